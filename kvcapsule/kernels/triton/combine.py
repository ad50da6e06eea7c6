"""Joining partial attentions by their log-sum-exp (base 2)."""

import triton
import triton.language as tl

from .loads import LOWEST

FIELDS = "first splits order bounds".split()
"""Columns of the table. first: the first partial result; splits: of each unit; order, bounds: addresses: the units of slot i (batch row and
KV head, counted through) are order[bounds[i] : bounds[i + 1]]."""
_WIDTH = tl.constexpr(len(FIELDS))


@triton.jit(do_not_specialize=["tail_splits"])
def combine(
    table, segments, tail_splits, out, lse, joined, joined_row, joined_head, joined_query, joined_lse,
    R: tl.constexpr, Q: tl.constexpr, H: tl.constexpr, D: tl.constexpr, LSE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row r of slot (b, h): joined [B, H * G, Q, D] in its dtype with these strides, and if LSE is set joined_lse [B * H, R].

    out [P, R, D] and lse [P, R] are fp32. A row whose partial results have no mass at all (it sees nothing) gets 0. What has no mass has
    no say, whatever stands in its output. The last segment has `tail_splits` splits.
    """
    slot = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1)
    c = tl.arange(0, BLOCK_D)
    top = tl.full([], LOWEST, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for s in range(0, segments):
        line = table + s * _WIDTH
        first = tl.load(line)
        splits = tl.load(line + 1)
        if s == segments - 1:
            splits = tail_splits.to(tl.int64)
        order = tl.load(line + 2).to(tl.pointer_type(tl.int64))
        bounds = tl.load(line + 3).to(tl.pointer_type(tl.int64))
        begin = tl.load(bounds + slot)
        count = (tl.load(bounds + slot + 1) - begin) * splits
        for low in range(0, count.to(tl.int32), BLOCK_P):
            i = low + tl.arange(0, BLOCK_P)
            there = i < count
            unit = tl.load(order + begin + i // splits, mask=there, other=0)
            at = (first + unit * splits + i % splits) * R + r
            mass = tl.load(lse + at, mask=there, other=-float("inf"))
            higher = tl.maximum(top, tl.max(mass, 0))
            share = tl.exp2(mass - higher)
            shrink = tl.exp2(top - higher)
            heard = there & (share != 0.0)
            x = tl.load(out + at[:, None] * D + c[None, :], mask=heard[:, None] & (c < D)[None, :], other=0.0)
            acc = acc * shrink + tl.sum(x * share[:, None], 0)
            total = total * shrink + tl.sum(share, 0)
            top = higher
    safe = tl.where(total == 0.0, 1.0, total)
    to = joined + slot // H * joined_row + (slot % H * (R // Q) + r // Q) * joined_head + (r % Q) * joined_query
    tl.store(to + c, (acc / safe).to(joined.dtype.element_ty), mask=c < D)
    if LSE:
        tl.store(joined_lse + slot * R + r, tl.where(total == 0.0, -float("inf"), top + tl.log2(safe)))
