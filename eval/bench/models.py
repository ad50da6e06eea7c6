"""The models whose decode steps are timed, with batches of prompts: pages-vlm, and named shapes with random weights.

The tokens of a random model mean nothing; its time and bytes are those of a trained model of the same shape. All
sequences of a batch have different images and prompts of the same length, so that none needs padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
)

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.data import source
from kvcapsule.data.batches import read_question
from kvcapsule.data.source import SourceConfig
from kvcapsule.methods.method import Method
from kvcapsule.policy import EvenlySpaced, Quantized
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.loading import load_vlm

from ..batches import make_batch
from .random_methods import KEPT, make
from .shapes import IMAGES, KV_BOUND, KV_BOUND_SHAPE, PAGES, SHAPES, Shape

_TIMED = ("int4", "kvcapsule-r0.4", "kept-10%", "compact-10%", "transform-20x")
"""Of `method_names.METHODS`, on random models."""
_IMAGE, _PATCH = 5, 4


class Subject(NamedTuple):
    """A model that is timed, with its inputs and the methods that are compared on it."""

    name: str
    model: PreTrainedModel
    batch: Callable[[int], BatchFeature]
    """Inputs for a number of sequences."""
    visual: int
    """Visual tokens of a sequence."""
    methods: dict[str, Method]
    shape: dict[str, int]
    """Shape of its language part, for the JSON."""


def default(device: torch.device) -> list[str]:
    """The models that are timed on a device by default."""
    return [PAGES, KV_BOUND] if device.type == "cpu" else list(SHAPES)


def build(name: str, device: torch.device, dtype: torch.dtype, text: int, tile: int, seed: int) -> Subject:
    """A subject by its name, a member of `known_models`.

    Args:
        text: tokens of text in a random model's prompt.
        tile: visual tokens of a tile of the capsules of random models.
    """
    if name == PAGES:
        return _pages(device, dtype)
    images, side = IMAGES[name]
    return random_llava(
        KV_BOUND_SHAPE if name == KV_BOUND else SHAPES[name], images, side, device, dtype, text, tile, seed
    )


def _pages(device: torch.device, dtype: torch.dtype) -> Subject:
    """The demo VLM with the shipped capsules."""
    model, processor = load_vlm(PAGES, device=str(device), dtype=str(dtype).removeprefix("torch."))

    def batch(size: int) -> BatchFeature:
        rows = source.load(SourceConfig(split="test", size=size))
        questions = [read_question(rows[i], i) for i in range(size)]
        return make_batch([q._replace(prompt=questions[0].prompt) for q in questions], model, processor).inputs

    methods: dict[str, Method] = {"int4": Quantized(4), "kept-10%": EvenlySpaced(KEPT)}
    shipped = {
        "kvcapsule-r0.4": "pages-vlm-kvcapsule",
        "transform-20x": "pages-vlm-transform",
        "cross-layer-20x": "pages-vlm-cross-layer",
    }
    for row, capsule in shipped.items():
        methods[row] = Capsule.from_pretrained(capsule).to(device, dtype)
    return Subject(PAGES, model, batch, int(model.config.image_seq_length), methods, _shape(model))


def random_llava(
    shape: Shape, images: int, side: int, device: torch.device, dtype: torch.dtype, text: int, tile: int, seed: int
) -> Subject:
    """A LLaVA of a shape with random weights and a minimal vision tower; an image has side x side tokens."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=_PATCH * side,
        patch_size=_PATCH,
        projection_dim=32,
    )
    language = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2**17,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=_IMAGE, image_seq_length=side * side
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    def batch(size: int) -> BatchFeature:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(_IMAGE + 1, shape.vocab, (size, text), generator=generator)
        # After every image a token that separates it from the next one; then the question.
        pictures = torch.tensor(([_IMAGE] * side * side + [1]) * images).expand(size, -1)
        ids = torch.cat([pictures, words], dim=1).to(device)
        pixels = torch.randn(size * images, 3, _PATCH * side, _PATCH * side, generator=generator).to(device, dtype)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})

    geometry = KVGeometry.from_config(config)
    methods = {row: make(row, geometry, tile, device, dtype, seed) for row in _TIMED}
    return Subject(shape.name, model, batch, images * side * side, methods, _shape(model))


def _shape(model: Any) -> dict[str, int]:
    geometry, text = KVGeometry.from_config(model.config), model.config.get_text_config(decoder=True)
    return {
        "layers": geometry.layers,
        "query_heads": geometry.query_heads,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "hidden": text.hidden_size,
        "intermediate": text.intermediate_size,
    }


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a decode step reads: the decoder's layers and the output head, without embeddings."""
    head = model.get_output_embeddings()
    parts = [*model.get_decoder().layers.parameters(), *(head.parameters() if head is not None else ())]
    return sum(p.nbytes for p in {id(p): p for p in parts}.values())
