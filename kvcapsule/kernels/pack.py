"""Codes into bytes, by the backend of the codes' device."""

import torch

from ..segments import bit_packing
from .backend import backend


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As kvcapsule.segments.bit_packing.pack, by the backend of the codes' device."""
    if backend(codes.device.type) == "triton":
        from .fused.packing import pack as by_triton

        return by_triton(codes, bits)
    return bit_packing.pack(codes, bits)
