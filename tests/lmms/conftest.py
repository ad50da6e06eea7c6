"""Tests of kvcapsule inside lmms-eval: run by `make test-lmms`, in an environment of their own. Where lmms-eval is not
installed they are skipped, and pytest says so."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.skipped_modules import skipped_module

HAS_LMMS_EVAL = find_spec("lmms_eval") is not None

if HAS_LMMS_EVAL:
    # Read when datasets is first imported.
    os.environ["HF_DATASETS_OFFLINE"] = "1"


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    if HAS_LMMS_EVAL:
        return None
    return skipped_module(module_path, parent, "lmms-eval is not installed: make test-lmms")


@pytest.fixture(autouse=True)
def no_deprecated_names() -> None:
    """What lmms-eval asks of transformers is its own affair."""


@pytest.fixture(autouse=True, scope="session")
def cache_of_data_sets(tmp_path_factory: pytest.TempPathFactory) -> None:
    """lmms-eval's own choice is the user's."""
    os.environ["LMMS_EVAL_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
