"""The pieces of a prompt that an image store holds: each image with the text before it.

What cannot be cut into pieces without a doubt is not served: such a call of generate runs without the store.
"""

from collections.abc import Mapping
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from ..vlm.families import FAMILIES, WORKS
from ..vlm.spans import VisualSpan, find_spans
from .generate_options import option
from .transformers_api import CACHE_NAMES, passed_cache

PIXELS, GRIDS, SIZES = "pixel_values", "image_grid_thw", "image_sizes"
MASK, TOKEN_TYPES = "attention_mask", "mm_token_type_ids"
_TYPES = {
    kind for family in FAMILIES if (family.status, family.span) == (WORKS, "image") for kind in family.model_types
}
"""Types of models in which an image is one span."""
_ONE = {"num_beams": "beams", "num_return_sequences": "several answers to one prompt"}
"""Options that must be 1, and what they ask for."""
_NONE = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "assisted decoding",
    "is_assistant": "assisted decoding",
    "custom_generate": "a generate of its own",
    "guidance_scale": "guidance",
    "token_healing": "token healing",
    "cache_implementation": "another kind of cache",
    "output_hidden_states": "hidden states of the whole prompt",
    "output_attentions": "attention weights",
    "prefill_chunk_size": "a prompt in chunks",
}
"""Options that must be off, and what they ask for."""

_HARMLESS = (("guidance_scale", 1), ("cache_implementation", "hybrid"))
"""Values of these that ask for nothing; the second stands in older generation configs of the Hub."""


class UnservedError(Exception):
    """A call of generate that an image store does not serve. The message is the reason."""


class Piece(NamedTuple):
    """One image of a prompt, with the text before it."""

    start: int
    """Position of the text's first token."""
    span: VisualSpan
    inputs: dict[str, torch.Tensor]
    """What the vision tower gets: the pixels of this image alone, its grid, its size."""

    @property
    def end(self) -> int:
        """Position behind the image's last token."""
        return self.span.start + self.span.length


class PiecedPrompt(NamedTuple):
    """A prompt whose images can be stored."""

    input_ids: torch.Tensor
    """[1, N], on the model's device."""
    inputs: dict[str, torch.Tensor]
    """The model's inputs beside them, of all images."""
    pieces: list[Piece]


def pieced_prompt(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PiecedPrompt | None:
    """The prompt of a call of generate in pieces; None if it has no image.

    Raises:
        UnservedError: if it cannot be cut, or the call asks for what a prompt in pieces cannot give.
    """
    inputs = {name: value for name, value in kwargs.items() if value is not None and name not in _options()}
    input_ids = inputs.pop("input_ids", kwargs.get("inputs", args[0] if args else None))
    if not set(inputs) - {MASK, TOKEN_TYPES}:
        return None
    _require_options(model, args, kwargs)
    if model.config.model_type not in _TYPES:
        raise UnservedError(f"a model of the type {model.config.model_type}, whose images are not known to be one span")
    unknown = sorted(set(inputs) - {MASK, TOKEN_TYPES, PIXELS, GRIDS, SIZES})
    if unknown:
        raise UnservedError(f"inputs of the kind {', '.join(unknown)}")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        raise UnservedError("a prompt without input_ids")
    if input_ids.shape[0] != 1:
        raise UnservedError("a batch of several prompts")
    if not all(isinstance(value, torch.Tensor) for value in inputs.values()) or PIXELS not in inputs:
        raise UnservedError("images that are no tensors of pixels")
    if model.device.type == "meta":
        raise UnservedError("weights that are not in memory")
    input_ids = input_ids.to(model.device)
    if MASK in inputs and (inputs[MASK].shape != input_ids.shape or not bool(inputs[MASK].bool().all())):
        raise UnservedError("a prompt with padding")
    spans = _spans(model, input_ids, inputs)
    images = _images(inputs)
    if len(spans) != len(images):
        raise UnservedError("images that the prompt cuts into parts, or whose number is not that of its placeholders")
    if spans[-1].start + spans[-1].length == input_ids.shape[1]:
        raise UnservedError("a prompt that ends with an image")
    starts = [0, *(span.start + span.length for span in spans)]
    pieces = [Piece(*piece) for piece in zip(starts, spans, images, strict=False)]
    for piece in pieces:
        one = _spans(model, input_ids[:, piece.start : piece.end], piece.inputs)
        if [(span.start, span.length) for span in one] != [(piece.span.start - piece.start, piece.span.length)]:
            raise UnservedError("an image whose pixels do not have the size of its placeholders")
    return PiecedPrompt(input_ids, inputs, pieces)


@cache
def _options() -> frozenset[str]:
    """Arguments of generate that are no inputs of the model."""
    named = {*signature(GenerationMixin.generate).parameters, *vars(GenerationConfig())} - {"kwargs"}
    return frozenset(named | {"use_model_defaults", "tokenizer", "assistant_tokenizer", *CACHE_NAMES})


def _require_options(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if passed_cache(kwargs) is not None:
        raise UnservedError("a cache of the caller's")
    for name, what in _ONE.items():
        if option(model, args, kwargs, name) not in (None, 1):
            raise UnservedError(f"{what} ({name})")
    for name, what in _NONE.items():
        value = option(model, args, kwargs, name)
        if value not in (None, False) and (name, value) not in _HARMLESS:
            raise UnservedError(f"{what} ({name})")


def _spans(model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> list[VisualSpan]:
    try:
        return find_spans(model.config, input_ids, inputs)
    except ValueError as error:
        raise UnservedError(f"images that do not fit the prompt ({error})") from error


def _images(inputs: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The inputs of each image alone, as the processor would have made them."""
    pixels, grids, sizes = (inputs.get(name) for name in (PIXELS, GRIDS, SIZES))
    assert pixels is not None
    if grids is not None:
        if sizes is not None or pixels.dim() != 2 or int(grids.prod(1).sum()) != len(pixels):
            raise UnservedError("pixels that are no patches of the images' grids")
        parts = pixels.split(grids.prod(1).tolist())
        return [{PIXELS: part, GRIDS: grids[i : i + 1]} for i, part in enumerate(parts)]
    if pixels.dim() not in (4, 5) or (sizes is not None and len(sizes) != len(pixels)):
        raise UnservedError("pixels that are no list of images")
    return [
        {PIXELS: pixels[i : i + 1], **({} if sizes is None else {SIZES: sizes[i : i + 1]})} for i in range(len(pixels))
    ]
