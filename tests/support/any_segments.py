"""Segments of any form that hypothesis draws: every kind of rows, maps, masks, frames, owners and sizes together."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from kvcapsule.codec.kvcapsule import MlpKeys, MlpRows
from kvcapsule.segments.bit_packing import WIDTHS
from kvcapsule.segments.coefficient_rows import CodedRows, Coding
from kvcapsule.segments.group_quantized_rows import GroupedRows
from kvcapsule.segments.packed_rows import Rows
from kvcapsule.segments.pooled_segment import PooledSegment
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment
from support.builders import random_widths

STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUERIES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call of attention."""

    query: torch.Tensor
    segments: list[Segment]
    scale: float
    visible: torch.Tensor | None
    stored: torch.dtype
    """Of the segments' numbers."""


class Builder:
    """Segments of one layer: H KV heads of D channels, for B batch rows."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.batch, self.heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        self.dim = 2 * draw(st.integers(1, 8))
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.dtype = draw(st.sampled_from(STORED))

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def map_of(self, *shape: int) -> torch.Tensor:
        """A matrix that leaves lengths about as they are."""
        return self.rand(*shape) / shape[-1] ** 0.5

    def sets(self) -> int:
        """A number of head groups."""
        return self.draw(st.sampled_from([s for s in range(1, self.heads + 1) if self.heads % s == 0]))

    def rows(self, kind: str, entries: int, heads: int, stored: int, channels: int) -> Rows:
        """Stored rows; coded ones have 8 rows where up to 8 are asked for, and so on."""
        if kind == "coded":
            sets, groups = self.sets() if heads == self.heads else 1, -(-stored // 8)
            widths = random_widths((sets, groups, channels), self.generator)
            step = 4 * (0.2 + self.rand(sets, groups, channels).abs()) / 2.0**widths
            coding = Coding(widths, step.to(self.dtype), self.rand(sets, 8 * groups, channels), heads // sets)
            return CodedRows.encode(self.rand(entries, sets, 8 * groups, channels), coding)
        if kind == "mlp":
            codec = MlpKeys(heads, self.draw(st.integers(1, 20)), stored, hidden=self.draw(st.integers(1, 5)))
            for parameter in codec.parameters():
                parameter.data.copy_(self.map_of(*parameter.shape))
            return MlpRows(self.rand(entries, heads, stored, channels), codec.requires_grad_(False))
        rows = self.rand(entries, heads, stored, channels)
        bits = self.draw(st.sampled_from(WIDTHS))
        if kind == "quantized":
            return QuantizedRows.pack(rows, bits)
        if kind == "grouped":
            return GroupedRows.pack(rows, bits, self.draw(st.integers(1, 9)), self.maybe())
        return rows

    def owner(self, entries: int) -> torch.Tensor:
        rows = st.integers(0, self.batch - 1)
        return torch.tensor(self.draw(st.lists(rows, min_size=entries, max_size=entries)), dtype=torch.int64)

    def bits(self, *shape: int) -> torch.Tensor:
        """Mostly true; now and then nothing is."""
        if self.draw(st.integers(0, 5)) == 0:
            return torch.zeros(*shape, dtype=torch.bool)
        return torch.rand(*shape, generator=self.generator) < 0.7

    def segment(self) -> Segment:
        """Entries of all KV heads."""
        entries, heads = self.draw(st.integers(0, 4)), self.heads
        channels = [self.draw(st.integers(1, 6)) if self.maybe() else None for _ in range(2)]
        keys = self.rows(
            self.draw(st.sampled_from(("raw", "raw", "quantized", "grouped", "coded", "mlp"))),
            entries, heads, self.draw(st.integers(1, 20)), channels[0] or self.dim,
        )  # fmt: skip
        maps: dict[str, Any] = {}
        if not isinstance(keys, MlpRows) and self.maybe():
            maps["score_map"] = self.map_of(self.sets(), self.draw(st.integers(1, 20)), keys.shape[2])
        tokens = keys.shape[2] if not maps else maps["score_map"].shape[1]
        # Without a map, the values have as many rows as there are tokens.
        mapped = self.maybe()
        kinds = (
            ("raw", "quantized", "grouped", "coded") if mapped or tokens % 8 == 0 else ("raw", "quantized", "grouped")
        )
        stored = self.draw(st.integers(1, 20)) if mapped else tokens
        values = self.rows(self.draw(st.sampled_from(kinds)), entries, heads, stored, channels[1] or self.dim)
        if mapped:
            maps["value_map"] = self.map_of(self.sets(), tokens, values.shape[2])
        if channels[0] is not None:
            maps["q_map"] = self.map_of(heads, self.dim, channels[0])
        if channels[1] is not None:
            maps["out_map"] = self.map_of(heads, channels[1], self.dim)
        if self.maybe():
            maps["value_mean"] = self.rand(heads, values.shape[3])
        if self.maybe():
            maps["bias"] = self.rand(entries, heads, tokens)
        if self.maybe():
            maps["mask"] = self.bits(entries, tokens)
        if self.maybe():
            maps["frame"] = self.frame(entries)
        return self.placed(Segment(keys, values, self.owner(entries), **maps))

    def frame(self, entries: int) -> Frame:
        angle = 3 * self.rand(entries, self.draw(st.integers(1, self.dim // 2))).float()
        return Frame(angle.cos(), angle.sin(), self.maybe())

    def placed(self, segment: Segment) -> Segment:
        """The segment, one entry a batch row where that is so, or entries of it as a pool."""
        entries = len(segment.owner)
        if segment.mask is not None or not entries or not self.maybe():
            return segment
        places = st.lists(st.integers(0, entries - 1), min_size=1, max_size=5)
        place = torch.tensor(self.draw(places), dtype=torch.int64)
        plain = segment.score_map is None and segment.value_map is None
        raw = isinstance(segment.keys, torch.Tensor) and isinstance(segment.values, torch.Tensor)
        counts = None
        if plain and raw and self.maybe():
            counts = torch.randint(0, segment.tokens + 1, place.shape, generator=self.generator)
        return PooledSegment.of(segment, self.owner(len(place)), place, counts)

    def single_heads(self) -> Segment:
        """Entries of one KV head each."""
        entries, tokens = self.draw(st.integers(0, 5)), self.draw(st.integers(1, 12))
        kinds = st.sampled_from(("raw", "quantized", "grouped"))
        keys, values = (self.rows(self.draw(kinds), entries, 1, tokens, self.dim) for _ in range(2))
        head = torch.randint(0, self.heads, (entries,), generator=self.generator)
        mask = self.bits(entries, tokens) if self.maybe() else None
        return Segment(keys, values, self.owner(entries), mask=mask, head=head)

    def tail(self) -> Segment:
        """Raw rows, one entry a batch row; none in it, now and then."""
        tokens = self.draw(st.integers(0, 10))
        keys, values = (self.rand(self.batch, self.heads, tokens, self.dim) for _ in range(2))
        return replace(Segment(keys, values, torch.arange(self.batch)), each_row=self.maybe())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Queries of a few heads for each KV head, some segments of any form, and a tail of which each query sees a
    part."""
    build = Builder(draw)
    segments = [
        build.single_heads() if draw(st.integers(0, 4)) == 0 else build.segment()
        for _ in range(draw(st.integers(0, 3)))
    ]
    segments.append(build.tail())
    shape = (build.batch, draw(st.integers(1, 5)), build.heads * draw(st.integers(1, 4)), build.dim)
    query = torch.randn(*shape, generator=build.generator, dtype=torch.float64).transpose(1, 2)
    visible = build.bits(build.batch, shape[1], segments[-1].tokens) if build.maybe() else None
    return Case(
        query.to(draw(st.sampled_from(QUERIES))), segments, draw(st.sampled_from((0.3, 1.0))), visible, build.dtype
    )
