"""What a row lost against the full cache, with 95 % confidence intervals, from what a result records of it."""

from collections.abc import Mapping
from math import sqrt
from statistics import mean
from typing import Any, NamedTuple

_Z = 1.96
"""Standard errors of a 95 % confidence interval, both ways."""


class Loss(NamedTuple):
    """A row beside the full cache's on the same questions."""

    points: float
    """Hundredths of the mean accuracy over the tasks that were lost; below 0 they were won."""
    points_margin: float
    """Half of the interval of `points`."""
    changed: float
    """Share of the answers that are not the full cache's, in [0, 1]."""
    changed_low: float
    """Begin of the interval of `changed`."""
    changed_high: float


def loss_of(row: Mapping[str, Any], full: Mapping[str, Any]) -> Loss:
    """What a row of a result (docs/eval-json.md) lost.

    Both intervals come from the count of questions and the share of changed answers. That of the accuracy is an upper
    bound: questions whose answer is unchanged lose nothing, and the others are counted as if each had lost or won all.
    Tasks are taken to have equally many questions.

    Args:
        row: of a method.
        full: of the full cache, in the same result.
    """
    count, changed = int(row["n"]), 1 - float(row["agreement"])
    lost = mean(full["accuracy"].values()) - mean(row["accuracy"].values())
    # Two more questions of either kind: no change among few questions does not mean that there never is one.
    likely = (changed * count + 2) / (count + 4)
    margin = _Z * sqrt(max(likely - lost**2, 0) / count)
    return Loss(100 * lost, 100 * margin, changed, *_wilson(changed, count))


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share among so many, which is exact enough at shares of 0 and 1 too."""
    spread = 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / spread
    half = _Z * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / spread
    return max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)
