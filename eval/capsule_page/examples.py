"""Questions answered side by side: by the full cache, the capsule, and pruning and quantisation beside it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import datasets
from PIL import Image
from rich.progress import Progress
from transformers import PreTrainedModel, ProcessorMixin

from kvcapsule.data.batches import read_question

from ..batches import by_task
from ..entries import FULL, Entry
from ..quality import Answering, evaluate


class Answer(NamedTuple):
    """A method's answer to an example."""

    method: str
    text: str
    score: float
    """In [0, 1]."""
    is_same: bool
    """Whether it equals the full cache's."""


class Example(NamedTuple):
    """A question about images, and all methods' answers."""

    images: list[Image.Image]
    prompt: str
    expected: str
    answers: list[Answer]
    """The full cache's is the first."""


def chosen_rows(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """The first rows of each kind of question in turn, `count` at most, sorted by kind."""
    tasks = list(rows["task"])
    seen: dict[str, int] = {}
    turns = []
    for i, task in enumerate(tasks):
        seen[task] = seen.get(task, 0) + 1
        turns.append((seen[task], i))
    return by_task(rows.select([i for _, i in sorted(turns)[:count]]))


def answered_examples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    entries: Sequence[Entry],
    answering: Answering,
    progress: Progress,
) -> Iterator[Example]:
    """Let every method answer the rows, one question at a time, so that no answer depends on which others are shown.

    Args:
        model: a VLM, not attached.
        processor: its processor.
        rows: of `chosen_rows`.
        entries: the methods, the full cache first.
        answering: how.
        progress: shows a bar.
    """
    for i in progress.track(range(len(rows)), description="answering the examples"):
        tallies = evaluate(model, processor, rows.select([i]), entries, answering, Progress(disable=True))
        question = read_question(rows[i], i)
        full = tallies[FULL].answers[0]
        answers = [
            Answer(name, tally.answers[0], tally.scores[question.task][0], tally.answers[0] == full)
            for name, tally in tallies.items()
        ]
        yield Example(question.images, question.prompt, question.answer, answers)
