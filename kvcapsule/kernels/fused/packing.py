"""kvcapsule.segments.bit_packing.pack by a kernel: every code is read once and every byte written once, and nothing is made in between."""

import torch

from ...segments.bit_packing import GROUP, WIDTHS
from .pack import pack_codes

_BLOCK = 256


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., 8], each below 2^bits, to bytes [..., bits].

    Raises:
        ValueError: for codes that are not bytes in groups of eight, or bits that cannot be packed.
    """
    if codes.dtype != torch.uint8 or codes.shape[-1] != GROUP or bits not in WIDTHS:
        raise ValueError(
            f"codes {tuple(codes.shape)} of {codes.dtype} in {bits} bits: uint8 codes [..., {GROUP}] and bits of "
            f"{', '.join(map(str, WIDTHS))} can be packed."
        )
    codes = codes.contiguous()
    packed = codes.new_empty(*codes.shape[:-1], bits)
    count = codes.numel() // GROUP
    if count:
        with torch.cuda.device_of(codes):
            pack_codes[(-(-count // _BLOCK),)](codes, packed, count, BITS=bits, BLOCK=_BLOCK)
    return packed
