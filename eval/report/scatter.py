"""Loss against visual bytes, the picture of a run without a suite: one marker a method, named in a legend."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from kvcapsule.methods.shown_names import shown_name

from ..entries import FULL, PRUNING
from .loss_panels import Series, panels
from .picture import LOOKS, other_looks


def picture(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """One marker and one line of the legend for each row but the full cache's."""
    full = next(row for row in rows if row["method"] == FULL)
    methods = [row for row in rows if row["method"] != FULL]
    series = [
        Series(f"{shown_name(row['method'])} ({row['compression16']:.3g}x at 16 bits)", [row], *look)
        for row, look in zip(methods, _looks(methods), strict=True)
    ]
    return panels(series, full, title)


def _looks(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Marker and colour of each row; capsules of a family have one colour, and so has quantisation."""
    others = other_looks()
    drawn = set()
    for row in rows:
        kind = row["method"] if row["family"] == PRUNING else row["family"]
        marker, colour = LOOKS[kind] if kind in LOOKS else next(others)
        while (marker, colour) in drawn:
            marker = next(others)[0]
        drawn.add((marker, colour))
        yield marker, colour
