"""Launching kvcapsule.kernels.fused.rows: which segments go together, and the table that its programs find them by."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from ...segments.quantized_rows import QuantizedRows
from ...segments.segment import Rows, Segment
from .call import Call, Part, Producer
from .device import BOTH, INTERPRETED, LOG2E, QUANTISED, RAW, TYPES, block, dot_type
from .mapped import turned
from .plan import index_of, split_length, table
from .rows import attend_rows

_ITEMS = 4
"""Items that every multiprocessor gets at least, where there are tokens enough."""
_ITEMS_IN_NUMPY = 64


def launches(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments that one launch can serve; the last segment is the last of the last launch.

    They agree in channels, precision and dtype of the bias; raw rows may go with few-bit ones of one pair of widths.
    """
    found: list[list[Segment]] = []
    for segment in reversed(segments):
        home = next((launch for launch in found if all(_agree(segment, other) for other in launch)), None)
        if home is None:
            found.append([segment])
        else:
            home.append(segment)
    return [launch[::-1] for launch in reversed(found)]


def _agree(one: Segment, other: Segment) -> bool:
    if _stored(one)[:3] != _stored(other)[:3]:
        return False
    if one.bias is not None and other.bias is not None and one.bias.dtype != other.bias.dtype:
        return False
    bits = {_stored(s)[3:] for s in (one, other)} - {(0, 0)}
    return len(bits) <= 1


def _stored(segment: Segment) -> tuple[Any, ...]:
    """Channels of keys and of values, dtype of rows or steps, bits of keys and of values (0: raw)."""
    keys, values = segment.keys, segment.values
    channels = (keys.shape[3], values.shape[3])
    if isinstance(keys, QuantizedRows) and isinstance(values, QuantizedRows):
        return (*channels, keys.step.dtype, keys.bits, values.bits)
    assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
    return (*channels, keys.dtype, 0, 0)


def _aligned(rows: Rows) -> bool:
    """Whether every unit of raw rows begins at a multiple of 16 bytes, so that loads may be wide."""
    if not isinstance(rows, torch.Tensor):
        return True
    size = rows.element_size()
    return rows.data_ptr() % 16 == 0 and all(n * size % 16 == 0 for n in (*rows.stride()[:2], rows.shape[3]))


@lru_cache(maxsize=8)
def _items(device: torch.device) -> int:
    return _ITEMS_IN_NUMPY if INTERPRETED else _ITEMS * torch.cuda.get_device_properties(device).multi_processor_count


def producer(call: Call, segments: Sequence[Segment], visible: torch.Tensor | None) -> Producer:
    """All of one launch; `visible` [E, Q, N] is that of the last segment."""
    units = [s.owner.numel() * s.keys.shape[1] for s in segments]
    # The tail's length, rounded up: the length of a split must not change with every token.
    lengths = [s.tokens for s in segments[:-1]] + [1 << (segments[-1].tokens - 1).bit_length()]
    split = split_length(list(zip(units, lengths, strict=True)), _items(call.query.device))
    parts = [Part(index_of(s, call.batch, call.heads), n, -(-s.tokens // split)) for s, n in zip(segments, units, strict=True)]

    def write(out: torch.Tensor, lse: torch.Tensor) -> None:
        _launch(call, segments, parts, split, visible, out, lse)

    return Producer(parts, write)


def _launch(
    call: Call,
    segments: Sequence[Segment],
    parts: Sequence[Part],
    split: int,
    visible: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    query = call.query
    pieces = [turned(call, s) if s.frame is not None or s.q_map is not None else None for s in segments]
    turns = [p for p in pieces if p is not None]
    begins, begin = [], 0
    for piece in pieces:
        begins.append(-1 if piece is None else begin)
        begin += 0 if piece is None else piece.numel()
    lines, first = [], 0
    for segment, part, at in zip(segments, parts, begins, strict=True):
        lines.append(_line(segment, part, first, at))
        first += part.units * part.splits
    # As in `combine`: what grows is handed over apart, so that the table stays what it was.
    lines[-1][1] = lines[-1][2] = 0
    forms = {_stored(s)[3:] for s in segments}
    key_bits, value_bits = max(forms)
    channels = _stored(segments[0])
    seen = query if visible is None else _as_bytes(visible)
    # What is held of a block of tokens must fit into registers; codes of 8 bits come in words of their own.
    tokens = 64 if query.dtype != torch.float32 and 8 not in (key_bits, value_bits) else 32
    attend_rows[(sum(p.units * p.splits for p in parts),)](
        table(tuple(n for line in lines for n in line), query.device), len(lines), segments[-1].tokens, split, call.scale * LOG2E,
        query, *query.stride()[:3], torch.cat([t.flatten() for t in turns]) if turns else query,
        seen, *(seen.stride()[:2]), out, lse,
        **call.constants, Q=call.queries, DK=channels[0], DV=channels[1], ROWS=TYPES[channels[2]],
        BIAS=TYPES[next((s.bias.dtype for s in segments if s.bias is not None), torch.float32)], DOT=dot_type(query.dtype),
        KIND=BOTH if len(forms) > 1 else QUANTISED if key_bits else RAW, KEY_BITS=key_bits, VALUE_BITS=value_bits,
        ALIGNED=all(_aligned(rows) for s in segments for rows in (s.keys, s.values)), VISIBLE=visible is not None,
        BLOCK_S=block(len(lines), least=1), BLOCK_R=block(call.rows), BLOCK_N=tokens, BLOCK_K=block(channels[0]),
        BLOCK_V=block(channels[1]),
    )  # fmt: skip


def _line(segment: Segment, part: Part, first: int, query_at: int) -> list[int]:
    """The segment's line of the table, as kvcapsule.kernels.fused.rows.FIELDS says."""

    def address(tensor: torch.Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    keys, values = segment.keys, segment.values
    scales: list[torch.Tensor | None] = [None] * 4
    if isinstance(keys, QuantizedRows) and isinstance(values, QuantizedRows):
        kind, k, v = QUANTISED.value, keys.codes, values.codes
        scales = [keys.step, keys.zero, values.step, values.zero]
    else:
        assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
        kind, k, v = RAW.value, keys, values
    return [
        first, segment.tokens, part.splits, keys.shape[1], k.data_ptr(), *k.stride()[:2], v.data_ptr(), *v.stride()[:2],
        address(segment.owner), address(segment.head), address(segment.bias), address(segment.mask), query_at,
        kind, *map(address, scales),
    ]  # fmt: skip


def _as_bytes(visible: torch.Tensor) -> torch.Tensor:
    return (visible if visible.stride(-1) == 1 else visible.contiguous()).view(torch.uint8)
