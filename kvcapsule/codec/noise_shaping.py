"""Noise shaping: the codes of a tile are chosen jointly, so that rounding errors fall on tokens with little attention.

Coefficients C [M, C] decode to the tokens A' C^ (A' [T, M], one row per token). Rounding every coefficient to its
nearest code minimises |C^ - C|, which weights all tokens equally. Attention does not: an error e_t in the value of
token t with probability p_t moves the output by p_t e_t, and an error in its key by an amount proportional to p_t. The
codes are therefore chosen to make

    sum over t of   w_t | A'_t (C^ - C) |^2,      w_t ~ mean over the query bank of p_t^2

small. In the metric H = A'^T diag(w) A' = L L^T the last group of eight rows is rounded first, and its error is
subtracted from the groups before it, as far as they can compensate it at the heavily weighted tokens. This is Babai's
nearest plane algorithm (1986) with groups in place of single rows (rows within a group are rounded independently: one
product per group, and no worse on the demo VLM); GPTQ (arXiv 2210.17323) does the same to weights.

Decoding does not change. Encoding a tile takes about M^2 (T + M / 6) multiplications for the metric and its factor,
M^2 C / 2 for the products, and Q T D per KV head for the attention of the query bank.

Approximations: the bank's queries come from other images and questions; all coefficients of a head group share one
weight per token, although layers, keys and values differ.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import ConfigError
from ..segments.bit_packing import GROUP
from ..segments.coefficient_rows import Coding
from ..vlm.geometry import KVGeometry

_FLOOR = 0.2
"""Weight of a token without attention, when the mean is 1 + this: queries of later turns may differ."""
_RIDGE = 1e-4
"""Added to the metric's diagonal, relative to its mean: rows that pad the last group have zero metric."""


class TokenWeighting(nn.Module):
    """Weights of a tile's tokens: their mean squared attention under a query bank."""

    queries: torch.Tensor
    """[L, H, Q, D]: the query bank of L layers, in the tiles' frames, multiplied by the scale of the scores. Zeros give
    all tokens the same weight."""

    def __init__(self, shape: Sequence[int], heads: int) -> None:
        """shape: [L, H, Q, D] of the query bank. heads: KV heads per head group; their tokens share weights."""
        super().__init__()
        self.heads = heads
        self.register_buffer("queries", torch.zeros(*shape))

    def forward(self, k_EHTD: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """Weight of each token, [E, S, T], with mean 1 over a tile, from keys in the queries' frames."""
        work = torch.promote_types(k_EHTD.dtype, torch.float32)
        with torch.autocast(k_EHTD.device.type, enabled=False):
            attention = (self.queries[layer].to(work) @ k_EHTD.to(work).transpose(-1, -2)).softmax(-1)
        square = attention.square().unflatten(1, (-1, self.heads)).mean((2, 3))
        weights: torch.Tensor = square / square.mean(-1, keepdim=True)
        return weights


def shaping_macs(tile: int, rows: int, channels: int) -> tuple[int, int]:
    """Multiply-adds of shaping one tile of one head group: (products, factorisation of the metric)."""
    return tile * rows**2 + channels * rows * (rows - GROUP) // 2, rows**3 // 6 + GROUP * rows**2 // 2


def check_query_bank(count: int) -> None:
    """Raises ConfigError for less than no queries per KV head."""
    if count < 0:
        raise ConfigError(f"readers {count}: queries of each KV head, 0 or more.")


def token_weighting(geometry: KVGeometry, layers: int, count: int, heads: int) -> TokenWeighting | None:
    """Untrained token weights of `layers` layers with `count` queries per KV head; None for no queries.

    heads: KV heads per head group.
    """
    return TokenWeighting((layers, geometry.kv_heads, count, geometry.head_dim), heads) if count else None


def shaped(
    coefficients_ESMC: torch.Tensor, tokens_STM: torch.Tensor, weights_EST: torch.Tensor, coding: Coding
) -> torch.Tensor:
    """Shift coefficients so that rounding each to its nearest code makes the weighted error small, [E, S, M, C].

    Without gradients: what is rounded afterwards has none.

    Args:
        coefficients_ESMC: the encoder's output.
        tokens_STM: the decoder's map along tokens, A'.
        weights_EST: weights of the tokens, at least 0 and with mean 1.
        coding: the coding that rounds them.
    """
    # The metric is never factorised in half precision.
    with torch.no_grad(), torch.autocast(coefficients_ESMC.device.type, enabled=False):
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
    # Not `cholesky`, which waits for the device to check for failures; the ridge rules them out.
    root = torch.linalg.cholesky_ex(metric, upper=True).L
    # What a group is moved by for each unit of error in a row behind it: its own block of the root is divided out.
    groups = root.unflatten(2, (-1, GROUP))
    blocks = groups.unflatten(4, (-1, GROUP)).diagonal(dim1=2, dim2=4).movedim(-1, 2)
    gains = torch.linalg.solve_triangular(blocks, groups, upper=True).flatten(2, 3)
    targets, errors = coefficients_ESMC.clone(), torch.empty_like(coefficients_ESMC)
    nearest = coding.rounding(work)
    for first in range(coefficients_ESMC.shape[2] - GROUP, -1, -GROUP):
        rows, later = slice(first, first + GROUP), slice(first + GROUP, None)
        target = targets[:, :, rows]
        if first + GROUP < coefficients_ESMC.shape[2]:
            target += gains[:, :, rows, later] @ errors[:, :, later]
        torch.sub(coefficients_ESMC[:, :, rows], nearest(target, rows), out=errors[:, :, rows])
    return targets
