"""Codes of 1, 2, 3, 4 or 8 bits in bytes, eight codes at a time: eight codes of b bits fill exactly b bytes.

8 / b consecutive codes share a byte, the first in its lowest bits. 3 does not divide 8: two bytes hold the low two bits of the eight
codes, a third byte their high bits.
"""

import torch

WIDTHS = (1, 2, 3, 4, 8)
"""Bits of a code."""
GROUP = 8
"""Codes that are packed together."""


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
    if bits == 3:
        return unpack(packed[..., :2], 2) | (unpack(packed[..., 2:], 1) << 2)
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    lanes: torch.Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return lanes.flatten(-2)
