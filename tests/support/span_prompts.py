"""Prompts whose images are given out of a cache and taken in by another."""

from typing import Any, NamedTuple

import torch

from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from support import tiny_vlm
from support.family_models import CASES, MARKS, Built, built

TILE = 5
NEW = 6
QUESTION = [tiny_vlm.END, 8, 9, 11]
LLAVA, QWEN = (next(i for i, case in enumerate(CASES) if case.model_type == name) for name in ("llava", "qwen2_vl"))


class Prompt(NamedTuple):
    """The beginning of a prompt, up to the end of its last image, and the whole of it."""

    of: Built
    beginning: dict[str, torch.Tensor]
    rest: list[int]

    def generate(self, cache: CapsuleCache, **more: Any) -> Any:
        """What the model answers to the question behind the cache."""
        ids, added = self.beginning["input_ids"], torch.tensor([self.rest])
        call: dict[str, Any] = {"input_ids": torch.cat([ids, added], dim=1)}
        call["attention_mask"] = torch.ones_like(call["input_ids"])
        if "image_grid_thw" in self.beginning:
            types = self.beginning["mm_token_type_ids"]
            call |= {"image_grid_thw": self.beginning["image_grid_thw"]}
            call |= {"mm_token_type_ids": torch.cat([types, torch.zeros_like(added, dtype=types.dtype)], dim=1)}
        options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        options |= {"pad_token_id": tiny_vlm.PAD, "suppress_tokens": MARKS}
        return self.of.model.generate(**{**call, **options, **cache_argument(cache), **more})

    def read(self, cache: CapsuleCache) -> CapsuleCache:
        """The cache, once the model has read the beginning into it."""
        call = dict(self.beginning)
        if "image_grid_thw" not in call:
            call["position_ids"] = (call["attention_mask"].cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            self.of.model(**call, **cache_argument(cache))
        return cache


def cut(inputs: Any) -> dict[str, torch.Tensor]:
    """Inputs of a batch whose last token, behind the last image, was taken away."""
    end = inputs["input_ids"].shape[1] - 1
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: x[:, :end] if name in names else x for name, x in inputs.items()}


def prompt(index: int, *pictures: int) -> Prompt:
    of = built(index)
    parts: list[Any] = [5, 6]
    for picture in pictures:
        parts += [of.tiny.picture(picture), 7]
    return Prompt(of, cut(tiny_vlm.batch(of.tiny, parts[:-1])), QUESTION)
