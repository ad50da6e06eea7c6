"""The pictures of the page, as data URIs, so that the page is one file."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image

from ..report import scatter
from .token_loss import TokenLoss
from .training_curves import Curve

_MOST_PIXELS = 360
"""Of an example's longer side; larger images are shrunk."""
_MOST_LAYERS = 6
"""Shown of a model's layers, evenly spread."""
_LEAST_LOSS = 1e-4
"""Losses below have the same colour."""


def image_uri(image: Image.Image) -> str:
    """An image, shrunk to _MOST_PIXELS, as PNG."""
    small = image.convert("RGB")
    small.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    return _uri(lambda file: small.save(file, "PNG", optimize=True), "png")


def figure_uri(figure: Figure) -> str:
    """A figure as SVG."""
    return _uri(lambda file: figure.savefig(file, format="svg"), "svg+xml")


def accuracy_uri(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Accuracy against bytes of an evaluation's rows."""
    return figure_uri(scatter.picture(rows, title))


def loss_uri(loss: TokenLoss) -> str:
    """What is lost of each token: keys above values, a column for each of some layers, the image's tokens as they lie.

    Losses are relative to the variance of a token, on a logarithmic scale.
    """
    shown = np.unique(np.linspace(0, len(loss.layers) - 1, min(_MOST_LAYERS, len(loss.layers))).round().astype(int))
    rows, columns = loss.grid
    tall = min(1.6, max(0.5, rows / columns))
    figure = Figure(figsize=(1.5 * len(shown) + 1, 2 * 1.5 * tall + 0.7), dpi=100, layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    norm, drawn = LogNorm(_LEAST_LOSS, 1.0, clip=True), None
    for line, (part, values) in enumerate((("keys", loss.keys), ("values", loss.values))):
        for place, number in enumerate(shown):
            cell = axes[line, place]
            losses = values[number].reshape(rows, columns).clamp(min=_LEAST_LOSS).numpy()
            drawn = cell.imshow(losses, norm=norm, cmap="magma", aspect="auto" if rows == 1 else "equal")
            cell.set(xticks=[], yticks=[])
            if line == 0:
                cell.set_title(f"layer {loss.layers[number]}", fontsize=9)
            if place == 0:
                cell.set_ylabel(part, fontsize=9)
    assert drawn is not None
    figure.colorbar(drawn, ax=axes, label="squared error / variance", shrink=0.9)
    return figure_uri(figure)


def curves_uri(curves: Sequence[Curve]) -> str:
    """One small plot for each number of the training log, on a logarithmic scale where all are positive."""
    across = min(3, len(curves))
    down = -(-len(curves) // across)
    figure = Figure(figsize=(3.2 * across, 2.3 * down), dpi=100, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for cell, curve in zip(axes, curves, strict=False):
        cell.plot(curve.steps, curve.values, color="#0072b2", linewidth=1.4)
        cell.set_title(curve.name, fontsize=9, loc="left")
        cell.set_xlabel("step", fontsize=8)
        cell.tick_params(labelsize=8)
        cell.grid(color="#e5e5e5")
        if min(curve.values) > 0:
            cell.set_yscale("log")
    for cell in axes[len(curves) :]:
        cell.remove()
    return figure_uri(figure)


def _uri(save: Callable[[io.BytesIO], Any], kind: str) -> str:
    file = io.BytesIO()
    save(file)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
