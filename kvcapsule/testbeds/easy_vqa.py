"""easy-VQA (PyPI `easy-vqa`, MIT): pictures of one coloured shape, with questions that are open or ask for yes or no.

Its own test pictures are the test split; a tenth of its training pictures is the validation split. A picture that is
there twice is left out the second time, so that no two splits share one.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

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
"""Every so manieth picture of the training set is the validation split's."""
_STREAM = 3


def easy_vqa(split: str, size: int, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> "datasets.Dataset":
    """`size` questions, the tasks in turn, no question twice, or as many as there are; columns image, prompt, answer,
    task.

    The seed says which questions come first.
    """
    found = shapes(split)
    by_task = [[(p, asked) for p in found for asked in p.questions if asked.task == task] for task in tasks]
    orders = [generator(split, place, seed, _STREAM).permutation(len(each)) for place, each in enumerate(by_task)]
    size = min(size, len(tasks) * min(map(len, by_task)))
    chosen = [by_task[i % len(tasks)][orders[i % len(tasks)][i // len(tasks)]] for i in range(size)]
    return table((p.image, asked) for p, asked in chosen)


@cache
def shapes(split: str) -> tuple[Picture, ...]:
    """All pictures of a split with all their questions.

    Raises:
        ValueError: for an unknown split.
        PackageError: if the package cannot be fetched.
    """
    return read(EASY_VQA.extracted() / "easy_vqa" / "data", split)


def read(folder: Path, split: str) -> tuple[Picture, ...]:
    """The same from the package's data folder.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    part = folder / ("test" if split == "test" else "train")
    asked: dict[int, list[Question]] = {}
    for prompt, answer, number in json.loads((part / "questions.json").read_text()):
        asked.setdefault(number, []).append(Question("yesno" if answer in ("yes", "no") else "open", prompt, answer))
    seen = {_digest(_open(path)) for path in (folder / "train" / "images").glob("*.png")} if split == "test" else set()
    found = []
    for number in sorted(asked):
        image = _open(part / "images" / f"{number}.png")
        digest = _digest(image)
        if digest in seen:
            continue
        seen.add(digest)
        if split == "test" or (number % _VALIDATION == 0) == (split == "validation"):
            found.append(Picture(image, (_shape(image, asked[number]),), tuple(asked[number])))
    return tuple(found)


def _open(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def _digest(image: Image.Image) -> bytes:
    """Of the pixels: two files of one picture may differ."""
    return hashlib.sha256(image.tobytes()).digest()


def _shape(image: Image.Image, asked: list[Question]) -> Thing:
    """The one shape: its box is where the picture is not as its corner is; its name, as far as the open questions and
    answers tell it."""
    pixels = np.asarray(image, int)
    inside = np.abs(pixels - pixels[0, 0]).sum(-1) > 24
    down, across = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
    said = {word for q in asked if q.task == "open" for word in (q.answer, *q.prompt.rstrip("?").split())}
    name = " ".join(word for word in (*COLOURS, *SHAPES) if word in said)
    if not len(down):
        return Thing(name, 0, 0, *map(float, image.size))
    return Thing(name, float(across[0]), float(down[0]), float(across[-1] + 1), float(down[-1] + 1))
