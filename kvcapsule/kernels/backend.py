"""Which implementation of attention and of packing serves a type of device: kernels or plain PyTorch
(docs/kernels.md)."""

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
        RuntimeError: if KVCAPSULE_KERNELS asks for what is not installed, or what does not serve the device.
    """
    if device not in _chosen:
        _chosen[device] = _choose(device)
    return _chosen[device]


def _choose(device: str) -> str:
    asked = os.environ.get(VARIABLE)
    if asked and asked not in BACKENDS:
        raise ValueError(
            f"{VARIABLE}={asked}: choose one of {', '.join(BACKENDS)}, or unset it to let the device decide."
        )
    own = {"cpu": "numba", "cuda": "triton"}.get(device, "reference")
    chosen = asked or (own if _installed(own) else "reference")
    if chosen != "reference" and not _installed(chosen):
        extra = {"numba": "cpu", "triton": "triton"}[chosen]
        raise RuntimeError(
            f"{VARIABLE}={chosen}, but {chosen.capitalize()} is not installed: pip install 'kvcapsule[{extra}]', or"
            " unset the variable."
        )
    if chosen == "numba" and device != "cpu":
        raise RuntimeError(
            f"{VARIABLE}=numba serves the CPU alone, not tensors on {device}: unset it, or set {VARIABLE}=reference."
        )
    if chosen == "triton":
        _require_triton(device)
    return chosen


def _installed(name: str) -> bool:
    return name == "reference" or find_spec(name) is not None


def _require_triton(device: str) -> None:
    from .fused.device import INTERPRETED

    if (device == "cpu") != INTERPRETED:
        mend = "set TRITON_INTERPRET=1 too" if device == "cpu" else "unset TRITON_INTERPRET"
        raise RuntimeError(
            f"Triton cannot serve tensors on {device}: compiled kernels need a CUDA device, and those that Triton"
            f" interprets (TRITON_INTERPRET=1, set before Python starts) need the CPU. Either {mend}, or set"
            f" {VARIABLE}=reference."
        )
