"""What jsonargparse says of an option that cannot be used, as one line that names the option and what it takes."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_KEY = re.compile(r'Parser key "([\w.]+)":\s*')
_VALUE = re.compile(r"(?:Got value|Given value): (.*)", re.DOTALL)
_TYPE = re.compile(r"Expected an? <class '(\w+)'>")
_UNLOADABLE = re.compile(r"Unable to load config (['\"])(.*?)\1", re.DOTALL)
_NO_VALUE = re.compile(r"^argument (--[\w.-]+): expected one argument$", re.IGNORECASE)
_UNKNOWN = re.compile(r"^unrecognized arguments: (.*)$", re.DOTALL | re.IGNORECASE)
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "dict": "a mapping",
}
"""What a type is called where a person gives its value."""


def with_near_option(message: str, options: Iterable[str]) -> str:
    """A parser's message, with the option that a mistyped one is like; any other message as it is."""
    unknown = _UNKNOWN.match(message)
    typed = unknown[1].partition(" ")[0].partition("=")[0] if unknown else ""
    # Values that nothing takes are listed as unknown too.
    near = get_close_matches(typed, options, n=1, cutoff=0.75) if typed.startswith("--") else []
    return f"there is no option {unknown[1]}; did you mean {near[0]}?" if unknown and near else message


def plain_line(message: str) -> str:
    """A message of the parser as one line in the words of the command line; any other message, its lines joined."""
    message = " ".join(message.split())
    if missing := _NO_VALUE.match(message):
        return f"{missing[1]} needs a value."
    if unknown := _UNKNOWN.match(message):
        return f"there is no option {unknown[1]}: --help shows the options."
    keys = list(_KEY.finditer(message))
    if not keys:
        return message
    # A group's message wraps that of the option in it.
    name, rest = keys[-1][1], message[keys[-1].end() :]
    if (file := _UNLOADABLE.match(rest)) is not None:
        return (
            f"--{name} {_shown(file[2])}: a YAML file of the options --{name}.* is expected; or give these one by one."
        )
    types = list(dict.fromkeys(_TYPES.get(kind, kind) for kind in _TYPE.findall(rest)))
    if not types:
        return f"--{name}: {rest}"
    value = _VALUE.search(rest)
    return f"--{name}{'' if value is None else ' ' + _shown(value[1])}: {' or '.join(types)} is expected."


def _shown(value: str) -> str:
    """A value as a command line has it."""
    return value.strip() or "''"
