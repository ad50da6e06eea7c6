"""Products with stored rows as `kvcapsule.kernels.reference` takes them, by the compiled kernels where these cover the rows.

What they cover: queries and weights in fp32, up to 64 rows of them; raw fp32 rows that are dense along the channels and not too few,
`QuantizedRows` and `CodedRows`; no gradients. Anything else is the reference's, by its form alone.
"""

from typing import Any

import torch

from ...codec.cells import CodedRows, Walk
from ...packing import GROUP
from ...quantize import QuantizedRows
from ...segment import Rows
from .. import reference
from . import cells, fewbit, raw
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
    if isinstance(rows, CodedRows):
        return _cell_products(q_EHRD, rows).add_(reference.mapped(q_EHRD, rows.coding.offset.transpose(-1, -2)))
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
    if not _covers(weights_EHRM, rows) or isinstance(rows, CodedRows):
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
    if not isinstance(rows, CodedRows) or not _covers(weights_EHRM, rows):
        return reference.added_up(sums(weights_EHRM, rows), owner, batch, absent)
    # Codes are numbers whatever they are the codes of, and have no weight where there is no token.
    of_row = reference.by_row(weights_EHRM, owner, batch)
    return _cell_totals(weights_EHRM, rows, owner, batch).add_(reference.mapped(of_row, rows.coding.offset))


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
    if isinstance(rows, CodedRows):
        return rows.packed.stride(1) == 1 and not _learning(x_EHRN, rows.coding.step, rows.coding.offset)
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


def _cell_products(q: torch.Tensor, rows: CodedRows) -> torch.Tensor:
    out = q.new_zeros(*q.shape[:3], rows.shape[2])
    sets, work, tables, given = _walk(q, rows, rows.coding.by_group)

    def call(piece: Piece) -> None:
        cells.products(*tables, *given, flat(out), U(piece.begin), U(piece.end))

    units = len(rows.packed) * sets
    run(call, pieces(units, 1, units * work, partable=False))
    return out


def _cell_totals(weights: torch.Tensor, rows: CodedRows, owner: torch.Tensor, batch: int) -> torch.Tensor:
    sets, work, tables, given = _walk(weights, rows, rows.coding.by_channel)
    shared = pieces(sets, len(owner), len(owner) * sets * work, block=1)
    parts = weights.new_zeros(shared[-1].part + 1, batch, *weights.shape[1:3], rows.shape[3])

    def call(piece: Piece) -> None:
        places = (U(piece.begin), U(piece.end), U(piece.since), U(piece.until))
        cells.totals(*tables, flat(owner), *given, flat(parts[piece.part]), *places)

    run(call, shared)
    return _joined(parts)


def _walk(x_EHRN: torch.Tensor, rows: CodedRows, walk: Walk) -> tuple[int, int, tuple[Any, ...], tuple[Any, ...]]:
    """S; multiply-adds of an average set of an entry; the cells, and what they are multiplied with, as the kernels take them."""
    coding, together = rows.coding, rows.coding.heads * x_EHRN.shape[2]
    sets, groups, channels = coding.widths.shape
    step = coding.step.detach().to(torch.float32).flatten()[walk.cells]
    tables = (flat(rows.packed), U(rows.packed.stride(0)), *(table.numpy().view(U) for table in walk[:-1]), step.numpy())
    x, strides = _by_set(x_EHRN, sets)
    return sets, len(walk.cells) * GROUP * together // sets, tables, (flat(x), *map(U, (*strides, together, GROUP * groups, channels)))


def _by_set(x_EHRN: torch.Tensor, sets: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """A tensor whose sets' rows lie one behind the other, and how far entries and sets are apart: products with maps put sets outermost."""
    x_ESHRN = x_EHRN.unflatten(1, (sets, -1))
    if not x_ESHRN[0, 0].is_contiguous():
        x_ESHRN = x_ESHRN.contiguous()
    return x_ESHRN, (x_ESHRN.stride(0), x_ESHRN.stride(1))


def _joined(parts: torch.Tensor) -> torch.Tensor:
    return parts.sum(dim=0) if len(parts) > 1 else parts[0]


def _middle(rows: QuantizedRows) -> torch.Tensor:
    """[E, H, 1, D]: what is left out of the numbers."""
    middle: torch.Tensor = rows.zero.to(torch.float32) + rows.step.to(torch.float32) * ((2**rows.bits - 1) / 2)
    return middle
