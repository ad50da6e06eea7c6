"""Random queries and segments of any size, for tests of kernels against the reference."""

from dataclasses import replace

import torch

from kvcapsule.segments.coefficient_rows import CodedRows, Coding
from kvcapsule.segments.mixed_width_rows import MixedWidthRows, WidthForm
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment
from support.builders import random_widths

HEADS, DIM, SCALE = 2, 8, 0.3
OWNERS = ([0, 1, 1, 3], [3, 0])
"""Batch rows of two segments' entries: several for one row, none for another, in any order."""


def query_of(
    group: int = 2, queries: int = 1, dtype: torch.dtype = torch.float32, batch: int = 4, dim: int = DIM
) -> torch.Tensor:
    """Laid out as models hand it over: heads behind tokens."""
    query = torch.randn(
        batch, queries, HEADS * group, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
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
        return Segment(
            self(entries, HEADS, tokens, dim), self(entries, HEADS, tokens, dim), torch.tensor(owner), bias=b
        )

    def coded(self, entries: int, widths: torch.Tensor, joint: int = 1) -> CodedRows:
        sets, groups, channels = widths.shape
        step = 4 * self(*widths.shape).abs() / 2.0**widths
        return CodedRows.encode(
            self(entries, sets, 8 * groups, channels), Coding(widths, step, self(sets, 8 * groups, channels), joint)
        )

    def transform(
        self, owner: list[int], tile: int, keys: tuple[int, int], values: tuple[int, int], joint: int = 1
    ) -> Segment:
        """Coded keys and values of (groups, channels)."""
        sets = HEADS // joint
        rows = [self.coded(len(owner), random_widths((sets, *size), self.generator), joint) for size in (keys, values)]
        return Segment(
            *rows,
            torch.tensor(owner),
            score_map=self(sets, tile, 8 * keys[0]),
            value_map=self(sets, tile, 8 * values[0]),
            q_map=self(HEADS, DIM, keys[1]), out_map=self(HEADS, values[1], DIM),
        )  # fmt: skip


def quantised(segment: Segment, key_bits: int, value_bits: int) -> Segment:
    assert isinstance(segment.keys, torch.Tensor) and isinstance(segment.values, torch.Tensor)
    return replace(
        segment, keys=QuantizedRows.pack(segment.keys, key_bits), values=QuantizedRows.pack(segment.values, value_bits)
    )


def mixed(
    draw: Draw, owner: list[int], tokens: int, frame: Frame | None = None, dim: int = DIM, heads: int = HEADS
) -> Segment:
    """Rows of a width per channel and head, with a bias in bytes and values along axes, as a coded compact
    capsule's."""
    rows = []
    for channels, most in ((dim, 7), (dim - 3, 4)):
        widths = torch.randint(0, most + 1, (heads, channels), dtype=torch.uint8, generator=draw.generator)
        unit, centre = (0.1 + draw(heads, channels).abs()) / 2 ** widths.to(draw.dtype), draw(heads, channels)
        rows.append(MixedWidthRows.encode(draw(len(owner), heads, tokens, channels), WidthForm(widths, unit, centre)))
    bias = (20 * draw(len(owner), heads, tokens)).round().clamp(-128, 127).to(torch.int8)
    out_map = draw(heads, dim - 3, dim)
    return Segment(rows[0], rows[1], torch.tensor(owner), bias=bias, frame=frame, out_map=out_map)


def of_odd_size(tokens: int, dtype: torch.dtype = torch.float32) -> list[Segment]:
    """Few-bit rows, maps, coded cells and raw rows of so many tokens, for 4 batch rows."""
    draw = Draw(tokens, dtype)
    rows = quantised(draw.raw([1, 0, 1], tokens, bias=True), 4, 2)
    stored = max(1, tokens // 3)
    maps = {"score_map": draw(HEADS, tokens, stored), "value_map": draw(HEADS, stored + 1, tokens).transpose(1, 2)}
    mapped = Segment(draw(3, HEADS, stored, DIM), draw(3, HEADS, stored + 1, DIM), torch.tensor([2, 2, 0]), **maps)
    transform = draw.transform([3, 1], tokens, (1 + tokens // 21, 5), (1 + tokens // 16, 7))
    return [rows, mapped, transform, draw.raw([0, 1, 2, 3], tokens)]


def of_cell_width(width: int, dtype: torch.dtype = torch.float32) -> list[Segment]:
    """Coded cells of one width, beside raw rows, for 1 batch row."""
    draw = Draw(width, dtype)
    segment = draw.transform([0], 6, (1, 3), (2, 3))
    widths = [torch.full((HEADS, groups, 3), width, dtype=torch.uint8) for groups in (1, 2)]
    return [replace(segment, keys=draw.coded(1, widths[0]), values=draw.coded(1, widths[1])), draw.raw([0], 3)]


def with_hidden_tokens(poison: float, dtype: torch.dtype = torch.float32) -> tuple[list[Segment], torch.Tensor]:
    """A masked segment and a tail in a larger buffer, for 3 rows of 3 queries, `poison` where nobody looks; and what
    each query sees."""
    draw, written, room = Draw(dtype=dtype), 67, 96
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, 5:], mask[3] = False, False
    capsule, tail = draw.raw([0, 1, 1, 2], 9, bias=True), draw.raw([0, 1, 2], room)
    seen = torch.ones(3, 3, room, dtype=torch.bool).tril(written - 3)
    seen[1, :, :3] = False
    parts = []
    for segment, hidden, own in ((capsule, ~mask, mask), (tail, ~seen.any(dim=1), None)):
        assert isinstance(segment.keys, torch.Tensor) and isinstance(segment.values, torch.Tensor)
        keys, values = (x.masked_fill(hidden[:, None, :, None], poison) for x in (segment.keys, segment.values))
        parts.append(replace(segment, keys=keys, values=values, mask=own))
    return parts, seen
