"""Progress on a terminal and on a pipe."""

import re
from io import StringIO

import pytest
from rich.console import Console

from kvcapsule.cli import progress
from kvcapsule.cli.progress import Bar, tracked


def test_a_pipe_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    screen = StringIO()
    assert list(tracked(range(25), "pages", 25, Console(file=screen, width=20))) == list(range(25))
    assert screen.getvalue().splitlines() == ["pages: 10 of 25", "pages: 20 of 25", "pages: 25 of 25"]


def test_a_terminal_gets_a_bar_that_ends_at_its_end() -> None:
    screen = StringIO()
    bar = Bar(Console(file=screen, force_terminal=True, width=120), "steps", 20, 3)
    for step in range(4, 21):
        bar.update(step, "loss 0.1")
    bar.close()
    assert re.findall(r"\d+/20", screen.getvalue())[-1] == "20/20" and "loss 0.1" in screen.getvalue()


def test_items_that_stop_early_are_counted_as_they_are() -> None:
    screen = StringIO()
    for item in tracked(range(5), "pages", 5, Console(file=screen)):
        if item == 2:
            break
    assert screen.getvalue() == "pages: 2 of 5\n"
    assert not list(tracked([], "pages", 0, Console(quiet=True)))
