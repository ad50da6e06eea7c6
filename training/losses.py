"""Losses of a codec: the variance of keys and values left unexplained, and the error of attention's output."""

import torch

from kvcapsule.errors import DataError
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.segment import Segment

from .harvest import LayerHarvest


def unexplained(rebuilt: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Fraction of variance unexplained over [E, H, T, D]; the variance is about each head's mean over tiles and
    tokens."""
    rebuilt, true = rebuilt.float(), true.float()
    spread = (true - true.mean(dim=(0, 2), keepdim=True)).square().sum()
    return (rebuilt - true).square().sum() / spread.clamp_min(1e-12)


def full_output(layer: LayerHarvest) -> torch.Tensor:
    """Attention's output with the true keys and values, [B, H * G, Q, D]."""
    true = Segment(layer.keys, layer.values, layer.owner, frame=layer.frame)
    return attend(layer.query, [true, layer.rest], layer.scale, layer.visible)


def output_error(layer: LayerHarvest, visual: Segment, truth: torch.Tensor) -> torch.Tensor:
    """Squared error of attention's output under the queries that really read it, relative to the output's own
    energy."""
    errors, energy = error_and_energy(layer, visual, truth, 1)
    return errors.sum() / energy.clamp_min(1e-12)


def error_and_energy(
    layer: LayerHarvest, visual: Segment, truth: torch.Tensor, sets: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the queries that really read: squared error of attention's output, and the output's own energy.

    Args:
        layer: the harvest.
        visual: its tiles, as they would be read.
        truth: `full_output` of it.
        sets: sets of neighbouring heads whose parts of the error are wanted apart.

    Returns: [sets] and a scalar.
    """
    # Filled, not multiplied: padding that sees nothing has an output that is not a number.
    unread = ~layer.reads[:, None, :, None]
    error = (
        (attend(layer.query, [visual, layer.rest], layer.scale, layer.visible) - truth).float().masked_fill(unread, 0.0)
    )
    squares = error.square().unflatten(1, (sets, -1)).sum((0, 2, 3, 4))
    return squares, truth.float().masked_fill(unread, 0.0).square().sum()


def require_finite(layer: LayerHarvest, index: int) -> None:
    """Raises DataError that names the layer and what in it is not a number."""
    for name in ("keys", "values", "query"):
        if not bool(torch.isfinite(getattr(layer, name)).all()):
            raise DataError(
                f"layer {index}: its {name} hold NaN or infinite numbers. Run the model in another precision (--dtype"
                " float32 or bfloat16) or look for broken images in the data."
            )
