"""What all pictures of results share: a look for each kind of method, the empty picture and the file."""

import io
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
    "random": ("X", "#999999"),
    "streaming-llm": ("<", "#661100"),
    "snapkv": (">", "#332288"),
    "h2o": ("x", "#aa3377"),
    "pyramidkv": ("1", "#b8860b"),
    "adakv": ("2", "#44aa99"),
    "look-m": ("h", "#882255"),
    "mixkv": ("$M$", "#0000cd"),
    "fp8": ("$8$", "#708090"),
    "kivi": ("*", "#117733"),
    "turboquant": ("$T$", "#8b4513"),
    "r-kv": ("8", "#ddaa33"),
    "vl-cache": ("H", "#7f5fff"),
    "aircache": ("3", "#6b8e23"),
    "tgv-kv": ("$G$", "#c71585"),
    "flashcache": ("$F$", "#20b2aa"),
    "akvq-vl": ("4", "#ee6677"),
    "hybridkv": ("+", "#4477aa"),
}
"""Marker and colour of a codec family, of quantisation and of each policy, the same in every picture. Those of
most pictures have the colours of Okabe and Ito's palette, which colour-blind readers can tell apart."""
FULL_COLOUR = "#555555"
_OTHERS = ((".", "#00a000"), ("|", "#a0522d"), ("_", "#1e90ff"), ("o", "#c71585"), ("s", "#808000"), ("D", "#2f4f4f"))


def other_looks() -> Iterator[tuple[str, str]]:
    """Endless pairs of marker and colour for methods that are not in LOOKS; after one round, each colour gets the next
    marker."""
    while True:
        for shift in range(len(_OTHERS)):
            for index, (_, colour) in enumerate(_OTHERS):
                yield _OTHERS[(index + shift) % len(_OTHERS)][0], colour


def new_picture(width: float = 10.0, height: float = 5.4) -> tuple[Figure, Axes]:
    """An empty picture of so many inches, and its axes."""
    figure = _figure(width, height)
    return figure, figure.add_subplot()


def new_panels(width: float = 10.0, height: float = 7.6) -> tuple[Figure, Axes, Axes]:
    """An empty picture of so many inches, and its axes: two above each other, with the same horizontal scale."""
    figure = _figure(width, height)
    upper, lower = figure.subplots(2, 1, sharex=True)
    return figure, upper, lower


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all; the suffix of `path` names the format.

    Raises:
        InputError: if it cannot be written.
    """
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:])
    write_whole(path, image.getvalue())


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
