"""What the kernels cover, and the small tables that a launch is steered by.

Which path a segment takes depends on its form alone, never on whether a kernel failed:

    rows        both keys and values raw, or both QuantizedRows, and no map along the tokens
    maps        any other pairing of raw rows, QuantizedRows and CodedRows, with or without maps
    reference   rows that are packed in another way (an MLP's, per-group codes), tensors that are not dense, frames that turn neighbouring
                channels, single-head entries or a mask a query on anything but rows
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...segments.coefficient_rows import CodedRows
from ...segments.quantized_rows import QuantizedRows
from ...segments.segment import Rows, Segment
from .device import TYPES

MOST_ROWS = 64
"""Query heads of a KV head times queries that a program holds; more (a second turn's prefill) is work for matrix products."""
MOST_CHANNELS = 256
"""Of rows that a program holds whole."""
_MOST_SHARED = 128
"""Rows of a set of heads that are coded together."""
_SPLITS = (1024, 512, 256, 128, 64)


def covers(query: torch.Tensor, segments: Sequence[Segment], heads: int) -> bool:
    """Whether the kernels serve this call: few queries, half or single precision, no gradients."""
    _, query_heads, queries, dim = query.shape
    if query.dtype not in TYPES or query_heads // heads * queries > MOST_ROWS or dim > MOST_CHANNELS or query.stride(3) != 1:
        return False
    if not torch.is_grad_enabled():
        return True
    tensors = (t for s in segments for t in (*s.entry_tensors(), *s.parameter_tensors()))
    return not (query.requires_grad or any(t.requires_grad for t in tensors))


def route(segment: Segment, query_rows: int, visible: bool) -> str:
    """ "rows", "maps" or "reference", for `query_rows` rows a KV head, with or without a mask a query."""
    if not all(t.is_contiguous() for t in _small(segment)) or segment.owner.dtype != torch.int64:
        return "reference"
    if segment.bias is not None and segment.bias.dtype not in TYPES:
        return "reference"
    if segment.frame is not None and segment.frame.neighbours:
        return "reference"
    keys, values = _form(segment.keys), _form(segment.values)
    if keys is None or values is None:
        return "reference"
    plain = segment.score_map is None and segment.value_map is None and max(segment.keys.shape[3], segment.values.shape[3]) <= MOST_CHANNELS
    if plain and keys == values != "coded" and _dtype(segment.keys) == _dtype(segment.values):
        return "rows"
    shared = max(rows.coding.heads if isinstance(rows, CodedRows) else 1 for rows in (segment.keys, segment.values))
    if visible or segment.head is not None or shared * query_rows > _MOST_SHARED:
        return "reference"
    return "maps"


def _small(segment: Segment) -> list[torch.Tensor]:
    frame = () if segment.frame is None else (segment.frame.cos, segment.frame.sin)
    return [t for t in (segment.owner, segment.head, segment.bias, segment.mask, *frame) if t is not None]


def _form(rows: Rows) -> str | None:
    if isinstance(rows, torch.Tensor):
        dense = rows.stride(3) == 1 and (rows.stride(2) == rows.shape[3] or rows.shape[2] == 1)
        return "raw" if dense and rows.dtype in TYPES else None
    if isinstance(rows, QuantizedRows):
        tensors = (rows.codes, rows.step, rows.zero)
        # Eight codes are read as one word, which may not lie across two.
        sound = all(t.is_contiguous() for t in tensors) and rows.codes.data_ptr() % 8 == 0
        return "quantised" if sound and rows.step.dtype in TYPES and rows.zero.dtype == rows.step.dtype else None
    if isinstance(rows, CodedRows):
        return "coded" if rows.packed.stride(1) == 1 and rows.coding.step.is_contiguous() else None
    return None


def _dtype(rows: Rows) -> torch.dtype:
    return rows.dtype if isinstance(rows, torch.Tensor) else _step(rows).dtype


def _step(rows: Rows) -> torch.Tensor:
    assert isinstance(rows, QuantizedRows)
    return rows.step


def split_length(units_and_tokens: Sequence[tuple[int, int]], programs: int) -> int:
    """Tokens of one item: the most that still gives the device `programs` items."""
    for length in _SPLITS:
        if sum(units * -(-tokens // length) for units, tokens in units_and_tokens) >= programs:
            return length
    return _SPLITS[-1]


@lru_cache(maxsize=4096)
def table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Numbers on the device. Kept, because a step's are those of the step before; they are a function of the numbers alone."""
    return torch.tensor(values, dtype=torch.int64, device=device)


class Index(NamedTuple):
    """The units of each slot (batch row and KV head, counted through): order[bounds[i] : bounds[i + 1]]."""

    order: torch.Tensor
    """[U] int64."""
    bounds: torch.Tensor
    """[B * H + 1] int64."""


_indices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the owner tensor itself: as long as a segment lives, its index need not be made again."""


def index_of(segment: Segment, batch: int, heads: int) -> Index:
    """Where a segment's units belong; worked out on the device, without waiting for it."""
    known = _indices.setdefault(segment.owner, {})
    head = segment.head
    key = (batch, heads, None if head is None else id(head))
    # An id may be that of another tensor by now: the tensor itself is kept beside the index.
    if key not in known:
        own = torch.arange(heads, device=segment.owner.device) if head is None else head[:, None]
        slots = (segment.owner[:, None] * heads + own).flatten()
        slots, order = slots.sort(stable=True)
        bounds = torch.searchsorted(slots, torch.arange(batch * heads + 1, device=slots.device))
        known[key] = (Index(order, bounds), head)
    found: Index = known[key][0]
    return found


@lru_cache(maxsize=64)
def slot_index(slots: int, device: torch.device) -> Index:
    """One unit a slot."""
    every = torch.arange(slots + 1, device=device)
    return Index(every[:-1], every)
