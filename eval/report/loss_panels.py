"""Loss against bytes, in two panels: the accuracy that was lost against the full cache, and the answers that are not
its. Both axes are linear near 0 and logarithmic beyond, so that small losses show beside large ones; better is up."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .losses import Loss, loss_of
from .picture import FULL_COLOUR, new_panels

_RATIOS = (0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
"""Compression ratios that the upper axis marks."""
_MORE_RATIOS = (0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 64, 80, 160, 320)
"""Those where it spans few of the others."""
_LEAST_MARKS = 4
_POINTS = (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)
_LINEAR_POINTS = 2.0
"""Up to this loss in points the axis is linear."""
_CHANGED = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_LINEAR_CHANGED = 0.02


class Series(NamedTuple):
    """What has one marker and one line of the legend."""

    label: str
    rows: Sequence[Mapping[str, Any]]
    """Of one method, the fewest bytes first; joined by a line."""
    marker: str
    colour: str
    combined: bool = False
    """Whether two kinds of methods are combined, which is shown by empty markers."""


def panels(
    series: Sequence[Series],
    full: Mapping[str, Any],
    title: str,
    key: str = "visual_kv_bytes",
    cache: str = "visual KV",
) -> Figure:
    """The picture.

    Args:
        series: in the order of the legend.
        full: the row of the full cache, which all others are held against.
        title: of the picture.
        key: key of the rows with their bytes.
        cache: which bytes these are.
    """
    figure, upper, lower = new_panels()
    for axes, name in ((upper, f"full cache, {_bytes(full[key])}"), (lower, None)):
        axes.axhline(0, color=FULL_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2, label=name)
    losses = [[loss_of(row, full) for row in one.rows] for one in series]
    for one, lost in zip(series, losses, strict=True):
        _draw(upper, lower, one, [float(row[key]) for row in one.rows], lost)
    xs = [float(row[key]) for one in series for row in one.rows] or [float(full[key])]
    upper.set_title(title, loc="left", fontsize=11)
    _style_bytes(lower, xs, cache)
    _style_losses(upper, lower, [loss for lost in losses for loss in lost])
    ratios = _compression_axis(upper, full[key] * full["compression16"])
    figure.legend(
        *upper.get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        handlelength=1.6,
        title="bars: 95 % confidence",
        title_fontsize=8,
        alignment="left",
    )
    # The upper axis takes its scale, and marks of its own, when it is first drawn.
    figure.draw_without_rendering()
    _mark_ratios(ratios)
    return figure


def _draw(upper: Axes, lower: Axes, one: Series, xs: Sequence[float], lost: Sequence[Loss]) -> None:
    heights = [loss.points for loss in lost], [loss.changed for loss in lost]
    margins = [loss.points_margin for loss in lost]
    low = [loss.changed - loss.changed_low for loss in lost]
    high = [loss.changed_high - loss.changed for loss in lost]
    bars: tuple[Any, ...] = ([margins, margins], [low, high])
    for axes, ys, errors, label in zip((upper, lower), heights, bars, (one.label, None), strict=True):
        axes.errorbar(xs, ys, yerr=errors, fmt="none", ecolor=one.colour, elinewidth=0.8, alpha=0.45, zorder=2)
        thin = one.marker in "1234+x|_"
        axes.plot(
            xs,
            ys,
            marker=one.marker,
            markersize=9 if thin else 7,
            color=one.colour,
            linewidth=1.4,
            markerfacecolor="white" if one.combined else one.colour,
            markeredgecolor=one.colour if one.combined or thin else "white",
            markeredgewidth=1.4 if one.combined or thin else 0.6,
            zorder=3,
            label=label,
        )


def _style_bytes(axes: Axes, xs: Sequence[float], cache: str) -> None:
    low, high = min(xs) / 1.3, max(xs) * 1.3
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    powers = [2.0**power for power in range(60)]
    marks = [mark for mark in powers if low <= mark <= high]
    if len(marks) < _LEAST_MARKS:
        marks = [part * mark for mark in powers for part in (1, 1.25, 1.5, 1.75) if low <= part * mark <= high]
    axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _bytes(x)))
    axes.set_xlabel(f"{cache} cache, bytes a question (log scale)")


def _style_losses(upper: Axes, lower: Axes, losses: Sequence[Loss]) -> None:
    won = min([loss.points - loss.points_margin for loss in losses], default=0.0)
    lost = max([loss.points + loss.points_margin for loss in losses], default=0.0)
    upper.set_yscale("symlog", linthresh=_LINEAR_POINTS)
    upper.set_ylim(max(1.3 * lost, 1.5), min(1.15 * won, -0.5))
    upper.set_ylabel("accuracy lost, in points\n(mean over tasks)")
    lower.set_yscale("symlog", linthresh=_LINEAR_CHANGED)
    lower.set_ylim(max([1.3 * loss.changed_high for loss in losses], default=0.02), -0.002)
    lower.set_ylabel("answers that are not\nthe full cache's")
    for axes, marks, form in ((upper, _POINTS, "{:g}"), (lower, _CHANGED, "{:.0%}")):
        axes.yaxis.set_major_locator(FixedLocator(marks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _, form=form: form.format(y)))
        axes.grid(color="#e5e5e5", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)


def _compression_axis(axes: Axes, full_bytes: float) -> XAxis:
    """The upper axis: compression against the bytes of the full cache at 16 bits an element."""
    upper = axes.secondary_xaxis(
        "top", functions=(lambda x: full_bytes / np.maximum(x, 1e-9), lambda c: full_bytes / np.maximum(c, 1e-9))
    )
    upper.set_xlabel("compression, against the full cache at 16 bits an element")
    return upper.xaxis


def _mark_ratios(upper: XAxis) -> None:
    """Mark round compression ratios on the upper axis, which must have been drawn once."""
    low, high = sorted(upper.get_view_interval())
    few = sum(1 for ratio in _RATIOS if low <= ratio <= high) < _LEAST_MARKS
    upper.set_major_locator(FixedLocator(_MORE_RATIOS if few else _RATIOS))
    upper.set_minor_locator(NullLocator())
    upper.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g} B"
