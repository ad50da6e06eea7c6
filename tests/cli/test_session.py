"""What commands that run a model prepare."""

import io
from collections.abc import Iterator

import datasets
import pytest
import torch
import transformers
from rich.console import Console

from kvcapsule.cli import session
from kvcapsule.errors import ModelError


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


def test_threads_and_seed_are_set() -> None:
    session.begin(Console(file=io.StringIO()), threads=1, seed=7, device="cpu")
    assert torch.get_num_threads() == 1
    first = torch.rand(3)
    session.begin(Console(file=io.StringIO()), threads=None, seed=7, device=None)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bars_are_off_where_stderr_is_no_terminal(terminal: bool) -> None:
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()
    session.begin(Console(file=io.StringIO(), force_terminal=terminal), threads=None, seed=0, device=None)
    assert datasets.are_progress_bars_disabled() is not terminal
    assert transformers.utils.logging.is_progress_bar_enabled() is terminal


def test_a_device_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ModelError, match="--device abacus cannot be used here"):
        session.begin(Console(file=io.StringIO()), threads=1, seed=0, device="abacus")
