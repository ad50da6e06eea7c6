"""What a cache remembers of the forwards that brought images: which entries of its segments are of which span.

A cache's segments hold the entries of several spans and batch rows together. Within a row, tiles stand in the order of
its spans, as raw rows do in the order of its tokens, and selecting rows of the batch keeps both orders. So the spans of
each forward with images, and how many rows of text lay before each, tell all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..segments.segment import Segment
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


class Place(NamedTuple):
    """A span of one row of a cache."""

    span: VisualSpan
    start: int
    """Its logical position."""
    text: int
    """Rows of text between the span before and it."""


class SpanRecord:
    """The forwards whose visual spans a cache holds."""

    def __init__(self) -> None:
        self.forwards: list[StoredForward] = []
        self._arriving: StoredForward | None = None

    def announce(
        self, spans: Sequence[VisualSpan], valid: torch.Tensor | None, batch: int, layer: CapsuleLayer
    ) -> None:
        """A forward begins that brings these spans; layer: any of the cache's."""
        self._arriving = None
        if spans:
            # The tail becomes a text segment when an image comes.
            before = len(layer.text) + (layer.tail_length > 0)
            self._arriving = StoredForward.of(spans, valid, batch, before)

    def arrive(self) -> None:
        """The forward ended: the cache holds its spans."""
        if self._arriving is not None:
            self.forwards.append(self._arriving)
            self._arriving = None

    def select(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Rows of the batch are selected, as `choose` selects numbers of the rows."""
        self.forwards = [forward.select(choose) for forward in self.forwards]


def places_in(forwards: Sequence[StoredForward], row: int, text: Sequence[Segment]) -> list[Place]:
    """The spans of a row; text: the text segments of any layer."""
    places, text_so_far, visual_so_far = [], 0, 0
    for forward in forwards:
        earlier = sum(keys.shape[2] for keys, _ in raw_rows(text[: forward.text_segments], row))
        row_then, before = int(forward.rows[row]), forward.text.tolist()
        for span, count in zip(forward.spans, before, strict=True):
            if span.row == row_then:
                behind = earlier + count
                places.append(Place(span, behind + visual_so_far, behind - text_so_far))
                text_so_far, visual_so_far = behind, visual_so_far + span.length
    return places


def raw_rows(segments: Sequence[Segment], row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [1, H, N, D] of one row, without padding, of each segment of raw rows that has an entry of it."""
    parts = []
    for segment in segments:
        for entry in [row] if segment.each_row else (segment.owner == row).nonzero()[:, 0].tolist():
            keys, values = segment.keys, segment.values
            assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
            keys, values = keys[entry, None], values[entry, None]
            if segment.mask is not None:
                keys, values = keys[:, :, segment.mask[entry]], values[:, :, segment.mask[entry]]
            parts.append((keys, values))
    return parts
