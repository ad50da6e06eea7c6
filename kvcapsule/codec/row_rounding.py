"""Rounding in a metric: each rounding error is made up for by the numbers that are rounded after it.

Numbers c [N] whose error e costs e^T G e, with G = R^T R (R upper triangular), are rounded from the last to the first.
Number i is rounded at c_i + sum over j > i of R_ij / R_ii e_j, where its error cancels what the errors so far do along
the i-th row of R: Babai's nearest plane algorithm (1986); GPTQ (arXiv 2210.17323) does the same to weights.

    rows        of a channel: the values of kept tokens, in the metric of the attention that they get
    channels    of a row: a key, in the metric of the queries

Cost, for M rows of C channels: M^3 / 6 + M^2 C / 2 multiplications for the rows; M C^2 / 2 for the channels, and
C^3 / 6 once.
"""

from typing import NamedTuple

import torch

from ..segments.mixed_width_rows import Grid
from .attention_matching import gather_columns, gather_rows


class ChannelMetric(NamedTuple):
    """What an error in the channels of a head's rows costs (G above), factored for rounding, and the order of rounding:
    from the last to the first."""

    order: torch.Tensor
    """[H, C] int64: the channels, that with the most to lose last."""
    gains: torch.Tensor
    """[H, C, C]: R_ij / R_ii, of the channels in this order."""
    weight: torch.Tensor
    """[H, C]: R_ii^2, of the channels in their own order: what an error costs that no channel makes up for."""

    @classmethod
    def of(cls, gram_HCC: torch.Tensor, spread_HC: torch.Tensor) -> "ChannelMetric":
        """spread: of the channels' numbers, in any unit: what matters most is rounded first, as all others can make up
        for it then."""
        order = (gram_HCC.diagonal(dim1=1, dim2=2) * spread_HC.square()).argsort(-1)
        root, size = _factor(gram_HCC[None], order[None])
        weight = torch.empty_like(size[0]).scatter_(1, order, size[0].square())
        return cls(order, (root / size[..., None])[0], weight)

    def heads(self, heads: slice) -> "ChannelMetric":
        """The metric of some heads."""
        return ChannelMetric(*(tensor[heads] for tensor in self))


def codes_of_rows(rows_EHMC: torch.Tensor, gram_EHMM: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes [E, H, M, C] of rows, chosen together.

    Args:
        rows_EHMC: the rows.
        gram_EHMM: G, positive definite. Rows with a large diagonal element come first, as others can make up for them
            best.
        grid: what codes stand for.
    """
    order = gram_EHMM.diagonal(dim1=-2, dim2=-1).argsort(-1)
    root, size = _factor(gram_EHMM, order)
    gains = root / size[..., None]
    rows = gather_rows(rows_EHMC, order)
    errors, codes = torch.zeros_like(rows), torch.empty_like(rows)
    for i in range(rows.shape[2] - 1, -1, -1):
        row, later = rows[:, :, i : i + 1], slice(i + 1, None)
        code = grid.codes(row + gains[:, :, i : i + 1, later] @ errors[:, :, later])
        codes[:, :, i : i + 1] = code
        errors[:, :, i : i + 1] = row - grid.values(code)
    return torch.empty_like(codes).scatter_(2, order[..., None].expand_as(codes), codes)


def codes_of_channels(rows_HEMC: torch.Tensor, metric: ChannelMetric, grid: Grid) -> torch.Tensor:
    """Codes [H, E, M, C] of rows, the channels of each chosen together.

    grid: its scale and minimum [H, E, 1, C], its levels [H, 1, 1, C].
    """
    order, errors = metric.order[:, None, None], torch.zeros_like(rows_HEMC)
    numbers, scale, minimum, levels = (
        torch.take_along_dim(x, order, 3) for x in (rows_HEMC, grid.scale, grid.minimum, grid.levels)
    )
    codes = torch.empty_like(numbers)
    for i in range(numbers.shape[3] - 1, -1, -1):
        of, later = Grid(scale[..., i], minimum[..., i], levels[..., i]), slice(i + 1, None)
        code = of.codes(numbers[..., i] + (errors[..., later] @ metric.gains[:, None, i, later, None])[..., 0])
        codes[..., i] = code
        errors[..., i] = numbers[..., i] - of.values(code)
    return torch.empty_like(codes).scatter_(3, order.expand_as(codes), codes)


def _factor(gram_EHNN: torch.Tensor, order_EHN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R of G in this order, and its diagonal."""
    # Not `cholesky`, which waits for the device to check for failures.
    root = torch.linalg.cholesky_ex(gather_columns(gather_rows(gram_EHNN, order_EHN), order_EHN), upper=True).L
    return root, root.diagonal(dim1=-2, dim2=-1)
