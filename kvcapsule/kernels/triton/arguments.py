"""Arguments of the Triton kernels: tensors grouped with their strides, data types and block sizes.

Triton takes a NamedTuple as one argument of a kernel, field by field. As an argument annotated `tl.constexpr` it is a
compile-time constant: a kernel is compiled for each value. None is a constant too: a kernel is compiled without the
code that would read it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .loads import load_raw

INTERPRETED = not isinstance(load_raw, triton.JITFunction)
"""Whether Triton interprets the kernels on the CPU with NumPy (TRITON_INTERPRET=1 when they were imported)."""

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Queries(NamedTuple):
    """Queries, or outputs, [B, H * G, Q, D] with dense channels; strides in elements."""

    data: torch.Tensor
    row_stride: int
    head_stride: int
    query_stride: int

    @classmethod
    def of(cls, data: torch.Tensor) -> "Queries":
        row_stride, head_stride, query_stride = data.stride()[:3]
        return cls(data, row_stride, head_stride, query_stride)


class Map(NamedTuple):
    """A map [S, rows, columns] that all entries share; a matrix serves `heads_per_set` neighbouring KV heads."""

    data: torch.Tensor
    set_stride: int
    row_stride: int
    column_stride: int
    heads_per_set: int

    @classmethod
    def of(cls, data: torch.Tensor | None, heads: int) -> "Map | None":
        """For H KV heads; None without a map."""
        if data is None:
            return None
        set_stride, row_stride, column_stride = data.stride()
        return cls(data, set_stride, row_stride, column_stride, heads // data.shape[0])


class Product(NamedTuple):
    """How a matrix product is computed; a compile-time constant."""

    dtype: tl.dtype
    """Of its operands."""
    precision: str
    """Of fp32 operands: Triton's `input_precision`."""

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Product":
        """For a query's dtype.

        NumPy has no bfloat16, and the interpreter's product of it is garbage: interpreted operands are fp32. TF32,
        Triton's default for fp32 operands, would round scores as half precision does.
        """
        return cls(tl.float32 if INTERPRETED else TYPES[dtype], "ieee" if dtype == torch.float32 else "tf32x3")


class Rotation(NamedTuple):
    """Rotation of each entry's frame, [E, rotated channels / 2] each."""

    cos: torch.Tensor
    sin: torch.Tensor


class StoredRows(NamedTuple):
    """Rows [E, S, M, D] as stored, for S sets of KV heads that share their rows."""

    data: torch.Tensor
    """Raw [E, S, M, D], codes [E, S, D, bytes], or coded or mixed [E, bytes]."""
    entry_stride: int
    set_stride: int
    """0 for coded and mixed rows."""
    rows: int
    """M."""
    groups: int
    """Groups of eight rows; 0 for raw rows."""
    scale: torch.Tensor | None = None
    """Of QuantizedRows [E, S, D], of CodedRows [S, groups, D], the unit of MixedWidthRows [H, D]; None for raw rows."""
    minimum: torch.Tensor | None = None
    """Of QuantizedRows, [E, S, D]; the centre of MixedWidthRows [H, D]; else None."""
    cells: torch.Tensor | None = None
    """Of CodedRows, [S, groups, D] int32 (load_cells); else None."""
    offset_product: torch.Tensor | None = None
    """[S, E, rows of a set, *]: what the offset of CodedRows adds to the result; else None."""
    side: torch.Tensor | None = None
    """[E, coded] uint8 of MixedWidthRows, as the rest; else None."""
    places: torch.Tensor | None = None
    """[H, D] int32: WidthForm.places."""
    side_places: torch.Tensor | None = None
    """[H, D] int32: WidthForm.side_places."""
    firsts: torch.Tensor | None = None
    """[H + 1, 2] int64: WidthForm.firsts."""
    coded: int = 0
    """Channels with bits."""


class RowFormat(NamedTuple):
    """How rows are stored and multiplied; a compile-time constant."""

    kind: int
    """RAW, QUANTISED, CODED or MIXED."""
    bits: int
    """Of QuantizedRows."""
    widest: int
    """Bits of the widest cell of CodedRows."""
    has_3_bits: bool
    """Whether CodedRows have cells of 3 bits."""
    product: Product


class MapSizes(NamedTuple):
    """Sizes of a mapped segment: E entries, H KV heads, N tokens, M stored keys, M' stored values."""

    entries: int
    heads: int
    tokens: int
    keys: int
    weights: int


def block(size: int, least: int = 16, most: int = 1 << 30) -> int:
    """The least power of two that holds `size`, between the bounds; 16 is the least side of a matrix product."""
    return min(max(1 << max(size - 1, 0).bit_length(), least), most)


def as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A bool mask as uint8, which kernels can load; its last dimension becomes dense."""
    if mask is None:
        return None
    return (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)
