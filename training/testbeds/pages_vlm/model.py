"""pages-vlm before training: tokenizer, processor and a randomly initialised LlavaForConditionalGeneration."""

from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SegformerConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from kvcapsule.testbeds.pages import SIDE, WORDS, page, questions

PATCH = 8
GRID = SIDE // PATCH
SPECIALS = {"pad": "<|pad|>", "user": "<|user|>", "assistant": "<|assistant|>", "end": "<|end|>", "image": "<image>"}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}{%"
    " for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif"
    " %}{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if"
    " add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the task's text: it encodes any text, and the task's words are single tokens.

    Digits and spaces are separate tokens, so that a word is the same token after a space (in a question) and after a
    line break (in an answer).
    """
    rng = np.random.default_rng(0)
    corpus = [text for i in range(400) for q in questions(page("train", i), rng) for text in (q.prompt, q.answer)]
    corpus += [word for word in WORDS for _ in range(50)]
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"[A-Za-z]+|[^A-Za-z]"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=20,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS["pad"],
        eos_token=SPECIALS["end"],
        additional_special_tokens=[AddedToken(SPECIALS[name]) for name in ("user", "assistant", "image")],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor() -> LlavaProcessor:
    """The processor of pages-vlm: images of SIDE x SIDE pixels, and the tokenizer."""
    size = {"height": SIDE, "width": SIDE}
    # SigLIP's processor crops nothing; vLLM counts an image's tokens by its crop_size.
    images = SiglipImageProcessorPil(size=size, crop_size=size, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    return LlavaProcessor(
        images, build_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """Untrained LLaVA of about 1.6 M parameters: 196 visual tokens, 4 layers, 4 query and 2 KV heads of dim 32.

    The vision tower is a SegFormer, whose convolutions learn to read in few steps (training/NOTES.md). The initialiser
    ranges fit the width.
    """
    width: dict[str, Any] = {"hidden_size": 128}
    vision = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 3],
        hidden_sizes=[48, 128],
        patch_sizes=[7, 3],
        strides=[4, PATCH // 4],
        num_attention_heads=[1, 4],
        sr_ratios=[7, 1],
        mlp_ratios=[2, 3],
        reshape_last_stage=False,
        hidden_dropout_prob=0.0,
        drop_path_rate=0.0,
        initializer_range=0.08,
        # Where LLaVA looks for the tower's width; no field of a SegFormer.
        **width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    image_token: Any = tokenizer.convert_tokens_to_ids(SPECIALS["image"])
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
