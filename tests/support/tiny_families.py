"""One tiny model of every family, built from a config with random weights, and prompts for it: text around images of
several sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BatchFeature, Gemma4Model, PreTrainedModel

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


def llava() -> Tiny:
    settings = {"text_config": llama(), "vision_config": clip(), "image_token_index": IMAGE, "vision_feature_layer": -1}
    return Tiny(settings, fixed(16, 3, 16, 16))


def vipllava() -> Tiny:
    settings = {
        "text_config": llama(),
        "vision_config": clip(),
        "image_token_index": IMAGE,
        "vision_feature_layers": [-1, -2],
    }
    return Tiny(settings, fixed(16, 3, 16, 16))


PINPOINTS = [[16, 32], [32, 16]]


def any_resolution(side: int = 4) -> Callable[[int], Picture]:
    """A thumbnail and two patches of side x side tokens, beside or below each other, with a newline token for each of
    their rows."""

    def picture(index: int) -> Picture:
        height, width = PINPOINTS[index % 2]
        count = 3 * side**2 + side * height // 16
        inputs = {"pixel_values": noise(index, 1, 3, 3, 16, 16), "image_sizes": torch.tensor([[height, width]])}
        return Picture(around(count), inputs, [count])

    return picture


def llava_next() -> Tiny:
    settings = {"text_config": llama(), "vision_config": clip(), "image_token_index": IMAGE, "vision_feature_layer": -1}
    return Tiny({**settings, "image_grid_pinpoints": PINPOINTS}, any_resolution())


def llava_next_video() -> Tiny:
    def video(index: int) -> Picture:
        return Picture([START, *[VIDEO] * 12, END], {"pixel_values_videos": noise(index, 1, 3, 3, 16, 16)}, [12])

    base = llava_next()
    settings = {**base.settings, "video_token_index": VIDEO, "spatial_pool_stride": 2}
    return Tiny(settings, base.picture, video)


def llava_onevision() -> Tiny:
    def video(index: int) -> Picture:
        return Picture([START, *[VIDEO] * 13, END], {"pixel_values_videos": noise(index, 1, 3, 3, 16, 16)}, [13])

    settings = {
        "text_config": qwen2(),
        "vision_config": siglip(),
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
    }
    settings |= {"image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_9"}
    return Tiny(settings, any_resolution(), video)


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
