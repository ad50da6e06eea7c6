"""What the kernels share: reading tiles of stored rows, and how a launch is set up.

Loads are masked wherever an index may lie outside, and where a token is not seen: memory that is not read cannot spoil a sum. Addresses are
64 bits wide throughout.
"""

import torch
import triton
import triton.language as tl

RAW, QUANTISED, CODED, BOTH = (tl.constexpr(i) for i in range(4))
"""How rows are stored: tensors, QuantizedRows, CodedRows; BOTH: a launch over raw and quantised segments."""
LOG2E = 1.4426950408889634
LOWEST = tl.constexpr(-3.0e38)
"""Least running maximum: finite, so that a row that sees nothing yet is scaled by 1 and not by what is not a number."""


@triton.jit
def load_raw(base, row, channel, row_there, width: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, rows] of dense rows [*, width], channels first; 0 where there is no such row or channel."""
    at = base + row[None, :] * width + channel[:, None]
    # A mask over channels would be worked out for every load; a whole block needs none.
    there = row_there[None, :] if width == BLOCK else row_there[None, :] & (channel[:, None] < width)
    return tl.load(at, mask=there, other=0.0)


@triton.jit
def load_codes(base, first, groups, channel, width: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, 8 * GROUPS] codes of QuantizedRows, channels first, from group `first` of the `groups` that each channel has.

    Eight tokens of a channel fill BITS bytes, which are read as one word where they are 1, 2, 4 or 8.
    """
    group = first + tl.arange(0, GROUPS)
    if BITS == 8:
        token = first * 8 + tl.arange(0, 8 * GROUPS)
        there = (channel[:, None] < width) & (token[None, :] < groups * 8)
        codes = tl.load(base + channel[:, None].to(tl.int64) * (groups * 8) + token[None, :], mask=there, other=0)
    else:
        there = (channel[:, None] < width) & (group[None, :] < groups)
        at = channel[:, None].to(tl.int64) * groups + group[None, :]
        eighth = tl.arange(0, 8)[None, None, :]
        if BITS == 3:
            low = tl.load(base + at * 3, mask=there, other=0).to(tl.int32)
            low = low | (tl.load(base + at * 3 + 1, mask=there, other=0).to(tl.int32) << 8)
            high = tl.load(base + at * 3 + 2, mask=there, other=0).to(tl.int32)
            spread = ((low[:, :, None] >> (2 * eighth)) & 3) | (((high[:, :, None] >> eighth) & 1) << 2)
        else:
            if BITS == 4:
                word = tl.load(base.to(tl.pointer_type(tl.int32)) + at, mask=there, other=0)
            elif BITS == 2:
                word = tl.load(base.to(tl.pointer_type(tl.int16)) + at, mask=there, other=0).to(tl.int32)
            else:
                word = tl.load(base + at, mask=there, other=0).to(tl.int32)
            spread = (word[:, :, None] >> (BITS * eighth)) & ((1 << BITS) - 1)
        codes = tl.reshape(spread, (BLOCK, 8 * GROUPS))
    return codes


@triton.jit
def load_cells(
    base,
    cells,
    step,
    first,
    groups,
    channel,
    channels,
    WIDEST: tl.constexpr,
    THREES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[8 * GROUPS, BLOCK] coefficients of CodedRows without their offset, rows first, from group `first` of one set of KV heads.

    Args:
        base: the entry's bytes.
        cells: of the set, [groups, channels] int32: 16 times the cell's first byte, plus its width.
        step: of the set, [groups, channels].
        WIDEST: bits of the widest cell: bytes to read.
        THREES: whether there are cells of 3 bits, whose codes do not lie in a row.
    """
    group = first + tl.arange(0, GROUPS)
    there = (group[:, None] < groups) & (channel[None, :] < channels)
    at = group[:, None] * channels + channel[None, :]
    cell = tl.load(cells + at, mask=there, other=0)
    width = cell & 15
    byte = base + (cell >> 4)
    kind = tl.int64 if WIDEST == 8 else tl.int32
    word = tl.load(byte, mask=width > 0, other=0).to(kind)
    for k in tl.static_range(1, WIDEST):
        word = word | (tl.load(byte + k, mask=width > k, other=0).to(kind) << (8 * k))
    eighth = tl.arange(0, 8)[None, :, None]
    width3 = width[:, None, :]
    levels = (1 << width3) - 1
    code = ((word[:, None, :] >> (width3 * eighth).to(kind)) & levels.to(kind)).to(tl.int32)
    if THREES:
        low = ((word[:, None, :] >> (2 * eighth).to(kind)) & 3).to(tl.int32)
        high = ((word[:, None, :] >> (16 + eighth).to(kind)) & 1).to(tl.int32)
        code = tl.where(width3 == 3, low | (high << 2), code)
    size = tl.load(step + at, mask=there, other=0.0).to(tl.float32)
    size = tl.where(width > 0, size, 0.0)
    rows = (code.to(tl.float32) - levels.to(tl.float32) * 0.5) * size[:, None, :]
    return tl.reshape(rows, (8 * GROUPS, BLOCK))


INTERPRETED = not isinstance(load_raw, triton.JITFunction)
"""Whether Triton runs these kernels on the CPU by NumPy (TRITON_INTERPRET=1 when they were imported)."""

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What products are taken in: the query's precision. NumPy has no bfloat16, and the interpreter's product of it is garbage."""
    return tl.float32 if INTERPRETED else TYPES[dtype]


def precision(dtype: torch.dtype) -> str:
    """Of products of fp32 operands: TF32, Triton's default, would round scores as half precision does."""
    return "ieee" if dtype == torch.float32 else "tf32x3"


def block(size: int, least: int = 16, most: int = 1 << 30) -> int:
    """The power of two that holds `size`, between the bounds; 16 is the least side of a matrix product."""
    return min(max(1 << max(size - 1, 0).bit_length(), least), most)
