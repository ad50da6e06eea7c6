"""Attention over segments, and the packing of codes: a reference in plain PyTorch, and Triton kernels that agree with it.

What runs is chosen once for each kind of device: the kernels on CUDA where Triton is installed (`pip install kvcapsule[triton]`), the
reference everywhere else. The environment variable KVCAPSULE_KERNELS=reference or =triton, read at the first call, overrides the choice;
on the CPU `triton` needs TRITON_INTERPRET=1 besides, and is for tests. What the kernels do not cover, they leave to the reference by the
predicates of kvcapsule.kernels.fused.plan: nothing falls back because something failed.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from ..segment import Segment
from .reference import attend as reference_attend

VARIABLE = "KVCAPSULE_KERNELS"
BACKENDS = ("reference", "triton")


_chosen: dict[str, str] = {}
"""The backend of each type of device that was asked for."""


def backend(device: str) -> str:
    """The member of BACKENDS that serves tensors of a type of device ("cpu", "cuda").

    Raises:
        ValueError: for a value of KVCAPSULE_KERNELS that names no backend.
        RuntimeError: if KVCAPSULE_KERNELS asks for triton where it is not installed, or Triton is set up for another device.
    """
    if device not in _chosen:
        _chosen[device] = _choose(device)
    return _chosen[device]


def _choose(device: str) -> str:
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
        out: torch.Tensor = _attend_by_triton(query, segments, scale, visible)
        return out
    return reference_attend(query, segments, scale, visible)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_triton(query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None) -> torch.Tensor:
    """The kernels bring their own launches, which the compiler leaves as they are."""
    from .fused.attend import attend as chosen

    return chosen(query, segments, scale, visible)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As kvcapsule.packing.pack, by the backend of the codes' device."""
    if backend(codes.device.type) == "triton":
        from .fused.packing import pack as chosen
    else:
        from ..packing import pack as chosen
    return chosen(codes, bits)
