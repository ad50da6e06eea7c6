"""What kernels are given of a segment, as C structs, and which segments they cover: decided by form alone.

Covered are fp32 keys and values of one kind (raw rows; `QuantizedRows`; `MixedWidthRows`; `CodedRows` behind maps),
without gradients, with any of a segment's other parts. All else is the reference's.
"""

import ctypes
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...segments.coefficient_rows import CodedRows
from ...segments.mixed_width_rows import MixedWidthRows
from ...segments.pooled_segment import PooledSegment
from ...segments.quantized_rows import QuantizedRows
from ...segments.segment import BIAS_UNIT, Segment
from .cell_words import cell_tables

RAW, QUANTIZED, CELLS, MIXED = range(4)
"""Form of structs.h."""
_LANES = 16
"""LANES of simd.h."""


def _structs() -> dict[str, type[ctypes.Structure]]:
    """The structs of structs.h by name, so that their fields are written once."""
    kinds: dict[str, Any] = {"int64_t": ctypes.c_int64, "float": ctypes.c_float}
    structs: dict[str, type[ctypes.Structure]] = {}
    text = re.sub("//.*", "", Path(__file__).with_name("structs.h").read_text())
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields = []
        for kind, names in re.findall(r"(?:const )?(\w+)\b([^;]*);", body):
            for field in names.split(","):
                pointer = "*" in field
                fields.append((re.sub(r"\*|const|\s", "", field), ctypes.c_void_p if pointer else kinds[kind]))
        structs[name] = kinds[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


_STRUCTS = _structs()
CStrided, CRows, CSegment, CCall = (_STRUCTS[name] for name in ("Strided", "Rows", "Segment", "Call"))


class Arguments(NamedTuple):
    """What the kernels are given of a covered segment."""

    struct: ctypes.Structure
    work: int
    """Multiply-adds of a query row."""
    tensors: tuple[torch.Tensor, ...]
    """What the struct points into: the segment's own, and copies and tables of them."""


_known: dict[int, tuple["weakref.ref[Segment]", tuple[torch.Tensor, ...], list[int], Arguments]] = {}
"""By the ids of segments that are still there, for most stay for a whole answer: their tensors, and where these were in
memory, for parameters may be put elsewhere."""


def arguments(segment: Segment, heads: int) -> Arguments | None:
    """What kernels are given of a segment for a layer of so many KV heads; None where they do not cover it."""
    number = id(segment)
    known, tensors, places, args = _known.get(number, (None, (), [], None))
    if known is None or known() is not segment or [t.data_ptr() for t in tensors] != places:
        tensors, args = (*segment.entry_tensors(), *segment.parameter_tensors()), None
        form = _form(segment)
        if form is not None and segment.tokens and len(segment.owner):
            builder = Builder()
            args = builder.arguments(segment, form, heads)
            if not builder.copied:  # of a copy nobody would know when it is out of date
                places = [t.data_ptr() for t in tensors]
                _known[number] = weakref.ref(segment, lambda _: _known.pop(number, None)), tensors, places, args
    return None if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) else args


def _form(s: Segment) -> int | None:
    """The kind of a segment's rows; None where its form is not covered."""
    keys, values = s.keys, s.values
    floats = [s.score_map, s.value_map, s.q_map, s.out_map, s.value_mean, s.frame.cos if s.frame else None]
    if s.bias is not None and s.bias.dtype != torch.int8:
        floats.append(s.bias)
    rows: Sequence[torch.Tensor]
    if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
        form, sets, rows = RAW, keys.shape[1], (keys, values)
        floats += rows
    elif isinstance(keys, QuantizedRows) and isinstance(values, QuantizedRows):
        form, sets, rows = QUANTIZED, keys.shape[1], (keys.codes, values.codes)
        floats += (keys.scale, keys.minimum, values.scale, values.minimum)
    elif isinstance(keys, MixedWidthRows) and isinstance(values, MixedWidthRows) and s.head is None:
        form, sets, rows = MIXED, keys.shape[1], (keys.packed, values.packed)
        floats += (t for form_ in (keys.form, values.form) for t in (form_.unit, form_.centre))
    elif isinstance(keys, CodedRows) and isinstance(values, CodedRows):
        form, sets, rows = CELLS, len(keys.coding.widths), (keys.packed, values.packed)
        floats += (t for coding in (keys.coding, values.coding) for t in (coding.scale, coding.offset))
        if s.q_map is None or s.score_map is None or s.value_map is None or len(values.coding.widths) != sets:
            return None
    else:
        return None
    dense = all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in rows)
    if form == RAW and isinstance(keys, torch.Tensor) and not dense:
        # Keys of a block may lie channel by channel, in whole vectors of tokens.
        dense = keys.stride(2) == 1 and keys.shape[2] % _LANES == 0 and s.score_map is None and rows[1].stride(-1) == 1
    # Each set of heads has one map along the tokens.
    mapped = all(map_ is None or len(map_) in (1, sets) for map_ in (s.score_map, s.value_map))
    return form if dense and mapped and all(t is None or t.dtype == torch.float32 for t in floats) else None


class Builder:
    """Makes the structs of one segment."""

    def __init__(self) -> None:
        self.copied = False
        self.tensors: list[torch.Tensor] = []

    def arguments(self, s: Segment, form: int, heads: int) -> Arguments:
        keys, values, frame = s.keys, s.values, s.frame
        sets, heads_of_a_set = keys.shape[1] if s.head is None else heads, 1
        if isinstance(keys, CodedRows):
            sets, heads_of_a_set = len(keys.coding.widths), keys.coding.heads
        struct = CSegment(
            form, len(s.owner), sets, heads_of_a_set, s.tokens, self.dense(s.owner), self.dense(s.head),
            *(map(self.dense, (s.place, s.counts)) if isinstance(s, PooledSegment) else (None, None)),
            self.dense(s.mask), *(self.dense(t) for t in (frame.tensors() if frame else (None, None))),
            frame.cos.shape[1] if frame else 0, frame is not None and frame.interleaved,
            BIAS_UNIT if s.bias is not None and s.bias.dtype == torch.int8 else 0,
            self.strided(s.bias), self.strided(s.q_map, True), self.strided(s.score_map), self.strided(s.value_map),
            self.strided(s.value_mean, True), self.strided(s.out_map), self.rows(keys, False), self.rows(values, True),
        )  # fmt: skip
        lengths = [m.shape[2] if m is not None else r.shape[3] for m, r in ((s.score_map, keys), (s.value_map, values))]
        work = len(s.owner) * keys.shape[1] * s.tokens * sum(lengths)
        return Arguments(struct, work, tuple(self.tensors))

    def dense(self, x: torch.Tensor | None) -> int | None:
        """Where a contiguous tensor is; where a copy is of one that is not."""
        if x is not None and not x.is_contiguous():
            x, self.copied = x.contiguous(), True
        return None if x is None else self.place(x)

    def strided(self, x: torch.Tensor | None, last_dense: bool = False) -> ctypes.Structure:
        """A tensor where it is; a copy where its last axis must be dense and is not."""
        if x is not None and last_dense and x.stride(-1) != 1 and x.shape[-1] > 1:
            x, self.copied = x.contiguous(), True
        return CStrided() if x is None else CStrided(self.place(x), *_steps(x))

    def rows(self, rows: Any, of_channels: bool) -> ctypes.Structure:
        count, channels = rows.shape[2:]
        if isinstance(rows, torch.Tensor):
            return CRows(self.place(rows), count, channels, *_steps(rows)[:3], rows.stride(3) if channels > 1 else 1)
        if isinstance(rows, QuantizedRows):
            scales = self.dense(rows.scale), self.dense(rows.minimum)
            return CRows(self.place(rows.codes), count, channels, *_steps(rows.codes)[:3], 1, *scales, rows.bits)
        if isinstance(rows, MixedWidthRows):
            form, side = rows.form, rows.side
            return CRows(
                self.place(rows.packed), count, channels, rows.packed.stride(0), 0, 0, 1, self.dense(form.unit),
                self.dense(form.centre), side.shape[1], self.dense(side), None, 0, self.place(form.places),
                self.place(form.firsts),
            )  # fmt: skip
        coding, packed = rows.coding, rows.packed
        return CRows(
            self.place(packed), count, channels, packed.stride(0), 0, 0, 1, self.dense(coding.scale),
            self.dense(coding.offset), 0, None, self.dense(coding.widths),
            packed.stride(0) * (len(packed) - 1) + packed.shape[1], *map(self.place, cell_tables(coding, of_channels)),
        )  # fmt: skip

    def place(self, x: torch.Tensor) -> int:
        self.tensors.append(x)
        return x.data_ptr()


def _steps(x: torch.Tensor) -> tuple[int, ...]:
    # Where there is one of a kind, how far the next is away may be any number.
    return tuple(step if size > 1 else 0 for step, size in zip(x.stride(), x.shape, strict=True))
