"""YAML files of people: recipes, suites and options, read within limits.

An alias (`*name`) repeats what its anchor holds. A few hundred bytes of aliases within aliases stand for more values
than fit any memory, which whoever walks over them learns too late: they are counted before values are made.
"""

from pathlib import Path
from typing import Any, NoReturn

import yaml

MOST_BYTES = 2**18
"""Largest file."""
MOST_VALUES = 100_000
"""Values, keys included, that a file may stand for, with every alias written out."""
MOST_DIGITS = 1000
"""Characters of a whole number; Python shows none of more than 4,300 digits."""
MOST_DEPTH = 64
"""Mappings and lists within one another."""


_WHOLE_NUMBER = "tag:yaml.org,2002:int"


class LimitError(yaml.YAMLError):  # type: ignore[misc]  # PyYAML has no types
    """A YAML file is too large, too deep, or stands for too many values."""


def read_yaml(path: Path) -> Any:
    """The value of a YAML file of plain data.

    Raises:
        OSError, UnicodeDecodeError: if it cannot be read.
        yaml.YAMLError: if it is no YAML, or past a limit (LimitError).
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        _too_large()
    return parse_yaml(content.decode())


def parse_yaml(text: str) -> Any:
    """The value of plain data in YAML. Raises yaml.YAMLError as `read_yaml` does."""
    if len(text) > MOST_BYTES:
        _too_large()
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError as error:
        raise LimitError(f"it is nested more than {MOST_DEPTH} deep") from error
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error
    finally:
        loader.dispose()


def _too_large() -> NoReturn:
    raise LimitError(f"it has more than {MOST_BYTES:,} bytes")


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Values that a node stands for; known: those of the nodes so far, 0 for one that is not done yet."""
    if depth > MOST_DEPTH:
        raise LimitError(f"it is nested more than {MOST_DEPTH} deep")
    if id(node) in known:
        if not known[id(node)]:
            raise LimitError("an alias stands within its own anchor")
        return known[id(node)]
    if node.tag == _WHOLE_NUMBER and len(node.value) > MOST_DIGITS:
        raise LimitError(f"a number has more than {MOST_DIGITS:,} digits")
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.CollectionNode):
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(item,) for item in node.value]
        for inner in (part for pair in pairs for part in pair):
            total += _count(inner, known, depth + 1)
            if total > MOST_VALUES:
                raise LimitError(f"its aliases stand for more than {MOST_VALUES:,} values")
    known[id(node)] = total
    return total
