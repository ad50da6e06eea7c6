"""Plan of a call: which path each segment takes, how long splits are, and the small tables that launches read.

The path of a segment depends on its form alone, never on whether a kernel failed:

    rows        keys and values both raw, or both QuantizedRows, and no map along the tokens
    maps        any other pairing of raw rows, QuantizedRows, CodedRows and MixedWidthRows, with or without maps
    reference   rows packed in another way (an MLP's, per-group codes), tensors that are not dense, frames that rotate
                neighbouring channels; single-head entries or a mask for each query on anything but rows
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...segments.coefficient_rows import CodedRows
from ...segments.mixed_width_rows import MixedWidthRows
from ...segments.packed_rows import Rows
from ...segments.quantized_rows import QuantizedRows
from ...segments.segment import Segment
from .arguments import TYPES

MOST_ROWS = 64
"""Most rows of a unit: more (a second turn's prefill) is work for matrix products."""
MOST_CHANNELS = 256
"""Most channels of rows that a program holds in full."""
_MOST_SHARED = 128
"""Most rows of a set of KV heads that are coded together."""
_SPLITS = (1024, 512, 256, 128, 64)
"""Lengths of a split, in tokens."""


def covers(query: torch.Tensor, segments: Sequence[Segment], heads: int) -> bool:
    """Whether the kernels compute this call: few queries, half or single precision, no gradients."""
    _, query_heads, queries, dim = query.shape
    if (
        query.dtype not in TYPES
        or query_heads // heads * queries > MOST_ROWS
        or dim > MOST_CHANNELS
        or query.stride(3) != 1
    ):
        return False
    if not torch.is_grad_enabled():
        return True
    tensors = (t for s in segments for t in (*s.entry_tensors(), *s.parameter_tensors()))
    return not (query.requires_grad or any(t.requires_grad for t in tensors))


def route(segment: Segment, query_rows: int, visible: bool) -> str:
    """The segment's path, for `query_rows` rows a unit, with or without a mask for each query (`visible`)."""
    if not all(t.is_contiguous() for t in _small_tensors(segment)) or segment.owner.dtype != torch.int64:
        return "reference"
    of_bytes = segment.bias is not None and segment.bias.dtype == torch.int8
    if segment.bias is not None and segment.bias.dtype not in TYPES and not of_bytes:
        return "reference"
    if segment.frame is not None and segment.frame.interleaved:
        return "reference"
    keys, values = _form(segment.keys), _form(segment.values)
    if keys is None or values is None:
        return "reference"
    channels = max(segment.keys.shape[3], segment.values.shape[3])
    plain = not of_bytes and segment.score_map is None and segment.value_map is None and channels <= MOST_CHANNELS
    if plain and keys == values and keys in ("raw", "quantised") and _dtype(segment.keys) == _dtype(segment.values):
        return "rows"
    shared = max(rows.coding.heads if isinstance(rows, CodedRows) else 1 for rows in (segment.keys, segment.values))
    if visible or segment.head is not None or shared * query_rows > _MOST_SHARED:
        return "reference"
    return "maps"


def _small_tensors(segment: Segment) -> list[torch.Tensor]:
    """Per-entry tensors and rotary frame, which the kernels need contiguous."""
    frame = () if segment.frame is None else (segment.frame.cos, segment.frame.sin)
    return [t for t in (segment.owner, segment.head, segment.bias, segment.mask, *frame) if t is not None]


def _form(rows: Rows) -> str | None:
    """ "raw", "quantised", "coded" or "mixed"; None for rows that the kernels cannot read."""
    if isinstance(rows, torch.Tensor):
        dense = rows.stride(3) == 1 and (rows.stride(2) == rows.shape[3] or rows.shape[2] == 1)
        return "raw" if dense and rows.dtype in TYPES else None
    if isinstance(rows, QuantizedRows):
        tensors = (rows.codes, rows.scale, rows.minimum)
        # Eight codes are loaded as one word, whose address must be a multiple of its size.
        readable = all(t.is_contiguous() for t in tensors) and rows.codes.data_ptr() % 8 == 0
        return (
            "quantised" if readable and rows.scale.dtype in TYPES and rows.minimum.dtype == rows.scale.dtype else None
        )
    if isinstance(rows, MixedWidthRows):
        tensors = (rows.side, rows.form.unit, rows.form.centre)
        dense = rows.packed.stride(1) == 1 and all(t.is_contiguous() for t in tensors)
        return "mixed" if dense and {rows.form.unit.dtype, rows.form.centre.dtype} <= TYPES.keys() else None
    if isinstance(rows, CodedRows):
        return "coded" if rows.packed.stride(1) == 1 and rows.coding.scale.is_contiguous() else None
    return None


def _dtype(rows: Rows) -> torch.dtype:
    """Of raw rows, or of the scales of quantised ones."""
    if isinstance(rows, torch.Tensor):
        return rows.dtype
    assert isinstance(rows, QuantizedRows)
    return rows.scale.dtype


def split_length(units_and_tokens: Sequence[tuple[int, int]], programs: int) -> int:
    """Tokens of one work item: the most that still gives the device `programs` items."""
    for length in _SPLITS:
        if sum(units * -(-tokens // length) for units, tokens in units_and_tokens) >= programs:
            return length
    return _SPLITS[-1]


@lru_cache(maxsize=4096)
def table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Numbers as an int64 tensor on the device, cached: those of a decode step are mostly those of the step before."""
    return torch.tensor(values, dtype=torch.int64, device=device)


class UnitIndex(NamedTuple):
    """The units of each slot (a batch row's KV head): those of slot i are order[bounds[i] : bounds[i + 1]]."""

    order: torch.Tensor
    """[U] int64."""
    bounds: torch.Tensor
    """[B * H + 1] int64."""


_indices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Indices by the owner tensor: an index lives as long as its segment."""


def index_of(segment: Segment, batch: int, heads: int) -> UnitIndex:
    """The units of a segment by slot, computed on the device without waiting for it, and cached."""
    known = _indices.setdefault(segment.owner, {})
    head = segment.head
    key = (batch, heads, None if head is None else id(head))
    # An id may be that of another tensor by now: the tensor itself is kept beside the index.
    if key not in known:
        heads_of_entry = torch.arange(heads, device=segment.owner.device) if head is None else head[:, None]
        slots = (segment.owner[:, None] * heads + heads_of_entry).flatten()
        slots, order = slots.sort(stable=True)
        bounds = torch.searchsorted(slots, torch.arange(batch * heads + 1, device=slots.device))
        known[key] = (UnitIndex(order, bounds), head)
    index: UnitIndex = known[key][0]
    return index


@lru_cache(maxsize=64)
def index_of_slots(slots: int, device: torch.device) -> UnitIndex:
    """The index of a segment that has one unit for each slot."""
    numbers = torch.arange(slots + 1, device=device)
    return UnitIndex(numbers[:-1], numbers)
