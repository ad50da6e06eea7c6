"""Models, prompts and stores for attach(..., store=...)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvcapsule import ImageStore
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.attach import attach
from support import tiny_vlm
from support.family_models import CASES, OPTIONS, Built

TILE = 5
ROOM = 10**8
QUESTION = [3, 8, 9]
TOWERS = ("visual", "vision_tower", "vision_model")


class Setting:
    """A model, its prompts, and how often its vision tower ran."""

    def __init__(self, of: Built, model: Any = None) -> None:
        self.of, self.model = of, of.model if model is None else model

    def prompt(self, *pictures: int, before: int = 5, question: list[int] = QUESTION) -> Any:
        """Some text, pictures with a token behind each, a question."""
        parts: list[Any] = [before, 6]
        for picture in pictures:
            parts += [self.of.tiny.picture(picture), 7]
        return tiny_vlm.batch(self.of.tiny, [*parts, *question])

    def plain(self, capsule: Capsule, prompt: Any, **options: Any) -> Any:
        with attach(self.model, capsule):
            return self.model.generate(**prompt, **{**OPTIONS, **options})

    def ask(self, store: ImageStore, capsule: Capsule, prompt: Any, **options: Any) -> tuple[Any, int]:
        """The answer with a store, and how many images the vision tower saw."""
        with attach(self.model, capsule, store), self.watched() as runs:
            return self.model.generate(**prompt, **{**OPTIONS, **options}), len(runs)

    @contextmanager
    def watched(self) -> Iterator[list[None]]:
        runs: list[None] = []
        tower = next(getattr(self.model.model, name) for name in TOWERS if hasattr(self.model.model, name))
        handle = tower.register_forward_hook(lambda *args: runs.append(None))
        try:
            yield runs
        finally:
            handle.remove()


def number(model_type: str) -> int:
    return next(i for i, case in enumerate(CASES) if case.model_type == model_type)


def assert_identical(out: Any, expected: Any) -> None:
    assert torch.equal(out.sequences, expected.sequences)
    assert all(map(torch.equal, out.logits, expected.logits))


def hits(store: ImageStore) -> int:
    return store.statistics.hits
