"""Tiny models with random weights as checkpoints that vLLM's own model classes load."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_clip import CLIPImageProcessor

from kvcapsule.checkpoints import shipped

GAIN = 3.0
"""Factor of the weight matrices: at their initial size attention is uniform, and every answer the same."""


def tokenizer() -> PreTrainedTokenizerFast:
    built: Any = AutoProcessor.from_pretrained(str(shipped("pages-vlm"))).tokenizer
    built.chat_template = None
    return built


def _save(model: PreTrainedModel, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(GAIN)
    model.save_pretrained(folder)


def save_llava(folder: Path) -> None:
    """A LLaVA with a CLIP tower and heads of 64: 144 visual tokens an image."""
    words = tokenizer()
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=168,
        patch_size=14,
        projection_dim=64,
    )
    token = words.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=token, vision_feature_layer=-1)
    torch.manual_seed(0)
    _save(LlavaForConditionalGeneration(config).float(), folder)
    side = {"height": 168, "width": 168}
    images = CLIPImageProcessor(size={"shortest_edge": 168}, crop_size=side)
    processor = LlavaProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    # transformers 5 drops a level of the tower's names, by which vLLM finds them in checkpoints of the Hub.
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    renamed = {
        name if "vision_tower.vision_model." in name else name.replace("vision_tower.", "vision_tower.vision_model."): t
        for name, t in tensors.items()
    }
    save_file(renamed, file, metadata={"format": "pt"})


def save_qwen(folder: Path) -> None:
    """A Qwen2.5-VL with M-RoPE and heads of 32; a quarter of a visual token for each patch of 14 pixels."""
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    words = tokenizer()
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words.add_tokens(marks, special_tokens=True)
    start, end, image, video = words.convert_tokens_to_ids(marks)
    text = {
        "vocab_size": len(words),
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    _save(Qwen2_5_VLForConditionalGeneration(config).float(), folder)
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor())
    processor.save_pretrained(folder)
