"""Coefficient rows: a matrix of transform coefficients in cells of few bits, packed into consecutive bytes per entry.

A cell is eight consecutive rows (token components) of one channel in one group of KV heads that are coded together. Its
eight coefficients share a width (0, 1, 2, 3, 4 or 8 bits) and a scale; a cell of width w takes w bytes
(kvcapsule.segments.bit_packing). The widths are parameters of the capsule, so all entries have the same layout and the
address of a cell is a constant:

    bytes of an entry = [cells of width 8 | of 4 | of 3 | of 2 | of 1], within a width by head group, row group, channel

A kernel walks all cells of one width without a branch; the product of a cell and one query channel gives eight
neighbouring scores.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..errors import ConfigError
from .bit_packing import GROUP, WIDTHS, pack, spread


class CellClass:
    """All cells of one width: their indices in the matrix, and the first of their bytes in an entry."""

    def __init__(self, width: int, start: int, cells: torch.Tensor) -> None:
        """cells [n]: flat indices over head groups, row groups and channels."""
        self.width, self.start, self.cells = width, start, cells

    @property
    def run(self) -> slice:
        """The cells' bytes in an entry."""
        return slice(self.start, self.start + self.width * len(self.cells))


class CellLayout:
    """Byte layout of an entry, from the widths [S, G, C] of S head groups, G groups of eight rows and C channels."""

    def __init__(self, widths: torch.Tensor) -> None:
        self.shape = widths.shape
        # On the host, so that it waits for an accelerator once.
        flat, device = widths.detach().flatten().cpu(), widths.device
        if wrong := sorted(set(flat.unique().tolist()) - {0, *WIDTHS}):
            raise ConfigError(
                f"cells of {', '.join(map(str, wrong))} bits: a cell has 0, {', '.join(map(str, WIDTHS))} bits."
            )
        self.classes: list[CellClass] = []
        self.size = 0
        for width in sorted(WIDTHS, reverse=True):
            cells = (flat == width).nonzero()[:, 0].to(device, non_blocking=True)
            if len(cells):
                self.classes.append(CellClass(width, self.size, cells))
                self.size += width * len(cells)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Pack codes [E, S, 8 G, C] uint8 into bytes [E, size]."""
        cells = codes.unflatten(2, (-1, GROUP)).transpose(3, 4).flatten(1, 3)  # [E, S * G * C, 8]
        runs = [pack(cells[:, c.cells], c.width).flatten(1) for c in self.classes]
        return torch.cat(runs, dim=1) if runs else codes.new_empty(len(codes), 0)


@dataclass(frozen=True)
class Coding:
    """Parameters of coded rows, the same for all entries: widths and scales of the cells, and an offset."""

    widths: torch.Tensor
    """[S, G, C] uint8: bits of a code."""
    scale: torch.Tensor
    """[S, G, C]."""
    offset: torch.Tensor
    """[S, 8 G, C]: added to the coefficients of every entry (their mean)."""
    heads: int = 1
    """KV heads per head group; all of them read the same rows."""

    @cached_property
    def layout(self) -> CellLayout:
        return CellLayout(self.widths)

    @cached_property
    def cells(self) -> torch.Tensor:
        """[S, G, C] int32: 16 * (first byte of the cell) + its width, which is all that a kernel needs to find it."""
        cells = self.widths.flatten().to(torch.int32)
        for kind in self.layout.classes:
            first = kind.start + kind.width * torch.arange(len(kind.cells), dtype=torch.int32, device=cells.device)
            cells[kind.cells] += 16 * first
        return cells.view(self.widths.shape)

    @cached_property
    def order(self) -> torch.Tensor:
        """[S * C * G] int32: position of the cell of each head group, channel and row group among the coded cells; the
        number of coded cells where the width is 0."""
        coded = (
            torch.cat([kind.cells for kind in self.layout.classes])
            if self.layout.classes
            else self.widths.new_zeros(0, dtype=torch.int64)
        )
        positions = torch.full((self.widths.numel(),), len(coded), dtype=torch.int32, device=self.widths.device)
        positions[coded] = torch.arange(len(coded), dtype=torch.int32, device=self.widths.device)
        return positions.view(self.widths.shape).transpose(1, 2).flatten()

    def scale_and_minimum(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum, [S, C, G, 8] each: coefficient = scale * code + minimum."""
        scale = self._rows(self.scale.to(dtype))
        half_range = scale * (2.0 ** self._rows(self.widths.to(dtype)) - 1) / 2
        scale, minimum = (
            x.transpose(1, 2).unflatten(2, (-1, GROUP)).contiguous()
            for x in (scale, self.offset.to(dtype) - half_range)
        )
        return scale, minimum

    def rounding(self, dtype: torch.dtype) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """The function that rounds coefficients [E, S, m, C] of a slice of m rows to the nearest codes' values."""
        scale, width = self._rows(self.scale.to(dtype)), self._rows(self.widths.to(dtype))
        offset = self.offset.to(dtype)
        # Codes count from the lowest value; half of them lie below the offset.
        inverse, most = 1 / scale, 2.0**width - 1
        lowest = offset - most / 2 * scale
        shift = 2.0 ** (width - 1) - offset * inverse
        none = torch.zeros((), dtype=dtype, device=scale.device)

        def nearest(coefficients: torch.Tensor, rows: slice) -> torch.Tensor:
            codes = torch.addcmul(shift[:, rows], coefficients, inverse[:, rows]).floor_().clamp(none, most[:, rows])
            return codes.mul_(scale[:, rows]).add_(lowest[:, rows])

        return nearest

    def codes(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Nearest codes [E, S, 8 G, C] uint8 of coefficients (offset included); 0 where the width is 0."""
        scale, width = self._rows(self.scale.to(coefficients.dtype)), self._rows(self.widths.to(coefficients.dtype))
        scaled = (coefficients - self.offset.to(coefficients.dtype)) / scale + 2.0 ** (width - 1)
        return torch.minimum(scaled.floor().clamp_min(0), 2.0**width - 1).to(torch.uint8)

    def _rows(self, cells: torch.Tensor) -> torch.Tensor:
        """[S, G, C] to [S, 8 G, C]."""
        return cells.repeat_interleave(GROUP, dim=1)


class CodedRows:
    """Rows [E, H, 8 G, C] as packed cells: coefficient = (code - (2^width - 1) / 2) * scale + offset, the same for all
    heads of a head group.

    `read` unpacks all coefficients into the working precision (8 G x C, not the T x D of the tile's keys). This saves
    memory; kernels that read the cells themselves save time as well.
    """

    def __init__(self, packed: torch.Tensor, coding: Coding) -> None:
        """packed [E, size] uint8."""
        self.packed, self.coding = packed, coding
        self._moved: weakref.ref[CodedRows] | None = None
        """Weak reference to these rows on the device that they were last moved from or to."""

    @classmethod
    def encode(cls, coefficients: torch.Tensor, coding: Coding) -> "CodedRows":
        """Code coefficients [E, S, 8 G, C] by their nearest codes."""
        # Cached now: a compiled decode step could not fill the cache.
        _ = coding.order
        return cls(coding.layout.pack(coding.codes(coefficients)), coding)

    @property
    def shape(self) -> torch.Size:
        head_groups, groups, channels = self.coding.widths.shape
        return torch.Size((self.packed.shape[0], head_groups * self.coding.heads, groups * GROUP, channels))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """[E, S, 8 G, C]: one matrix per head group."""
        coding = self.coding
        head_groups, groups, channels = coding.widths.shape
        words = [
            spread(self.packed[:, kind.run].unflatten(1, (-1, kind.width)), kind.width)
            for kind in coding.layout.classes
        ]
        words.append(torch.zeros(len(self.packed), 1, dtype=torch.int64, device=self.packed.device))
        # Cells are gathered as 64-bit words of eight codes, and converted to numbers in their final place.
        codes = torch.cat(words, dim=1).index_select(1, coding.order)[..., None].view(torch.uint8)
        rows = codes.view(-1, head_groups, channels, groups, GROUP).to(dtype)
        scale, minimum = coding.scale_and_minimum(dtype)
        return rows.mul_(scale).add_(minimum).flatten(3).transpose(2, 3)

    def select(self, index: torch.Tensor) -> "CodedRows":
        return CodedRows(self.packed[index], self.coding)

    def to(self, device: torch.device | str) -> "CodedRows":
        """The rows on `device`. Layers of a layer group share rows but move one at a time, so the moved rows are reused
        while any layer holds them."""
        if self.packed.device == torch.device(device):
            return self
        moved = self._moved() if self._moved else None
        if moved is None or moved.packed.device != torch.device(device):
            moved = CodedRows(self.packed.to(device), self.coding)
            self._moved, moved._moved = weakref.ref(moved), weakref.ref(self)
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> "CodedRows":
        """Copies the codes; the coding, which all entries share, is not copied."""
        return CodedRows(copy.deepcopy(self.packed, memo), self.coding)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.packed,)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "CodedRows":
        """See kvcapsule.segments.storable_rows."""
        (packed,) = tensors
        return CodedRows(packed, self.coding)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return (self.coding.widths, self.coding.scale, self.coding.offset)
