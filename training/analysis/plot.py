"""Four pictures of a study: similarity, spectra, drift and predicted distortion."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from kvcapsule.cli.results import write_whole

from .report import followed, mean, over_steps

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""From Okabe and Ito's palette, which is safe for colour-blind readers."""
_FEW = 6
"""Up to this number, layers are in the legend; more are shown by a colour bar."""
_OF = ("keys", "values")
_FRAMES: dict[str, tuple[Any, str]] = {
    "": ("-", "in the tile's frame"),
    "_rotated": ("--", "as the model rotated them"),
    "_unrotated": (":", "each turned back by\nits own position"),
}
"""Line style and name of the kinds of spectra along one axis, by suffix of their key."""
_CHOSEN: dict[str, tuple[Any, str]] = {
    "post_vision": ("-", "chosen by prefill"),
    "best": ("--", "chosen at the step itself"),
    "": (":", "chosen blindly"),
}
"""Line style and name of the rules that select the kept tokens."""


def draw(result: Mapping[str, Any], folder: Path) -> None:
    """Write the pictures.

    Raises:
        InputError: if one cannot be written.
    """
    for name, picture in PICTURES.items():
        held = BytesIO()
        picture(result).savefig(held, format="png")
        write_whole(folder / f"{name}.png", held.getvalue())


def similarity(result: Mapping[str, Any]) -> Figure:
    """Figure of mean cosines by layer."""
    figure, panels = _figure(result, "how alike the visual tokens of an image are", 2)
    at = [layer["layer"] for layer in result["layers"]]
    lines = {
        "neighbours": ("neighbours in a row", _COLOURS[0], "-"),
        "pairs": ("any two of an image", _COLOURS[1], "-"),
        "neighbours_centred": ("neighbours, mean token taken off", _COLOURS[0], "--"),
        "pairs_centred": ("any two, mean token taken off", _COLOURS[1], "--"),
    }
    for axes, of in zip(panels, _OF, strict=True):
        for name, (label, colour, style) in lines.items():
            means = [mean(layer["similarity"][of][name]) for layer in result["layers"]]
            axes.plot(at, [_number(m) for m in means], style, marker="o", markersize=4, color=colour, label=label)
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.set(xlabel="layer", ylim=(min(-0.1, axes.get_ylim()[0]), 1.03))
        axes.set_title(of, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("mean cosine, over images and KV heads")
    _legend(figure, panels[0].get_legend_handles_labels()[0])
    return figure


def spectra(result: Mapping[str, Any]) -> Figure:
    """Figure of the variance outside the first components."""
    figure, panels = _figure(result, f"energy outside the first components (RoPE: {result['geometry']['rotary']})", 4)
    layers, shades = result["layers"], _shades(result)
    shown = (("keys", "tokens"), ("values", "tokens"), ("keys", "channels"), ("values", "channels"))
    for axes, (of, axis) in zip(panels, shown, strict=True):
        for layer, colour in zip(layers, shades, strict=True):
            for suffix, (style, _) in _FRAMES.items():
                one = layer["spectra"][of].get(axis + suffix)
                if one is not None:
                    # The last point would be 0, outside a logarithmic axis.
                    left = [1 - energy for energy in one["energy"][:-1]]
                    axes.plot(one["ranks"][:-1], left, style, color=colour, linewidth=1.4)
        size = layers[0]["spectra"][of][axis]["ranks"][-1]
        axes.set(xlabel=f"components of {size}", xscale="log", yscale="log", xlim=(0.9, size * 1.1), ylim=(5e-4, 1.15))
        axes.set_title(f"{of}, along {axis}", fontsize=10)
        ticks = [tick for tick in (1, 3, 10, 30, 100, 300, 1000, 3000) if tick <= size]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    panels[0].set_ylabel("share of the variance")
    _name_layers(figure, panels[0], result, "lower left")
    handles = [Line2D([], [], color="#444444", linestyle=style, label=label) for style, label in _FRAMES.values()]
    panels[2].legend(handles=handles, loc="lower left", frameon=False, fontsize=8)
    return figure


def drift(result: Mapping[str, Any]) -> Figure:
    """Figure of the overlap by step, and of the attention that tokens kept by prefill attention would hold."""
    figure, (left, right) = _figure(result, "does the answer read what the prompt attended to?", 2)
    of = result["drift"]
    steps = followed(of)
    for layer, colour in zip(of["layers"], _shades(result), strict=True):
        left.plot(of["steps"][:steps], layer["overlap"]["last_prompt_token"][:steps], color=colour, linewidth=1.4)
    left.axhline(of["top"] / (2 - of["top"]), color="#999999", linestyle=":", linewidth=1.2)
    left.set(xlabel="decode step (dotted: chance)", ylabel="Jaccard overlap", ylim=(0, 1.03))
    left.set_title(f"top {of['top']:.0%} of the tokens: step against last prompt token", fontsize=10)
    _name_layers(figure, left, result, "upper right")
    at = [layer["layer"] for layer in of["layers"]]
    for i, (share, colour) in enumerate(zip(of["kept"], _COLOURS, strict=False)):
        for by, (style, _) in _CHOSEN.items():
            held = [over_steps(of, layer["held"][by][i]) for layer in of["layers"]] if by else [share] * len(at)
            right.plot(at, [_number(h) for h in held], style, color=colour, marker="o" if by else "", markersize=4)
    right.set(xlabel="layer", ylabel="share of the attention to the image", ylim=(0, 1.03))
    right.set_title("attention held by the tokens kept, mean over decode steps", fontsize=10)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [
        Line2D([], [], color=c, label=f"{share:.0%} kept") for share, c in zip(of["kept"], _COLOURS, strict=False)
    ]
    handles += [Line2D([], [], color="#444444", linestyle=style, label=label) for style, label in _CHOSEN.values()]
    _legend(figure, handles, "outside lower right")
    return figure


def distortion(result: Mapping[str, Any]) -> Figure:
    """Figure of predicted unexplained variance against bits."""
    figure, panels = _figure(result, "predicted loss (rate-distortion bound; thin: layers, bold: their mean)", 2)
    methods = (
        ("transform", "transform code"),
        ("per_channel", "per-channel quantisation"),
        ("token_pca", "PCA along tokens, 16-bit rows"),
    )
    bits, compression = zip(
        *sorted({(entry["bits"], entry["compression"]) for entry in result["predicted"]}), strict=True
    )
    layers = [layer["layer"] for layer in result["layers"]]
    by = {(entry["layer"], entry["bits"]): entry for entry in result["predicted"]}
    for axes, of in zip(panels, _OF, strict=True):
        for (method, label), colour in zip(methods, _COLOURS, strict=False):
            for layer in layers:
                axes.plot(bits, [by[layer, b][of][method] for b in bits], color=colour, linewidth=0.7, alpha=0.45)
            means = [fmean(by[layer, b][of][method] for layer in layers) for b in bits]
            axes.plot(bits, means, color=colour, linewidth=2.2, marker="o", markersize=5, label=label)
        axes.set(xlabel="bits for each element", xscale="log", yscale="log")
        axes.set_title(of, fontsize=10)
        axes.set_xticks(bits, [f"{b:g}\n{less:.0f}x" for b, less in zip(bits, compression, strict=True)])
        axes.xaxis.set_minor_locator(NullLocator())
    panels[0].set_ylabel("unexplained variance")
    low = min(axes.get_ylim()[0] for axes in panels)
    for axes in panels:
        axes.set_ylim(low, 1.3)
    _legend(figure, panels[0].get_legend_handles_labels()[0])
    return figure


PICTURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "similarity": similarity,
    "spectra": spectra,
    "drift": drift,
    "distortion": distortion,
}
"""Figures by file name."""


def _figure(result: Mapping[str, Any], title: str, panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10.0 if panels < 3 else 13.5, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{result['model']} on {result['data']['source']}: {title}", x=0.01, ha="left", fontsize=11)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.grid(color="#e5e5e5", zorder=0)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _shades(result: Mapping[str, Any]) -> list[Any]:
    """One colour per layer, from dark (first) to light (last)."""
    count = len(result["layers"])
    return [matplotlib.colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]


def _name_layers(figure: Figure, axes: Axes, result: Mapping[str, Any], loc: Any) -> None:
    """Add a legend of layers, or a colour bar if there are many."""
    layers, shades = [layer["layer"] for layer in result["layers"]], _shades(result)
    if len(layers) <= _FEW:
        handles = [
            Line2D([], [], color=colour, linewidth=2, label=f"layer {i}")
            for i, colour in zip(layers, shades, strict=True)
        ]
        axes.legend(handles=handles, loc=loc, frameon=False, fontsize=8)
    else:
        scale = matplotlib.cm.ScalarMappable(Normalize(layers[0], layers[-1]), ListedColormap(shades))
        bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=30)
        bar.ax.set_title("layer", fontsize=8)


def _legend(figure: Figure, handles: Sequence[Any], loc: Any = "outside lower left") -> None:
    figure.legend(handles=list(handles), loc=loc, ncols=len(handles), frameon=False, fontsize=9)


def _number(value: float | None) -> float:
    """NaN, a gap in a line, for None."""
    return nan if value is None else value
