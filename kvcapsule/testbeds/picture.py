"""A picture with questions on it, and data sets of such pictures."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .digits import SPLITS
from .pages import Question

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Thing:
    """Something that a picture shows: its name and its box in pixels."""

    name: str
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Picture:
    """An RGB image, what it shows, and questions with exact answers."""

    image: Image.Image
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]


Draw = Callable[[str, int, int], Picture]
"""(split, index, seed) to a picture; the same arguments always give the same picture."""


def generator(split: str, index: int, seed: int, stream: int) -> np.random.Generator:
    """The randomness of one picture; `stream` tells kinds of pictures apart.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return np.random.default_rng([seed, SPLITS.index(split), index, stream])


def data_set(draw: Draw, split: str, size: int, seed: int, tasks: Sequence[str]) -> "datasets.Dataset":
    """`size` questions, each on a picture of its own, the tasks in turn; of several questions of a task, one is drawn.

    Columns: image, prompt, answer, task. Deterministic by (split, seed); size is only a cut.
    """

    def rows() -> Iterable[tuple[Image.Image, Question]]:
        for index in range(size):
            task = tasks[index % len(tasks)]
            drawn = draw(split, index, seed)
            fitting = [asked for asked in drawn.questions if asked.task == task]
            yield drawn.image, fitting[int(generator(split, index, seed, stream=99).integers(len(fitting)))]

    return table(rows())


def table(rows: Iterable[tuple[Image.Image, Question]]) -> "datasets.Dataset":
    """Images with one question each as a data set."""
    import datasets

    held: dict[str, list[Any]] = {"image": [], "prompt": [], "answer": [], "task": []}
    for image, asked in rows:
        for column, value in zip(held, (image, asked.prompt, asked.answer, asked.task), strict=True):
            held[column].append(value)
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "prompt": text, "answer": text, "task": text})
    return datasets.Dataset.from_dict(held, features=features)


def prior_accuracy(known: Iterable[Mapping[str, str]], asked: Iterable[Mapping[str, str]]) -> dict[str, float]:
    """Share of right answers, by task, of one who never looks: the most frequent answer to the same prompt among the
    `known` rows.

    A prompt that is not among them gets the task's most frequent answer.
    """
    by_prompt: dict[str, Counter[str]] = defaultdict(Counter)
    by_task: dict[str, Counter[str]] = defaultdict(Counter)
    for row in known:
        by_prompt[row["prompt"]][row["answer"]] += 1
        by_task[row["task"]][row["answer"]] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for row in asked:
        seen = by_prompt.get(row["prompt"]) or by_task.get(row["task"])
        right[row["task"]].append(seen is not None and seen.most_common(1)[0][0] == row["answer"])
    return {task: sum(found) / len(found) for task, found in right.items()}
