"""Parts of the tiny VLMs of the tests: token ids, configs of towers and language models, pictures, batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BatchFeature, PreTrainedModel

PAD, IMAGE, VIDEO, START, END, CUT, VIDEO_START, VIDEO_END = 0, 90, 91, 92, 93, 94, 95, 96
"""Token ids: padding, the placeholders, what stands around images and between the rows or frames of one."""
VOCABULARY = 100
WIDTH = 32
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
TOWER = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
GAIN = 8.0
"""Factor of the weight matrices: at their initial size all logits are alike, and no test could tell one cache from
another."""


class Picture(NamedTuple):
    """An image or a video as a processor would hand it over."""

    tokens: list[int]
    """What stands in the prompt for it."""
    inputs: dict[str, torch.Tensor]
    """What the model is given for it; those of several pictures are joined along their first dimension."""
    spans: list[int]
    """Lengths of the visual spans that it makes."""


Part = int | Picture
"""Of a prompt: a token of text or a picture."""


@dataclass(frozen=True)
class Tiny:
    """How to build a family's model and its inputs."""

    settings: dict[str, Any]
    """Of the config."""
    picture: Callable[[int], Picture]
    """picture(i): image number i; images 0 and 1 differ in size where the family takes images of any size."""
    video: Callable[[int], Picture] | None = None
    types: str = ""
    """Name of the input that marks visual tokens by 1 (images) and 2 (videos)."""
    join: Callable[[list[list[Picture]]], dict[str, torch.Tensor]] | None = None
    """Joins pictures, row by row, where their first dimension is not the pictures'."""


def build(model_type: str, tiny: Tiny, seed: int = 0) -> PreTrainedModel:
    """The family's real class from a random config, in eval mode and float32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **tiny.settings)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(GAIN)
    return model.eval().requires_grad_(False)


def batch(tiny: Tiny, *rows: Sequence[Part]) -> BatchFeature:
    """A left-padded batch of prompts."""
    ids = [[t for part in row for t in ([part] if isinstance(part, int) else part.tokens)] for row in rows]
    longest = max(map(len, ids))
    input_ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    pictures = [[part for part in row if isinstance(part, Picture)] for row in rows]
    if tiny.types:
        inputs[tiny.types] = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
        # GLM-4V writes the frames of a video with the placeholders of images, between two marks.
        in_video = (input_ids == VIDEO_START).cumsum(1) > (input_ids == VIDEO_END).cumsum(1)
        inputs[tiny.types] += ((input_ids == IMAGE) & in_video).int()
    if any(pictures):
        inputs |= tiny.join(pictures) if tiny.join else joined([p for row in pictures for p in row])
    return BatchFeature(inputs)


def joined(pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
    names = dict.fromkeys(name for p in pictures for name in p.inputs)
    return {name: torch.cat([p.inputs[name] for p in pictures if name in p.inputs]) for name in names}


def noise(index: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + index))


def around(count: int) -> list[int]:
    return [START, *[IMAGE] * count, END]


def clip(patch: int = 4, side: int = 16) -> dict[str, Any]:
    return {
        **TOWER,
        "model_type": "clip_vision_model",
        "image_size": side,
        "patch_size": patch,
        "projection_dim": WIDTH,
    }


def siglip(patch: int = 4, side: int = 16) -> dict[str, Any]:
    return {
        **TOWER,
        "model_type": "siglip_vision_model",
        "image_size": side,
        "patch_size": patch,
        "vision_use_head": False,
    }


def llama(**more: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": "llama", **more}


def qwen2(**more: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": "qwen2", **more}


def fixed(count: int, *shape: int, name: str = "pixel_values") -> Callable[[int], Picture]:
    """Images of one size, of `count` tokens each."""
    return lambda index: Picture(around(count), {name: noise(index, 1, *shape)}, [count])
