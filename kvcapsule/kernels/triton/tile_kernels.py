"""Tile kernels: attention over tiles whose rows are not tokens, for maps, frames and coded rows.

A tile's own rows are small beside the maps that all tiles share, so the work is divided where sharing changes:

    derotate_queries   q' = rotate(q, -frame) q_map    (entry, row) pairs of many tiles together, for they share q_map
    score_rows         z  = q' keys^T * scale          tile by tile; keys are read once for all heads that share them
    map_scores         s  = z score_map^T + bias       pairs of many tiles together, by online softmax
                       w  = softmax(s) value_map
    weigh_rows         o  = w values                   tile by tile again

z and w, one number for each stored row and query, pass through memory; the scores of tokens stay in registers. A map is
read once for the pairs of a block; one program for each tile would read it once a tile. value_mean and out_map are
applied once to a batch row's sum over its tiles (kvcapsule.kernels.triton.attend).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loads import (
    BIAS_UNIT,
    CODED,
    LOG2E,
    LOWEST,
    MIXED,
    QUANTISED,
    load_cells,
    load_codes,
    load_map,
    load_mixed,
    load_mixed_grid,
    load_raw,
    query_offset,
)


class Pairs(NamedTuple):
    """A block of (entry, row) pairs of one KV head."""

    head: Any
    entry: Any
    unit: Any
    row: Any
    """Rows of all units, counted through."""
    valid: Any


@triton.jit
def _pairs(entries, heads, ROWS: tl.constexpr, BLOCK_R: tl.constexpr):
    """The block of program (block, KV head)."""
    number = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    head = tl.program_id(1).to(tl.int64)
    entry = number // ROWS
    unit = entry * heads + head
    return Pairs(head=head, entry=entry, unit=unit, row=unit * ROWS + number % ROWS, valid=number < entries * ROWS)


@triton.jit
def derotate_queries(
    queries, owner, head_of_entry, rotation, q_map, out, entries,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr, HALF: tl.constexpr, CHANNELS_OUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [E, H, R, CHANNELS_OUT]: queries rotated back by their entry's frame, then mapped by q_map.

    Args:
        queries: Queries, [B, H * G, Q, CHANNELS].
        owner: [E] int64, the entries' batch rows.
        head_of_entry: [E] int64, the KV heads of entries of single heads, or None.
        rotation: Rotation, or None. Of CHANNELS, the first 2 * HALF are rotated.
        q_map: Map [H, CHANNELS, CHANNELS_OUT], or None.
        BLOCK_C: holds HALF, and the channels that are not rotated.
    """
    pairs = _pairs(entries, tl.num_programs(1), ROWS, BLOCK_R)
    row = tl.load(owner + pairs.entry, mask=pairs.valid, other=0)
    kv_head = pairs.head
    if head_of_entry is not None:
        kv_head = tl.load(head_of_entry + pairs.entry, mask=pairs.valid, other=0)
    at = queries.data + query_offset(queries, row, kv_head, pairs.row % ROWS, ROWS, QUERIES)[:, None]
    to = out + pairs.row[:, None] * CHANNELS_OUT
    c = tl.arange(0, BLOCK_C)
    c_out = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    if rotation is not None:
        rotated = pairs.valid[:, None] & (c < HALF)[None, :]
        first = tl.load(at + c[None, :], mask=rotated, other=0.0).to(tl.float32)
        second = tl.load(at + HALF + c[None, :], mask=rotated, other=0.0).to(tl.float32)
        angle = pairs.entry[:, None] * HALF + c[None, :]
        cos = tl.load(rotation.cos + angle, mask=rotated, other=0.0).to(tl.float32)
        sin = tl.load(rotation.sin + angle, mask=rotated, other=0.0).to(tl.float32)
        first, second = first * cos + second * sin, second * cos - first * sin
        if q_map is not None:
            in_map = (c < HALF)[:, None] & (c_out < CHANNELS_OUT)[None, :]
            first_map = load_map(q_map, pairs.head, c[:, None], c_out[None, :], in_map)
            second_map = load_map(q_map, pairs.head, (HALF + c)[:, None], c_out[None, :], in_map)
            acc += tl.dot(first, first_map, input_precision=PRECISION)
            acc += tl.dot(second, second_map, input_precision=PRECISION)
        else:
            tl.store(to + c[None, :], first, mask=rotated)
            tl.store(to + HALF + c[None, :], second, mask=rotated)
    if CHANNELS > 2 * HALF:
        c_rest = 2 * HALF + c
        unrotated = pairs.valid[:, None] & (c_rest < CHANNELS)[None, :]
        rest = tl.load(at + c_rest[None, :], mask=unrotated, other=0.0).to(tl.float32)
        if q_map is not None:
            in_map = (c_rest < CHANNELS)[:, None] & (c_out < CHANNELS_OUT)[None, :]
            rest_map = load_map(q_map, pairs.head, c_rest[:, None], c_out[None, :], in_map)
            acc += tl.dot(rest, rest_map, input_precision=PRECISION)
        else:
            tl.store(to + c_rest[None, :], rest, mask=unrotated)
    if q_map is not None:
        tl.store(to + c_out[None, :], acc, mask=pairs.valid[:, None] & (c_out < CHANNELS_OUT)[None, :])


@triton.jit
def score_rows(
    queries, keys, z, scale,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """z [E, S, ROWS, M] fp32: scores of the stored keys, for ROWS rows of a set of KV heads.

    Args:
        queries: derotated, [E, S, ROWS, CHANNELS].
        keys: StoredRows.
        scale: of the scores, times log2(e).
    """
    entry = tl.program_id(0).to(tl.int64)
    set_ = tl.program_id(1).to(tl.int64)
    unit = entry * tl.num_programs(1) + set_
    begin = tl.program_id(2) * BLOCK_M
    m = begin + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    base = keys.data + entry * keys.entry_stride + set_ * keys.set_stride
    q_minimum = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for low in range(0, CHANNELS, BLOCK_C):
        c = low + tl.arange(0, BLOCK_C)
        in_q = (r < ROWS)[:, None] & (c < CHANNELS)[None, :]
        q_at = queries + (unit * ROWS + r)[:, None] * CHANNELS + c[None, :]
        q = tl.load(q_at, mask=in_q, other=0.0).to(tl.float32)
        if FORMAT.kind == CODED:
            cells = set_ * keys.groups * CHANNELS
            k = load_cells(
                base, keys.cells + cells, keys.scale + cells, begin // 8, keys.groups, c, CHANNELS,
                FORMAT.widest, FORMAT.has_3_bits, BLOCK_M // 8, BLOCK_C,
            )  # fmt: skip
            k = tl.trans(k.to(FORMAT.product.dtype))
        elif FORMAT.kind == QUANTISED:
            key_scale = tl.load(keys.scale + unit * CHANNELS + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
            minimum = tl.load(keys.minimum + unit * CHANNELS + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
            k = load_codes(base, begin // 8, keys.groups, c, CHANNELS, FORMAT.bits, BLOCK_M // 8, BLOCK_C)
            k = k.to(FORMAT.product.dtype)
        elif FORMAT.kind == MIXED:
            key_scale, minimum = load_mixed_grid(keys, entry, set_, c, CHANNELS)
            k = tl.trans(load_mixed(keys, entry, set_, m, c, CHANNELS)).to(FORMAT.product.dtype)
        else:
            k = load_raw(base, m, c, m < keys.rows, CHANNELS, BLOCK_C).to(FORMAT.product.dtype)
        if FORMAT.kind == QUANTISED or FORMAT.kind == MIXED:
            q_minimum += tl.sum(q * minimum[None, :], 1)
            q = q * key_scale[None, :]
        acc += tl.dot(q.to(FORMAT.product.dtype), k, input_precision=FORMAT.product.precision)
    in_z = (r < ROWS)[:, None] & (m < keys.rows)[None, :]
    if FORMAT.kind == QUANTISED or FORMAT.kind == MIXED:
        acc += q_minimum[:, None]
    elif FORMAT.kind == CODED:
        shared = (set_ * tl.num_programs(0) + entry) * ROWS + r
        acc += tl.load(keys.offset_product + shared[:, None] * keys.rows + m[None, :], mask=in_z, other=0.0)
    tl.store(z + (unit * ROWS + r)[:, None] * keys.rows + m[None, :], acc * scale, mask=in_z)


@triton.jit
def _token_scores(
    z, score_map, bias, mask, pairs, n, sizes,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """s [BLOCK_R, BLOCK_N] of the tokens n, times log2(e); -inf where a token is hidden or there is none."""
    valid = pairs.valid[:, None] & (n < sizes.tokens)[None, :]
    if score_map is not None:
        s = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for low in range(0, sizes.keys, BLOCK_M):
            m = low + tl.arange(0, BLOCK_M)
            in_z = pairs.valid[:, None] & (m < sizes.keys)[None, :]
            x = tl.load(z + pairs.row[:, None] * sizes.keys + m[None, :], mask=in_z, other=0.0)
            in_map = (m < sizes.keys)[:, None] & (n < sizes.tokens)[None, :]
            y = load_map(score_map, pairs.head, n[None, :], m[:, None], in_map)
            s += tl.dot(x, y, input_precision=PRECISION)
    else:
        s = tl.load(z + pairs.row[:, None] * sizes.keys + n[None, :], mask=valid, other=0.0)
    if bias is not None:
        b = tl.load(bias + pairs.unit[:, None] * sizes.tokens + n[None, :], mask=valid, other=0)
        s += b.to(tl.float32) * (LOG2E * BIAS_UNIT if bias.dtype.element_ty == tl.int8 else LOG2E)
    if mask is not None:
        seen = tl.load(mask + pairs.entry[:, None] * sizes.tokens + n[None, :], mask=valid, other=0)
        valid = valid & (seen != 0)
    return tl.where(valid, s, -float("inf"))


@triton.jit
def map_scores(
    z, score_map, value_map, bias, mask, w, lse, sizes,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """w [E, H, R, M'] and lse [E, H, R] (base 2) from z [E, H, R, M]: the weights of the stored values.

    The third axis of the grid is blocks of weights.

    Args:
        score_map: Map [S, N, M]; None: z are the tokens' scores (M = N).
        value_map: Map [S, N, M']; None: the probabilities are the weights (M' = N).
        bias: [E, H, N], in units of BIAS_UNIT if it is of int8; or None.
        mask: [E, N] uint8, or None.
        sizes: MapSizes.
    """
    pairs = _pairs(sizes.entries, sizes.heads, ROWS, BLOCK_R)
    c = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for low in range(0, sizes.tokens, BLOCK_N):
        n = low + tl.arange(0, BLOCK_N)
        s = _token_scores(z, score_map, bias, mask, pairs, n, sizes, PRECISION, BLOCK_R, BLOCK_N, BLOCK_M)
        new_top = tl.maximum(top, tl.max(s, 1))
        rescale = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * rescale + tl.sum(p, 1)
        if value_map is not None:
            in_map = (n < sizes.tokens)[:, None] & (c < sizes.weights)[None, :]
            y = load_map(value_map, pairs.head, n[:, None], c[None, :], in_map)
            acc = acc * rescale[:, None] + tl.dot(p, y, input_precision=PRECISION)
        top = new_top
    divisor = tl.where(total == 0.0, 1.0, total)
    if value_map is None:
        # The weights are the probabilities themselves, which are known only now that their sum is.
        s = _token_scores(z, score_map, bias, mask, pairs, c, sizes, PRECISION, BLOCK_R, BLOCK_W, BLOCK_M)
        acc = tl.exp2(s - top[:, None])
    in_w = pairs.valid[:, None] & (c < sizes.weights)[None, :]
    tl.store(w + pairs.row[:, None] * sizes.weights + c[None, :], acc / divisor[:, None], mask=in_w)
    if tl.program_id(2) == 0:
        tl.store(lse + pairs.row, tl.where(total == 0.0, -float("inf"), top + tl.log2(divisor)), mask=pairs.valid)


@triton.jit
def weigh_rows(
    w, values, mask, out,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [E, S, ROWS, CHANNELS] fp32: sums of the stored values with weights w [E, S, ROWS, M'].

    Args:
        values: StoredRows; ROWS rows of queries share a set's.
        mask: [E, M'] uint8, which tokens are valid, for raw values without a map; or None. What is stored for the
            others may be anything.
    """
    entry = tl.program_id(0).to(tl.int64)
    set_ = tl.program_id(1).to(tl.int64)
    unit = entry * tl.num_programs(1) + set_
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    base = values.data + entry * values.entry_stride + set_ * values.set_stride
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for low in range(0, values.rows, BLOCK_M):
        m = low + tl.arange(0, BLOCK_M)
        in_w = (r < ROWS)[:, None] & (m < values.rows)[None, :]
        x = tl.load(w + (unit * ROWS + r)[:, None] * values.rows + m[None, :], mask=in_w, other=0.0)
        total += tl.sum(x, 1)
        if FORMAT.kind == CODED:
            cells = set_ * values.groups * CHANNELS
            v = load_cells(
                base, values.cells + cells, values.scale + cells, low // 8, values.groups, c, CHANNELS,
                FORMAT.widest, FORMAT.has_3_bits, BLOCK_M // 8, BLOCK_C,
            )  # fmt: skip
        elif FORMAT.kind == QUANTISED:
            v = load_codes(base, low // 8, values.groups, c, CHANNELS, FORMAT.bits, BLOCK_M // 8, BLOCK_C)
            v = tl.trans(v).to(tl.float32)
        elif FORMAT.kind == MIXED:
            v = load_mixed(values, entry, set_, m, c, CHANNELS)
        else:
            valid = m < values.rows
            if mask is not None:
                valid = valid & (tl.load(mask + entry * values.rows + m, mask=valid, other=0) != 0)
            v = tl.trans(load_raw(base, m, c, valid, CHANNELS, BLOCK_C)).to(tl.float32)
        x, v = x.to(FORMAT.product.dtype), v.to(FORMAT.product.dtype)
        acc += tl.dot(x, v, input_precision=FORMAT.product.precision)
    in_out = (r < ROWS)[:, None] & (c < CHANNELS)[None, :]
    if FORMAT.kind == QUANTISED:
        scale = tl.load(values.scale + unit * CHANNELS + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
        minimum = tl.load(values.minimum + unit * CHANNELS + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
        acc = acc * scale[None, :] + total[:, None] * minimum[None, :]
    elif FORMAT.kind == MIXED:
        scale, minimum = load_mixed_grid(values, entry, set_, c, CHANNELS)
        acc = acc * scale[None, :] + total[:, None] * minimum[None, :]
    elif FORMAT.kind == CODED:
        shared = (set_ * tl.num_programs(0) + entry) * ROWS + r
        acc += tl.load(values.offset_product + shared[:, None] * CHANNELS + c[None, :], mask=in_out, other=0.0)
    tl.store(out + (unit * ROWS + r)[:, None] * CHANNELS + c[None, :], acc, mask=in_out)
