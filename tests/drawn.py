"""Random queries and segments of any size, for tests of kernels against the reference."""

from dataclasses import replace

import torch
from builders import random_widths

from kvcapsule.codec.cells import CodedRows, Coding
from kvcapsule.quantize import QuantizedRows
from kvcapsule.segment import Segment

HEADS, DIM, SCALE = 2, 8, 0.3
OWNERS = ([0, 1, 1, 3], [3, 0])
"""Batch rows of two segments' entries: several for one row, none for another, in any order."""


def query_of(group: int = 2, queries: int = 1, dtype: torch.dtype = torch.float32, batch: int = 4, dim: int = DIM) -> torch.Tensor:
    """Laid out as models hand it over: heads behind tokens."""
    query = torch.randn(batch, queries, HEADS * group, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return query.to(dtype).transpose(1, 2)


class Draw:
    """Random segments of any size."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def raw(self, owner: list[int], tokens: int, bias: bool = False, dim: int = DIM) -> Segment:
        entries = len(owner)
        b = self(entries, HEADS, tokens) if bias else None
        return Segment(self(entries, HEADS, tokens, dim), self(entries, HEADS, tokens, dim), torch.tensor(owner), bias=b)

    def coded(self, entries: int, widths: torch.Tensor, joint: int = 1) -> CodedRows:
        sets, groups, channels = widths.shape
        step = 4 * self(*widths.shape).abs() / 2.0**widths
        return CodedRows.encode(self(entries, sets, 8 * groups, channels), Coding(widths, step, self(sets, 8 * groups, channels), joint))

    def transform(self, owner: list[int], tile: int, keys: tuple[int, int], values: tuple[int, int], joint: int = 1) -> Segment:
        """Coded keys and values of (groups, channels)."""
        sets = HEADS // joint
        rows = [self.coded(len(owner), random_widths((sets, *size), self.generator), joint) for size in (keys, values)]
        return Segment(
            *rows, torch.tensor(owner), score_map=self(sets, tile, 8 * keys[0]), value_map=self(sets, tile, 8 * values[0]),
            q_map=self(HEADS, DIM, keys[1]), out_map=self(HEADS, values[1], DIM),
        )  # fmt: skip


def quantised(segment: Segment, key_bits: int, value_bits: int) -> Segment:
    assert isinstance(segment.keys, torch.Tensor) and isinstance(segment.values, torch.Tensor)
    return replace(segment, keys=QuantizedRows.pack(segment.keys, key_bits), values=QuantizedRows.pack(segment.values, value_bits))
