"""Accuracy against visual bytes, the picture of a run without a suite: one marker a method, named in a legend."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from ..entries import FULL, PRUNING
from .picture import COLOURS, FULL_COLOUR, LOOKS, MARKERS, add_legend, new_picture, style_axes

_SIZES = (11, 9)
"""Of the markers, in points, in turn: equal bytes and equal accuracy put markers on each other."""


def picture(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """One marker and one line of the legend for each row."""
    figure, axes = new_picture()
    xs = [float(row["visual_kv_bytes"]) for row in rows]
    for number, (row, x, (marker, colour)) in enumerate(zip(rows, xs, _looks(rows), strict=True)):
        axes.plot(
            x,
            mean(row["accuracy"].values()),
            marker,
            markersize=_SIZES[number % len(_SIZES)],
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.6,
            # The smaller ones lie on top.
            zorder=3 + number % len(_SIZES),
            label=f"{row['method']} ({row['compression']:.3g}x)",
        )
    style_axes(axes, xs, title)
    add_legend(figure)
    return figure


def _looks(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Marker and colour of each row; capsules of a family have one colour, and so has quantisation."""
    others = zip(cycle(MARKERS), cycle(COLOURS), strict=False)
    drawn = set()
    for row in rows:
        kind = row["method"] if row["family"] == PRUNING else row["family"]
        if kind == FULL:
            marker, colour = "o", FULL_COLOUR
        elif kind in LOOKS:
            marker, colour = LOOKS[kind]
        else:
            marker, colour = next(others)
        if (marker, colour) in drawn:
            marker = next(others)[0]
        drawn.add((marker, colour))
        yield marker, colour
