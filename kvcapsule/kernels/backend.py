"""Attention backend of each device type: compiled kernels or the plain PyTorch reference (docs/kernels.md)."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path

import torch

from ..errors import ConfigError, KernelError
from .cpu import library

VARIABLE = "KVCAPSULE_KERNELS"
BACKENDS = ("reference", "cpu", "triton")
_logger = logging.getLogger(__name__)


_chosen: dict[str, str] = {}
"""Backend by device type, filled at first use."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def backend_for(device: str) -> str:
    """The member of BACKENDS that serves tensors of a type of device ("cpu", "cuda").

    Raises:
        ConfigError: for a value of KVCAPSULE_KERNELS that names no backend.
        KernelError: if KVCAPSULE_KERNELS asks for what is not installed, or what does not serve the device.
    """
    if device not in _chosen:
        _chosen[device] = _choose(device)
    return _chosen[device]


def _choose(device: str) -> str:
    setting = os.environ.get(VARIABLE)
    if setting == "numba":
        raise ConfigError(f"{VARIABLE}=numba: the Numba kernels were replaced by C++ kernels, set {VARIABLE}=cpu.")
    if setting and setting not in BACKENDS:
        raise ConfigError(
            f"{VARIABLE}={setting}: choose one of {', '.join(BACKENDS)}, or unset it to let the device decide."
        )
    chosen = setting or {"cpu": "cpu", "cuda": "triton"}.get(device, "reference")
    if missing := _missing(chosen):
        if setting:
            raise KernelError(f"{VARIABLE}={setting}, but {missing}, or unset the variable.")
        _logger.warning("kvcapsule: attention runs in plain PyTorch, several times slower: %s.", missing)
        return "reference"
    if chosen == "cpu" and device != "cpu":
        raise KernelError(
            f"{VARIABLE}=cpu serves the CPU alone, not tensors on {device}: unset it, or set {VARIABLE}=reference."
        )
    if chosen == "triton":
        _require_triton(device)
        if device != "cpu" and _is_first_use(folder := _triton_cache()):
            _logger.warning("kvcapsule: Triton compiles the GPU kernels once for this machine, into %s", folder)
    return chosen


def _missing(backend: str) -> str | None:
    """What a backend lacks and how to install it; None if nothing is missing."""
    if backend == "cpu" and library.compiler() is None:
        return f"no C++ compiler was found: {library.INSTALL}"
    if backend == "triton" and find_spec("triton") is None:
        return "Triton is not installed: pip install 'kvcapsule[triton]'"
    return None


def _triton_cache() -> Path:
    """Where Triton keeps what it has compiled."""
    from triton import knobs

    return Path(knobs.cache.dir)


def _is_first_use(folder: Path) -> bool:
    """Whether Triton has compiled nothing yet, of any program."""
    return not folder.is_dir() or not any(folder.iterdir())


def _require_triton(device: str) -> None:
    from .triton.arguments import INTERPRETED

    if (device == "cpu") != INTERPRETED:
        mend = "set TRITON_INTERPRET=1 too" if device == "cpu" else "unset TRITON_INTERPRET"
        raise KernelError(
            f"Triton cannot serve tensors on {device}: compiled kernels need a CUDA device, and those that Triton"
            f" interprets (TRITON_INTERPRET=1, set before Python starts) need the CPU. Either {mend}, or set"
            f" {VARIABLE}=reference."
        )
