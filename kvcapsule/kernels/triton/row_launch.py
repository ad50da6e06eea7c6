"""Row launch: which segments share a launch of the row kernel, and the table that its programs read."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ...segments.packed_rows import Rows
from ...segments.quantized_rows import QuantizedRows
from ...segments.segment import Segment
from .arguments import INTERPRETED, TYPES, Queries, as_bytes, block
from .call import Call, Part, Producer
from .loads import BOTH, LOG2E, QUANTISED, RAW
from .plan import index_of, split_length, table
from .row_kernels import Blocks, Format, Line, Shape, Visible, attend_rows
from .tile_launch import derotated_queries

_ITEMS = 4
"""Items that every multiprocessor gets at least, where there are tokens enough."""
_ITEMS_INTERPRETED = 64


class _Storage(NamedTuple):
    """How the rows of a segment are stored."""

    key_channels: int
    value_channels: int
    dtype: torch.dtype
    """Of raw rows or of scales."""
    bits: tuple[int, int]
    """Of keys and of values; (0, 0): raw."""

    @classmethod
    def of(cls, segment: Segment) -> "_Storage":
        keys, values = segment.keys, segment.values
        if isinstance(keys, QuantizedRows) and isinstance(values, QuantizedRows):
            return cls(keys.shape[3], values.shape[3], keys.scale.dtype, (keys.bits, values.bits))
        assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
        return cls(keys.shape[3], values.shape[3], keys.dtype, (0, 0))


def group_by_launch(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments that one launch can serve; the last segment is the last of the last launch.

    They agree in channels, precision and dtype of the bias; raw rows may share a launch with quantised rows of one pair
    of widths.
    """
    launches: list[list[Segment]] = []
    for segment in reversed(segments):
        launch = next((launch for launch in launches if all(_agree(segment, other) for other in launch)), None)
        if launch is None:
            launches.append([segment])
        else:
            launch.append(segment)
    return [launch[::-1] for launch in reversed(launches)]


def _agree(one: Segment, other: Segment) -> bool:
    first, second = _Storage.of(one), _Storage.of(other)
    if first[:3] != second[:3]:
        return False
    if one.bias is not None and other.bias is not None and one.bias.dtype != other.bias.dtype:
        return False
    return len({first.bits, second.bits} - {(0, 0)}) <= 1


def _aligned(rows: Rows) -> bool:
    """Whether every unit of raw rows begins at a multiple of 16 bytes, so that loads may be wide."""
    if not isinstance(rows, torch.Tensor):
        return True
    size = rows.element_size()
    return rows.data_ptr() % 16 == 0 and all(n * size % 16 == 0 for n in (*rows.stride()[:2], rows.shape[3]))


@lru_cache(maxsize=8)
def _items(device: torch.device) -> int:
    """Items that keep a device busy."""
    if INTERPRETED:
        return _ITEMS_INTERPRETED
    return _ITEMS * torch.cuda.get_device_properties(device).multi_processor_count


def producer(call: Call, segments: Sequence[Segment], visible: torch.Tensor | None) -> Producer:
    """The partial results of one launch; `visible` [E, Q, N] is that of the last segment."""
    units = [s.owner.numel() * s.keys.shape[1] for s in segments]
    # The tail's length, rounded up: the length of a split must not change with every token.
    lengths = [s.tokens for s in segments[:-1]] + [1 << (segments[-1].tokens - 1).bit_length()]
    split = split_length(list(zip(units, lengths, strict=True)), _items(call.query.device))
    parts = [
        Part(index_of(s, call.batch, call.heads), n, -(-s.tokens // split))
        for s, n in zip(segments, units, strict=True)
    ]

    def write(out: torch.Tensor, lse: torch.Tensor) -> None:
        queries = [derotated_queries(call, s) if s.frame is not None or s.q_map is not None else None for s in segments]
        lines = table(_lines(segments, parts, queries), call.query.device)
        derotated = [q.flatten() for q in queries if q is not None]
        shape, form, blocks = _constants(call, segments)
        seen = as_bytes(visible)
        attend_rows[(sum(p.units * p.splits for p in parts),)](
            lines, len(segments), segments[-1].tokens, split, call.scale * LOG2E.value, Queries.of(call.query),
            torch.cat(derotated) if derotated else None,
            None if seen is None else Visible(seen, *seen.stride()[:2]), out, lse,
            SHAPE=shape, FORMAT=form, BLOCK=blocks,
        )  # fmt: skip

    return Producer(parts, write)


def _constants(call: Call, segments: Sequence[Segment]) -> tuple[Shape, Format, Blocks]:
    """What the kernel is compiled for."""
    stored = [_Storage.of(s) for s in segments]
    key_channels, value_channels, dtype, _ = stored[0]
    widths = {s.bits for s in stored}
    key_bits, value_bits = max(widths)
    kind = BOTH if len(widths) > 1 else QUANTISED if key_bits else RAW
    bias_dtype = next((s.bias.dtype for s in segments if s.bias is not None), torch.float32)
    aligned = all(_aligned(rows) for s in segments for rows in (s.keys, s.values))
    # A block of tokens must fit into registers; codes of 8 bits are loaded in words of their own.
    tokens = 64 if call.query.dtype != torch.float32 and 8 not in (key_bits, value_bits) else 32
    form = Format(kind.value, key_bits, value_bits, TYPES[dtype], TYPES[bias_dtype], aligned, call.product)
    blocks = Blocks(block(len(segments), least=1), block(call.rows), tokens, block(key_channels), block(value_channels))
    return Shape(call.rows, call.queries, key_channels, value_channels), form, blocks


def _lines(
    segments: Sequence[Segment], parts: Sequence[Part], queries: Sequence[torch.Tensor | None]
) -> tuple[int, ...]:
    """The segments' lines of the table; `queries`: their derotated queries, which lie one after the other, or None."""
    lines, first_item, first_query = [], 0, 0
    for segment, part, derotated in zip(segments, parts, queries, strict=True):
        lines.append(_line(segment, part, first_item, -1 if derotated is None else first_query))
        first_item += part.units * part.splits
        first_query += 0 if derotated is None else derotated.numel()
    # As in `combine`: what grows is an argument of its own, so that the table stays the same from token to token.
    lines[-1] = lines[-1]._replace(tokens=0, splits=0)
    return tuple(n for line in lines for n in line)


def _line(segment: Segment, part: Part, first_item: int, first_query: int) -> Line:
    def address(tensor: torch.Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    keys, values = segment.keys, segment.values
    scales: list[torch.Tensor | None] = [None] * 4
    if isinstance(keys, QuantizedRows) and isinstance(values, QuantizedRows):
        kind, key_rows, value_rows = QUANTISED.value, keys.codes, values.codes
        scales = [keys.scale, keys.minimum, values.scale, values.minimum]
    else:
        assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
        kind, key_rows, value_rows = RAW.value, keys, values
    return Line(
        first_item=first_item, tokens=segment.tokens, splits=part.splits, heads=keys.shape[1],
        key_rows=key_rows.data_ptr(), key_entry_stride=key_rows.stride(0), key_head_stride=key_rows.stride(1),
        value_rows=value_rows.data_ptr(), value_entry_stride=value_rows.stride(0),
        value_head_stride=value_rows.stride(1), owner=address(segment.owner), head=address(segment.head),
        bias=address(segment.bias), mask=address(segment.mask), query=first_query, kind=kind,
        key_scale=address(scales[0]), key_minimum=address(scales[1]),
        value_scale=address(scales[2]), value_minimum=address(scales[3]),
    )  # fmt: skip
