"""Stored spans of capsules drawn at random, made from layer prefills without a model."""

import torch

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.digest import capsule_digest
from kvcapsule.capsule.span_header import SpanHeader, dtype_name, frame_name
from kvcapsule.capsule.stored_span import StoredSpan
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.segments.segment import Segment
from kvcapsule.vlm.spans import VisualSpan


def stored_span(
    capsule: Capsule, length: int = 24, text: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> StoredSpan:
    """A span of `length` tokens behind `text` tokens of text, as the capsule compresses random keys and values."""
    geometry, tokens = capsule.config.geometry, text + length
    generator = torch.Generator().manual_seed(seed)

    def rand(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, geometry.head_dim, generator=generator, dtype=torch.float64).to(dtype)

    angles = torch.arange(float(tokens))[None, :, None] / 3 ** torch.arange(geometry.head_dim / 2)
    rotation = torch.cat([angles, angles], -1)
    compression = capsule.begin_pass(range(geometry.layers))
    visual: dict[int, list[Segment]] = {}
    texts: dict[int, list[Segment]] = {}
    shared: dict = {}
    for layer in range(geometry.layers):
        prefill = LayerPrefill(
            layer=layer,
            query=rand(geometry.query_heads),
            keys=rand(geometry.kv_heads),
            values=rand(geometry.kv_heads),
            spans=[VisualSpan(0, text, length, (1, 1, length))],
            valid=torch.ones(1, tokens, dtype=torch.bool),
            scale=geometry.head_dim**-0.5,
            position_embeddings=(rotation.cos(), rotation.sin()),
            shared=shared,
        )
        for index, compressed in compression.add(prefill):
            visual[index], texts[index] = compressed
    header = SpanHeader(
        capsule=capsule_digest(capsule),
        family=capsule.config.family,
        base_model=capsule.config.base_model,
        dtype=dtype_name(dtype),
        grid=(1, 1, length),
        tile=capsule.config.codec.tile,
        align=capsule.config.codec.align,
        frame=frame_name(visual[0][0].frame),
        start=text,
        length=length,
        text=text,
        layers=tuple(range(geometry.layers)),
    )
    return StoredSpan(header, visual, texts)
