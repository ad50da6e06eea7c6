"""Whole tokens shared out among heads."""

from collections.abc import Sequence
from math import floor, log2

_STEPS = 100
"""Halvings after which an interval of doubles is as small as it gets."""


def nearest_power(count: float) -> int:
    """The power of two that lies nearest, 1 at least; of two that lie equally near, the greater."""
    if count <= 1:
        return 1
    below = 2 ** floor(log2(count))
    return int(below if count - below < 2 * below - count else 2 * below)


def share_out(wanted: Sequence[float], least: int, most: int, total: int) -> list[int]:
    """Whole numbers in proportion to `wanted`, each from `least` to `most`, that are `total` together, or as near to it
    as these allow.

    Where some are held at a bound, the others grow or shrink by one factor. Fractions are rounded so that the total
    holds: the greatest up, of equal ones the first.
    """
    if total <= least * len(wanted):
        return [least] * len(wanted)
    if total >= most * len(wanted):
        return [most] * len(wanted)

    def scaled(factor: float) -> list[float]:
        return [min(float(most), max(float(least), factor * w)) for w in wanted]

    low, high = 0.0, max(1.0, most / min(wanted))
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(scaled(middle)) < total else (low, middle)
    exact = scaled(high)
    shares = [floor(x) for x in exact]
    # What lacks the last bit of a double to be whole has the greatest fraction, and fractions alike but for that bit
    # are equal.
    by_fraction = sorted(range(len(exact)), key=lambda i: (round(shares[i] - exact[i], 6), i))
    for i in by_fraction[: total - sum(shares)]:
        shares[i] += 1
    return shares
