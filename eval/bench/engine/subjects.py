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
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig

from kvcapsule.capsule.hub import find
from kvcapsule.testbeds.pages import pages
from kvcapsule.vlm.geometry import KVGeometry

from ..random_transform import capsule as random_capsule

PAGES = "pages-vlm"
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
    return Subject("random-llava", folder, side * side, "auto", prompts, answer, False, text + answer)


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
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token, vision_feature_layer=-1)
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


def make_capsule(folder: Path, tile: int, compression: float, into: Path) -> None:
    """A random transform code of `compression` times fewer bytes than 16 bits a number, for a model on disk."""
    from transformers import AutoConfig

    geometry = KVGeometry.from_config(AutoConfig.from_pretrained(folder))
    tile_bytes = int(2 * 2 * tile * geometry.kv_heads * geometry.head_dim / compression)
    random_capsule(geometry, tile, tile_bytes, torch.Generator().manual_seed(0)).save_pretrained(into)
