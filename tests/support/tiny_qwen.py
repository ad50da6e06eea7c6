"""Tiny models with M-RoPE and grids of patches: the families of Qwen-VL and GLM-4V."""

from collections.abc import Callable
from typing import Any

import torch

from .tiny_vlm import CUT, END, IMAGE, START, TEXT, VIDEO, VIDEO_END, VIDEO_START, WIDTH, Picture, Tiny, around, noise

SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
GRIDS = [(1, 8, 12), (1, 4, 8)]


def qwen_picture(merge: int = 2, temporal: int = 2, patch: int = 4) -> Callable[[int], Picture]:
    def picture(index: int) -> Picture:
        grid = torch.tensor([GRIDS[index % 2]])
        patches = int(grid.prod())
        count = patches // merge**2
        inputs = {"pixel_values": noise(index, patches, 3 * temporal * patch**2), "image_grid_thw": grid}
        return Picture(around(count), inputs, [count])

    return picture


def qwen_video(cut: bool = False, merge: int = 2, temporal: int = 2, patch: int = 4) -> Callable[[int], Picture]:
    """Three steps in time of 4 tokens; with `cut` each stands apart, behind a time stamp."""

    def video(index: int) -> Picture:
        grid = torch.tensor([[3, 4, 4]])
        inputs = {"pixel_values_videos": noise(index, 48, 3 * temporal * patch**2), "video_grid_thw": grid}
        if cut:
            return Picture([token for _ in range(3) for token in (CUT, START, *[VIDEO] * 4, END)], inputs, [4] * 3)
        return Picture([START, *[VIDEO] * 12, END], inputs, [12])

    return video


MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
TYPES = "mm_token_type_ids"


def qwen2_vl() -> Tiny:
    vision = {"depth": 1, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 1, "patch_size": 4}
    return Tiny(
        {"text_config": {**TEXT, "rope_parameters": SECTIONS}, "vision_config": vision, **MARKS},
        qwen_picture(),
        qwen_video(),
        TYPES,
    )


def qwen2_5_vl() -> Tiny:
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
    }
    vision |= {"spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0]}
    return Tiny(
        {"text_config": {**TEXT, "rope_parameters": SECTIONS}, "vision_config": vision, **MARKS},
        qwen_picture(),
        qwen_video(),
        TYPES,
    )


def qwen3_vision(deep: bool = True) -> dict[str, Any]:
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
    }
    return {
        **vision,
        "spatial_merge_size": 2,
        "num_position_embeddings": 64,
        **({"deepstack_visual_indexes": [0]} if deep else {}),
    }


INTERLEAVED = {**SECTIONS, "mrope_interleaved": True}


def qwen3_vl() -> Tiny:
    text = {**TEXT, "head_dim": 8, "rope_parameters": INTERLEAVED}
    return Tiny(
        {"text_config": text, "vision_config": qwen3_vision(), **MARKS}, qwen_picture(), qwen_video(cut=True), TYPES
    )


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def qwen3_vl_moe() -> Tiny:
    text = {**TEXT, "head_dim": 8, "rope_parameters": INTERLEAVED, **EXPERTS}
    return Tiny(
        {"text_config": text, "vision_config": qwen3_vision(), **MARKS}, qwen_picture(), qwen_video(cut=True), TYPES
    )


LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}


def qwen3_5(**more: Any) -> Tiny:
    text = {**TEXT, "head_dim": 32, "rope_parameters": {**INTERLEAVED, "partial_rotary_factor": 0.25}, **LINEAR, **more}
    text |= {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    return Tiny(
        {"text_config": text, "vision_config": qwen3_vision(deep=False), **MARKS},
        qwen_picture(),
        qwen_video(cut=True),
        TYPES,
    )


def qwen3_5_moe() -> Tiny:
    return qwen3_5(**EXPERTS, shared_expert_intermediate_size=16)


GLM_MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END}
GLM_MARKS |= {"video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END}


def glm_video(index: int) -> Picture:
    """Frames of a video stand for themselves, each with the image's placeholders, behind a time stamp."""
    grid = torch.tensor([[3, 4, 4]])
    tokens = [token for _ in range(3) for token in (START, *[IMAGE] * 4, END, CUT)]
    return Picture(
        [VIDEO_START, *tokens, VIDEO_END],
        {"pixel_values_videos": noise(index, 48, 96), "video_grid_thw": grid},
        [4] * 3,
    )


def glm_vision() -> dict[str, Any]:
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
    }
    return {**vision, "image_size": 32, "spatial_merge_size": 2}


def glm4v() -> Tiny:
    text = {**TEXT, "rope_parameters": {**SECTIONS, "mrope_section": [1, 1, 2]}}
    return Tiny({"text_config": text, "vision_config": glm_vision(), **GLM_MARKS}, qwen_picture(), glm_video, TYPES)


def glm4v_moe() -> Tiny:
    text = {
        **TEXT,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    }
    text |= {"n_group": 1, "topk_group": 1, "rope_parameters": {**SECTIONS, "partial_rotary_factor": 1.0}}
    return Tiny({"text_config": text, "vision_config": glm_vision(), **GLM_MARKS}, qwen_picture(), glm_video, TYPES)
