"""What the commands of this package have in common: the words of a command line, and telling a refusal from a
defect."""

import json
from collections.abc import Mapping, Sequence
from traceback import walk_tb

from jsonargparse import ArgumentError


def normal(words: Sequence[str], lists: Mapping[str, bool]) -> list[str]:
    """The command line as jsonargparse takes it: `--save-metrics` as `--save_metrics`, all that a list is given in one
    word.

    So that what the command line says of a list replaces what a suite or a file of options says, and is not added to
    it.

    Args:
        words: the command line.
        lists: options that may be given several times, and whether commas part what one of them is given.
    """
    found: list[str] = []
    given: dict[str, tuple[int, list[str]]] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        if name in lists and (item := value if equals else next(rest, None)) is not None:
            if name not in given:
                given[name] = len(found), []
                found.append(name)
            given[name][1].extend(item.split(",") if lists[name] else [item])
        else:
            found.append(name + equals + value)
    for name, (place, values) in given.items():
        found[place] = f"{name}={json.dumps(values)}"
    return found


def on_purpose(error: Exception) -> bool:
    """Whether the project itself refused the input. A ValueError of a library below is a defect, whose traceback is
    needed."""
    if isinstance(error, ArgumentError):
        return True
    *_, (innermost, _) = walk_tb(error.__traceback__)
    return str(innermost.f_globals.get("__name__", "")).startswith("kvcapsule")
