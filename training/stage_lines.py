"""A line on each long stage, as soon as one of its batches tells how long it takes."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from kvcapsule.cli.progress import duration
from kvcapsule.cli.sizes import shown_bytes

LONG = 30.0
"""Seconds from which a stage gets a line."""
T = TypeVar("T")


def with_lines(
    batches: Iterable[T], title: str, count: int, held: int | None, show: Callable[[str], None]
) -> Iterator[T]:
    """The batches of a stage.

    Args:
        batches: of the stage.
        title: of the stage.
        count: of its batches.
        held: bytes that it holds beside the model and the forward of a batch, where they are known.
        show: prints a line to the user.
    """
    begun = time.perf_counter()
    for number, batch in enumerate(batches):
        if number == 1:
            seconds = time.perf_counter() - begun
            if seconds * count >= LONG:
                holds = "" if held is None else f", holding up to {shown_bytes(held)} beside the model and a batch"
                show(f"{title}: {count} batches of {seconds:.1f} s, about {duration(seconds * count)} in all{holds}.")
        yield batch
