"""Attention over stored rows that stand for themselves: raw or kept tokens, compact rows with a bias, few-bit rows, the tail.

One launch serves all such segments of a layer. Its programs are items of a flattened list (segment, entry, KV head, split): a table says
where each segment's items begin, so rows of a batch may own different numbers of entries of different lengths, and heads too, at no cost.
Every program reads its tokens once, for all query heads that share the KV head, and leaves a normalised output and its log-sum-exp
(base 2) to kvcapsule.kernels.triton.combine.

The scales of few-bit rows stay out of the inner loop: those of the keys are multiplied into the query, those of the values into the output.
"""

import triton
import triton.language as tl

from .loads import BOTH, LOWEST, QUANTISED, RAW, load_codes, load_raw

FIELDS = (
    "first tokens splits heads keys key_entry key_head values value_entry value_head owner head bias mask query kind "
    "key_step key_zero value_step value_zero"
).split()
"""Columns of the table. first: its first item; keys ... mask: addresses (0: none); key_entry ...: strides in elements (bytes, of codes);
query: where its turned queries begin (-1: the query as it is); kind: RAW or QUANTISED."""
_WIDTH = tl.constexpr(len(FIELDS))
(
    _FIRST, _TOKENS, _SPLITS, _HEADS, _KEYS, _KEY_ENTRY, _KEY_HEAD, _VALUES, _VALUE_ENTRY, _VALUE_HEAD, _OWNER, _HEAD, _BIAS, _MASK, _QUERY,
    _KIND, _KEY_STEP, _KEY_ZERO, _VALUE_STEP, _VALUE_ZERO,
) = (tl.constexpr(i) for i in range(len(FIELDS)))  # fmt: skip


@triton.jit
def _flash(
    line, unit, entry, head, q, low, high, tokens, scale, visible, visible_entry, visible_query, sees,
    Q: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr, KIND: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, ALIGNED: tl.constexpr, VISIBLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Softmax attention of q [BLOCK_R, BLOCK_K] over the tokens [low, high) of a unit: out [BLOCK_R, BLOCK_V], log2 of the mass."""
    c_k = tl.arange(0, BLOCK_K)
    c_v = tl.arange(0, BLOCK_V)
    r = tl.arange(0, BLOCK_R)
    keys = tl.load(line + _KEYS)
    values = tl.load(line + _VALUES)
    key_at = entry * tl.load(line + _KEY_ENTRY) + head * tl.load(line + _KEY_HEAD)
    value_at = entry * tl.load(line + _VALUE_ENTRY) + head * tl.load(line + _VALUE_HEAD)
    bias = tl.load(line + _BIAS)
    mask = tl.load(line + _MASK)
    if KIND == QUANTISED:
        keys_8 = keys.to(tl.pointer_type(tl.uint8)) + key_at
        values_8 = values.to(tl.pointer_type(tl.uint8)) + value_at
        at = unit * DK + c_k
        step = tl.load(tl.load(line + _KEY_STEP).to(tl.pointer_type(ROWS)) + at, mask=c_k < DK, other=0.0).to(tl.float32)
        zero = tl.load(tl.load(line + _KEY_ZERO).to(tl.pointer_type(ROWS)) + at, mask=c_k < DK, other=0.0).to(tl.float32)
        q_zero = tl.sum(q * zero[None, :], 1)
        q_in = (q * step[None, :]).to(DOT)
    else:
        keys_x = keys.to(tl.pointer_type(ROWS)) + key_at
        values_x = values.to(tl.pointer_type(ROWS)) + value_at
        if ALIGNED:
            keys_x = tl.multiple_of(keys_x, 16)
            values_x = tl.multiple_of(values_x, 16)
        q_in = q.to(DOT)
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in range(low, high, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n < high
        if mask != 0:
            there = there & (tl.load(mask.to(tl.pointer_type(tl.int8)) + entry * tokens + n, mask=there, other=0) != 0)
        seen = there[None, :] & (r >= 0)[:, None]
        if VISIBLE:  # noqa: SIM102 (the one is known when this is compiled, the other is not)
            if sees:
                at_q = visible + entry * visible_entry + (r % Q)[:, None] * visible_query
                seen = seen & (tl.load(at_q + n[None, :], mask=seen, other=0) != 0)
                there = there & (tl.max(seen.to(tl.int32), 0) != 0)
        if KIND == QUANTISED:
            k = load_codes(keys_8, start // 8, tl.cdiv(tokens, 8), c_k, DK, KEY_BITS, BLOCK_N // 8, BLOCK_K)
            s = (tl.dot(q_in, k.to(DOT), input_precision=PRECISION) + q_zero[:, None]) * scale
        else:
            k = load_raw(keys_x, n, c_k, there, DK, BLOCK_K)
            s = tl.dot(q_in, k.to(DOT), input_precision=PRECISION) * scale
        if bias != 0:
            b = tl.load(bias.to(tl.pointer_type(BIAS)) + unit * tokens + n, mask=there, other=0.0).to(tl.float32)
            s += b[None, :] * 1.4426950408889634
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        if KIND == QUANTISED:
            v = load_codes(values_8, start // 8, tl.cdiv(tokens, 8), c_v, DV, VALUE_BITS, BLOCK_N // 8, BLOCK_V)
        else:
            v = load_raw(values_x, n, c_v, there, DV, BLOCK_V)
        acc = acc * shrink[:, None] + tl.dot(p.to(DOT), tl.trans(v.to(DOT)), input_precision=PRECISION)
        top = higher
    safe = tl.where(total == 0.0, 1.0, total)
    out = acc / safe[:, None]
    if KIND == QUANTISED:
        at = unit * DV + c_v
        step = tl.load(tl.load(line + _VALUE_STEP).to(tl.pointer_type(ROWS)) + at, mask=c_v < DV, other=0.0).to(tl.float32)
        zero = tl.load(tl.load(line + _VALUE_ZERO).to(tl.pointer_type(ROWS)) + at, mask=c_v < DV, other=0.0).to(tl.float32)
        out = out * step[None, :] + zero[None, :]
    return out, tl.where(total == 0.0, -float("inf"), top + tl.log2(safe))


@triton.jit(do_not_specialize=["last_tokens"])
def attend_rows(
    table, segments, last_tokens, split, scale, query, query_row, query_head, query_query, turned, visible, visible_entry, visible_query,
    out, lse,
    R: tl.constexpr, Q: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr,
    KIND: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, ALIGNED: tl.constexpr, VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One item: out [P, R, DV] and lse [P, R] of its tokens.

    Args:
        table: [segments, FIELDS] int64.
        last_tokens: tokens of the last segment, which alone grows from call to call.
        split: tokens of an item, a multiple of BLOCK_N.
        scale: of the scores, times log2(e).
        query: [B, H * G, Q, D] with these strides, channels dense.
        turned: queries in the frames or channels of the segments that have such, [U, R, DK] each.
        visible: [E, Q, N] of the last segment, tokens dense.
    """
    item = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    firsts = tl.load(table + s * _WIDTH + _FIRST, mask=s < segments, other=9223372036854775807)
    number = tl.sum((item >= firsts).to(tl.int32), 0) - 1
    line = table + number * _WIDTH
    last = number == segments - 1
    tokens = tl.load(line + _TOKENS)
    splits = tl.load(line + _SPLITS)
    if last:
        tokens = last_tokens.to(tl.int64)
        splits = tl.cdiv(last_tokens, split).to(tl.int64)
    local = item - tl.load(line + _FIRST)
    unit = local // splits
    heads = tl.load(line + _HEADS)
    entry = unit // heads
    head = unit % heads
    low = ((local % splits) * split).to(tl.int32)
    high = tl.minimum(low + split, tokens).to(tl.int32)

    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_K)
    there = (r < R)[:, None] & (c < DK)[None, :]
    begin = tl.load(line + _QUERY)
    if begin < 0:
        row = tl.load(tl.load(line + _OWNER).to(tl.pointer_type(tl.int64)) + entry)
        kv_head = head
        own = tl.load(line + _HEAD)
        if own != 0:
            kv_head = tl.load(own.to(tl.pointer_type(tl.int64)) + entry)
        at = row * query_row + (kv_head * (R // Q) + r // Q) * query_head + (r % Q) * query_query
        q = tl.load(query + at[:, None] + c[None, :], mask=there, other=0.0).to(tl.float32)
    else:
        q = tl.load(turned + begin + (unit * R + r)[:, None] * DK + c[None, :], mask=there, other=0.0).to(tl.float32)

    if KIND == BOTH:
        if tl.load(line + _KIND) == 1:
            o, mass = _flash(
                line, unit, entry, head, q, low, high, tokens, scale, visible, visible_entry, visible_query, last,
                Q, DK, DV, ROWS, BIAS, DOT, QUANTISED, KEY_BITS, VALUE_BITS, ALIGNED, VISIBLE, PRECISION, BLOCK_R, BLOCK_N, BLOCK_K,
                BLOCK_V,
            )  # fmt: skip
        else:
            o, mass = _flash(
                line, unit, entry, head, q, low, high, tokens, scale, visible, visible_entry, visible_query, last,
                Q, DK, DV, ROWS, BIAS, DOT, RAW, KEY_BITS, VALUE_BITS, ALIGNED, VISIBLE, PRECISION, BLOCK_R, BLOCK_N, BLOCK_K,
                BLOCK_V,
            )  # fmt: skip
    else:
        o, mass = _flash(
            line, unit, entry, head, q, low, high, tokens, scale, visible, visible_entry, visible_query, last,
            Q, DK, DV, ROWS, BIAS, DOT, KIND, KEY_BITS, VALUE_BITS, ALIGNED, VISIBLE, PRECISION, BLOCK_R, BLOCK_N, BLOCK_K, BLOCK_V,
        )  # fmt: skip

    to = item * R + r
    c_v = tl.arange(0, BLOCK_V)
    tl.store(out + to[:, None] * DV + c_v[None, :], o, mask=(r < R)[:, None] & (c_v < DV)[None, :])
    tl.store(lse + to, mass, mask=r < R)
