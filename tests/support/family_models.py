"""A tiny model for every row of kvcapsule.vlm.families, with prompts, and a method that records layer prefills."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed
from kvcapsule.policy import Full
from kvcapsule.vlm.families import FAMILIES, Family
from kvcapsule.vlm.geometry import KVGeometry

from . import tiny_families
from .tiny_families import BUILDERS, Tiny

EXACT = 1e-5
NEW = 5
MARKS = [
    tiny_families.IMAGE,
    tiny_families.VIDEO,
    tiny_families.START,
    tiny_families.END,
    tiny_families.CUT,
    tiny_families.VIDEO_START,
    tiny_families.VIDEO_END,
]
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": tiny_families.PAD,
    "suppress_tokens": MARKS,
    "output_logits": True,
    "return_dict_in_generate": True,
}
TILE = 8


class Case(NamedTuple):
    family: Family
    model_type: str
    class_name: str
    builder: Callable[[], Tiny]


CASES = [
    Case(family, *of_type)
    for family in FAMILIES
    if family.status == "works"
    for of_type in zip(family.model_types, family.classes, BUILDERS[family.name], strict=True)
]


class Built(NamedTuple):
    case: Case
    tiny: Tiny
    model: PreTrainedModel
    geometry: KVGeometry

    @property
    def prompts(self) -> list[list[Any]]:
        """Two images of different sizes amid text, one behind padding, none."""
        first, second = self.tiny.picture(0), self.tiny.picture(1)
        return [[5, 6, first, 7, second, 8, 9], [3, second, 4, 4], [1, 2, 3]]

    @property
    def film(self) -> list[list[Any]]:
        """A video, beside an image where the model takes both at once (GLM-4V gives them the same placeholder), and
        behind padding."""
        video, image = self.tiny.video(2), self.tiny.picture(1)
        return [
            [5, video, 6, 7] if self.case.family.name == "GLM-4V" else [5, video, 6, image, 7],
            [4, self.tiny.video(3), 8],
        ]

    def identity(self, tile: int = TILE) -> Capsule:
        return Capsule(CapsuleConfig("identity", IdentityConfig(tile), self.geometry, "tiny"))


@functools.cache
def built(index: int) -> Built:
    case = CASES[index]
    tiny = case.builder()
    model = tiny_families.build(case.model_type, tiny)
    return Built(case, tiny, model, KVGeometry.from_config(model.config))


def assert_same(out: Any, expected: Any, atol: float = EXACT) -> None:
    assert torch.equal(out.sequences[:, -NEW:], expected.sequences[:, -NEW:])
    assert len(out.logits) == len(expected.logits) == NEW
    for ours, theirs in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


class Witness(Full):
    """The full cache, recording every layer prefill."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[LayerPrefill] = []

    def compress(self, prefill: LayerPrefill) -> Compressed:
        self.seen.append(prefill)
        return super().compress(prefill)
