"""Bytes as people write and read them: 10GB, 512MiB."""

import argparse
import re
from decimal import Decimal

MOST_BYTES = 2**63
"""A size is below."""
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([a-z]*)", re.IGNORECASE)


def byte_count(text: str) -> int:
    """The bytes that a word of a command line stands for; the type of an option.

    Raises:
        ArgumentTypeError: if it stands for none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write bytes, or such as 512MB, 10GB or 1.5GiB")
    if (size := Decimal(match[1]) * _UNITS[match[2].lower()]) >= MOST_BYTES:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is more bytes than any disk has")
    return int(size)


def shown_bytes(count: int) -> str:
    """A count of bytes in the largest decimal unit that leaves at least 1 in front of the point."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} B"
