"""Running a VLM over a cache and comparing it with another run; tiny models of other families than conftest's."""

from typing import Any

import torch
from transformers import (
    BatchFeature,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from kvcapsule.inference.attach import attach
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.method import Method

Model = LlavaForConditionalGeneration

EXACT = 5e-5
"""What float32 makes of logits of several units behind four layers, where nothing is lost."""
MIXED = ((1, "Read line 2."), (2, "Transcribe the page."), (0, "What is the number beside the owl?"))
"""One image, several, none; with left padding."""


def in_dtype(batch: BatchFeature, dtype: torch.dtype) -> BatchFeature:
    """The batch with its pixels in `dtype`."""
    return BatchFeature({name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()})


def run(model: Model, method: Method, batch: BatchFeature, **options: Any) -> Any:
    with attach(model, method):
        return model.generate(**batch, **options)


def assert_same(out: Any, expected: Any, atol: float = EXACT) -> None:
    assert torch.equal(out.sequences, expected.sequences)
    assert len(out.logits) == len(expected.logits)
    for ours, theirs in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def prefill(model: Model, batch: BatchFeature, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **cache_argument(cache)).logits


def step(model: Model, cache: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [B, Q, V] of `tokens` [B, Q] behind what the cache holds; `mask` [B, N] covers both."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, position_ids=positions, **cache_argument(cache)).logits


def longer(mask: torch.Tensor, by: int) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones(mask.shape[0], by)], dim=1)


def tiny_qwen() -> tuple[Any, dict[str, torch.Tensor]]:
    """A Qwen2.5-VL of two layers with M-RoPE, and a prompt with images of 24 and 8 tokens."""
    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
    }
    vision |= {"spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=90, video_token_id=91)
    torch.manual_seed(0)
    grid = torch.tensor([[1, 8, 12], [1, 4, 8]])
    ids = torch.tensor([[5, 6, 92, *[90] * 24, 93, 92, *[90] * 8, 93, 8, 9]])
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 90).int()}
    return Qwen2_5_VLForConditionalGeneration(config), inputs


def tiny_gemma() -> tuple[Any, dict[str, torch.Tensor]]:
    """A Gemma 3 of four layers, every second with a window and a rotation of its own, and a prompt with two images of
    16 tokens."""
    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    vision |= {"patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_index=90)
    torch.manual_seed(0)
    ids = torch.tensor([[5, 6, *[90] * 16, 7, *[90] * 16, 8, 9]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32), "token_type_ids": (ids == 90).int()}
    return Gemma3ForConditionalGeneration(config), inputs


def ready(built: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, BatchFeature]:
    """A model as it was built, with weights of a size at which attention is not uniform, and its prompt with a mask."""
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return built.eval().requires_grad_(False), BatchFeature(inputs)
