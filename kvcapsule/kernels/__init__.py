"""Attention over segments, and the packing of codes: a reference in plain PyTorch, and Triton kernels that agree with it.

What runs is chosen once for each kind of device: the kernels on CUDA where Triton is installed (`pip install kvcapsule[triton]`), the
reference everywhere else. The environment variable KVCAPSULE_KERNELS=reference or =triton, read at the first call, overrides the choice;
on the CPU `triton` needs TRITON_INTERPRET=1 besides, and is for tests. What the kernels do not cover, they leave to the reference by the
predicates of kvcapsule.kernels.fused.plan: nothing falls back because something failed.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

import torch

from ..segment import Segment

VARIABLE = "KVCAPSULE_KERNELS"
BACKENDS = ("reference", "triton")


@lru_cache(maxsize=16)
def backend(device: str) -> str:
    """The member of BACKENDS that serves tensors of a type of device ("cpu", "cuda").

    Raises:
        ValueError: for a value of KVCAPSULE_KERNELS that names no backend.
        RuntimeError: if KVCAPSULE_KERNELS asks for triton where it is not installed, or Triton is set up for another device.
    """
    asked = os.environ.get(VARIABLE)
    if asked and asked not in BACKENDS:
        raise ValueError(f"{VARIABLE}={asked}: choose one of {', '.join(BACKENDS)}, or unset it to let the device decide.")
    installed = find_spec("triton") is not None
    chosen = asked or ("triton" if device == "cuda" and installed else "reference")
    if chosen == "triton":
        _require_triton(device, installed)
    return chosen


def _require_triton(device: str, installed: bool) -> None:
    if not installed:
        raise RuntimeError(f"{VARIABLE}=triton, but Triton is not installed: pip install 'kvcapsule[triton]', or unset the variable.")
    from .fused.device import INTERPRETED

    if (device == "cpu") != INTERPRETED:
        mend = "set TRITON_INTERPRET=1 too" if device == "cpu" else "unset TRITON_INTERPRET"
        raise RuntimeError(
            f"Triton cannot serve tensors on {device}: compiled kernels need a CUDA device, and those that Triton interprets "
            f"(TRITON_INTERPRET=1, set before Python starts) need the CPU. Either {mend}, or set {VARIABLE}=reference."
        )


def attend(query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None) -> torch.Tensor:
    """As kvcapsule.kernels.reference.attend, by the backend of the query's device."""
    if backend(query.device.type) == "triton":
        from .fused.attend import attend as chosen
    else:
        from .reference import attend as chosen
    return chosen(query, segments, scale, visible)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As kvcapsule.packing.pack, by the backend of the codes' device."""
    if backend(codes.device.type) == "triton":
        from .fused.packing import pack as chosen
    else:
        from ..packing import pack as chosen
    return chosen(codes, bits)
