"""Progress on stderr: a bar where a person looks on, a line now and then where the output goes to a file or a pipe."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY_SECONDS = 10.0
"""Between two lines."""

T = TypeVar("T")


class Bar:
    """How many of a stage's items are done."""

    def __init__(self, console: Console, title: str, total: int, done: int = 0) -> None:
        """title: of the stage. total: its items. done: those that are done already."""
        self.console, self.title, self.total, self.done = console, title, total, done
        self._next_line = time.monotonic() + EVERY_SECONDS
        self._printed: int | None = None
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}", style="dim"), console=console
            )
            self._task = self._progress.add_task(title, total=total, completed=done, note="")
            self._progress.start()

    def update(self, done: int, note: str = "") -> None:
        """done: items by now. note: shown behind them."""
        self.done = done
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif time.monotonic() >= self._next_line:
            self._line(note)

    def close(self, note: str = "") -> None:
        """The stage ends; may be called again."""
        if self._progress is not None:
            self._progress.stop()
        elif self._printed != self.done:
            self._line(note)

    def _line(self, note: str) -> None:
        self._next_line = time.monotonic() + EVERY_SECONDS
        self._printed = self.done
        self.console.print(f"{self.title}: {self.done} of {self.total} {note}".rstrip(), highlight=False, markup=False)


def tracked(items: Iterable[T], title: str, total: int, console: Console) -> Iterator[T]:
    """The items, with their number on the screen; an item is done when the next one is taken."""
    bar = Bar(console, title, total)
    try:
        for item in items:
            yield item
            bar.update(bar.done + 1)
    finally:
        bar.close()
