"""Codes into bytes, by the backend of the codes' device."""

import torch

from .. import packing
from ..backend import backend


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As kvcapsule.packing.pack, by the backend of the codes' device."""
    if backend(codes.device.type) == "triton":
        from .fused.packing import pack as by_triton

        return by_triton(codes, bits)
    return packing.pack(codes, bits)
