"""Losses of a codec: the variance of keys and values left unexplained, and the error of attention's output."""

import torch

from kvcapsule.errors import DataError
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.segment import Segment

from .harvest import LayerHarvest
from .processes import add_up, ratio


def unexplained(rebuilt: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Fraction of variance unexplained over [E, H, T, D] of all processes; the variance is about each head's mean over
    tiles and tokens."""
    rebuilt, true = rebuilt.float(), true.float()
    sums = torch.cat([true.sum(dim=(0, 2)).flatten(), true.new_tensor([true.shape[0] * true.shape[2]])]).double()
    add_up(sums)
    mean = (sums[:-1] / sums[-1]).view(true.shape[1], 1, -1).to(true.dtype)
    return ratio((rebuilt - true).square().sum(), (true - mean).square().sum().clamp_min(1e-12))


def full_output(layer: LayerHarvest) -> torch.Tensor:
    """Attention's output with the true keys and values, [B, H * G, Q, D]."""
    true = Segment(layer.keys, layer.values, layer.owner, frame=layer.frame)
    return attend(layer.query, [true, layer.rest], layer.scale, layer.visible)


def output_error(layer: LayerHarvest, visual: Segment, truth: torch.Tensor) -> torch.Tensor:
    """Squared error of attention's output under the queries after the image, relative to the squared output, of all
    processes."""
    errors, energy = error_and_energy(layer, visual, truth, 1)
    return ratio(errors.sum(), energy.clamp_min(1e-12)).float()


def error_and_energy(
    layer: LayerHarvest, visual: Segment, truth: torch.Tensor, head_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of attention's output, and squared output, summed over the queries after the image.

    Args:
        layer: the harvest.
        visual: its tiles as a codec's segment.
        truth: its `full_output`.
        head_groups: number of groups of neighbouring heads whose errors are summed separately.

    Returns: [head_groups] and a scalar.
    """
    # masked_fill, not a product: the output of padding that sees no token is NaN.
    unread = ~layer.reads[:, None, :, None]
    error = (
        (attend(layer.query, [visual, layer.rest], layer.scale, layer.visible) - truth).float().masked_fill(unread, 0.0)
    )
    # In fp64, so that sums of several processes are those of one.
    squares = error.square().unflatten(1, (head_groups, -1)).sum((0, 2, 3, 4), dtype=torch.float64)
    return squares, truth.float().masked_fill(unread, 0.0).square().sum(dtype=torch.float64)


def require_finite(layer: LayerHarvest, index: int) -> None:
    """Raises DataError that names the layer and the tensor with NaN or infinity."""
    for name in ("keys", "values", "query"):
        if not bool(torch.isfinite(getattr(layer, name)).all()):
            raise DataError(
                f"layer {index}: its {name} hold NaN or infinite numbers. Run the model in another precision (--dtype"
                " float32 or bfloat16) or look for broken images in the data."
            )
