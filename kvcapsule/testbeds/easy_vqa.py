"""easy-VQA (PyPI `easy-vqa`, MIT): pictures of one coloured shape, with open and yes-or-no questions.

The package's test pictures are the test split; a tenth of its training pictures is the validation split. Duplicates of
a picture are left out, so that no two splits share one.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import ConfigError
from .digits import SPLITS
from .packages import EASY_VQA
from .pages import Question
from .picture import Picture, Thing, generator, table

if TYPE_CHECKING:
    import datasets

TASKS = ("open", "yesno")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
_VALIDATION = 10
"""One in so many training pictures belongs to the validation split."""
_STREAM = 3


def easy_vqa(split: str, size: int, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> "datasets.Dataset":
    """Data set of `size` distinct questions (or all there are), alternating over the tasks; columns image, prompt,
    answer, task.

    The seed determines the order of the questions.
    """
    pictures = shapes(split)
    by_task = [[(p, question) for p in pictures for question in p.questions if question.task == task] for task in tasks]
    orders = [generator(split, place, seed, _STREAM).permutation(len(rows)) for place, rows in enumerate(by_task)]
    size = min(size, len(tasks) * min(map(len, by_task)))
    chosen = [by_task[i % len(tasks)][orders[i % len(tasks)][i // len(tasks)]] for i in range(size)]
    return table((p.image, question) for p, question in chosen)


@cache
def shapes(split: str) -> tuple[Picture, ...]:
    """All pictures of a split with all their questions.

    Raises:
        ConfigError: for an unknown split.
        PackageError: if the package cannot be fetched.
    """
    return read(EASY_VQA.extracted() / "easy_vqa" / "data", split)


def read(folder: Path, split: str) -> tuple[Picture, ...]:
    """Read the pictures of a split from the package's data folder.

    Raises:
        ConfigError: for an unknown split.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    part = folder / ("test" if split == "test" else "train")
    questions: dict[int, list[Question]] = {}
    for prompt, answer, number in json.loads((part / "questions.json").read_text()):
        questions.setdefault(number, []).append(
            Question("yesno" if answer in ("yes", "no") else "open", prompt, answer)
        )
    seen = {_digest(_open(path)) for path in (folder / "train" / "images").glob("*.png")} if split == "test" else set()
    pictures = []
    for number in sorted(questions):
        image = _open(part / "images" / f"{number}.png")
        digest = _digest(image)
        if digest in seen:
            continue
        seen.add(digest)
        if split == "test" or (number % _VALIDATION == 0) == (split == "validation"):
            pictures.append(Picture(image, (_shape(image, questions[number]),), tuple(questions[number])))
    return tuple(pictures)


def _open(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def _digest(image: Image.Image) -> bytes:
    """Hash of the pixels; different files may hold the same picture."""
    return hashlib.sha256(image.tobytes()).digest()


def _shape(image: Image.Image, questions: list[Question]) -> Thing:
    """The picture's one shape: its box covers all pixels unlike the corner; its name is as complete as the open
    questions and answers allow."""
    pixels = np.asarray(image, int)
    inside = np.abs(pixels - pixels[0, 0]).sum(-1) > 24
    down, across = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
    said = {word for q in questions if q.task == "open" for word in (q.answer, *q.prompt.rstrip("?").split())}
    name = " ".join(word for word in (*COLOURS, *SHAPES) if word in said)
    if not len(down):
        return Thing(name, 0, 0, *map(float, image.size))
    return Thing(name, float(across[0]), float(down[0]), float(across[-1] + 1), float(down[-1] + 1))
