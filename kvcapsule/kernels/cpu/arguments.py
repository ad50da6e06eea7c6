"""What kernels are given of a segment, as C structs (structs.h), and which segments they cover: decided by form alone.

Covered are fp32 keys and values of one kind (raw rows; `QuantizedRows`; `CodedRows` behind maps), without gradients, with any of a segment's
other parts. All else is the reference's.
"""

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...codec.cells import CodedRows
from ...quantize import QuantizedRows
from ...segment import Segment
from .cell_words import cell_tables

RAW, QUANTIZED, CELLS = range(3)


def _fields(names: str, kind: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class CStrided(ctypes.Structure):
    """Strided of structs.h."""

    _fields_ = [*_fields("data", ctypes.c_void_p), *_fields("first second third", ctypes.c_int64)]


class CRows(ctypes.Structure):
    """Rows of structs.h."""

    _fields_ = [
        *_fields("data", ctypes.c_void_p), *_fields("rows channels entry head row", ctypes.c_int64), *_fields("step offset", ctypes.c_void_p),
        *_fields("bits bytes", ctypes.c_int64), *_fields("widths", ctypes.c_void_p), *_fields("cells", ctypes.c_int64),
        *_fields("bounds lines numbers ranges", ctypes.c_void_p),
    ]  # fmt: skip


class CSegment(ctypes.Structure):
    """Segment of structs.h."""

    _fields_ = [
        *_fields("form entries sets heads tokens", ctypes.c_int64), *_fields("owner head mask", ctypes.c_void_p), ("bias", CStrided),
        *_fields("cos sin", ctypes.c_void_p), *_fields("half interleaved", ctypes.c_int64),
        *_fields("q_map score_map value_map value_mean out_map", CStrided), *_fields("keys values", CRows),
    ]  # fmt: skip


class CCall(ctypes.Structure):
    """Call of structs.h."""

    _fields_ = [
        *_fields("query out", ctypes.c_void_p), *_fields("batch heads rows queries dim", ctypes.c_int64),
        *_fields("segments", ctypes.c_void_p), *_fields("count", ctypes.c_int64),
        *_fields("visible rest_sums rest_top rest_mass workspace", ctypes.c_void_p), *_fields("pieces", ctypes.c_int64),
        *_fields("thread threads", ctypes.c_void_p), ("scale", ctypes.c_float),
    ]  # fmt: skip


class Arguments(NamedTuple):
    """A covered segment."""

    struct: CSegment
    address: int
    work: int
    """Multiply-adds of a query row."""
    tensors: tuple[torch.Tensor, ...]
    """What the struct points into: the segment's own, and copies and tables of them."""


class _Known(NamedTuple):
    segment: "weakref.ref[Segment]"
    tensors: tuple[torch.Tensor, ...]
    """The segment's own."""
    places: list[int]
    """Where these were in memory: parameters may be put elsewhere."""
    arguments: Arguments


_known: dict[int, _Known] = {}
"""Of segments that are still there, by their ids: most stay for a whole answer."""


def arguments(segment: Segment, heads: int) -> Arguments | None:
    """What kernels are given of a segment for a layer of so many KV heads; None where they do not cover it."""
    known = _known.get(id(segment))
    if known is not None and known.segment() is segment and [t.data_ptr() for t in known.tensors] == known.places:
        return None if _learning(known.tensors) else known.arguments
    tensors = (*segment.entry_tensors(), *segment.parameter_tensors())
    form = _form(segment)
    if form is None or not segment.tokens or not len(segment.owner) or _learning(tensors):
        return None
    builder = _Builder()
    made = builder.arguments(segment, form, heads)
    if not builder.copied:  # of a copy nobody would know when it is out of date
        number = id(segment)
        _known[number] = _Known(weakref.ref(segment, lambda _: _known.pop(number, None)), tensors, [t.data_ptr() for t in tensors], made)
    return made


def _learning(tensors: Sequence[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _form(s: Segment) -> int | None:
    floats = (s.score_map, s.value_map, s.q_map, s.out_map, s.value_mean, s.bias, None if s.frame is None else s.frame.cos)
    if any(t is not None and t.dtype != torch.float32 for t in floats):
        return None
    if isinstance(s.keys, torch.Tensor) and isinstance(s.values, torch.Tensor):
        dense = all(rows.dtype == torch.float32 and (rows.stride(3) == 1 or rows.shape[3] == 1) for rows in (s.keys, s.values))
        return RAW if dense and _maps_fit(s, s.keys.shape[1]) else None
    if isinstance(s.keys, QuantizedRows) and isinstance(s.values, QuantizedRows):
        steps = all(t.dtype == torch.float32 for rows in (s.keys, s.values) for t in (rows.step, rows.zero))
        dense = all(rows.codes.stride(3) == 1 or rows.codes.shape[3] == 1 for rows in (s.keys, s.values))
        return QUANTIZED if steps and dense and _maps_fit(s, s.keys.shape[1]) else None
    if isinstance(s.keys, CodedRows) and isinstance(s.values, CodedRows):
        sets = [len(rows.coding.widths) for rows in (s.keys, s.values)]
        floats = tuple(t for rows in (s.keys, s.values) for t in (rows.coding.step, rows.coding.offset))
        dense = all(rows.packed.stride(1) == 1 for rows in (s.keys, s.values)) and all(t.dtype == torch.float32 for t in floats if t is not None)
        mapped = s.q_map is not None and s.score_map is not None and s.value_map is not None
        return CELLS if dense and mapped and sets[0] == sets[1] and _maps_fit(s, sets[0]) else None
    return None


def _maps_fit(s: Segment, sets: int) -> bool:
    """Whether each set of heads has one map along the tokens."""
    return all(map_ is None or len(map_) in (1, sets) for map_ in (s.score_map, s.value_map))


class _Builder:
    """Makes the structs of one segment."""

    def __init__(self) -> None:
        self.copied = False
        self.tensors: list[torch.Tensor] = []

    def arguments(self, s: Segment, form: int, heads: int) -> Arguments:
        keys, values = s.keys, s.values
        sets = len(keys.coding.widths) if isinstance(keys, CodedRows) else keys.shape[1] if s.head is None else heads
        struct = CSegment(
            form, len(s.owner), sets, keys.coding.heads if isinstance(keys, CodedRows) else 1, s.tokens, self._dense(s.owner),
            self._dense(s.head), self._dense(s.mask), self._strided(s.bias),
            *((None, None, 0, 0) if s.frame is None else (*map(self._dense, s.frame.tensors()), s.frame.cos.shape[1], s.frame.neighbours)),
            self._strided(s.q_map, 1), self._strided(s.score_map), self._strided(s.value_map), self._strided(s.value_mean, 1),
            self._strided(s.out_map), self._rows(keys, False), self._rows(values, True),
        )  # fmt: skip
        work = len(s.owner) * keys.shape[1] * s.tokens * (keys.shape[2] + values.shape[2]) if form == CELLS or s.score_map is not None else 0
        work = work or len(s.owner) * keys.shape[1] * s.tokens * (keys.shape[3] + values.shape[3])
        return Arguments(struct, ctypes.addressof(struct), work, tuple(self.tensors))

    def _dense(self, x: torch.Tensor | None) -> int | None:
        if x is None:
            return None
        if not x.is_contiguous():
            x, self.copied = x.contiguous(), True
        self.tensors.append(x)
        return x.data_ptr()

    def _strided(self, x: torch.Tensor | None, last: int | None = None) -> CStrided:
        """A tensor where it is; a copy where its last axis must be dense and is not."""
        if x is None:
            return CStrided()
        if last is not None and x.stride(-1) != last and x.shape[-1] > 1:
            x, self.copied = x.contiguous(), True
        self.tensors.append(x)
        return CStrided(x.data_ptr(), *_steps(x))

    def _rows(self, rows: Any, of_channels: bool) -> CRows:
        count, channels = rows.shape[2:]
        if isinstance(rows, torch.Tensor):
            return CRows(self._place(rows), count, channels, *_steps(rows)[:3])
        if isinstance(rows, QuantizedRows):
            steps = _steps(rows.codes)[:3]
            return CRows(self._place(rows.codes), count, channels, *steps, self._dense(rows.step), self._dense(rows.zero), rows.bits)
        coding, packed = rows.coding, rows.packed
        tables = (self._place(table) for table in cell_tables(coding, of_channels))
        return CRows(
            self._place(packed), count, channels, packed.stride(0), 0, 0, self._dense(coding.step), self._dense(coding.offset), 0,
            packed.stride(0) * (len(packed) - 1) + packed.shape[1], self._dense(coding.widths), coding.widths.numel(), *tables,
        )  # fmt: skip

    def _place(self, x: torch.Tensor) -> int:
        self.tensors.append(x)
        return x.data_ptr()


def _steps(x: torch.Tensor) -> tuple[int, ...]:
    # Where there is one of a kind, how far the next is away may be any number.
    return tuple(step if size > 1 else 0 for step, size in zip(x.stride(), x.shape, strict=True))
