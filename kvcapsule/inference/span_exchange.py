"""Stored spans out of a cache and into one: which entries of its segments are of which span, and how spans are joined.

A cache's segments hold the entries of several spans and batch rows together. Within a row, tiles stand in the order of
its spans, as raw rows do in the order of its tokens, and selecting rows of the batch keeps both orders. So the spans of
each forward with images, and how many rows of text lay before each, tell all.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch

from ..capsule.capsule import Capsule
from ..capsule.digest import capsule_digest
from ..capsule.span_form import raw
from ..capsule.span_header import SpanHeader, dtype_name, frame_name
from ..capsule.stored_span import StoredSpan
from ..codec.base import TILES
from ..errors import CapsuleError
from ..methods.method import Compressed
from ..segments.memo import Memo
from ..segments.rotary_frame import Frame
from ..segments.segment import Segment
from ..segments.storable_rows import joined
from ..vlm.spans import VisualSpan
from .cache_layer import CapsuleLayer


class StoredForward(NamedTuple):
    """A forward whose visual spans are in the cache."""

    spans: Sequence[VisualSpan]
    text: torch.Tensor
    """[spans] int64: tokens of this forward's text before each span, in its row."""
    text_segments: int
    """Text segments that each layer had before the forward's own."""
    rows: torch.Tensor
    """[B] int64: the row of the forward that each row of the cache was."""

    @classmethod
    def of(
        cls, spans: Sequence[VisualSpan], valid: torch.Tensor | None, batch: int, text_segments: int
    ) -> "StoredForward":
        """A forward over `batch` rows; valid [B, N] bool: False at padding, None: no padding."""
        if valid is None:
            end = max(span.start + span.length for span in spans)
            valid = torch.ones(batch, end, dtype=torch.bool)
        text = valid.clone()
        for span in spans:
            text[span.row, span.start : span.start + span.length] = False
        before = text.cumsum(1) - text.to(torch.int64)
        rows, starts = ([getattr(span, name) for span in spans] for name in ("row", "start"))
        return cls(tuple(spans), before[rows, starts], text_segments, torch.arange(batch))

    def select(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> "StoredForward":
        """The forward once rows of the batch were selected."""
        return self._replace(rows=choose(self.rows))


class _Place(NamedTuple):
    """A span of one row of a cache."""

    span: VisualSpan
    start: int
    """Its logical position."""
    text: int
    """Rows of text between the span before and it."""


def give_out(
    layers: Sequence[CapsuleLayer],
    forwards: Sequence[StoredForward],
    row: int,
    capsule: Capsule,
    weights: str,
    adapter: str,
) -> list[StoredSpan]:
    """The spans of one batch row, in their order.

    Args:
        layers: all layers, nothing pending.
        forwards: those that brought images.
        row: of the batch.
        capsule: that made the segments.
        weights: see SpanHeader.
        adapter: see SpanHeader.
    """
    places = _places(forwards, row, layers[0].text)
    if not places:
        return []
    tile, memos = capsule.config.codec.tile, [Memo() for _ in places]
    visual: list[dict[int, list[Segment]]] = [{} for _ in places]
    text: list[dict[int, list[Segment]]] = [{} for _ in places]
    for layer in layers:
        tiles = _Tiles([s for s in layer.visual if s.tag == TILES], row)
        rest = _cut([s for s in layer.visual if s.tag != TILES], row, [p.span.length % tile for p in places])
        before = _cut(layer.text, row, [p.text for p in places])
        for i, place in enumerate(places):
            visual[i][layer.index] = [*tiles.take(place.span.length // tile, memos[i]), *rest[i]]
            text[i][layer.index] = before[i]
    digest, config = capsule_digest(capsule), capsule.config
    return [
        StoredSpan(
            SpanHeader(
                capsule=digest,
                family=config.family,
                base_model=config.base_model,
                dtype=dtype_name(layers[0].dtype),
                grid=place.span.grid,
                tile=tile,
                frame=frame_name(visual[i][layers[0].index][0].frame),
                start=place.start,
                length=place.span.length,
                text=place.text,
                layers=tuple(visual[i]),
                weights=weights,
                adapter=adapter,
            ),
            visual[i],
            text[i],
        )
        for i, place in enumerate(places)
    ]


def _places(forwards: Sequence[StoredForward], row: int, text: Sequence[Segment]) -> list[_Place]:
    """The spans of a row; text: the text segments of any layer."""
    places, text_so_far, visual_so_far = [], 0, 0
    for forward in forwards:
        earlier = sum(part.shape[2] for part in _parts(text[: forward.text_segments], row))
        row_then, before = int(forward.rows[row]), forward.text.tolist()
        for span, count in zip(forward.spans, before, strict=True):
            if span.row == row_then:
                behind = earlier + count
                places.append(_Place(span, behind + visual_so_far, behind - text_so_far))
                text_so_far, visual_so_far = behind, visual_so_far + span.length
    return places


class _Tiles:
    """The tiles of one row and layer, in their order, which may lie in several segments."""

    def __init__(self, segments: Sequence[Segment], row: int) -> None:
        self._left = [(s, (s.owner == row).nonzero()[:, 0]) for s in segments]

    def take(self, count: int, memo: Memo) -> list[Segment]:
        """The next `count` tiles as a segment of one batch row; none where count is 0."""
        if count == 0:
            return []
        while self._left and len(self._left[0][1]) == 0:
            del self._left[0]
        if not self._left or len(self._left[0][1]) < count:
            raise RuntimeError(f"{count} tiles of a span are not in the cache: its segments are not a capsule's.")
        segment, index = self._left[0]
        self._left[0] = segment, index[count:]
        chosen = memo.get_or_make(segment.owner, lambda: (index[:count], torch.zeros_like(index[:count])))
        return [segment.entries(*chosen, memo)]


def _parts(segments: Sequence[Segment], row: int) -> list[torch.Tensor]:
    """Keys of one row, [1, H, N, D], of each segment of raw rows that has an entry of it."""
    return [keys for keys, _ in _raw_rows(segments, row)]


def _raw_rows(segments: Sequence[Segment], row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [1, H, N, D] of one row, without padding, of each segment of raw rows that has an entry of it."""
    found = []
    for segment in segments:
        for entry in [row] if segment.each_row else (segment.owner == row).nonzero()[:, 0].tolist():
            keys, values = segment.keys, segment.values
            assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
            keys, values = keys[entry, None], values[entry, None]
            if segment.mask is not None:
                keys, values = keys[:, :, segment.mask[entry]], values[:, :, segment.mask[entry]]
            found.append((keys, values))
    return found


def _cut(segments: Sequence[Segment], row: int, lengths: Sequence[int]) -> list[list[Segment]]:
    """Raw rows of one batch row, cut into pieces of these lengths; what is behind them is left out."""
    rows = _raw_rows(segments, row)
    if not any(lengths):
        return [[] for _ in lengths]
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*rows, strict=True)) if rows else (None, None)
    if keys is None or values is None or keys.shape[2] < sum(lengths):
        raise RuntimeError(f"{sum(lengths)} raw rows of spans are not in the cache: its segments are not a capsule's.")
    ends = list(accumulate(lengths))
    return [
        [raw(keys[:, :, end - n : end].clone(), values[:, :, end - n : end].clone())] if n else []
        for n, end in zip(lengths, ends, strict=True)
    ]


def require_row_of_pieces(spans: Sequence[StoredSpan], capsule: Capsule, layers: Sequence[int]) -> None:
    """Raises CapsuleError unless the spans, in this order, are the beginning of one prompt for a cache of these layers
    and this capsule."""
    if not spans:
        raise CapsuleError("no spans were given: a cache takes in one at least.")
    digest, position = capsule_digest(capsule), 0
    first = spans[0].header
    for number, (header, _, _) in enumerate(spans):
        for name, value, expected in (
            ("capsule", header.capsule, digest),
            ("layers", header.layers, tuple(layers)),
            ("dtype", header.dtype, first.dtype),
            ("weights", header.weights, first.weights),
            ("adapter", header.adapter, first.adapter),
            ("frame of the tiles", header.tiles and header.frame, header.tiles and first.tiles and first.frame),
        ):
            if value != expected and not (name.startswith("frame") and not first.tiles):
                raise CapsuleError(
                    f"span {number} was stored with the {name} {value!r} and not {expected!r}: the cache cannot take it"
                    " in."
                )
        if header.start - header.text != position:
            raise CapsuleError(
                f"span {number} and its text begin at position {header.start - header.text} and not {position}: give"
                " all spans of the prompt's beginning, in their order."
            )
        position = header.end


def joined_spans(spans: Sequence[StoredSpan]) -> dict[int, Compressed]:
    """The segments of each layer, as one prefill of all spans would have made them."""
    memo = Memo()
    return {
        layer: Compressed(
            [
                *_joined_tiles([s for span in spans for s in span.visual[layer] if s.tag == TILES], memo),
                *_joined_raw([s for span in spans for s in span.visual[layer] if s.tag != TILES]),
            ],
            _joined_raw([s for span in spans for s in span.text[layer]]),
        )
        for layer in spans[0].header.layers
    }


def forward_of(spans: Sequence[StoredSpan]) -> StoredForward:
    """The forward that would have brought the spans."""
    headers = [span.header for span in spans]
    return StoredForward(
        [VisualSpan(0, header.start, header.length, header.grid) for header in headers],
        torch.tensor(list(accumulate(header.text for header in headers))),
        0,
        torch.arange(1),
    )


def _joined_tiles(segments: Sequence[Segment], memo: Memo) -> list[Segment]:
    if not segments:
        return []
    first = segments[0]
    frames = [s.frame for s in segments if s.frame is not None]
    biases = [s.bias for s in segments if s.bias is not None]

    def frame() -> Frame:
        cos, sin = (torch.cat(parts) for parts in zip(*(f.tensors() for f in frames), strict=True))
        return replace(frames[0], cos=cos, sin=sin)

    return [
        replace(
            first,
            keys=memo.get_or_make(first.keys, lambda: joined([s.keys for s in segments])),
            values=memo.get_or_make(first.values, lambda: joined([s.values for s in segments])),
            owner=memo.get_or_make(first.owner, lambda: torch.cat([s.owner for s in segments])),
            bias=torch.cat(biases) if biases else None,
            frame=memo.get_or_make(first.frame, frame) if frames else None,
        )
    ]


def _joined_raw(segments: Sequence[Segment]) -> list[Segment]:
    if not segments:
        return []
    keys, values = ([getattr(s, name) for s in segments] for name in ("keys", "values"))
    return [raw(torch.cat(keys, dim=2), torch.cat(values, dim=2))]
