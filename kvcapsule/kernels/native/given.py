"""What a kernel over tiles (tiles.py) is given of a segment, and which segments that are: fp32 throughout, by form alone.

Mapped segments of all KV heads with both maps along the tokens and no bias: coded keys and values whose queries are mapped, or raw ones.
Plain segments, and those whose entries are not one for each row, of raw rows. All else is the reference's.
"""

import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from ...segments.coefficient_rows import CodedRows, Runs
from ...segments.segment import Segment
from .flat import flat, told
from .forms import After, Coded, Entries, Form, Map, Raw, Turn
from .jit import U
from .kept import Kept, keep

CHUNK = 64
"""Tokens of a plain segment that are read at once."""
_ZERO, _NO, _NOT = U(0), np.zeros(1, np.float32), np.zeros(1, np.bool_)
_NOWHERE = (_ZERO, _ZERO, _ZERO)
_NO_TURN, _NO_MAP, _NOTHING_AFTER = Turn(_NO, _NO, _ZERO, False, _NO), Map(_NO, *_NOWHERE), After(_NO, _NO, _NOWHERE)
"""What stands where a segment has nothing of a kind."""


class Given(NamedTuple):
    """A segment as a kernel takes it."""

    kind: str
    """Of `tiles.KINDS`."""
    sizes: tuple[int, ...]
    """Those of Form from `dim` on."""
    sets: int
    heads: int
    """KV heads of a set."""
    entries: Entries
    arrays: tuple[Any, ...]
    """Turn, both maps, keys, values and what follows."""
    work: int
    """Multiply-adds of a query row."""
    kept: Kept | None = None
    """Entries and arrays in memory, if all of it is known again."""


class _Known(NamedTuple):
    segment: "weakref.ref[Segment]"
    tensors: tuple[torch.Tensor, ...]
    places: list[int]
    """Where these were in memory: parameters may be put elsewhere."""
    given: Given


_known: dict[int, _Known] = {}
"""Of segments that are still there: most stay for a whole answer."""


def given(segment: Segment) -> Given | None:
    """None for a segment that no kernel covers."""
    known = _known.get(id(segment))
    if known is not None and known.segment() is segment and [t.data_ptr() for t in known.tensors] == known.places:
        told(known.tensors)
        return None if _learning(known.tensors) else known.given
    tensors = (*segment.entry_tensors(), *segment.parameter_tensors())
    if segment.head is not None or not segment.tokens or not len(segment.owner) or _learning(tensors):
        return None
    kind = _kind(segment)
    if kind is None:
        return None
    made = {"coded": _coded, "raw": _raw, "plain": _plain}[kind](segment)
    if _in_place(segment):
        made, number = made._replace(kept=keep((made.entries, *made.arrays))), id(segment)
        _known[number] = _Known(weakref.ref(segment, lambda _: _known.pop(number, None)), tensors, [t.data_ptr() for t in tensors], made)
    return made


def _in_place(s: Segment) -> bool:
    """Whether a kernel reads all where it is: of a copy nobody would know when it is out of date."""
    small = [s.owner, s.mask, s.value_mean, s.q_map, *(() if s.frame is None else s.frame.tensors())]
    codings = [rows.coding for rows in (s.keys, s.values) if isinstance(rows, CodedRows)]
    return all(t is None or t.is_contiguous() for t in (*small, *(t for c in codings for t in (c.widths, c.step, c.offset))))


def _learning(tensors: Sequence[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _kind(s: Segment) -> str | None:
    if type(s).for_query is not Segment.for_query:
        return None
    if any(t is not None and t.dtype != torch.float32 for t in (s.score_map, s.value_map, s.q_map, s.out_map, s.value_mean, s.bias)):
        return None
    if s.frame is not None and s.frame.cos.dtype != torch.float32:
        return None
    if isinstance(s.keys, torch.Tensor) and isinstance(s.values, torch.Tensor):
        if s.q_map is not None or s.out_map is not None or not all(_dense(rows) for rows in (s.keys, s.values)):
            return None
        if s.keys.shape[3] != s.values.shape[3]:
            return None
        if s.score_map is None and s.value_map is None:
            return "plain" if s.value_mean is None else None
        return "raw" if _mapped(s, s.keys.shape[1]) else None
    if isinstance(s.keys, CodedRows) and isinstance(s.values, CodedRows) and s.q_map is not None and s.value_mean is None:
        keys, values = s.keys.coding, s.values.coding
        alike = len(keys.widths) == len(values.widths) and all(t.dtype == torch.float32 for c in (keys, values) for t in (c.step, c.offset))
        dense = s.keys.packed.stride(1) == 1 and s.values.packed.stride(1) == 1
        return "coded" if alike and dense and s.out_map is not None and _mapped(s, len(keys.widths)) else None
    return None


def _dense(rows: torch.Tensor) -> bool:
    """fp32, dense along channels that fill vectors."""
    return rows.dtype == torch.float32 and rows.stride(3) == 1 and rows.shape[3] % 16 == 0


def _mapped(s: Segment, sets: int) -> bool:
    both = s.score_map is not None and s.value_map is not None
    return both and s.bias is None and {len(s.score_map), len(s.value_map)} <= {1, sets}  # type: ignore[arg-type]


def _coded(s: Segment) -> Given:
    keys, values = s.keys, s.values
    assert isinstance(keys, CodedRows) and isinstance(values, CodedRows) and s.q_map is not None and s.out_map is not None
    (sets, _, channels), heads = keys.coding.widths.shape, keys.coding.heads
    sizes = (s.q_map.shape[1], s.tokens, keys.shape[2], values.shape[2], channels, values.shape[3])
    after = After(_NO, flat(s.out_map), _steps(s.out_map))
    arrays = (_turn(s), _map(s.score_map), _map(s.value_map), _cells(keys, keys.coding.runs_of_groups))
    return Given("coded", sizes, sets, heads, _entries(s), (*arrays, _cells(values, values.coding.runs_of_channels), after), _work(s))


def _raw(s: Segment) -> Given:
    keys, values = s.keys, s.values
    assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
    dim = keys.shape[3]
    sizes = (dim, s.tokens, keys.shape[2], values.shape[2], dim, dim)
    after = _NOTHING_AFTER if s.value_mean is None else After(flat(s.value_mean.contiguous()), _NO, _NOWHERE)
    arrays = (_turn(s), _map(s.score_map), _map(s.value_map), _rows(keys), _rows(values), after)
    return Given("raw", sizes, keys.shape[1], 1, _entries(s), arrays, _work(s))


def _plain(s: Segment) -> Given:
    keys, values = s.keys, s.values
    assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
    dim = keys.shape[3]
    arrays = (_turn(s), _NO_MAP, _NO_MAP, _rows(keys), _rows(values), _NOTHING_AFTER)
    return Given("plain", (dim, CHUNK, CHUNK, CHUNK, dim, dim), keys.shape[1], 1, _entries(s), arrays, _work(s))


@lru_cache(maxsize=256)
def form(sets: int, heads: int, sizes: tuple[int, ...], batch: int, each: int) -> Form:
    return Form(*map(U, (batch, sets, heads, each, *sizes)))


def _work(s: Segment) -> int:
    return int(len(s.owner) * s.keys.shape[1] * s.tokens * (s.keys.shape[2] + s.values.shape[2]))


def _entries(s: Segment) -> Entries:
    mask, bias = s.mask, s.bias
    return Entries(
        flat(s.owner.contiguous()), U(s.tokens), _NOT if mask is None else flat(mask.contiguous()), mask is not None, _NOT, False, U(1),
        _NO if bias is None else flat(bias), _NOWHERE if bias is None else _steps(bias),
    )  # fmt: skip


def seen(entries: Entries, visible: torch.Tensor) -> Entries:
    """With what each query sees, [E, Q, N]."""
    return entries._replace(visible=flat(visible.contiguous()), hidden=True, queries=U(visible.shape[1]))


def _turn(s: Segment) -> Turn:
    frame, q_map = s.frame, _NO if s.q_map is None else flat(s.q_map.contiguous())
    if frame is None:
        return _NO_TURN._replace(q_map=q_map)
    return Turn(flat(frame.cos.contiguous()), flat(frame.sin.contiguous()), U(frame.cos.shape[1]), frame.neighbours, q_map)


def _steps(x: torch.Tensor) -> tuple[Any, ...]:
    # Where there is one of a kind, how far the next is away may be any number.
    return tuple(U(step if size > 1 else 0) for step, size in zip(x.stride(), x.shape, strict=True))


def _map(map_: torch.Tensor | None) -> Map:
    assert map_ is not None
    return Map(flat(map_), *_steps(map_))


def _rows(rows: torch.Tensor) -> Raw:
    return Raw(flat(rows), *_steps(rows)[:3])


def _cells(rows: CodedRows, runs: Runs) -> Coded:
    tables = (table.numpy().reshape(-1).view("uint64" if table.dtype == torch.int64 else "uint32") for table in runs)
    coding = (rows.coding.widths, rows.coding.step, rows.coding.offset)
    return Coded(flat(rows.packed), U(rows.packed.stride(0)), *tables, *(flat(t.contiguous()) for t in coding))
