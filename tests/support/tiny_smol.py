"""Small random stand-ins for what smol-vlm is made of: a tower, a language model with SmolLM2's chat template, and
pictures."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvcapsule.testbeds import emoji, words
from kvcapsule.testbeds.efficientnet_lite import EfficientNetLiteConfig
from kvcapsule.testbeds.picture import Picture, generator

TOWER = {
    "image_size": 32,
    "patch_size": 16,
    "stem_channels": 4,
    "channels": (4, 4, 6, 6, 8, 8, 10),
    "kernels": (3, 3, 5, 3, 5, 5, 3),
    "repeats": (1, 1, 2, 1, 1, 1, 1),
    "expansions": (1, 2, 2, 2, 2, 2, 2),
    "strides": (1, 2, 2, 2, 1, 2, 1),
    "feature_stages": (2, 3, 4, 5, 6),
    "position_waves": 3,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""That of SmolLM2-135M-Instruct."""


def published_tower(seed: int = 0) -> dict[str, torch.Tensor]:
    """A random state dict in the naming of the published EfficientNet-Lite weights, of TOWER's sizes."""
    rng = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def layer(conv: str, norm: str, outside: int, inside: int, kernel: int) -> None:
        state[f"{conv}.weight"] = torch.randn(outside, inside, kernel, kernel, generator=rng) / (inside**0.5 * kernel)
        state[f"{norm}.weight"] = torch.rand(outside, generator=rng) + 0.5
        state[f"{norm}.bias"] = torch.randn(outside, generator=rng)
        state[f"{norm}.running_mean"] = torch.randn(outside, generator=rng) * 0.1
        state[f"{norm}.running_var"] = torch.rand(outside, generator=rng) + 0.5

    config = EfficientNetLiteConfig(**TOWER)
    layer("_conv_stem", "_bn0", config.stem_channels, 3, 3)
    inside, number = config.stem_channels, 0
    for outside, kernel, repeats, expansion in zip(
        config.channels, config.kernels, config.repeats, config.expansions, strict=True
    ):
        for _ in range(repeats):
            at, wide = f"_blocks.{number}", inside * expansion
            if expansion > 1:
                layer(f"{at}._expand_conv", f"{at}._bn0", wide, inside, 1)
            layer(f"{at}._depthwise_conv", f"{at}._bn1", wide, 1, kernel)
            layer(f"{at}._project_conv", f"{at}._bn2", outside, wide, 1)
            inside, number = outside, number + 1
    return state


def language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama of two layers that reads bytes."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {text: i for i, text in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    names = {"bos_token": specials[1], "eos_token": specials[2], "pad_token": specials[2], "unk_token": specials[0]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), fast


def backgrounds() -> tuple[Image.Image, ...]:
    """A stand-in for photographs."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    return (Image.fromarray(noise),)


def glyph(character: str) -> Image.Image:
    """A stand-in for an emoji's picture: a disc in a colour of its own."""
    image = Image.new("RGBA", (40, 30))
    code = ord(character)
    ImageDraw.Draw(image).ellipse((1, 1, 38, 28), fill=(code * 37 % 256, code * 91 % 256, code * 53 % 256, 255))
    return image


class Draw:
    """A stand-in for the mixture of training pictures."""

    def __call__(self, index: int) -> tuple[str, Picture]:
        rng = generator("train", index, 0, 1)
        if index % 2:
            return "words", words.compose(rng, backgrounds())
        return "emoji", emoji.compose(rng, backgrounds(), glyph)
