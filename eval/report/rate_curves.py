"""Accuracy against bytes, the picture of a suite: one line a kind of method, through all its compression ratios.

Bytes are those of visual tokens, or where methods also differ in what they store of the text, those of all tokens.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..entries import FULL
from .picture import COLOURS, FULL_COLOUR, LOOKS, MARKERS, add_legend, new_picture, style_axes

_MARKER_SIZE = 7
"""In points."""
_QUANTIZED = "quantized"
"""The policy whose widths in bits are points of one line, that of its family."""
_RATIOS = (0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
"""Compression ratios that the upper axis marks."""


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
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] != FULL:
            policy = row["settings"].get("policy", _QUANTIZED)
            kinds.setdefault(row["family"] if policy == _QUANTIZED else policy, []).append(row)
    result: list[Curve] = []
    key, others = axis(rows)[0], zip(cycle(MARKERS), cycle(COLOURS), strict=False)
    for name, members in kinds.items():
        base, _, more = name.partition("+")
        marker, colour = LOOKS[base] if base in LOOKS else next(others)
        if any((marker, colour, bool(more)) == (line.marker, line.colour, line.combined) for line in result):
            marker = next(others)[0]
        label = name if len(members) > 1 else members[0]["method"]
        result.append(Curve(label, sorted(_point(row, key) for row in members), marker, colour, bool(more)))
    return result


def picture(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """One line a kind of method, named in a legend."""
    figure, axes = new_picture()
    lines, (key, cache) = curves(rows), axis(rows)
    full = next(row for row in rows if row["method"] == FULL)
    best = _point(full, key)
    axes.plot(*best, "o", markersize=_MARKER_SIZE, color=FULL_COLOUR, zorder=3, label="full cache")
    axes.axhline(best[1], color=FULL_COLOUR, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    for curve in lines:
        axes.plot(
            *zip(*curve.points, strict=True),
            marker=curve.marker,
            markersize=_MARKER_SIZE,
            color=curve.colour,
            linewidth=1.6,
            markerfacecolor="white" if curve.combined else curve.colour,
            markeredgecolor=curve.colour if curve.combined else "white",
            markeredgewidth=1.4 if curve.combined else 0.6,
            zorder=3,
            label=curve.label,
        )
    upper = _compression_axis(axes, full[key] * full["compression16"])
    style_axes(axes, [best[0], *(x for curve in lines for x, _ in curve.points)], title, cache)
    add_legend(figure)
    # The upper axis takes its scale, and marks of its own, when it is first drawn.
    figure.draw_without_rendering()
    _mark_ratios(upper)
    return figure


def _point(row: Mapping[str, Any], key: str) -> tuple[float, float]:
    """A row's bytes (or other figure named by key) and its mean accuracy over the tasks."""
    return float(row[key]), mean(row["accuracy"].values())


def _compression_axis(axes: Axes, full_bytes: float) -> XAxis:
    """The upper axis: compression against the bytes of the full cache at 16 bits an element."""
    upper = axes.secondary_xaxis(
        "top", functions=(lambda x: full_bytes / np.maximum(x, 1e-9), lambda c: full_bytes / np.maximum(c, 1e-9))
    )
    upper.set_xlabel("compression, against the full cache at 16 bits an element")
    return upper.xaxis


def _mark_ratios(upper: XAxis) -> None:
    """Mark round compression ratios on the upper axis, which must have been drawn once."""
    upper.set_major_locator(FixedLocator(_RATIOS))
    upper.set_minor_locator(NullLocator())
    upper.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
