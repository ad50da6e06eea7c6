"""kvcapsule's own tasks for lmms-eval, offline: their rows, chats and scores, named by the YAML files of `tasks/`.

lmms-eval reads a line of a JSON file, which says what to draw, and `draw` or `draw_pairs` puts the rows in its place.
Scores are those of `kvcapsule eval`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from kvcapsule.data import source
from kvcapsule.data.images import images_of
from kvcapsule.data.source import SourceConfig
from kvcapsule.testbeds.pages import Page, page

from ..batches import by_task
from ..scores.demo import demo_score
from ..scores.target import Target

TASKS = Path(__file__).with_name("tasks")
"""The folder for `lmms-eval --include_path`."""
LOOKUP = "lookup"


def draw(plan: datasets.Dataset) -> datasets.Dataset:
    """The rows of one source, in the order in which `kvcapsule eval` asks them.

    Args:
        plan: one row with source, split, size and seed, as `--data` of `kvcapsule eval` has them.

    Raises:
        DataError: if they cannot be had.
    """
    return by_task(source.load(SourceConfig(**plan[0])))


def draw_pairs(plan: datasets.Dataset) -> datasets.Dataset:
    """Rows of two pages each, with a look-up of a word that stands on one of them alone.

    Args:
        plan: one row with split, size (pairs) and seed.
    """
    split, size, seed = (plan[0][name] for name in ("split", "size", "seed"))
    rows: dict[str, list[Any]] = {"images": [], "prompt": [], "answer": [], "task": []}
    for index in range(size):
        pair = [page(split, 2 * index + side, seed) for side in range(2)]
        prompt, answer = _lookup(pair, np.random.default_rng([seed, index]))
        for column, value in zip(rows, ([one.image for one in pair], prompt, answer, LOOKUP), strict=True):
            rows[column].append(value)
    text = datasets.Value("string")
    images = datasets.List(datasets.Image())
    features = datasets.Features({"images": images, "prompt": text, "answer": text, "task": text})
    return datasets.Dataset.from_dict(rows, features=features)


def _lookup(pair: Sequence[Page], rng: np.random.Generator) -> tuple[str, str]:
    """(question, answer): the words of the page down to the one of the question, and its number."""
    first = int(rng.integers(2))
    for side in (first, 1 - first):
        of, other = pair[side], {word for word, _ in pair[1 - side].lines}
        lines = [k for k, (word, _) in enumerate(of.lines) if word not in other]
        if lines:
            k = lines[int(rng.integers(len(lines)))]
            words = [word for word, _ in of.lines[: k + 1]]
            return f"What stands beside {words[-1]}?", "\n".join(words) + f" {of.lines[k][1]}"
    raise ValueError("two pages have the same words.")


def images(row: Mapping[str, Any]) -> list[Image.Image]:
    """The images of a row, as RGB."""
    return images_of({"image": row["images"] if "images" in row else row["image"]}, "a row")


def prompt(row: Mapping[str, Any]) -> str:
    """The question of a row."""
    return str(row["prompt"])


def chat(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The images of a row one after the other, then its question, as lmms-eval's messages."""
    content: list[dict[str, Any]] = [{"type": "image", "url": image} for image in images(row)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt(row)}]}]


def scores(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy of one answer, in 0..1, under "accuracy" and under the name of its task."""
    score = demo_score(answers[0], Target((row["answer"].strip(),), task=row["task"]))
    return {"accuracy": score, row["task"]: score}
