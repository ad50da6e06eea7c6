"""A tiny Qwen2-VL with a processor that reads images and videos, as a folder; its processor needs torchvision."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from .tiny_qwen import qwen2_vl
from .tiny_vlm import END, IMAGE, PAD, START, VIDEO, VOCABULARY, build

_NAMES = {
    PAD: "<pad>",
    IMAGE: "<|image_pad|>",
    VIDEO: "<|video_pad|>",
    START: "<|vision_start|>",
    END: "<|vision_end|>",
}
_TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }} {% for part in turn.content %}"
    "{% if part.type == 'text' %}{{ part.text }} "
    "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)
SIDE = 32
"""Images and frames of this width and height are read as they are: 16 tokens."""


def save_video_vlm(folder: Path) -> str:
    """Write model and processor, and return the folder's name."""
    ids = {_NAMES.get(i, f"w{i}"): i for i in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="w1")
    tokenizer.add_special_tokens({"additional_special_tokens": [name for i, name in _NAMES.items() if i != PAD]})
    size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**patches), tokenizer, Qwen2VLVideoProcessor(**patches), chat_template=_TEMPLATE
    )
    processor.save_pretrained(folder)
    build("qwen2_vl", qwen2_vl()).save_pretrained(folder)
    return str(folder)
