"""Test modules of a folder that is skipped as a whole where its package is not installed; pytest says so."""

from pathlib import Path
from typing import Any

import pytest


class _Skipped(pytest.Module):
    reason: str

    def collect(self) -> Any:
        pytest.skip(self.reason, allow_module_level=True)


def skipped_module(module_path: Path, parent: Any, reason: str) -> pytest.Module:
    """A module of which nothing is collected but the reason."""
    module: _Skipped = _Skipped.from_parent(parent, path=module_path)
    module.reason = reason
    return module
