"""What a codec is trained on: how much of the keys and values it loses, and how much attention's output moves."""

import torch

from kvcapsule.kernels.reference import attend
from kvcapsule.segment import Segment

from .harvest import LayerHarvest


def unexplained(rebuilt: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Fraction of variance unexplained over [E, H, T, D]; the variance is about each head's mean over tiles and tokens."""
    rebuilt, true = rebuilt.float(), true.float()
    spread = (true - true.mean(dim=(0, 2), keepdim=True)).square().sum()
    return (rebuilt - true).square().sum() / spread.clamp_min(1e-12)


def full_output(layer: LayerHarvest) -> torch.Tensor:
    """Attention's output with the true keys and values, [B, H * G, Q, D]."""
    true = Segment(layer.keys, layer.values, layer.owner, frame=layer.frame)
    return attend(layer.query, [true, layer.rest], layer.scale, layer.visible)


def output_error(layer: LayerHarvest, visual: Segment, truth: torch.Tensor) -> torch.Tensor:
    """Squared error of attention's output under the queries that really read it, relative to the output's own energy."""
    reads = layer.reads[:, None, :, None]
    error = (attend(layer.query, [visual, layer.rest], layer.scale, layer.visible) - truth).float()
    return (error * reads).square().sum() / (truth.float() * reads).square().sum().clamp_min(1e-12)
