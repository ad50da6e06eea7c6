"""What all pictures of results share: the colours, the axes of accuracy against bytes, the legend and the file."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

from kvcapsule.cli.results import write_whole

LOOKS = {
    "cross-layer": ("D", "#e69f00"),
    "transform": ("o", "#000000"),
    "kvcapsule": ("d", "#009e73"),
    "compact": ("v", "#56b4e9"),
    "coded-compact": ("P", "#0b5d8a"),
    "quantisation": ("p", "#0072b2"),
    "post-vision-attention": ("^", "#d55e00"),
    "evenly-spaced": ("s", "#cc79a7"),
}
"""Marker and colour of the kinds of methods that are in most pictures. The colours are those of Okabe and Ito's
palette, which colour-blind readers can tell apart."""
FULL_COLOUR = "#555555"
MARKERS = "X*<>Ph8H"
COLOURS = ("#b8860b", "#882255", "#117733", "#332288", "#aa4499", "#44aa99", "#661100")
"""For all other methods, in turn; the numbers of markers and colours have no common divisor, so that no pair soon comes
again."""


def new_picture(width: float = 10.0, height: float = 5.4) -> tuple[Figure, Axes]:
    """An empty picture of so many inches, and its axes."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def style_axes(axes: Axes, xs: Sequence[float], title: str, cache: str = "visual KV cache") -> None:
    """Scales, ticks and titles of a picture of accuracy against bytes.

    Args:
        axes: to be styled.
        xs: bytes of all points.
        title: of the picture.
        cache: whose bytes they are.
    """
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(xs) / 1.7, max(xs) * 1.7)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _bytes(x)))
    axes.set_ylim(-0.04, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"{cache}, bytes a question (log scale)")
    axes.set_ylabel("accuracy, mean over tasks")
    axes.grid(color="#e5e5e5", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure) -> None:
    """The legend, beside the axes so that it covers no point; in the order in which things were drawn."""
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, numpoints=1, handlelength=1.6)


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all; the suffix of `path` names the format.

    Raises:
        InputError: if it cannot be written.
    """
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:])
    write_whole(path, image.getvalue())


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B"
