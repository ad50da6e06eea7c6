"""Counts of a model from its config alone: the parameters that are held and that a decode step reads, and the visual
tokens of a sequence. No weights are loaded."""

from typing import Any

import torch
from PIL import Image
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)

from kvcapsule.checkpoints import shipped

from .data.prompts import conversation, encode
from .errors import InputError, ModelError
from .estimate import Weights
from .vlm.spans import find_spans

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k")
"""Names that text configs have for the routed experts of a layer, and for those that one token is given."""


def read_config(model: str, revision: str | None) -> PreTrainedConfig:
    """The config of a shipped model, a folder or an id on the Hub.

    Raises:
        ModelError: if it cannot be read.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(shipped(model) or model), revision=revision, trust_remote_code=False
        )
    except Exception as error:  # Whatever transformers meets in a damaged file.
        raise ModelError(f"cannot read a config of {model!r}: {error}") from error
    return config


def count_weights(config: PreTrainedConfig, model: str) -> Weights:
    """Parameters by how they are stored and read, counted on a model without storage.

    Args:
        config: of the model.
        model: its name, for errors.

    Raises:
        ModelError: if it is no image-text-to-text model of transformers, or if its config does not say how many experts
            a token is given.
    """
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(
            f"{model!r} is a {config.model_type}, which is no image-text-to-text model of transformers: use a VLM."
        )
    with torch.device("meta"):
        vlm: Any = AutoModelForImageTextToText.from_config(config)
    decoder, head = vlm.get_decoder(), vlm.get_output_embeddings()
    # A step looks up rows of an embedding. One that is tied to the head is read completely, as the head.
    looked_up = {
        id(p) for module in decoder.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()
    }
    others: float = sum(p.numel() for p in head.parameters()) if head is not None else 0
    matrices, quantised = 0.0, 0
    for path, parameter in decoder.named_parameters():
        if id(parameter) in looked_up:
            continue
        share = _share_of_experts(config, model) if "experts" in path.split(".") else 1
        if parameter.dim() > 1:
            matrices += share * parameter.numel()
            quantised += parameter.numel()
        else:
            others += share * parameter.numel()
    return Weights(matrices, others, quantised, sum(p.numel() for p in vlm.parameters()) - quantised)


def _share_of_experts(config: PreTrainedConfig, model: str) -> float:
    """Share of the routed experts that a step reads at least: those of one token. A step that reads more has a lower
    speed-up, so the bound stays an upper one."""
    text = config.get_text_config(decoder=True)
    chosen, experts = (
        next((getattr(text, key) for key in names if getattr(text, key, None)), None)
        for names in (_EXPERTS_OF_A_TOKEN, _EXPERTS)
    )
    if not chosen or not experts:
        raise ModelError(
            f"{model!r} has experts, but its config does not say how many a token is given, so what a step reads is not"
            " known."
        )
    return float(chosen / experts)


def count_visual_tokens(
    config: PreTrainedConfig, model: str, revision: str | None, images: int, size: tuple[int, int]
) -> int:
    """Visual tokens of a sequence, as the model's processor places them.

    Args:
        config: of the model.
        model: a shipped name, a folder or an id on the Hub.
        revision: branch, tag or commit on the Hub.
        images: of the sequence.
        size: height and width of each image, in pixels.

    Raises:
        ModelError: if the model has no processor for images.
        InputError: if the processor cannot take images of this size, or places no visual tokens.
    """
    height, width = size
    try:
        processor = AutoProcessor.from_pretrained(
            str(shipped(model) or model), revision=revision, trust_remote_code=False
        )
    except Exception as error:  # As above.
        raise ModelError(f"cannot load the processor of {model!r}: {error} Give --visual-tokens instead.") from error
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(f"{model!r} has no image processor beside its tokenizer: give --visual-tokens instead.")
    # All images at once: some processors cut a single image into more tiles than each of several.
    pictures = [Image.new("RGB", (width, height))] * images
    try:
        ids = encode(processor, [conversation(pictures, "?")])["input_ids"]
    except ValueError as error:
        raise InputError(
            f"--resolution {height}x{width}: {model!r} cannot take it: {error} Give --visual-tokens instead."
        ) from error
    tokens = sum(span.length for span in find_spans(config, ids))
    if not tokens:
        raise InputError(
            f"the processor of {model!r} places no visual tokens that its config names: give --visual-tokens instead."
        )
    return tokens
