"""Products with stored rows as `kvcapsule.kernels.reference` takes them, by the compiled kernels where these cover the rows.

What they cover: queries and weights in fp32, up to 64 rows of them; raw fp32 rows that are dense along the channels and not too few,
`QuantizedRows`; no gradients. Anything else is the reference's, by its form alone.
"""

from typing import Any

import torch

from ...segments.quantized_rows import QuantizedRows
from ...segments.segment import Rows
from .. import reference
from . import fewbit, raw
from .flat import flat
from .jit import Kernel, U
from .share import Piece, pieces, run

_MOST_ROWS = 64
"""Query rows of a KV head; more is work for matrix products."""
_LEAST = 2**19
"""Multiply-adds with raw rows: for less, handing tensors over takes longer than PyTorch's product."""


def products(q_EHRD: torch.Tensor, rows: Rows) -> torch.Tensor:
    """See `reference.Reading`."""
    if not _covers(q_EHRD, rows):
        return reference.products(q_EHRD, rows)
    q = q_EHRD.contiguous()
    out = q.new_zeros(*q.shape[:3], rows.shape[2])
    if isinstance(rows, QuantizedRows):
        _few_bits(fewbit.KERNELS[rows.bits].products, q, rows, out[None])
        return out.add_((q * _middle(rows)).sum(dim=-1, keepdim=True))
    assert isinstance(rows, torch.Tensor)
    _raw(raw.products, q, rows, out[None])
    return out


def sums(weights_EHRM: torch.Tensor, rows: Rows) -> torch.Tensor:
    """See `reference.Reading`."""
    if not _covers(weights_EHRM, rows):
        return reference.sums(weights_EHRM, rows)
    weights = weights_EHRM.contiguous()
    parts = weights.new_zeros(torch.get_num_threads(), *weights.shape[:3], rows.shape[3])
    if isinstance(rows, QuantizedRows):
        _few_bits(fewbit.KERNELS[rows.bits].sums, weights, rows, parts)
        return _joined(parts).add_(weights.sum(dim=-1, keepdim=True) * _middle(rows))
    assert isinstance(rows, torch.Tensor)
    _raw(raw.sums, weights, rows, parts)
    return _joined(parts)


def totals(weights_EHRM: torch.Tensor, rows: Rows, owner: torch.Tensor, batch: int, absent: torch.Tensor | None) -> torch.Tensor:
    """See `reference.Reading`."""
    return reference.added_up(sums(weights_EHRM, rows), owner, batch, absent)


COMPILED = reference.Reading(products, sums, totals)


def _covers(x_EHRN: torch.Tensor, rows: Rows) -> bool:
    if x_EHRN.dtype != torch.float32 or x_EHRN.shape[2] > _MOST_ROWS or not x_EHRN.numel():
        return False
    if isinstance(rows, torch.Tensor):
        dense = rows.stride(3) == 1 or rows.shape[3] == 1
        much = x_EHRN.shape[2] * rows.numel() >= _LEAST
        return much and dense and rows.dtype == torch.float32 and rows.shape[:2] == x_EHRN.shape[:2] and not _learning(x_EHRN, rows)
    if isinstance(rows, QuantizedRows):
        return rows.codes.is_contiguous() and not _learning(x_EHRN, rows.step, rows.zero)
    return False


def _learning(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _raw(kernel: Kernel, x: torch.Tensor, rows: torch.Tensor, parts: torch.Tensor) -> None:
    entries, heads, tokens, dim = rows.shape
    # Where there is one of a kind, how far the next is away may be any number.
    strides = [stride if length > 1 else 0 for stride, length in zip(rows.stride()[:3], rows.shape[:3], strict=True)]
    given = (flat(x), U(x.shape[2]), flat(rows), *map(U, (*strides, heads, dim, tokens)))
    _share(kernel, given, parts, entries * heads, tokens, x.shape[2] * rows.numel())


def _few_bits(kernel: Kernel, x: torch.Tensor, rows: QuantizedRows, parts: torch.Tensor) -> None:
    entries, heads, dim, line = rows.codes.shape
    step = rows.step.to(torch.float32).contiguous()
    given = (flat(x), U(x.shape[2]), flat(rows.codes), U(line), flat(step), U(dim), U(rows.tokens))
    _share(kernel, given, parts, entries * heads, rows.tokens, x.shape[2] * rows.shape.numel())


def _share(kernel: Kernel, given: tuple[Any, ...], parts: torch.Tensor, units: int, tokens: int, work: int) -> None:
    """Kernels add to what is there, each part to its own of `parts` [P, ...]: one for all where they write in different places."""

    def call(piece: Piece) -> None:
        out = parts[min(piece.part, len(parts) - 1)]
        kernel(*given, flat(out), U(piece.begin), U(piece.end), U(piece.since), U(piece.until))

    run(call, pieces(units, tokens, work))


def _joined(parts: torch.Tensor) -> torch.Tensor:
    return parts.sum(dim=0) if len(parts) > 1 else parts[0]


def _middle(rows: QuantizedRows) -> torch.Tensor:
    """[E, H, 1, D]: what is left out of the numbers."""
    middle: torch.Tensor = rows.zero.to(torch.float32) + rows.step.to(torch.float32) * ((2**rows.bits - 1) / 2)
    return middle
