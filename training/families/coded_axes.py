"""Axes in which the rows of a coded compact capsule are coded, and the units of their grids."""

from typing import NamedTuple

import torch
from torch import nn

from kvcapsule.codec.coded_compact import RowCoding
from kvcapsule.segments.mixed_width_rows import WidthForm

_RIDGE = 1e-3
"""Added to a metric's diagonal, relative to its mean: directions that no query of the bank has are not lost."""


class Axes(NamedTuple):
    """Principal axes of rows in a metric, the first with the most energy."""

    into: torch.Tensor
    """[H, D, D]: rows to coefficients."""
    out: torch.Tensor
    """[H, D, D]: x = y out^T."""
    energy: torch.Tensor
    """[D]: mean square of the coefficients, over tiles, heads and rows."""
    variance: torch.Tensor
    """[D]: their mean variance within a tile."""

    def coding(self, widths: torch.Tensor, grids: "Grids") -> RowCoding:
        """Of the first axes, with these widths."""
        count = len(widths)
        levels = 2.0 ** widths.to(grids.low.dtype).to(grids.low.device) - 1
        unit = (grids.log_range / grids.count).exp()[:, :count] / levels
        form = WidthForm(widths.to(unit.device), unit.float(), (grids.low / grids.count)[:, :count].float())
        return RowCoding(self.into[:, :, :count].float(), self.out[:, :, :count].float(), form)


class RowMoments(nn.Module):
    """Sums over tiles of the second moments of their rows, about 0 and about the tile's mean."""

    total: torch.Tensor
    centred: torch.Tensor
    count: torch.Tensor

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        for name in ("total", "centred"):
            self.register_buffer(name, torch.zeros(heads, dim, dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def add(self, rows_EHMD: torch.Tensor) -> None:
        """Take in the rows of some tiles."""
        rows = rows_EHMD.double()
        self.total += torch.einsum("ehmd,ehmf->hdf", rows, rows)
        rows = rows - rows.mean(2, keepdim=True)
        self.centred += torch.einsum("ehmd,ehmf->hdf", rows, rows)
        self.count += rows.shape[0] * rows.shape[2]

    def axes(self, metric_HDD: torch.Tensor) -> Axes:
        """Principal axes where x^T metric x is the squared length."""
        metric = metric_HDD.double()
        size = metric.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        values, vectors = torch.linalg.eigh(metric + _RIDGE * size * torch.eye(metric.shape[1]).to(metric))
        root = (vectors * values.sqrt()[:, None]) @ vectors.transpose(1, 2)
        inverse = (vectors / values.sqrt()[:, None]) @ vectors.transpose(1, 2)
        energy, basis = torch.linalg.eigh(root @ (self.total / self.count) @ root)
        energy, into, out = energy.flip(1).clamp_min(0), root @ basis.flip(2), inverse @ basis.flip(2)
        variance = torch.einsum("hdc,hdf,hfc->hc", into, self.centred / self.count, into)
        return Axes(into, out, energy.mean(0), variance.mean(0))


class Grids(nn.Module):
    """Sums over tiles of the range (its log) and the lowest number of each coefficient."""

    log_range: torch.Tensor
    low: torch.Tensor
    count: torch.Tensor

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        for name in ("log_range", "low"):
            self.register_buffer(name, torch.zeros(heads, dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def add(self, rows_EHMC: torch.Tensor) -> None:
        """Take in the coefficients of some tiles."""
        low, high = rows_EHMC.double().aminmax(dim=2)
        self.log_range += (high - low).clamp_min(1e-12).log().sum(0)
        self.low += low.sum(0)
        self.count += len(low)
