"""Questions about the same images, side by side, so that what they share is read once."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import datasets
from rich.progress import Progress

from kvcapsule.data.batches import read_question
from kvcapsule.data.row_digest import images_digest
from kvcapsule.errors import DataError

T = TypeVar("T")


def image_groups(rows: datasets.Dataset, progress: Progress) -> list[list[int]]:
    """Numbers of the rows, those about the same images (by their pixels) together. Groups are sorted by their tasks, so
    that answers of similar lengths are written together; a row without images is a group of its own.

    Raises:
        DataError: naming the row, if an image cannot be read; or if no row has one.
    """
    bar = progress.add_task("comparing the images", total=len(rows))
    groups: dict[int | tuple[str, int], list[int]] = {}
    for index in range(len(rows)):
        images = read_question(rows[index], index).images
        groups.setdefault(images_digest(images) if images else ("row", index), []).append(index)
        progress.advance(bar)
    if all(isinstance(key, tuple) for key in groups):
        raise DataError("none of the questions has an image, so there is nothing to compress.")
    tasks = list(rows["task"])
    order = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
    return sorted(groups.values(), key=lambda group: [order[tasks[index]] for index in group])


def bundles(groups: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Whole groups, as many as have `size` members together; a larger one is a bundle of its own."""
    bundle: list[int] = []
    for group in groups:
        if bundle and len(bundle) + len(group) > size:
            yield bundle
            bundle = []
        bundle = [*bundle, *group]
    if bundle:
        yield bundle


def runs(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in their order, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
