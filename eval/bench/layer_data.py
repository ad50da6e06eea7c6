"""One layer's cache as each method stores it, made by the method's own encoder from random keys and values."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Method
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.vlm.spans import VisualSpan

from .shapes import Shape

TAIL = 16
"""Tokens written since the prompt, beside the text in it."""
DIFFERENT = 2
"""Sequences whose keys and values are drawn; the others of a batch are copies of these, in memory of their own."""


@dataclass(frozen=True)
class Cell:
    """What one comparison is about."""

    shape: Shape
    batch: int
    visual: int
    """Visual tokens of a sequence, all of one image."""
    text: int
    """Tokens of text in its prompt."""
    tile: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    @property
    def tokens(self) -> int:
        """N: all that a query of the newest token sees."""
        return self.visual + self.text + TAIL

    @property
    def full_bytes(self) -> int:
        """Of the full cache, of one layer."""
        return self.batch * self.tokens * self.shape.token_bytes(self.dtype.itemsize)


class Layer(NamedTuple):
    """One layer of a cell: raw, and what its methods are made from."""

    keys: torch.Tensor
    """[B, H, N, D]."""
    values: torch.Tensor
    query: torch.Tensor
    """[B, H * G, 1, D]."""


def draw(cell: Cell) -> Layer:
    """Normally distributed keys, values and a query for every sequence."""
    generator = torch.Generator(cell.device).manual_seed(cell.seed)
    different, shape = min(cell.batch, DIFFERENT), cell.shape

    def rand(batch: int, heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, shape.head_dim, generator=generator, device=cell.device).to(cell.dtype)

    again = torch.arange(cell.batch, device=cell.device) % different
    keys, values = (rand(different, shape.kv_heads, cell.tokens)[again] for _ in range(2))
    return Layer(keys, values, rand(cell.batch, shape.query_heads, 1))


def store(cell: Cell, layer: Layer, method: Method) -> list[Segment]:
    """The segments that a decode step reads: what `method` makes of the prompt, and the tail."""
    different = min(cell.batch, DIFFERENT)
    compressed = method.compress(prefill(cell, layer, different))
    again = torch.arange(cell.batch, device=cell.device) % different
    prompt = [s if cell.batch == different else s.select(again) for s in (*compressed.visual, *compressed.text)]
    keys, values = (x[:, :, -TAIL:].contiguous() for x in (layer.keys, layer.values))
    return [*prompt, Segment(keys, values, torch.arange(cell.batch, device=cell.device))]


def prefill(cell: Cell, layer: Layer, rows: int) -> LayerPrefill:
    """The prompts of the first sequences: an image, then text."""
    prompt = cell.visual + cell.text
    spans = [VisualSpan(row, 0, cell.visual, (1, 1, cell.visual)) for row in range(rows)]
    valid = torch.ones(rows, prompt, dtype=torch.bool, device=cell.device)
    keys, values = (x[:rows, :, :prompt] for x in (layer.keys, layer.values))
    no_queries = keys.new_empty(rows, cell.shape.query_heads, 0, cell.shape.head_dim)
    return LayerPrefill(0, no_queries, keys, values, spans, valid, cell.shape.head_dim**-0.5, rotation(cell, prompt))


def rotation(cell: Cell, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 1-D RoPE at the first positions, [1, N, D] each."""
    half = cell.shape.head_dim // 2
    rates = 1e4 ** (-torch.arange(half, device=cell.device) / half)
    angles = torch.arange(tokens, device=cell.device)[:, None] * torch.cat([rates, rates])
    return angles.cos()[None], angles.sin()[None]


def bytes_read(segments: list[Segment]) -> int:
    """What a call must read: all that is stored for the sequences, and the maps that they share, once."""
    return storage_bytes(t for s in segments for t in (*s.entry_tensors(), *s.parameter_tensors()))


def copied(segments: list[Segment]) -> list[Segment]:
    """The same in memory of its own, maps included: another layer has others."""
    return copy.deepcopy(segments)
