"""Pictures with questions about them, and data sets of such pictures."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import ConfigError
from .digits import SPLITS
from .pages import Question

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Thing:
    """An object in a picture: its name and its box in pixels."""

    name: str
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Picture:
    """An RGB image, the objects in it, and questions with exact answers."""

    image: Image.Image
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]


Draw = Callable[[str, int, int], Picture]
"""Maps (split, index, seed) to a picture; a pure function."""


def generator(split: str, index: int, seed: int, stream: int) -> np.random.Generator:
    """Random generator of one picture; different kinds of pictures use a different `stream`.

    Raises:
        ConfigError: for an unknown split.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return np.random.default_rng([seed, SPLITS.index(split), index, stream])


def data_set(draw: Draw, split: str, size: int, seed: int, tasks: Sequence[str]) -> "datasets.Dataset":
    """Data set of `size` questions, one per picture, alternating over the tasks; one of a picture's questions of the
    task is drawn at random.

    Columns: image, prompt, answer, task. Rows depend on split and seed alone: a smaller `size` gives the first rows.
    """

    def rows() -> Iterable[tuple[Image.Image, Question]]:
        for index in range(size):
            task = tasks[index % len(tasks)]
            drawn = draw(split, index, seed)
            fitting = [question for question in drawn.questions if question.task == task]
            yield drawn.image, fitting[int(generator(split, index, seed, stream=99).integers(len(fitting)))]

    return table(rows())


def table(rows: Iterable[tuple[Image.Image, Question]]) -> "datasets.Dataset":
    """Data set of images with one question each."""
    import datasets

    held: dict[str, list[Any]] = {"image": [], "prompt": [], "answer": [], "task": []}
    for image, question in rows:
        for column, value in zip(held, (image, question.prompt, question.answer, question.task), strict=True):
            held[column].append(value)
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "prompt": text, "answer": text, "task": text})
    return datasets.Dataset.from_dict(held, features=features)


def prior_accuracy(train: Iterable[Mapping[str, str]], test: Iterable[Mapping[str, str]]) -> dict[str, float]:
    """Accuracy by task without looking at the images: the answer to a test prompt is its most frequent answer in the
    training rows, or the task's most frequent answer if the prompt does not occur there."""
    by_prompt: dict[str, Counter[str]] = defaultdict(Counter)
    by_task: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        by_prompt[row["prompt"]][row["answer"]] += 1
        by_task[row["task"]][row["answer"]] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for row in test:
        seen = by_prompt.get(row["prompt"]) or by_task.get(row["task"])
        right[row["task"]].append(seen is not None and seen.most_common(1)[0][0] == row["answer"])
    return {task: sum(hits) / len(hits) for task, hits in right.items()}
