"""Codes of 1, 2, 3, 4 or 8 bits in bytes, eight codes at a time: eight codes of b bits fill exactly b bytes.

8 / b consecutive codes share a byte, the first in its lowest bits. 3 does not divide 8: two bytes hold the low two bits
of the eight codes, a third byte their high bits.
"""

import torch

WIDTHS = (1, 2, 3, 4, 8)
"""Bits of a code."""
GROUP = 8
"""Codes that are packed together."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer that eight codes of so many bits fill."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., 8], each below 2^bits, to bytes [..., bits]."""
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=-1)
    lanes = codes.unflatten(-1, (bits, 8 // bits))
    packed: torch.Tensor = lanes[..., 0].clone()
    for lane in range(1, 8 // bits):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [..., bits] to uint8 codes [..., 8]."""
    if bits == 8:
        return packed
    return spread(packed, bits)[..., None].view(torch.uint8)


def spread(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [..., bits] to int64 words [...] whose eight bytes are the codes, the first the lowest (and first in
    memory: little-endian).

    Eight codes move at once: the lower and the upper four of a word are drawn apart, then the pairs of each, then the
    codes of each pair.
    """
    if bits == 3:
        return spread(packed[..., :2], 2) | (spread(packed[..., 2:], 1) << 2)
    # A copy: a view as wider integers asks for an even address, which bytes need not have.
    dense = packed.clone(memory_format=torch.contiguous_format)
    word = dense.flatten().view(_WORDS[bits]).view(packed.shape[:-1]).to(torch.int64)
    if bits == 8:
        return word
    word &= 2 ** (8 * bits) - 1  # int16 and int32 bring their sign along
    for fields in (2, 4, 8):
        width, apart = 8 * bits // fields, 64 // fields
        word |= word << (apart - width)
        word &= sum((2**width - 1) << (apart * field) for field in range(fields))
    return word
