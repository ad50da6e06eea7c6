"""Progress on a terminal and on a pipe."""

import re
import time
from io import StringIO

import pytest
from rich.console import Console

from kvcapsule.cli import progress
from kvcapsule.cli.progress import Bar, Stages, duration, tracked


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


def test_stages_of_a_pipe_get_lines_also_while_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage under way is told of again and again, one that has ended once."""
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.01)
    screen = StringIO()
    with Stages(Console(file=screen, width=20)) as stages:
        first = stages.add_task("reading", total=2)
        stages.advance(first, 2)
        stages.add_task("answering", total=1200)
        until = time.monotonic() + 20
        while screen.getvalue().count("answering") < 3 and time.monotonic() < until:
            time.sleep(0.01)
        stages.update(1, completed=700)
    lines = screen.getvalue().splitlines()
    assert lines[:3] == ["reading: 2 of 2, 0 s", "answering: 0 of 1200, 0 s", "answering: 0 of 1200, 0 s"]
    assert lines[-1].startswith("answering: 700 of 1200") and screen.getvalue().count("reading") == 1


def test_stages_of_a_terminal_are_bars() -> None:
    screen = StringIO()
    with Stages(Console(file=screen, force_terminal=True, width=120)) as stages:
        assert list(stages.track(range(3), description="pages")) == [0, 1, 2]
    assert re.findall(r"pages.*3/3", screen.getvalue()) and "pages: 3" not in screen.getvalue()


def test_durations() -> None:
    assert [duration(x) for x in (59.0, 90.0, 5400.0)] == ["59 s", "1.5 min", "1.5 h"]
