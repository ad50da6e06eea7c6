"""Accuracy against bytes, a picture of a suite: one line a kind of method, through all its compression ratios.

Bytes are those of visual tokens, or where methods also differ in what they store of the text, those of all tokens.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from ..entries import FULL
from .scatter import Label, around, dress, place

_DOT = 7
"""Size of a marker, in points."""
_LOOKS = {
    "cross-layer": ("D", "#e69f00"),
    "transform": ("o", "#000000"),
    "kvcapsule": ("d", "#009e73"),
    "compact": ("v", "#56b4e9"),
    "quantisation": ("p", "#0072b2"),
    "post-vision-attention": ("^", "#d55e00"),
    "evenly-spaced": ("s", "#cc79a7"),
}
"""Marker and colour (of Okabe and Ito's palette, which colour-blind readers can tell apart) of each line."""
_MARKERS = "X*<>Ph8H"
_COLOURS = ("#b8860b", "#882255", "#117733", "#332288", "#aa4499", "#44aa99", "#661100")
"""Of the rest, in turn; as many of each as have no common divisor, so that no pair soon comes again."""
_WIDTHS = "quantized"
"""The policy whose widths are points of the line of its family."""
_FULL_COLOUR = "#555555"
_RATIOS = (0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
"""Marks of the upper axis."""


class Curve(NamedTuple):
    """A line of the picture."""

    label: str
    points: list[tuple[float, float]]
    """Bytes and mean accuracy, the fewest bytes first."""
    marker: str
    colour: str
    combined: bool
    """Whether two kinds of methods are combined, which is shown by empty markers."""


def axis(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What the picture sets accuracy against: a key of the rows, and its words."""
    both = any({"text", "budget", "matched_to"} & set(row["settings"]) for row in rows)
    return ("kv_bytes", "KV cache, visual and text") if both else ("visual_kv_bytes", "visual KV cache")


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The rows but the full cache's, by family; of policies of one family, each has a line of its own."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] != FULL:
            policy = row["settings"].get("policy", _WIDTHS)
            found.setdefault(row["family"] if policy == _WIDTHS else policy, []).append(row)
    made, key, others = [], axis(rows)[0], zip(cycle(_MARKERS), cycle(_COLOURS), strict=False)
    for name, members in found.items():
        base, _, more = name.partition("+")
        marker, colour = _LOOKS[base] if base in _LOOKS else next(others)
        label = name if len(members) > 1 else members[0]["method"]
        made.append(Curve(label, sorted(_point(row, key) for row in members), marker, colour, bool(more)))
    return made


def picture(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """One line and one label a kind of method; labels cover neither each other nor a line."""
    figure = Figure(figsize=(8.5, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn, (key, words) = curves(rows), axis(rows)
    full = next(row for row in rows if row["method"] == FULL)
    points = [_point(full, key), *(point for curve in drawn for point in curve.points)]
    for curve in drawn:
        axes.plot(
            *zip(*curve.points, strict=True),
            marker=curve.marker,
            markersize=_DOT,
            color=curve.colour,
            linewidth=1.6,
            markerfacecolor="white" if curve.combined else curve.colour,
            markeredgecolor=curve.colour if curve.combined else "white",
            markeredgewidth=1.4 if curve.combined else 0.6,
            zorder=3,
        )
    axes.plot(*points[0], "o", markersize=_DOT, color=_FULL_COLOUR, zorder=3)
    axes.axhline(points[0][1], color=_FULL_COLOUR, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    upper = _compression_axis(axes, full[key] * full["compression16"])
    dress(axes, [x for x, _ in points], title, words)
    # Labels are placed in pixels, so the axes must have their final place.
    figure.draw_without_rendering()
    _mark(upper)
    low, high = axes.get_xlim()
    level = [(low, points[0][1]), (high, points[0][1])]
    taken = [around(axes, point) for point in points]
    taken += [box for line in (level, *(curve.points for curve in drawn)) for box in _along(axes, line)]
    labels = [
        Label("full cache", points[:1], _FULL_COLOUR),
        *(Label(curve.label, curve.points, curve.colour) for curve in drawn),
    ]
    place(axes, labels, taken)
    return figure


def _point(row: Mapping[str, Any], key: str) -> tuple[float, float]:
    return float(row[key]), mean(row["accuracy"].values())


def _compression_axis(axes: Axes, whole: float) -> XAxis:
    """Above: how many times smaller than the `whole` bytes of the full cache at 16 bits an element."""
    upper = axes.secondary_xaxis(
        "top", functions=(lambda x: whole / np.maximum(x, 1e-9), lambda c: whole / np.maximum(c, 1e-9))
    )
    upper.set_xlabel("compression, against the full cache at 16 bits an element")
    return upper.xaxis


def _mark(upper: XAxis) -> None:
    """Put round ratios on the upper axis. It takes its scale, and marks of its own, when it is first drawn: call this
    after that."""
    upper.set_major_locator(FixedLocator(_RATIOS))
    upper.set_minor_locator(NullLocator())
    upper.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))


def _along(axes: Axes, line: Sequence[tuple[float, float]], reach: float = 3.0) -> list[Bbox]:
    """The pixels that a line covers, as boxes."""
    corners = [axes.transData.transform(point) for point in line]
    boxes = []
    for start, end in pairwise(corners):
        steps = int(np.hypot(*(end - start)) / reach) + 1
        for x, y in np.linspace(start, end, steps + 1):
            boxes.append(Bbox.from_extents(x - reach, y - reach, x + reach, y + reach))
    return boxes
