"""Models that vLLM serves in the bench: pages-vlm, and a random LLaVA whose decoding is bound by its KV cache.

The tokens of the random model mean nothing; its time and bytes are those of a trained model of the same shape.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.capsule.hub import find
from kvcapsule.codec.compact import CompactConfig
from kvcapsule.testbeds.pages import pages
from kvcapsule.vlm.geometry import KVGeometry

from .. import random_transform

PAGES, RANDOM = "pages-vlm", "random-llava"
COMPRESSION = 20
_PATCH = 4
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Subject(NamedTuple):
    """A model on disk with what is asked of it."""

    name: str
    folder: Path
    visual_tokens: int
    implementation: str
    """vLLM's model_impl."""
    prompts: list[dict[str, Any]]
    answer: int
    """Tokens of an answer at most."""
    ends: bool
    """Whether an answer may end before."""
    text_tokens: int
    """Of a prompt and its answer."""


def pages_vlm(count: int) -> Subject:
    """pages-vlm, asked about as many pages of its test split."""
    prompts = [
        {"prompt": f"<|user|><image>{row['prompt']}<|assistant|>", "multi_modal_data": {"image": row["image"]}}
        for row in pages("test", count, 0)
    ]
    return Subject(PAGES, find(PAGES), 196, "transformers", prompts, 120, True, 40)


def random_llava(side: int, count: int, answer: int, folder: Path) -> Subject:
    """A LLaVA with random weights, side x side visual tokens an image, asked about as many random images."""
    _make(side, folder)
    rng = np.random.default_rng(0)
    size, words = side * _PATCH, "Read line 1, and then tell what stands in the last line."
    prompts = [
        {
            "prompt": f"<|user|><image>{words}<|assistant|>",
            "multi_modal_data": {"image": Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))},
        }
        for _ in range(count)
    ]
    text = len(AutoProcessor.from_pretrained(folder).tokenizer(prompts[0]["prompt"])["input_ids"]) - 1
    return Subject(RANDOM, folder, side * side, "auto", prompts, answer, False, text + answer)


def _make(side: int, folder: Path) -> None:
    """4 layers of 8 query and 4 KV heads of 64: 8,192 bytes of fp32 KV a token, beside 13 MB of weights."""
    source = find(PAGES)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER:
        shutil.copy(source / name, folder / name)
    processor = AutoProcessor.from_pretrained(source)
    size = {"height": side * _PATCH, "width": side * _PATCH}
    processor.image_processor.size = processor.image_processor.crop_size = size
    processor.patch_size, processor.num_additional_image_tokens = _PATCH, 1
    processor.vision_feature_select_strategy = "default"
    processor.save_pretrained(folder)
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=8192,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=side * _PATCH,
        patch_size=_PATCH,
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_layer=-1)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    # vLLM knows the names that LLaVA's weights have on the Hub, not those of transformers 5.
    (weights,) = folder.glob("*.safetensors")
    names = {name: tensor for name, tensor in load_file(weights).items()}
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model.") if "vision_model" not in name else name: tensor
        for name, tensor in names.items()
    }
    save_file(renamed, weights, metadata={"format": "pt"})


def make_capsule(folder: Path, family: str, tile: int, into: Path) -> None:
    """A random capsule for a model on disk.

    Args:
        folder: of the model.
        family: "transform": a code of 20 times fewer bytes than 16 bits a number; "compact": one row in 20.
        tile: tokens of a tile.
        into: the capsule's folder.
    """
    geometry = KVGeometry.from_config(AutoConfig.from_pretrained(folder))
    drawn = torch.Generator().manual_seed(0)
    if family == "transform":
        capsule = random_transform.capsule(geometry, tile, tile_bytes(geometry, tile), drawn)
    else:
        config = CompactConfig(tile, ratios=(1 / COMPRESSION,) * len(geometry.capsule_layers))
        capsule = Capsule(CapsuleConfig("compact", config, geometry, "random")).requires_grad_(False)
        for bank in (buffer for name, buffer in capsule.named_buffers() if name.endswith("bank")):
            bank.copy_(torch.randn(bank.shape, generator=drawn))
    capsule.save_pretrained(into)


def tile_bytes(geometry: KVGeometry, tile: int) -> int:
    """Bytes of a layer's tile, keys and values, at 16 bits a number, COMPRESSION times fewer."""
    return 2 * 2 * tile * geometry.kv_heads * geometry.head_dim // COMPRESSION
