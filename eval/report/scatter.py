"""Accuracy against visual bytes, a picture of a run: one dot a method."""

import os
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from uuid import uuid4

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter
from matplotlib.transforms import Bbox

from ..entries import FIXED, RIVALS

SUFFIXES = (".png", ".svg", ".pdf")
_DOT = 9
"""Size of a dot, in points."""
_OFFSETS = sorted(
    product((10, -10), range(-238, 239, 7)), key=lambda offset: (abs(offset[1]), offset[1], offset[0] < 0)
)
"""Places of a label beside its dot, in points, the nearest first."""
_LOOKS = {
    "full": ("o", _DOT, "#444444"),
    "post-vision-attention": ("^", _DOT + 4, "#d55e00"),
    "evenly-spaced": ("s", _DOT, "#cc79a7"),
    **{name: ("v", _DOT, "#b8860b") for name in RIVALS if name not in ("post-vision-attention", "evenly-spaced")},
    **{name: ("o", _DOT, "#0072b2") for name in FIXED},
}
"""Marker, its size and colour (of Okabe and Ito's palette, which colour-blind readers can tell apart) of the
training-free methods.

Equal bytes make equal x, and answers may be equally good: shapes of different outline show when they lie on each other.
"""
_CAPSULE = ("d", _DOT - 1, "#009e73")


class Label(NamedTuple):
    """Words that belong to points."""

    text: str
    points: Sequence[tuple[float, float]]
    """In data coordinates; it may stand beside any of them."""
    colour: str


def draw(figure: Figure, path: Path) -> None:
    """Write a picture; the suffix of `path` says in what format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid4().hex[:8]}{path.suffix}")
    try:
        figure.savefig(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def picture(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """One dot and one label for each row; labels lie where they cover neither each other nor a dot."""
    figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(float(row["visual_kv_bytes"]), mean(row["accuracy"].values())) for row in rows]
    for row, (x, y) in zip(rows, points, strict=True):
        marker, size, colour = _look(row)
        # The smaller ones lie on top.
        axes.plot(
            x,
            y,
            marker,
            markersize=size,
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=3 + 1 / size,
        )
    dress(axes, [x for x, _ in points], title)
    texts = [f"{row['method']} ({row['compression']:.3g}x)" for row in rows]
    labels = [Label(text, [point], _look(row)[2]) for text, point, row in zip(texts, points, rows, strict=True)]
    # Labels are placed in pixels, so the axes must have their final place.
    figure.draw_without_rendering()
    place(axes, labels, [around(axes, point) for point in points])
    return figure


def dress(axes: Axes, xs: Sequence[float], title: str, what: str = "visual KV cache") -> None:
    """Scales, ticks and titles of a picture of accuracy against bytes."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(xs) / 1.7, max(xs) * 2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _bytes(x)))
    axes.set_ylim(-0.04, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"{what}, bytes a question (log scale)")
    axes.set_ylabel("accuracy, mean over tasks")
    axes.grid(color="#e5e5e5", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def place(axes: Axes, labels: Sequence[Label], taken: list[Bbox]) -> None:
    """Put each label beside one of its points, or as near as there is room, with a line to the point.

    Args:
        axes: at their final place, which they have once the figure was drawn.
        labels: the first ones have the choice.
        taken: what labels must not cover, in pixels.
    """
    frame = axes.get_window_extent()
    taken = list(taken)
    for label in labels:
        for (dx, dy), point in product(_OFFSETS, label.points):
            words = _annotation(axes, label, point, dx, dy)
            # Measured without its line, which belongs to an annotation's extent too and always touches the dot.
            box = words.get_window_extent()
            if (
                frame.x0 <= box.x0
                and box.x1 <= frame.x1
                and frame.y0 <= box.y0
                and box.y1 <= frame.y1
                and not box.count_overlaps(taken)
            ):
                break
            words.remove()
        else:
            # A picture so full that no place is left: beside the dot, whatever is there.
            (dx, dy), point = _OFFSETS[0], label.points[0]
            words = _annotation(axes, label, point, dx, dy)
            box = words.get_window_extent()
        taken.append(box)
        if abs(dy) > _DOT:
            words.remove()
            line = {
                "arrowstyle": "-",
                "color": "#999999",
                "linewidth": 0.8,
                "shrinkB": _DOT / 2,
                "relpos": (float(dx < 0), 0.5),
            }
            _annotation(axes, label, point, dx, dy, line)


def around(axes: Axes, point: tuple[float, float]) -> Bbox:
    """The pixels that a dot covers."""
    x, y = axes.transData.transform(point)
    return Bbox.from_extents(x - _DOT, y - _DOT, x + _DOT, y + _DOT)


def _annotation(
    axes: Axes, label: Label, point: tuple[float, float], dx: int, dy: int, line: dict[str, Any] | None = None
) -> Annotation:
    return axes.annotate(
        label.text,
        point,
        xytext=(dx, dy),
        textcoords="offset points",
        ha="left" if dx > 0 else "right",
        va="center",
        fontsize=9,
        color=label.colour,
        arrowprops=line,
    )


def _look(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return _LOOKS.get(row["method"], _CAPSULE)


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B"
