"""Limits of a capsule's small files, checked before they are read and as their JSON is parsed."""

import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import CapsuleError

MOST_BYTES = {
    "config.json": 2**20,
    "metrics.json": 16 * 2**20,
    "README.md": 16 * 2**20,
}
"""Largest file of each name; all that kvcapsule wrote so far are under a hundredth of it."""
MOST_DEPTH = 32
"""Objects and lists within one another in a JSON file."""


def read_file(path: Path) -> bytes:
    """The content of one of a capsule's small files.

    Raises:
        CapsuleError: if it cannot be read, or is larger than MOST_BYTES allows.
    """
    most = MOST_BYTES[path.name]
    try:
        with path.open("rb") as file:
            # Not by the size alone: some files have one of 0 and no end.
            size, content = os.fstat(file.fileno()).st_size, b""
            if size <= most:
                content = file.read(most + 1)
    except OSError as error:
        raise CapsuleError(f"{path} cannot be read: {error.strerror or error}.") from error
    if max(size, len(content)) > most:
        raise CapsuleError(
            f"{path} has {max(size, len(content)):,} bytes where at most {most:,} are expected: it is damaged, or not"
            " a capsule's."
        )
    return content


def read_json(path: Path) -> Any:
    """The value in one of a capsule's JSON files.

    Raises:
        CapsuleError: if it cannot be read, is too large or too deep, or is no JSON of plain numbers and text.
    """
    content = read_file(path)
    try:
        return plain_json(content)
    except ValueError as error:
        raise CapsuleError(
            f"{path} is not JSON ({error}): the file is damaged. Save, copy or download the capsule again."
        ) from error


def plain_json(content: bytes) -> Any:
    """The value of JSON text in UTF-8.

    Raises:
        ValueError: if it is none, names a key twice, is nested deeper than MOST_DEPTH, or holds NaN, an infinite number
            or text that is no Unicode.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(f"nested more than {MOST_DEPTH} deep") from error
    _check_depth(value)
    if b"\\u" in content:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands in it twice")
    return dict(pairs)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        items = [item for item in level if isinstance(item, dict | list)]
        if not items:
            return
        level = [inner for item in items for inner in (item.values() if isinstance(item, dict) else item)]
    raise ValueError(f"nested more than {MOST_DEPTH} deep")
