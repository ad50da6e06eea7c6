"""Progress on stderr: a bar where a person looks on, a line now and then where the output goes to a file or a pipe."""

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

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


class Stages(Progress):
    """Bars of several stages, one below the other; where nobody looks on, lines: every EVERY_SECONDS on the stage that
    is under way, also while none of its items ends, and one when it has ended."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._shown: dict[int, str] = {}
        """The last line of a stage, by its number."""
        self._ended = threading.Event()
        self._writer: threading.Thread | None = None

    def start(self) -> None:
        super().start()
        if self.disable and self._writer is None:
            self._writer = threading.Thread(target=self._write_lines, daemon=True)
            self._writer.start()

    def stop(self) -> None:
        super().stop()
        if self._writer is not None:
            self._ended.set()
            self._writer.join()
            self._writer = None
            self._write(self.tasks)

    def _write_lines(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            ended = [task for task in self.tasks if task.finished]
            under_way = [task for task in self.tasks if not task.finished]
            self._write([*ended, *under_way[-1:]])

    def _write(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            done = f"{task.description}: {task.completed:.0f} of {task.total or 0:.0f}"
            if task.finished and self._shown.get(task.id) == done:
                continue
            self._shown[task.id] = done
            self.console.print(
                f"{done}, {duration(task.elapsed or 0.0)}", highlight=False, markup=False, soft_wrap=True
            )


def duration(seconds: float) -> str:
    """A time in the unit that people would name."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
