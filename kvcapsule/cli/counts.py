"""Whole numbers as options of a command line: types for argparse."""

import argparse

MOST = 10**12
"""Largest number of anything: what is computed from it still has exact digits."""


def count(text: str) -> int:
    """A whole number of at least 1. Raises ArgumentTypeError for anything else."""
    return _number(text, 1)


def count_or_0(text: str) -> int:
    """A whole number of at least 0. Raises ArgumentTypeError for anything else."""
    return _number(text, 0)


def _number(text: str, least: int) -> int:
    # Python reads no number of some thousand digits.
    if not text.isdecimal() or len(text) > len(str(MOST)) or not least <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least} (and at most {MOST:,})")
    return int(text)
