"""One tiny model of every family, built from a config with random weights."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from transformers import Gemma4Model

from .tiny_llava import PINPOINTS, any_resolution, llava, llava_next, llava_next_video, llava_onevision, vipllava
from .tiny_qwen import TYPES, glm4v, glm4v_moe, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_5_moe, qwen3_vl, qwen3_vl_moe
from .tiny_vlm import (
    CUT,
    END,
    IMAGE,
    PAD,
    START,
    TEXT,
    TOWER,
    VIDEO,
    VOCABULARY,
    WIDTH,
    Picture,
    Tiny,
    around,
    clip,
    fixed,
    llama,
    noise,
    qwen2,
    siglip,
)


def internvl() -> Tiny:
    """An image is cut into parts of 16 tokens, with nothing between them."""
    vision = {**TOWER, "image_size": [32, 32], "patch_size": [4, 4]}
    settings = {"text_config": qwen2(), "vision_config": vision, "image_token_id": IMAGE, "downsample_ratio": 0.5}

    def picture(index: int) -> Picture:
        parts = 1 if index % 2 else 3
        return Picture(around(16 * parts), {"pixel_values": noise(index, parts, 3, 32, 32)}, [16] * parts)

    return Tiny(settings, picture)


def idefics3() -> Tiny:
    """An image is cut into parts of 16 tokens, with marks between them."""
    vision = {**TOWER, "image_size": 32, "patch_size": 4}
    settings = {
        "text_config": llama(),
        "vision_config": vision,
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": PAD,
    }

    def picture(index: int) -> Picture:
        parts = 1 if index % 2 else 3
        tokens = [token for _ in range(parts) for token in (START, CUT, *[IMAGE] * 16)] + [START]
        return Picture(tokens, {"pixel_values": noise(index, parts, 3, 32, 32)}, [16] * parts)

    def join(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
        of_rows = [[part for p in row for part in p.inputs["pixel_values"]] for row in rows]
        pixels = torch.zeros(len(rows), max(map(len, of_rows)), 3, 32, 32)
        for row, parts in enumerate(of_rows):
            for index, part in enumerate(parts):
                pixels[row, index] = part
        return {"pixel_values": pixels}

    return Tiny(settings, picture, join=join)


def paligemma() -> Tiny:
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    settings = {
        "text_config": text,
        "vision_config": siglip(),
        "image_token_index": IMAGE,
        "projection_dim": WIDTH,
        "hidden_size": WIDTH,
    }
    return Tiny(settings, fixed(16, 3, 16, 16), types="token_type_ids")


def gemma3() -> Tiny:
    text = {**TEXT, "num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    settings = {
        "text_config": text,
        "vision_config": siglip(side=32),
        "mm_tokens_per_image": 16,
        "image_token_index": IMAGE,
    }
    return Tiny(settings, fixed(16, 3, 32, 32), types="token_type_ids")


def gemma4(**more: Any) -> Tiny:
    text = {
        **TEXT,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 8,
        "hidden_size_per_layer_input": 0,
    }
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": VOCABULARY}
    # As in the large ones: values that are the keys, fewer KV heads where attention is full, images that see all of
    # themselves.
    text |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "use_bidirectional_attention": "vision", **more}
    vision = {
        **TOWER,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
    settings = {
        "text_config": text,
        "vision_config": vision,
        "audio_config": None,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    }
    settings |= {"boi_token_id": START, "eoi_token_id": END, "audio_token_id": CUT}

    def picture(index: int) -> Picture:
        height, width = [(8, 8), (4, 8)][index % 2]
        places = torch.full((1, 64, 2), -1)
        places[0, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
        pixels = noise(index, 1, 64, 48).masked_fill((places < 0)[..., :1], 0)
        count = height * width // 4
        return Picture(around(count), {"pixel_values": pixels, "image_position_ids": places}, [count])

    def video(index: int) -> Picture:
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1).expand(3, 16, 2)
        inputs = {"pixel_values_videos": noise(index, 3, 16, 48), "video_position_ids": places}
        if "num_frames_per_video" in signature(Gemma4Model.get_video_features).parameters:
            inputs["num_frames_per_video"] = torch.tensor([3])
        else:
            # Frames of one video had a dimension of their own before transformers 5.19.
            inputs = {name: tensor[None] for name, tensor in inputs.items()}
        return Picture([token for _ in range(3) for token in (CUT, START, *[VIDEO] * 4, END)], inputs, [4] * 3)

    return Tiny(settings, picture, video, TYPES)


def pixtral() -> dict[str, Any]:
    return {**TOWER, "model_type": "pixtral", "head_dim": 16, "image_size": 64, "patch_size": 4}


def rows_of_patches(merge: int) -> Callable[[int], Picture]:
    """Pixtral's way: a token behind every row of patches; images of any size, padded to the largest."""

    def picture(index: int) -> Picture:
        height, width = [(16, 64), (16, 48)][index % 2]
        rows, columns = height // 4 // merge, width // 4 // merge
        tokens = [token for _ in range(rows) for token in (*[IMAGE] * columns, CUT)]
        pixels = torch.zeros(1, 3, 16, 64)
        pixels[..., :height, :width] = noise(index, 1, 3, height, width)
        return Picture(
            [*tokens[:-1], END],
            {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])},
            [columns] * rows,
        )

    return picture


def mistral3() -> Tiny:
    text = {**TEXT, "model_type": "mistral", "head_dim": 8, "sliding_window": None}
    settings = {
        "text_config": text,
        "vision_config": pixtral(),
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    }
    return Tiny(settings, rows_of_patches(2))


def llava_pixtral() -> Tiny:
    text = {**TEXT, "model_type": "mistral", "head_dim": 8, "sliding_window": None}
    settings = {"text_config": text, "vision_config": pixtral(), "image_token_index": IMAGE, "vision_feature_layer": -1}
    return Tiny({**settings, "vision_feature_select_strategy": "full"}, rows_of_patches(1))


def cohere2() -> dict[str, Any]:
    text = {**TEXT, "model_type": "cohere2", "num_hidden_layers": 4, "sliding_window": 8}
    return {**text, "layer_types": ["sliding_attention", "full_attention"] * 2}


def marked_parts(index: int) -> Picture:
    """An image in parts of 16 tokens, as AyaVision and Cohere cut it: a mark stands before each."""
    parts = 1 if index % 2 else 3
    tokens = [token for _ in range(parts) for token in (CUT, *[IMAGE] * 16)]
    return Picture([START, *tokens, END], {"pixel_values": noise(index, parts, 3, 32, 32)}, [16] * parts)


def aya_vision() -> Tiny:
    settings = {
        "text_config": cohere2(),
        "vision_config": siglip(side=32),
        "image_token_index": IMAGE,
        "downsample_factor": 2,
    }
    return Tiny({**settings, "alignment_intermediate_size": 64}, marked_parts)


def cohere2_vision() -> Tiny:
    settings = {
        "text_config": cohere2(),
        "vision_config": siglip(side=32),
        "image_token_id": IMAGE,
        "downsample_factor": 2,
    }
    return Tiny({**settings, "alignment_intermediate_size": 64}, marked_parts)


def got_ocr2() -> Tiny:
    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 4,
        "output_channels": 8,
    }
    vision |= {"mlp_dim": WIDTH, "window_size": 4, "global_attn_indexes": [0], "initializer_range": 0.02}
    return Tiny({"text_config": qwen2(), "vision_config": vision, "image_token_index": IMAGE}, fixed(16, 3, 64, 64))


def granite4_vision() -> Tiny:
    vision = {**clip(), "hidden_size": 64}
    settings = {
        "text_config": {**TEXT, "model_type": "granite4_vision_text"},
        "vision_config": vision,
        "image_token_index": IMAGE,
    }
    settings |= {
        "downsample_rate": "1/2",
        "image_grid_pinpoints": PINPOINTS,
        "deepstack_layer_map": [(-1, 0)],
        "spatial_target_layers": [1],
    }
    return Tiny(settings, any_resolution(2))


def lfm2_vl() -> Tiny:
    vision = {
        **TOWER,
        "model_type": "siglip2_vision_model",
        "patch_size": 4,
        "num_patches": 64,
        "vision_use_head": False,
    }
    text = {**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}
    settings = {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": IMAGE,
        "downsample_factor": 2,
        "projector_hidden_size": 32,
    }

    def picture(index: int) -> Picture:
        height, width = [(8, 8), (4, 8)][index % 2]
        used = torch.arange(64)[None] < height * width
        pixels = noise(index, 1, 64, 48) * used[..., None]
        count = height * width // 4
        inputs = {
            "pixel_values": pixels,
            "spatial_shapes": torch.tensor([[height, width]]),
            "pixel_attention_mask": used.int(),
        }
        return Picture(around(count), inputs, [count])

    return Tiny(settings, picture)


BUILDERS: dict[str, tuple[Callable[[], Tiny], ...]] = {
    "LLaVA": (llava,),
    "LLaVA-NeXT": (llava_next,),
    "LLaVA-OneVision": (llava_onevision,),
    "LLaVA-NeXT-Video": (llava_next_video,),
    "VipLlava": (vipllava,),
    "Qwen2-VL": (qwen2_vl,),
    "Qwen2.5-VL": (qwen2_5_vl,),
    "Qwen3-VL": (qwen3_vl, qwen3_vl_moe),
    "Qwen3.5": (qwen3_5, qwen3_5_moe),
    "InternVL": (internvl,),
    "Idefics3, SmolVLM": (idefics3, idefics3),
    "PaliGemma": (paligemma,),
    "Gemma 3": (gemma3,),
    "Gemma 4": (gemma4,),
    "Mistral 3": (mistral3,),
    "Pixtral": (llava_pixtral,),
    "Aya Vision": (aya_vision, cohere2_vision),
    "GLM-4V": (glm4v, glm4v_moe, glm4v),
    "GOT-OCR2": (got_ocr2,),
    "Granite Vision": (granite4_vision,),
    "LFM2-VL": (lfm2_vl,),
}
"""For each model type of a family that works, in the order of kvcapsule.vlm.families.FAMILIES."""


def shared_layers() -> dict[str, Any]:
    """Of a Gemma 4 whose later layers read the keys and values of earlier ones."""
    return gemma4(num_kv_shared_layers=2).settings


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], ...]] = {
    "Florence-2": (dict,),
    "vision-encoder-decoder": (
        lambda: {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2", "add_cross_attention": True}},
    ),
    "Llama 3.2 Vision": (dict,),
    "Gemma with shared KV": (dict, shared_layers),
}
"""Settings of a config for each model type of a family that is refused."""
