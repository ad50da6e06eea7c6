"""Row kernel: softmax attention over stored rows that are tokens (raw or kept tokens, compact rows, quantised rows).

One launch serves all such segments of a layer, the tail among them. Its programs are work items, numbered through
(segment, entry, KV head, split); a table says at which item each segment begins. So batch rows, and heads too, may own
different numbers of entries of different lengths, and no program is idle. An item reads its tokens once, for all query
heads that share the KV head, and leaves a normalised output and its log-sum-exp (base 2) for
kvcapsule.kernels.triton.combine.

The scales of quantised rows stay out of the loop over tokens: those of the keys multiply the query, those of the values
the output.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loads import BOTH, LOG2E, LOWEST, QUANTISED, RAW, load_codes, load_raw, query_offset


class Line(NamedTuple):
    """A segment's line of the table, all int64; an address is 0 where there is no such tensor."""

    first_item: Any
    tokens: Any
    splits: Any
    """Items of a unit."""
    heads: Any
    key_rows: Any
    """Address of raw keys or of their codes; strides are in elements, of codes in bytes."""
    key_entry_stride: Any
    key_head_stride: Any
    value_rows: Any
    value_entry_stride: Any
    value_head_stride: Any
    owner: Any
    """Address of the entries' batch rows."""
    head: Any
    """Address of the entries' KV heads, for entries of single heads."""
    bias: Any
    mask: Any
    query: Any
    """First element of its derotated queries; -1: the query as it is."""
    kind: Any
    """RAW or QUANTISED."""
    key_scale: Any
    key_minimum: Any
    value_scale: Any
    value_minimum: Any


LINE_WIDTH = tl.constexpr(len(Line._fields))


class Visible(NamedTuple):
    """Which tokens of the last segment each query sees, [E, Q, N] uint8 with dense tokens."""

    data: Any
    entry_stride: int
    query_stride: int


class Shape(NamedTuple):
    """Sizes of a unit; a compile-time constant."""

    rows: int
    """R."""
    queries: int
    """Q."""
    key_channels: int
    value_channels: int


class Format(NamedTuple):
    """How the segments of a launch are stored and multiplied; a compile-time constant."""

    kind: int
    """RAW, QUANTISED or BOTH."""
    key_bits: int
    value_bits: int
    dtype: tl.dtype
    """Of raw rows and of scales."""
    bias_dtype: tl.dtype
    aligned: bool
    """Whether each unit of raw rows begins at a multiple of 16 bytes."""
    product: Any
    """A Product."""


class Blocks(NamedTuple):
    """Block sizes, powers of two; a compile-time constant."""

    segments: int
    rows: int
    tokens: int
    key_channels: int
    value_channels: int


class Item(NamedTuple):
    """Tokens [low, high) of one unit, of a segment with `tokens` tokens an entry."""

    unit: Any
    entry: Any
    head: Any
    low: Any
    high: Any
    tokens: Any
    is_last: Any
    """Whether the segment is the last."""


@triton.jit
def _load_line(table, number):
    at = table + number * LINE_WIDTH
    return Line(
        first_item=tl.load(at), tokens=tl.load(at + 1), splits=tl.load(at + 2), heads=tl.load(at + 3),
        key_rows=tl.load(at + 4), key_entry_stride=tl.load(at + 5), key_head_stride=tl.load(at + 6),
        value_rows=tl.load(at + 7), value_entry_stride=tl.load(at + 8), value_head_stride=tl.load(at + 9),
        owner=tl.load(at + 10), head=tl.load(at + 11), bias=tl.load(at + 12), mask=tl.load(at + 13),
        query=tl.load(at + 14), kind=tl.load(at + 15), key_scale=tl.load(at + 16), key_minimum=tl.load(at + 17),
        value_scale=tl.load(at + 18), value_minimum=tl.load(at + 19),
    )  # fmt: skip


@triton.jit
def _load_scales(address, at, valid, DTYPE: tl.constexpr):
    """Scales or minimums [channels] of one unit, in fp32."""
    return tl.load(address.to(tl.pointer_type(DTYPE)) + at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _attend_item(
    line, item, q, scale, visible, SHAPE: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr
):
    """Attention of q [rows, key channels] over an item of KIND rows: [rows, value channels], and log2 of the mass."""
    # A field of a constant must itself be declared constant before it can be the size of a block.
    BLOCK_R: tl.constexpr = BLOCK.rows
    BLOCK_N: tl.constexpr = BLOCK.tokens
    BLOCK_K: tl.constexpr = BLOCK.key_channels
    BLOCK_V: tl.constexpr = BLOCK.value_channels
    D_K: tl.constexpr = SHAPE.key_channels
    D_V: tl.constexpr = SHAPE.value_channels
    c_k = tl.arange(0, BLOCK_K)
    c_v = tl.arange(0, BLOCK_V)
    r = tl.arange(0, BLOCK_R)
    key_offset = item.entry * line.key_entry_stride + item.head * line.key_head_stride
    value_offset = item.entry * line.value_entry_stride + item.head * line.value_head_stride
    if KIND == QUANTISED:
        keys = line.key_rows.to(tl.pointer_type(tl.uint8)) + key_offset
        values = line.value_rows.to(tl.pointer_type(tl.uint8)) + value_offset
        at = item.unit * D_K + c_k
        key_scale = _load_scales(line.key_scale, at, c_k < D_K, FORMAT.dtype)
        key_minimum = _load_scales(line.key_minimum, at, c_k < D_K, FORMAT.dtype)
        q_minimum = tl.sum(q * key_minimum[None, :], 1)
        q_in = (q * key_scale[None, :]).to(FORMAT.product.dtype)
    else:
        keys = line.key_rows.to(tl.pointer_type(FORMAT.dtype)) + key_offset
        values = line.value_rows.to(tl.pointer_type(FORMAT.dtype)) + value_offset
        if FORMAT.aligned:
            keys = tl.multiple_of(keys, 16)
            values = tl.multiple_of(values, 16)
        q_in = q.to(FORMAT.product.dtype)
    groups = tl.cdiv(item.tokens, 8)
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in range(item.low, item.high, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        valid = n < item.high
        if line.mask != 0:
            mask = line.mask.to(tl.pointer_type(tl.int8)) + item.entry * item.tokens
            valid = valid & (tl.load(mask + n, mask=valid, other=0) != 0)
        seen = valid[None, :] & (r >= 0)[:, None]
        if visible is not None and item.is_last:
            of_entry = visible.data + item.entry * visible.entry_stride
            of_query = of_entry + (r % SHAPE.queries)[:, None] * visible.query_stride
            seen = seen & (tl.load(of_query + n[None, :], mask=seen, other=0) != 0)
            valid = valid & (tl.max(seen.to(tl.int32), 0) != 0)
        if KIND == QUANTISED:
            k = load_codes(keys, start // 8, groups, c_k, D_K, FORMAT.key_bits, BLOCK_N // 8, BLOCK_K)
            s = tl.dot(q_in, k.to(FORMAT.product.dtype), input_precision=FORMAT.product.precision) + q_minimum[:, None]
        else:
            k = load_raw(keys, n, c_k, valid, D_K, BLOCK_K)
            s = tl.dot(q_in, k.to(FORMAT.product.dtype), input_precision=FORMAT.product.precision)
        s = s * scale
        if line.bias != 0:
            bias = line.bias.to(tl.pointer_type(FORMAT.bias_dtype)) + item.unit * item.tokens
            s += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)[None, :] * LOG2E
        s = tl.where(seen, s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        rescale = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * rescale + tl.sum(p, 1)
        if KIND == QUANTISED:
            v = load_codes(values, start // 8, groups, c_v, D_V, FORMAT.value_bits, BLOCK_N // 8, BLOCK_V)
        else:
            v = load_raw(values, n, c_v, valid, D_V, BLOCK_V)
        v = tl.trans(v.to(FORMAT.product.dtype))
        acc = acc * rescale[:, None] + tl.dot(p.to(FORMAT.product.dtype), v, input_precision=FORMAT.product.precision)
        top = new_top
    divisor = tl.where(total == 0.0, 1.0, total)
    out = acc / divisor[:, None]
    if KIND == QUANTISED:
        at = item.unit * D_V + c_v
        value_scale = _load_scales(line.value_scale, at, c_v < D_V, FORMAT.dtype)
        value_minimum = _load_scales(line.value_minimum, at, c_v < D_V, FORMAT.dtype)
        out = out * value_scale[None, :] + value_minimum[None, :]
    return out, tl.where(total == 0.0, -float("inf"), top + tl.log2(divisor))


@triton.jit(do_not_specialize=["last_tokens"])
def attend_rows(
    table, segments, last_tokens, split, scale, queries, derotated, visible, out, lse,
    SHAPE: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention over the tokens of one work item: its part of out [P, R, value channels] and lse [P, R].

    Args:
        table: [segments, fields of Line] int64.
        last_tokens: tokens of the last segment, the only one that grows from call to call; its line has 0.
        split: tokens of an item, a multiple of BLOCK.tokens.
        scale: of the scores, times log2(e).
        queries: Queries, [B, H * G, Q, key channels].
        derotated: queries of segments with a frame or a q_map, [U, R, key channels] each, one after the other; or None.
        visible: Visible of the last segment, or None.
    """
    number_of_item = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK.segments)
    first_items = tl.load(table + s * LINE_WIDTH, mask=s < segments, other=9223372036854775807)
    number = tl.sum((number_of_item >= first_items).to(tl.int32), 0) - 1
    line = _load_line(table, number)
    is_last = number == segments - 1
    tokens = line.tokens
    splits = line.splits
    if is_last:
        tokens = last_tokens.to(tl.int64)
        splits = tl.cdiv(last_tokens, split).to(tl.int64)
    item_of_segment = number_of_item - line.first_item
    unit = item_of_segment // splits
    entry = unit // line.heads
    head = unit % line.heads
    low = ((item_of_segment % splits) * split).to(tl.int32)
    high = tl.minimum(low + split, tokens).to(tl.int32)
    item = Item(unit=unit, entry=entry, head=head, low=low, high=high, tokens=tokens, is_last=is_last)

    r = tl.arange(0, BLOCK.rows)
    c = tl.arange(0, BLOCK.key_channels)
    in_query = (r < SHAPE.rows)[:, None] & (c < SHAPE.key_channels)[None, :]
    if derotated is not None and line.query >= 0:
        derotated_at = derotated + line.query + (unit * SHAPE.rows + r)[:, None] * SHAPE.key_channels
        q = tl.load(derotated_at + c[None, :], mask=in_query, other=0.0).to(tl.float32)
    else:
        row = tl.load(line.owner.to(tl.pointer_type(tl.int64)) + entry)
        kv_head = head
        if line.head != 0:
            kv_head = tl.load(line.head.to(tl.pointer_type(tl.int64)) + entry)
        query_at = queries.data + query_offset(queries, row, kv_head, r, SHAPE.rows, SHAPE.queries)[:, None]
        q = tl.load(query_at + c[None, :], mask=in_query, other=0.0).to(tl.float32)

    if FORMAT.kind == QUANTISED or (FORMAT.kind == BOTH and line.kind == QUANTISED):
        o, mass = _attend_item(line, item, q, scale, visible, SHAPE, FORMAT, BLOCK, QUANTISED)
    else:
        o, mass = _attend_item(line, item, q, scale, visible, SHAPE, FORMAT, BLOCK, RAW)

    to = number_of_item * SHAPE.rows + r
    c_v = tl.arange(0, BLOCK.value_channels)
    in_out = (r < SHAPE.rows)[:, None] & (c_v < SHAPE.value_channels)[None, :]
    tl.store(out + to[:, None] * SHAPE.value_channels + c_v[None, :], o, mask=in_out)
    tl.store(lse + to, mass, mask=r < SHAPE.rows)
