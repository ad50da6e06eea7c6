"""Closed-form statistics of one coding source (the keys or the values of a layer, or all of a layer group), and the
transform code of given widths for it."""

import torch
from torch import nn

from kvcapsule.codec.bit_allocation import cell_reach, cell_scale, cell_variance
from kvcapsule.codec.coefficient_transform import CellTransform
from kvcapsule.codec.transform import Transform
from kvcapsule.segments.bit_packing import GROUP

from ..second_moments import Bases, CoefficientMoments, Extremes
from .mean_axes import Held, with_means

LEAST_STEP = 1e-6
"""No scale of a quantiser is less, or descent could carry it through 0."""


class CodingSource(nn.Module):
    """Bases of a source, and means, variances and extremes of its coefficients in them."""

    def __init__(self, bases: Bases, moments: CoefficientMoments, extremes: Extremes) -> None:
        super().__init__()
        self.bases, self.mean, self.variance = bases, moments.mean(), moments.variance()
        self.cells, self.reach = cell_variance(self.variance), cell_reach(extremes.reach(self.mean))

    def held(self, widths: torch.Tensor, most: int | None = None) -> Held:
        """Rows and channels of a code of given widths [S, G, D], those of the mean tile included; most: channels."""
        return with_means(self.bases, self.mean, self.cells, widths, most)

    def transform(self, widths: torch.Tensor, heads: int, dim: int, most: int | None = None) -> Transform:
        """The transform code of given widths [S, G, D], cut to the rows and channels that have any or hold the mean
        tile; most: channels."""
        held = self.held(widths, most)
        rows, channels = held.rows, held.channels
        built = Transform(
            head_groups=len(widths), heads=heads, tile=self.variance.shape[1], dim=dim, rows=rows, channels=channels
        ).to(self.variance.device)
        self.fill(built, widths, held)
        with torch.no_grad():
            built.channels_in.copy_(held.bases.channels_in[:, :, :channels])
            built.channels_out.copy_(held.bases.channels_out[:, :, :channels])
        return built

    @torch.no_grad()
    def fill(self, built: CellTransform, widths: torch.Tensor, held: Held) -> None:
        """All of a transform code but its channels."""
        _, groups, channels = built.widths.shape
        rows = min(groups * GROUP, self.variance.shape[1])
        coded = widths[:, :groups, :channels].to(self.variance.device)
        built.tokens_in[:, :rows] = held.bases.tokens[:, :rows].float()
        built.tokens_out[:, :, :rows] = held.bases.tokens[:, :rows].transpose(-1, -2).float()
        built.offset[:, :rows] = held.mean[:, :rows, :channels].float()
        deviation = (self.cells[:, :groups, :channels] / GROUP).sqrt()
        built.step.copy_(cell_scale(coded, deviation, self.reach[:, :groups, :channels]).clamp_min(LEAST_STEP))
        built.widths.copy_(coded)
