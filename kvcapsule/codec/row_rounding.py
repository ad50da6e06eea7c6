"""Rounding rows in a metric: each row's rounding error is made up for by the rows that are rounded after it.

For rows C [M, C] whose error e [M] in a channel costs e^T G e, with G = R^T R (R upper triangular), rows are rounded
from the last to the first. Row i is rounded at c_i + sum over j > i of R_ij / R_ii e_j, where its error cancels what
the errors so far do along the i-th row of R: Babai's nearest plane algorithm (1986); GPTQ (arXiv 2210.17323) does the
same to weights. Rows with a large diagonal element come first, as others can make up for them best.

Cost: M^3 / 6 + M^2 C / 2 multiplications.
"""

import torch

from ..segments.mixed_width_rows import Grid
from .attention_matching import gather_columns, gather_rows


def codes_in_metric(rows_EHMC: torch.Tensor, gram_EHMM: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes [E, H, M, C] of rows, chosen together.

    Args:
        rows_EHMC: the rows.
        gram_EHMM: G, positive definite.
        grid: what codes stand for.
    """
    order = gram_EHMM.diagonal(dim1=-2, dim2=-1).argsort(-1)
    # Not `cholesky`, which waits for the device to check for failures.
    root = torch.linalg.cholesky_ex(gather_columns(gather_rows(gram_EHMM, order), order), upper=True).L
    gains = root / root.diagonal(dim1=-2, dim2=-1)[..., None]
    rows = gather_rows(rows_EHMC, order)
    errors, codes = torch.zeros_like(rows), torch.empty_like(rows)
    for i in range(rows.shape[2] - 1, -1, -1):
        row, later = rows[:, :, i : i + 1], slice(i + 1, None)
        code = grid.codes(row + gains[:, :, i : i + 1, later] @ errors[:, :, later])
        codes[:, :, i : i + 1] = code
        errors[:, :, i : i + 1] = row - grid.values(code)
    return torch.empty_like(codes).scatter_(2, order[..., None].expand_as(codes), codes)
