"""Stored spans out of a cache and into one: segments are split by span, and joined as after one prefill."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from ..capsule.capsule import Capsule
from ..capsule.digest import capsule_digest
from ..capsule.span_form import raw
from ..capsule.span_header import SpanHeader, dtype_name, frame_name
from ..capsule.stored_span import StoredSpan
from ..codec.base import TILES
from ..errors import CapsuleError, ConfigError
from ..methods.method import Compressed, Method
from ..methods.tiles import tile_starts
from ..segments.memo import Memo
from ..segments.rotary_frame import Frame
from ..segments.segment import Segment
from ..segments.storable_rows import join_rows
from ..vlm.spans import VisualSpan
from .cache_layer import CapsuleLayer
from .span_record import StoredForward, places_in, raw_rows


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

    Raises:
        ConfigError: if there is no such row.
    """
    rows = layers[0].tail.keys.shape[0] if layers[0].is_initialized else 0
    if not 0 <= row < rows:
        raise ConfigError(f"row {row} of a cache of {rows} rows: there is none.")
    places = places_in(forwards, row, layers[0].text)
    if not places:
        return []
    tile, align, memos = capsule.config.codec.tile, capsule.config.codec.align, [Memo() for _ in places]
    counts = [len(tile_starts(place.start, place.span.length, tile, align)) for place in places]
    rests = [place.span.length - count * tile for place, count in zip(places, counts, strict=True)]
    visual: list[dict[int, list[Segment]]] = [{} for _ in places]
    text: list[dict[int, list[Segment]]] = [{} for _ in places]
    for layer in layers:
        tiles = _Tiles([s for s in layer.visual if s.tag == TILES], row)
        rest = _cut([s for s in layer.visual if s.tag != TILES], row, rests)
        before = _cut(layer.text, row, [p.text for p in places])
        for i in range(len(places)):
            visual[i][layer.index] = [*tiles.take(counts[i], memos[i]), *rest[i]]
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
                align=align,
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


def _cut(segments: Sequence[Segment], row: int, lengths: Sequence[int]) -> list[list[Segment]]:
    """Raw rows of one batch row, cut into pieces of these lengths; what is behind them is left out."""
    rows = raw_rows(segments, row)
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


def require_exchangeable(method: Method, layers: Sequence[object]) -> Capsule:
    """The method of a cache of these layers as the capsule that it is.

    Raises:
        ConfigError: if it is none, or layers have a cache of the model's own.
    """
    if not isinstance(method, Capsule):
        raise ConfigError(
            f"{type(method).__name__} is no capsule, and only a capsule's spans are given out and taken in: what it"
            " stores of an image needs no more than the image and the prompt before it. Make the CapsuleCache with a"
            " Capsule."
        )
    others = [index for index, layer in enumerate(layers) if not isinstance(layer, CapsuleLayer)]
    if others:
        raise ConfigError(
            f"layers {others} of this model have a cache of the model's own (a window, linear attention), which stored"
            " spans do not hold: spans of its cache are not given out or taken in."
        )
    return method


def fill_layers(layers: Sequence[CapsuleLayer], spans: Sequence[StoredSpan], capsule: Capsule) -> None:
    """Fill a cache's empty layers with spans, as one prefill of one batch row would have.

    Raises:
        CapsuleError: unless the spans, in this order, are the beginning of one prompt, made by this capsule.
        ConfigError: if the layers are not empty.
    """
    if any(not layer.is_empty for layer in layers):
        raise ConfigError("this cache holds tokens: spans are taken in by an empty one.")
    _require_beginning(spans, capsule, [layer.index for layer in layers])
    header, geometry, memo = spans[-1].header, capsule.config.geometry, Memo()
    for layer in layers:
        visual = [s for span in spans for s in span.visual[layer.index]]
        compressed = Compressed(
            [
                *_joined_tiles([s for s in visual if s.tag == TILES], memo),
                *_joined_raw([s for s in visual if s.tag != TILES]),
            ],
            _joined_raw([s for span in spans for s in span.text[layer.index]]),
        )
        device = compressed.visual[0].owner.device
        like = torch.empty(1, geometry.kv_heads, 0, geometry.head_dim, dtype=header.kv_dtype, device=device)
        layer.take_in(compressed, header.end, like)


def _require_beginning(spans: Sequence[StoredSpan], capsule: Capsule, layers: Sequence[int]) -> None:
    if not spans:
        raise CapsuleError("no spans were given: a cache takes in one at least.")
    frames = {header.frame for header, _, _ in spans if header.tiles}
    if len(frames) > 1:
        raise CapsuleError(f"spans with frames of the kinds {' and '.join(sorted(frames))} are not of one model.")
    first, position = spans[0].header, 0
    expected = replace(first, capsule=capsule_digest(capsule), align=capsule.config.codec.align, layers=tuple(layers))
    for number, (header, _, _) in enumerate(spans):
        for name in ("capsule", "align", "layers", "dtype", "weights", "adapter"):
            if getattr(header, name) != getattr(expected, name):
                raise CapsuleError(
                    f"span {number} was stored with {name} {getattr(header, name)!r} and not"
                    f" {getattr(expected, name)!r}: the cache cannot take it in."
                )
        if header.start - header.text != position:
            raise CapsuleError(
                f"span {number} and the text before it begin at position {header.start - header.text} and not"
                f" {position}: give all spans of a prompt's beginning, in their order."
            )
        position = header.end


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
            keys=memo.get_or_make(first.keys, lambda: join_rows([s.keys for s in segments])),
            values=memo.get_or_make(first.values, lambda: join_rows([s.values for s in segments])),
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
