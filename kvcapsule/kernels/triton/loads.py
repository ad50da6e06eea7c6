"""Loads inside Triton kernels: raw rows, quantised rows, coded cells, maps, and where a query lies.

A load is masked wherever an index may lie outside its tensor and where a token is hidden: memory that is not read
cannot spoil a sum. Offsets have 64 bits throughout.
"""

import triton
import triton.language as tl

from ...segments import mixed_width_rows as mixed
from ...segments import segment

RAW, QUANTISED, CODED, BOTH, MIXED = (tl.constexpr(i) for i in range(5))
"""How rows are stored: a tensor, QuantizedRows, CodedRows, MixedWidthRows. BOTH: a launch over raw and quantised
segments."""
LOG2E = tl.constexpr(1.4426950408889634)
"""Scores are scaled by log2(e), so that exp2 gives their exponentials."""
BIAS_UNIT = tl.constexpr(segment.BIAS_UNIT)
SCALE_MIDDLE, OCTAVE = tl.constexpr(mixed.SCALE_MIDDLE), tl.constexpr(mixed.OCTAVE)
MINIMUM_MIDDLE, FRACTIONS = tl.constexpr(mixed.MINIMUM_MIDDLE), tl.constexpr(mixed.FRACTIONS)
LOWEST = tl.constexpr(-3.0e38)
"""Initial running maximum: finite, because a row that sees no token would otherwise be rescaled by exp2(inf - inf)."""


@triton.jit
def query_offset(layout, row, kv_head, r, ROWS: tl.constexpr, QUERIES: tl.constexpr):
    """Offset of row r of a KV head in a Queries tensor [B, H * G, Q, D]; r counts G query heads times Q queries."""
    query_head = kv_head * (ROWS // QUERIES) + r // QUERIES
    return row * layout.row_stride + query_head * layout.head_stride + (r % QUERIES) * layout.query_stride


@triton.jit
def load_map(map_, head, row, column, valid):
    """Elements of a Map for one KV head, in fp32, at indices that broadcast to one shape; 0 where not valid."""
    at = map_.data + head // map_.heads_per_set * map_.set_stride + row * map_.row_stride + column * map_.column_stride
    return tl.load(at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def load_raw(base, row, channel, valid_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, rows] of dense rows [*, WIDTH], channels first; 0 where there is no such row or channel."""
    at = base + row[None, :] * WIDTH + channel[:, None]
    # A mask over channels would be computed for every load; a full block needs none.
    valid = valid_rows[None, :] if WIDTH == BLOCK else valid_rows[None, :] & (channel[:, None] < WIDTH)
    return tl.load(at, mask=valid, other=0.0)


@triton.jit
def load_codes(
    base, first, groups, channel, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    """[BLOCK, 8 * GROUPS] codes of QuantizedRows, channels first, from group `first` of the `groups` of each channel.

    Eight tokens of a channel fill BITS bytes, which are loaded as one word where BITS is 1, 2 or 4.
    """
    group = first + tl.arange(0, GROUPS)
    if BITS == 8:
        token = first * 8 + tl.arange(0, 8 * GROUPS)
        valid = (channel[:, None] < WIDTH) & (token[None, :] < groups * 8)
        codes = tl.load(base + channel[:, None].to(tl.int64) * (groups * 8) + token[None, :], mask=valid, other=0)
    else:
        valid = (channel[:, None] < WIDTH) & (group[None, :] < groups)
        at = channel[:, None].to(tl.int64) * groups + group[None, :]
        eighth = tl.arange(0, 8)[None, None, :]
        if BITS == 3:
            low = tl.load(base + at * 3, mask=valid, other=0).to(tl.int32)
            low = low | (tl.load(base + at * 3 + 1, mask=valid, other=0).to(tl.int32) << 8)
            high = tl.load(base + at * 3 + 2, mask=valid, other=0).to(tl.int32)
            spread = ((low[:, :, None] >> (2 * eighth)) & 3) | (((high[:, :, None] >> eighth) & 1) << 2)
        else:
            if BITS == 4:
                word = tl.load(base.to(tl.pointer_type(tl.int32)) + at, mask=valid, other=0)
            elif BITS == 2:
                word = tl.load(base.to(tl.pointer_type(tl.int16)) + at, mask=valid, other=0).to(tl.int32)
            else:
                word = tl.load(base + at, mask=valid, other=0).to(tl.int32)
            spread = (word[:, :, None] >> (BITS * eighth)) & ((1 << BITS) - 1)
        codes = tl.reshape(spread, (BLOCK, 8 * GROUPS))
    return codes


@triton.jit
def load_cells(
    base, cells, scales, first, groups, channel, channels,
    WIDEST: tl.constexpr, HAS_3_BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[8 * GROUPS, BLOCK] coefficients of CodedRows without offset, rows first, from group `first` of one set of heads.

    Args:
        base: the entry's bytes.
        cells: of the set, [groups, channels] int32: 16 times the cell's first byte, plus its width in bits.
        scales: of the set, [groups, channels].
        WIDEST: bits of the widest cell, which is the number of bytes to load.
        HAS_3_BITS: whether there are cells of 3 bits, whose low and high bits are stored apart.
    """
    group = first + tl.arange(0, GROUPS)
    valid = (group[:, None] < groups) & (channel[None, :] < channels)
    at = group[:, None] * channels + channel[None, :]
    cell = tl.load(cells + at, mask=valid, other=0)
    width = cell & 15
    byte = base + (cell >> 4)
    word_type = tl.int64 if WIDEST == 8 else tl.int32
    word = tl.load(byte, mask=width > 0, other=0).to(word_type)
    for k in tl.static_range(1, WIDEST):
        word = word | (tl.load(byte + k, mask=width > k, other=0).to(word_type) << (8 * k))
    eighth = tl.arange(0, 8)[None, :, None]
    width_of_code = width[:, None, :]
    top_code = (1 << width_of_code) - 1
    code = ((word[:, None, :] >> (width_of_code * eighth).to(word_type)) & top_code.to(word_type)).to(tl.int32)
    if HAS_3_BITS:
        low = ((word[:, None, :] >> (2 * eighth).to(word_type)) & 3).to(tl.int32)
        high = ((word[:, None, :] >> (16 + eighth).to(word_type)) & 1).to(tl.int32)
        code = tl.where(width_of_code == 3, low | (high << 2), code)
    scale = tl.load(scales + at, mask=valid, other=0.0).to(tl.float32)
    scale = tl.where(width > 0, scale, 0.0)
    rows = (code.to(tl.float32) - top_code.to(tl.float32) * 0.5) * scale[:, None, :]
    return tl.reshape(rows, (8 * GROUPS, BLOCK))


@triton.jit
def load_mixed(rows, entry, head, row, channel, WIDTH: tl.constexpr):
    """[rows, channels] codes of MixedWidthRows of one unit; 0 where there is no such row or channel."""
    first = tl.load(rows.firsts + 2 * head)
    row_bytes = tl.load(rows.firsts + 2 * head + 2) - first
    base = rows.data + entry * rows.entry_stride + first * rows.rows
    place = tl.load(rows.places + head * WIDTH + channel, mask=channel < WIDTH, other=0)
    width, bit = place & 15, (place >> 4) & 7
    at = base + row[:, None] * row_bytes + (place >> 7)[None, :]
    valid = (row < rows.rows)[:, None] & (width > 0)[None, :]
    code = tl.load(at, mask=valid, other=0).to(tl.int32)
    # Nothing is read behind the last byte.
    code = code | (tl.load(at + 1, mask=valid & (bit + width > 8)[None, :], other=0).to(tl.int32) << 8)
    return (code >> bit[None, :]) & ((1 << width) - 1)[None, :]


@triton.jit
def load_mixed_grid(rows, entry, head, channel, WIDTH: tl.constexpr):
    """Scale and minimum [channels] of MixedWidthRows of one unit (kvcapsule.segments.mixed_width_rows), in fp32."""
    at, valid = head * WIDTH + channel, channel < WIDTH
    width = tl.load(rows.places + at, mask=valid, other=0) & 15
    side = rows.side + entry * rows.coded + tl.load(rows.side_places + at, mask=valid, other=0)
    byte = tl.load(side, mask=width > 0, other=0).to(tl.int32)
    power = tl.exp2(((byte & 15) - SCALE_MIDDLE).to(tl.float32) / OCTAVE)
    scale = tl.load(rows.scale + at, mask=valid, other=0.0).to(tl.float32) * power
    range_ = scale * ((1 << width) - 1).to(tl.float32)
    fraction = ((byte >> 4) - MINIMUM_MIDDLE).to(tl.float32) / FRACTIONS
    return scale, tl.load(rows.minimum + at, mask=valid, other=0.0).to(tl.float32) + range_ * fraction
