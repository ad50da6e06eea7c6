"""Combine kernel: joins partial attention results by their log-sum-exp (base 2)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loads import LOWEST, query_offset


class Source(NamedTuple):
    """A segment's line of the table: its partial results, and the slots (batch row, KV head) that they belong to."""

    first: Any
    """Its first partial result."""
    splits: Any
    """Partial results of each unit."""
    order: Any
    """Address of its units, sorted by slot."""
    bounds: Any
    """Address of the bounds: the units of slot i are order[bounds[i] : bounds[i + 1]]."""


_WIDTH = tl.constexpr(len(Source._fields))


class Shape(NamedTuple):
    """Sizes of the joined result [B, H * G, Q, D]; a compile-time constant."""

    rows: int
    """R."""
    queries: int
    """Q."""
    heads: int
    """H."""
    channels: int
    """D."""


@triton.jit
def _load_source(table, number):
    at = table + number * _WIDTH
    return Source(first=tl.load(at), splits=tl.load(at + 1), order=tl.load(at + 2), bounds=tl.load(at + 3))


@triton.jit(do_not_specialize=["tail_splits"])
def combine(
    table, sources, tail_splits, out, lse, joined, joined_lse,
    SHAPE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row r of slot (b, h): the joined output in its own dtype and, if given, its log-sum-exp.

    A row whose partial results have no mass at all (it sees no token) gets 0. An output without mass is never read.

    Args:
        table: [sources, fields of Source] int64.
        tail_splits: splits of the last source, the only one that grows from call to call.
        out: [P, R, D] fp32.
        lse: [P, R] fp32.
        joined: Queries, [B, H * G, Q, D].
        joined_lse: [B * H, R] fp32, or None.
    """
    slot = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1)
    c = tl.arange(0, BLOCK_D)
    top = tl.full([], LOWEST, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for number in range(0, sources):
        source = _load_source(table, number)
        splits = source.splits
        if number == sources - 1:
            splits = tail_splits.to(tl.int64)
        order = source.order.to(tl.pointer_type(tl.int64))
        bounds = source.bounds.to(tl.pointer_type(tl.int64))
        begin = tl.load(bounds + slot)
        count = (tl.load(bounds + slot + 1) - begin) * splits
        for low in range(0, count.to(tl.int32), BLOCK_P):
            i = low + tl.arange(0, BLOCK_P)
            valid = i < count
            unit = tl.load(order + begin + i // splits, mask=valid, other=0)
            at = (source.first + unit * splits + i % splits) * SHAPE.rows + r
            mass = tl.load(lse + at, mask=valid, other=-float("inf"))
            new_top = tl.maximum(top, tl.max(mass, 0))
            share = tl.exp2(mass - new_top)
            rescale = tl.exp2(top - new_top)
            counts = valid & (share != 0.0)
            in_out = counts[:, None] & (c < SHAPE.channels)[None, :]
            x = tl.load(out + at[:, None] * SHAPE.channels + c[None, :], mask=in_out, other=0.0)
            acc = acc * rescale + tl.sum(x * share[:, None], 0)
            total = total * rescale + tl.sum(share, 0)
            top = new_top
    divisor = tl.where(total == 0.0, 1.0, total)
    to = joined.data + query_offset(joined, slot // SHAPE.heads, slot % SHAPE.heads, r, SHAPE.rows, SHAPE.queries)
    tl.store(to + c, (acc / divisor).to(joined.data.dtype.element_ty), mask=c < SHAPE.channels)
    if joined_lse is not None:
        tl.store(joined_lse + slot * SHAPE.rows + r, tl.where(total == 0.0, -float("inf"), top + tl.log2(divisor)))
