"""Noise shaping: the codes of a tile are chosen together, so that what rounding loses falls on tokens that are little
read.

Coefficients C [M, C] are read as the tokens A' C^ (A' [T, M], one row a token). Rounding each by itself makes |C^ - C|
least: it treats all tokens alike. But attention reads tokens unlike: an error e_t of a token's value moves the output
    by p_t e_t, one of its key in
proportion to p_t too. So here the codes make

    sum over t of   w_t | A'_t (C^ - C) |^2,      w_t ~ mean over a bank of training queries of p_t^2

small. In the metric H = A'^T diag(w) A' = L L^T the last group of eight rows is rounded first, and what it loses is
taken off the groups before it, as far as they can make up for it at the tokens that count. That is Babai's nearest
plane (1986), with groups in place of single rows (within a group each row is rounded by itself: one product a group,
and on the demo VLM as good); GPTQ (arXiv 2210.17323) does the same to weights.

Nothing changes for who reads the codes. At encoding a tile takes some M^2 (T + M / 6) multiplications for the metric
and its factor, M^2 C / 2 for the products, and Q T D for each KV head's queries.

Approximations: the bank's queries come from other images and questions; all coefficients of a set share one weight a
token, though layers, keys and values differ.
"""

import torch
from torch import nn

from ..segments.bit_packing import GROUP
from ..segments.coefficient_rows import Coding

_FLOOR = 0.2
"""Weight of a token that no query reads, where the mean is 1 + this: queries of later turns may differ."""
_RIDGE = 1e-4
"""Added to the metric, relative to its mean: rows that fill up the last group have none of their own."""


class Readers(nn.Module):
    """A bank of training queries for each layer, and the weights of tokens by what it reads."""

    queries: torch.Tensor
    """[L, H, Q, D]: of L layers, in the tiles' frames, times the scale of the scores. All zero weigh all tokens
    alike."""

    def __init__(self, layers: int, heads: int, count: int, dim: int, joint: int) -> None:
        """joint: KV heads of a set, whose tokens share their weights."""
        super().__init__()
        self.joint = joint
        self.register_buffer("queries", torch.zeros(layers, heads, count, dim))

    def forward(self, k_EHTD: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """How much errors at each token move what the bank reads, [E, S, T], 1 in the mean of a tile; keys in the
        queries' frames."""
        work = torch.promote_types(k_EHTD.dtype, torch.float32)
        with torch.autocast(k_EHTD.device.type, enabled=False):
            attention = (self.queries[layer].to(work) @ k_EHTD.to(work).transpose(-1, -2)).softmax(-1)
        square = attention.square().unflatten(1, (-1, self.joint)).mean((2, 3))
        weights: torch.Tensor = square / square.mean(-1, keepdim=True)
        return weights


def shaping_macs(tile: int, rows: int, channels: int) -> tuple[int, int]:
    """Multiply-adds of shaping one tile of one set: of its products, and of the metric's factorisation."""
    return tile * rows**2 + channels * rows * (rows - GROUP) // 2, rows**3 // 6 + GROUP * rows**2 // 2


def check_readers(count: int) -> None:
    """Raises ValueError for a number of readers that there cannot be."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"readers {count}: queries of each KV head, 0 or more.")


def shaped(
    coefficients_ESMC: torch.Tensor, tokens_STM: torch.Tensor, weights_EST: torch.Tensor, coding: Coding
) -> torch.Tensor:
    """Coefficients moved such that rounding each to its nearest code makes the weighted error small, [E, S, M, C].

    Args:
        coefficients_ESMC: as an encoder made them.
        tokens_STM: the map along tokens that they are read with, A'.
        weights_EST: of the tokens, 0 or more and 1 in the mean.
        coding: what they are rounded with.
    """
    # Factors are never taken in half precision.
    with torch.autocast(coefficients_ESMC.device.type, enabled=False):
        return _shaped(coefficients_ESMC, tokens_STM, weights_EST, coding)


def _shaped(
    coefficients_ESMC: torch.Tensor, tokens_STM: torch.Tensor, weights_EST: torch.Tensor, coding: Coding
) -> torch.Tensor:
    coefficients_ESMC = coefficients_ESMC.to(torch.promote_types(coefficients_ESMC.dtype, torch.float32))
    work = coefficients_ESMC.dtype
    basis = tokens_STM.to(work)
    weights = (weights_EST.to(work) + _FLOOR) / (1 + _FLOOR)
    metric = basis.transpose(-1, -2) @ (weights[..., None] * basis)
    diagonal = metric.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(_RIDGE * diagonal.mean(-1, keepdim=True))
    # Not cholesky: it would wait for the device to look for failures, which the ridge rules out.
    root = torch.linalg.cholesky_ex(metric, upper=True).L
    moved, lost = torch.empty_like(coefficients_ESMC), torch.empty_like(coefficients_ESMC)
    for first in range(coefficients_ESMC.shape[2] - GROUP, -1, -GROUP):
        own, later = slice(first, first + GROUP), slice(first + GROUP, None)
        wanted = coefficients_ESMC[:, :, own]
        if first + GROUP < coefficients_ESMC.shape[2]:
            made_up = root[:, :, own, later] @ lost[:, :, later]
            wanted = wanted + torch.linalg.solve_triangular(root[:, :, own, own], made_up, upper=True)
        moved[:, :, own] = wanted
        lost[:, :, own] = coefficients_ESMC[:, :, own] - coding.rounded(wanted, first // GROUP)
    return moved
