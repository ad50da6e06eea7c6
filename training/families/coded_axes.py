"""What the rows of a coded compact capsule are like, channel by channel, and the forms in which they are coded."""

from typing import NamedTuple

import torch
from torch import nn

from kvcapsule.segments.mixed_width_rows import WidthForm


class Channels(NamedTuple):
    """Statistics of the channels of a layer's keys or values, [H, C] each; per tile where not said otherwise."""

    energy: torch.Tensor
    """Mean squared distance from the mean of all rows of all tiles: the error of a channel without bits."""
    variance: torch.Tensor
    """Mean variance within a tile: what a channel's codes have to describe."""
    range: torch.Tensor
    """Geometric mean of highest less lowest number."""
    low: torch.Tensor
    """Mean lowest number."""
    mean: torch.Tensor
    """Of all rows of all tiles."""

    def form(self, widths_HC: torch.Tensor) -> WidthForm:
        """How channels of these widths are coded."""
        widths = widths_HC.to(self.range.device)
        levels = (2.0 ** widths.to(self.range.dtype) - 1).clamp_min(1)
        centre = torch.where(widths > 0, self.low, self.mean)
        return WidthForm(widths, (self.range / levels).float(), centre.float())


class RowSums(nn.Module):
    """Sums over tiles of their rows and second moments."""

    first: torch.Tensor
    second: torch.Tensor
    within: torch.Tensor
    log_range: torch.Tensor
    low: torch.Tensor
    rows: torch.Tensor
    tiles: torch.Tensor

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        for name in ("first", "within", "log_range", "low"):
            self.register_buffer(name, torch.zeros(heads, dim, dtype=torch.float64))
        self.register_buffer("second", torch.zeros(heads, dim, dim, dtype=torch.float64))
        for name in ("rows", "tiles"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def add(self, rows_EHMC: torch.Tensor) -> None:
        """Take in the rows of some tiles."""
        rows = rows_EHMC.double()
        self.first += rows.sum((0, 2))
        self.second += torch.einsum("ehmd,ehmf->hdf", rows, rows)
        self.within += (rows - rows.mean(2, keepdim=True)).square().sum((0, 2))
        low, high = rows.aminmax(dim=2)
        self.log_range += (high - low).clamp_min(1e-12).log().sum(0)
        self.low += low.sum(0)
        self.rows += rows.shape[0] * rows.shape[2]
        self.tiles += len(rows)

    def channels(self) -> Channels:
        """Statistics of the rows along the channels that they have."""
        mean = self.first / self.rows
        energy = self.second.diagonal(dim1=1, dim2=2) / self.rows - mean.square()
        variance, log_range, low = self.within / self.rows, self.log_range / self.tiles, self.low / self.tiles
        return Channels(energy.clamp_min(0), variance, log_range.exp(), low, mean)

    def axes(self) -> torch.Tensor:
        """[H, D, D] orthogonal: the columns are the principal axes, the first with the most energy."""
        vectors: torch.Tensor = torch.linalg.eigh(self.second / self.rows).eigenvectors
        return vectors.flip(2)
