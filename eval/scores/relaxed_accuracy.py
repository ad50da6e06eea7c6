"""Relaxed accuracy of answers about charts (ChartQA, arXiv 2203.10244, section 5.1): a number may be off by 5 %, any
other answer must be the right one, case aside.

As in the script that the field uses (pix2struct), 50% is 0.5. Two things differ: a right answer of 0 is compared as a
number, and digits may stand in groups (1,000).
"""

import math
import re

from .target import Target

TOLERANCE = 0.05
"""Largest difference from the right number, as a share of it."""
_GROUPS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?%?")


def relaxed_accuracy(answer: str, target: Target) -> float:
    """1 if the answer agrees with one that is accepted, else 0."""
    return float(any(_agree(answer.strip(), right) for right in target.accepted))


def _agree(answer: str, right: str) -> bool:
    said, expected = _number(answer), _number(right)
    if said is None or expected is None:
        return answer.lower() == right.lower()
    return abs(said - expected) <= TOLERANCE * abs(expected)


def _number(text: str) -> float | None:
    """The finite number that a text is, a percentage as a share of 1; None for any other text."""
    plain = text.replace(",", "") if _GROUPS.fullmatch(text) else text
    try:
        number = float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
