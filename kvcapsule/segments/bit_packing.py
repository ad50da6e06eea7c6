"""Bit packing: codes of 1, 2, 3, 4 or 8 bits in bytes, eight codes at a time, so that eight b-bit codes fill b bytes.

8 / b consecutive codes share a byte, the first in its lowest bits. 3 does not divide 8: two bytes hold the low two bits
of the eight codes, a third byte their high bits.
"""

import torch

WIDTHS = (1, 2, 3, 4, 8)
"""Possible bits of a code."""
GROUP = 8
"""Number of codes that are packed together."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type that eight codes of each width fill."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [..., 8], all below 2^bits, into bytes [..., bits]."""
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=-1)
    lanes = codes.unflatten(-1, (bits, 8 // bits))
    packed: torch.Tensor = lanes[..., 0].clone()
    for lane in range(1, 8 // bits):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack bytes [..., bits] into uint8 codes [..., 8]."""
    if bits == 8:
        return packed
    return spread(packed, bits)[..., None].view(torch.uint8)


def spread(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack bytes [..., bits] into int64 words [...] whose eight bytes are the codes, the first one in the lowest byte
    (first in memory: little-endian).

    Eight codes move at once: first the lower and the upper four codes of a word are separated, then the pairs of codes,
    then the codes.
    """
    if bits == 3:
        return spread(packed[..., :2], 2) | (spread(packed[..., 2:], 1) << 2)
    # A copy, because a view as wider integers needs an aligned address.
    dense = packed.clone(memory_format=torch.contiguous_format)
    word = dense.flatten().view(_WORDS[bits]).view(packed.shape[:-1]).to(torch.int64)
    if bits == 8:
        return word
    word &= 2 ** (8 * bits) - 1  # int16 and int32 are sign-extended
    for fields in (2, 4, 8):
        width, stride = 8 * bits // fields, 64 // fields
        word |= word << (stride - width)
        word &= sum((2**width - 1) << (stride * field) for field in range(fields))
    return word
