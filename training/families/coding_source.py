"""Closed-form statistics of one coding source (the keys or the values of a layer, or all of a layer group), and the
transform code of given widths for it."""

import torch
from torch import nn

from kvcapsule.codec.bit_allocation import cell_reach, cell_scale, cell_variance
from kvcapsule.codec.transform import CellTransform, Transform
from kvcapsule.segments.bit_packing import GROUP

from ..second_moments import Bases, CoefficientMoments, Extremes

LEAST_STEP = 1e-6
"""No scale of a quantiser is less, or descent could carry it through 0."""


class CodingSource(nn.Module):
    """Bases of a source, and means, variances and extremes of its coefficients in them."""

    def __init__(self, bases: Bases, moments: CoefficientMoments, extremes: Extremes) -> None:
        super().__init__()
        self.bases, self.mean, self.variance = bases, moments.mean(), moments.variance()
        self.cells, self.reach = cell_variance(self.variance), cell_reach(extremes.reach(self.mean))

    def transform(self, widths: torch.Tensor, heads: int, dim: int) -> Transform:
        """The transform code of given widths [S, G, D], cut to the rows and channels that have any."""
        rows, channels = used(widths)
        built = Transform(
            head_groups=len(widths), heads=heads, tile=self.variance.shape[1], dim=dim, rows=rows, channels=channels
        ).to(self.variance.device)
        self.fill(built, widths)
        with torch.no_grad():
            built.channels_in.copy_(self.bases.channels_in[:, :, :channels])
            built.channels_out.copy_(self.bases.channels_out[:, :, :channels])
        return built

    @torch.no_grad()
    def fill(self, built: CellTransform, widths: torch.Tensor) -> None:
        """All of a transform code but its channels."""
        _, groups, channels = built.widths.shape
        rows = min(groups * GROUP, self.variance.shape[1])
        coded = widths[:, :groups, :channels].to(self.variance.device)
        built.tokens_in[:, :rows] = self.bases.tokens[:, :rows].float()
        built.tokens_out[:, :, :rows] = self.bases.tokens[:, :rows].transpose(-1, -2).float()
        built.offset[:, :rows] = self.mean[:, :rows, :channels].float()
        deviation = (self.cells[:, :groups, :channels] / GROUP).sqrt()
        built.step.copy_(cell_scale(coded, deviation, self.reach[:, :groups, :channels]).clamp_min(LEAST_STEP))
        built.widths.copy_(coded)


def used(widths: torch.Tensor) -> tuple[int, int]:
    """Rows (a multiple of 8) and channels up to the last that has bits in widths [S, G, D]; at least one cell of
    them."""
    coded = (widths > 0).any(0)
    groups, channels = (int(coded.any(axis).nonzero().amax()) + 1 if coded.any() else 1 for axis in (1, 0))
    return groups * GROUP, channels
