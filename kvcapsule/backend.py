"""Which implementation of attention and of packing serves a type of device: the kernels or plain PyTorch (docs/kernels.md)."""

import os
from importlib.util import find_spec

VARIABLE = "KVCAPSULE_KERNELS"
BACKENDS = ("reference", "numba", "triton")


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
    from .kernels.fused.device import INTERPRETED

    if (device == "cpu") != INTERPRETED:
        mend = "set TRITON_INTERPRET=1 too" if device == "cpu" else "unset TRITON_INTERPRET"
        raise RuntimeError(
            f"Triton cannot serve tensors on {device}: compiled kernels need a CUDA device, and those that Triton interprets "
            f"(TRITON_INTERPRET=1, set before Python starts) need the CPU. Either {mend}, or set {VARIABLE}=reference."
        )
