"""Attention over tiles whose rows do not stand for themselves: maps along the tokens, maps along the channels, frames, coded rows.

A tile's own rows are small beside the maps that all tiles share, so the work is cut where sharing changes:

    turn_queries   q' = rotate(q, -frame) q_map      rows of many tiles at once, for the map is shared
    score_rows     z  = q' keys^T * scale            a tile at a time: reads what is stored of it, once for all heads that share it
    map_scores     s  = z score_map^T + bias, p = softmax(s), w = p value_map     many tiles: flash attention over the maps' rows
    weigh_rows     o  = w values                     a tile at a time again

z and w, one number a stored row and query, pass through memory; scores of the logical tokens stay in registers. A map is read once for the
tiles of a block, where a program for each tile would read it for each. value_mean and out_map are applied once a row of the batch, behind
the sum over its tiles (kvcapsule.kernels.triton.attend).
"""

import triton
import triton.language as tl

from .loads import CODED, LOWEST, QUANTISED, load_cells, load_codes, load_raw


@triton.jit
def turn_queries(
    query, query_row, query_head, query_query, owner, head_of, cos, sin, q_map, map_head, map_in, map_out, out, entries,
    R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, DK: tl.constexpr, HEAD: tl.constexpr, FRAME: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [E, H, R, DK]: queries turned back by their entry's frame, then mapped to the channels of its keys. D - 2 HALF do not turn."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    head = tl.program_id(1).to(tl.int64)
    there = rows < entries * R
    entry = rows // R
    r = rows % R
    kv_head = head
    if HEAD:
        kv_head = tl.load(head_of + entry, mask=there, other=0)
    at = tl.load(owner + entry, mask=there, other=0) * query_row + (kv_head * (R // Q) + r // Q) * query_head + (r % Q) * query_query
    to = out + ((entry * tl.num_programs(1) + head) * R + r)[:, None] * DK
    c_out = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    if FRAME:
        c = tl.arange(0, BLOCK_H)
        turns = there[:, None] & (c < HALF)[None, :]
        first = tl.load(query + at[:, None] + c[None, :], mask=turns, other=0.0).to(tl.float32)
        second = tl.load(query + at[:, None] + HALF + c[None, :], mask=turns, other=0.0).to(tl.float32)
        x = tl.load(cos + entry[:, None] * HALF + c[None, :], mask=turns, other=0.0).to(tl.float32)
        y = tl.load(sin + entry[:, None] * HALF + c[None, :], mask=turns, other=0.0).to(tl.float32)
        back, back_2 = first * x + second * y, second * x - first * y
        if MAP:
            in_map = (c < HALF)[:, None] & (c_out < DK)[None, :]
            own = q_map + head * map_head + c_out[None, :] * map_out
            m = tl.load(own + c[:, None] * map_in, mask=in_map, other=0.0).to(tl.float32)
            m_2 = tl.load(own + (HALF + c)[:, None] * map_in, mask=in_map, other=0.0).to(tl.float32)
            acc += tl.dot(back, m, input_precision=PRECISION) + tl.dot(back_2, m_2, input_precision=PRECISION)
        else:
            tl.store(to + c[None, :], back, mask=turns)
            tl.store(to + HALF + c[None, :], back_2, mask=turns)
    if D > 2 * HALF:
        c_rest = 2 * HALF + tl.arange(0, BLOCK_D)
        stays = there[:, None] & (c_rest < D)[None, :]
        rest = tl.load(query + at[:, None] + c_rest[None, :], mask=stays, other=0.0).to(tl.float32)
        if MAP:
            own = q_map + head * map_head + c_rest[:, None] * map_in + c_out[None, :] * map_out
            m = tl.load(own, mask=(c_rest < D)[:, None] & (c_out < DK)[None, :], other=0.0).to(tl.float32)
            acc += tl.dot(rest, m, input_precision=PRECISION)
        else:
            tl.store(to + c_rest[None, :], rest, mask=stays)
    if MAP:
        tl.store(to + c_out[None, :], acc, mask=there[:, None] & (c_out < DK)[None, :])


@triton.jit
def score_rows(
    query, keys, key_entry, key_head, step, zero, cells, base, z, stored, groups, scale,
    RS: tl.constexpr, DK: tl.constexpr, DOT: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, WIDEST: tl.constexpr,
    THREES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z [E, S, RS, M] fp32 of turned queries [E, S, RS, DK], S sets of KV heads that share their rows, RS rows of a set.

    Args:
        keys: raw [E, S, M, DK], codes [E, S, DK, bytes], or coded [E, bytes].
        step, zero: of QuantizedRows, [E, S, DK]; of CodedRows step alone, [S, M / 8, DK].
        base: [S, E, RS, M]: the offset's part of z, for coded keys.
        groups: of eight rows.
        scale: times log2(e).
    """
    entry = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1).to(tl.int64)
    unit = entry * tl.num_programs(1) + own
    begin = tl.program_id(2) * BLOCK_M
    m = begin + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for low in range(0, DK, BLOCK_K):
        c = low + tl.arange(0, BLOCK_K)
        q_there = (r < RS)[:, None] & (c < DK)[None, :]
        q = tl.load(query + (unit * RS + r)[:, None] * DK + c[None, :], mask=q_there, other=0.0).to(tl.float32)
        if KIND == CODED:
            k = load_cells(
                keys + entry * key_entry, cells + own * groups * DK, step + own * groups * DK, begin // 8, groups, c, DK,
                WIDEST, THREES, BLOCK_M // 8, BLOCK_K,
            )  # fmt: skip
            acc += tl.dot(q.to(DOT), tl.trans(k.to(DOT)), input_precision=PRECISION)
        elif KIND == QUANTISED:
            size = tl.load(step + unit * DK + c, mask=c < DK, other=0.0).to(tl.float32)
            least = tl.load(zero + unit * DK + c, mask=c < DK, other=0.0).to(tl.float32)
            k = load_codes(keys + entry * key_entry + own * key_head, begin // 8, groups, c, DK, BITS, BLOCK_M // 8, BLOCK_K)
            acc += tl.dot((q * size[None, :]).to(DOT), k.to(DOT), input_precision=PRECISION) + tl.sum(q * least[None, :], 1)[:, None]
        else:
            k = load_raw(keys + entry * key_entry + own * key_head, m, c, m < stored, DK, BLOCK_K)
            acc += tl.dot(q.to(DOT), k.to(DOT), input_precision=PRECISION)
    to = (unit * RS + r)[:, None] * stored + m[None, :]
    there = (r < RS)[:, None] & (m < stored)[None, :]
    if KIND == CODED:
        shared = (own * tl.num_programs(0) + entry) * RS + r
        acc += tl.load(base + shared[:, None] * stored + m[None, :], mask=there, other=0.0)
    tl.store(z + to, acc * scale, mask=there)


@triton.jit
def _scores(
    z, at, z_there, score_map, map_token, map_row, n, tokens, stored, bias, mask, unit, entry,
    MAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """s [BLOCK_R, BLOCK_N] of the tokens n, times log2(e); -inf where there is none."""
    there = z_there[:, None] & (n < tokens)[None, :]
    if MAP:
        s = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for low in range(0, stored, BLOCK_M):
            m = low + tl.arange(0, BLOCK_M)
            x = tl.load(z + at[:, None] * stored + m[None, :], mask=z_there[:, None] & (m < stored)[None, :], other=0.0)
            in_map = (m < stored)[:, None] & (n < tokens)[None, :]
            y = tl.load(score_map + n[None, :] * map_token + m[:, None] * map_row, mask=in_map, other=0.0).to(tl.float32)
            s += tl.dot(x, y, input_precision=PRECISION)
    else:
        s = tl.load(z + at[:, None] * stored + n[None, :], mask=there, other=0.0)
    if HAS_BIAS:
        s += tl.load(bias + unit[:, None] * tokens + n[None, :], mask=there, other=0.0).to(tl.float32) * 1.4426950408889634
    if HAS_MASK:
        there = there & (tl.load(mask + entry[:, None] * tokens + n[None, :], mask=there, other=0) != 0)
    return tl.where(there, s, -float("inf"))


@triton.jit
def map_scores(
    z, score_map, score_set, score_token, score_row, value_map, value_set, value_token, value_row, bias, mask, w, lse,
    entries, heads, score_heads, value_heads, tokens, stored, weights,
    R: tl.constexpr, SCORES: tl.constexpr, VALUES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """w [E, H, R, M'] and lse [E, H, R] (base 2) from z [E, H, R, M].

    Without a score map z are the scores (M = N), without a value map the probabilities are the weights (M' = N). `score_heads` and
    `value_heads` neighbouring KV heads share a map. The third axis of the grid is blocks of weights, or of tokens without a value map.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    head = tl.program_id(1).to(tl.int64)
    there = rows < entries * R
    entry = rows // R
    unit = entry * heads + head
    at = unit * R + rows % R
    score_map += head // score_heads * score_set
    value_map += head // value_heads * value_set
    c = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for low in range(0, tokens, BLOCK_N):
        n = low + tl.arange(0, BLOCK_N)
        s = _scores(
            z, at, there, score_map, score_token, score_row, n, tokens, stored, bias, mask, unit, entry,
            SCORES, HAS_BIAS, HAS_MASK, PRECISION, BLOCK_R, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        if VALUES:
            in_map = (n < tokens)[:, None] & (c < weights)[None, :]
            y = tl.load(value_map + n[:, None] * value_token + c[None, :] * value_row, mask=in_map, other=0.0).to(tl.float32)
            acc = acc * shrink[:, None] + tl.dot(p, y, input_precision=PRECISION)
        top = higher
    safe = tl.where(total == 0.0, 1.0, total)
    if not VALUES:
        # The weights are the probabilities themselves, known only now that their sum is.
        s = _scores(
            z, at, there, score_map, score_token, score_row, c, tokens, stored, bias, mask, unit, entry,
            SCORES, HAS_BIAS, HAS_MASK, PRECISION, BLOCK_R, BLOCK_W, BLOCK_M,
        )  # fmt: skip
        acc = tl.exp2(s - top[:, None])
    tl.store(w + at[:, None] * weights + c[None, :], acc / safe[:, None], mask=there[:, None] & (c < weights)[None, :])
    if tl.program_id(2) == 0:
        tl.store(lse + at, tl.where(total == 0.0, -float("inf"), top + tl.log2(safe)), mask=there)


@triton.jit
def weigh_rows(
    w, values, value_entry, value_head, step, zero, cells, base, mask, out, stored, groups,
    RS: tl.constexpr, DV: tl.constexpr, DOT: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, WIDEST: tl.constexpr,
    THREES: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out [E, S, RS, DV] fp32 of weights [E, S, RS, M']; arguments as those of score_rows.

    mask [E, M']: which tokens are there, where values have no map of their own: what is stored for the others may be anything.
    """
    entry = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1).to(tl.int64)
    unit = entry * tl.num_programs(1) + own
    first = tl.program_id(2) * BLOCK_V
    c = first + tl.arange(0, BLOCK_V)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for low in range(0, stored, BLOCK_M):
        m = low + tl.arange(0, BLOCK_M)
        in_w = (r < RS)[:, None] & (m < stored)[None, :]
        x = tl.load(w + (unit * RS + r)[:, None] * stored + m[None, :], mask=in_w, other=0.0)
        if KIND == CODED:
            v = load_cells(
                values + entry * value_entry, cells + own * groups * DV, step + own * groups * DV, low // 8, groups, c, DV,
                WIDEST, THREES, BLOCK_M // 8, BLOCK_V,
            )  # fmt: skip
        elif KIND == QUANTISED:
            total += tl.sum(x, 1)
            codes = load_codes(values + entry * value_entry + own * value_head, low // 8, groups, c, DV, BITS, BLOCK_M // 8, BLOCK_V)
            v = tl.trans(codes).to(tl.float32)
        else:
            there = m < stored
            if HAS_MASK:
                there = there & (tl.load(mask + entry * stored + m, mask=there, other=0) != 0)
            v = tl.trans(load_raw(values + entry * value_entry + own * value_head, m, c, there, DV, BLOCK_V)).to(tl.float32)
        acc += tl.dot(x.to(DOT), v.to(DOT), input_precision=PRECISION)
    there_out = (r < RS)[:, None] & (c < DV)[None, :]
    to = (unit * RS + r)[:, None] * DV + c[None, :]
    if KIND == QUANTISED:
        size = tl.load(step + unit * DV + c, mask=c < DV, other=0.0).to(tl.float32)
        least = tl.load(zero + unit * DV + c, mask=c < DV, other=0.0).to(tl.float32)
        acc = acc * size[None, :] + total[:, None] * least[None, :]
    elif KIND == CODED:
        shared = (own * tl.num_programs(0) + entry) * RS + r
        acc += tl.load(base + shared[:, None] * DV + c[None, :], mask=there_out, other=0.0)
    tl.store(out + to, acc, mask=there_out)
