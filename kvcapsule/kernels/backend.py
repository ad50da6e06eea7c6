"""Which implementation of attention and of packing serves a type of device: kernels or plain PyTorch
(docs/kernels.md)."""

import logging
import os
from importlib.util import find_spec

from .cpu import library

VARIABLE = "KVCAPSULE_KERNELS"
BACKENDS = ("reference", "cpu", "triton")
_logger = logging.getLogger(__name__)


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
    if asked == "numba":
        raise ValueError(
            f"{VARIABLE}=numba: Numba's kernels are gone, set {VARIABLE}=cpu for the CPU's kernels in C++."
        )
    if asked and asked not in BACKENDS:
        raise ValueError(
            f"{VARIABLE}={asked}: choose one of {', '.join(BACKENDS)}, or unset it to let the device decide."
        )
    own = {"cpu": "cpu", "cuda": "triton"}.get(device, "reference")
    chosen = asked or (own if _missing(own) is None else "reference")
    if missing := _missing(asked or own):
        if asked:
            raise RuntimeError(f"{VARIABLE}={asked}, but {missing}, or unset the variable.")
        if own == "cpu":
            _logger.warning("kvcapsule: attention runs in plain PyTorch, several times slower: %s.", missing)
    if chosen == "cpu" and device != "cpu":
        raise RuntimeError(
            f"{VARIABLE}=cpu serves the CPU alone, not tensors on {device}: unset it, or set {VARIABLE}=reference."
        )
    if chosen == "triton":
        _require_triton(device)
    return chosen


def _missing(name: str) -> str | None:
    """What a backend lacks, and how to get it; None where nothing is missing."""
    if name == "cpu" and library.compiler() is None:
        return f"no C++ compiler was found: {library.INSTALL}"
    if name == "triton" and find_spec("triton") is None:
        return "Triton is not installed: pip install 'kvcapsule[triton]'"
    return None


def _require_triton(device: str) -> None:
    from .fused.device import INTERPRETED

    if (device == "cpu") != INTERPRETED:
        mend = "set TRITON_INTERPRET=1 too" if device == "cpu" else "unset TRITON_INTERPRET"
        raise RuntimeError(
            f"Triton cannot serve tensors on {device}: compiled kernels need a CUDA device, and those that Triton"
            f" interprets (TRITON_INTERPRET=1, set before Python starts) need the CPU. Either {mend}, or set"
            f" {VARIABLE}=reference."
        )
