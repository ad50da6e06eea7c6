"""Tests of kvcapsule inside vLLM: run by `make test-vllm`, in an environment of their own. Where vLLM is not installed
they are skipped, and pytest says so."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.skipped_modules import skipped_module

HAS_VLLM = find_spec("vllm") is not None

if HAS_VLLM:
    # One process, so that tests see the scheduler and the worker; read when vLLM is first imported.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    # Compiling small functions of the sampler takes longer than all tests that run them.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    # It would count for more than the bytes that the tests give.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    return None if HAS_VLLM else skipped_module(module_path, parent, "vLLM is not installed: make test-vllm")


@pytest.fixture(autouse=True)
def no_deprecated_names() -> None:
    """What vLLM asks of transformers is its own affair."""


@pytest.fixture(scope="session")
def tile32(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A capsule for pages-vlm that stores everything, in tiles of 32 tokens."""
    from support.serving_engine import identity_capsule

    return identity_capsule("pages-vlm", 32, tmp_path_factory.mktemp("capsule") / "identity-32")


@pytest.fixture
def engines() -> Iterator[Any]:
    """engines(capsule, ...): an engine at a time in this process; the one before is shut down."""
    from support.serving_engine import Engines

    made = Engines()
    yield made
    made.close()
