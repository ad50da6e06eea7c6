"""Packed rows decoded one number at a time with Python integers, from the description of their bytes alone."""

import torch

from kvcapsule.segments.coefficient_rows import CodedRows
from kvcapsule.segments.group_quantized_rows import GroupedRows
from kvcapsule.segments.quantized_rows import QuantizedRows


def code(packed: list[int], bits: int, index: int) -> int:
    """Code `index` of the eight that `bits` bytes hold."""
    if bits == 3:
        low = packed[index // 4] >> 2 * (index % 4) & 0b11
        return low + 4 * (packed[2] >> index & 1)
    per_byte = 8 // bits
    return (packed[index // per_byte] >> bits * (index % per_byte)) % 2**bits


def quantized(rows: QuantizedRows, entry: int, head: int) -> torch.Tensor:
    """[M, D]."""
    out = torch.full((rows.tokens, rows.codes.shape[2]), torch.nan, dtype=torch.float64)
    for channel in range(out.shape[1]):
        run = rows.codes[entry, head, channel].tolist()
        step, zero = float(rows.scale[entry, head, 0, channel]), float(rows.minimum[entry, head, 0, channel])
        for token in range(rows.tokens):
            group = run[token // 8 * rows.bits :][: rows.bits]
            out[token, channel] = code(group, rows.bits, token % 8) * step + zero
    return out


def addresses(widths: torch.Tensor) -> dict[tuple[int, int, int], int]:
    """The first byte of every coded cell (set of heads, group, channel)."""
    found, byte = {}, 0
    for width in (8, 4, 3, 2, 1):
        for of_set, groups in enumerate(widths.tolist()):
            for group, channels in enumerate(groups):
                for channel, own in enumerate(channels):
                    if own == width:
                        found[of_set, group, channel] = byte
                        byte += width
    return found


def coded(rows: CodedRows, entry: int, head: int) -> torch.Tensor:
    """[8 G, C]."""
    widths, step, own = rows.coding.widths, rows.coding.scale.double(), head // rows.coding.heads
    out = rows.coding.offset[own].double().clone()
    run = rows.packed[entry].tolist()
    for (of_set, group, channel), byte in addresses(widths).items():
        if of_set == own:
            width = int(widths[own, group, channel])
            for i in range(8):
                level = code(run[byte : byte + width], width, i) - (2**width - 1) / 2
                out[8 * group + i, channel] += level * float(step[own, group, channel])
    return out


def grouped(rows: GroupedRows, entry: int, head: int) -> torch.Tensor:
    """[M, D]."""
    scale, minimum = rows.scale[entry, head].tolist(), rows.minimum[entry, head].tolist()
    out = torch.full((len(scale), rows.length), torch.nan, dtype=torch.float64)
    for run, packed in enumerate(rows.codes[entry, head].tolist()):
        for place in range(rows.length):
            level = code(packed[place // 8 * rows.bits :][: rows.bits], rows.bits, place % 8)
            out[run, place] = level * scale[run][place // rows.group] + minimum[run][place // rows.group]
    return out.T if rows.along_tokens else out
