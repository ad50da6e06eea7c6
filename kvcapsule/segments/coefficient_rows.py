"""Coded rows: a matrix of coefficients whose cells have few bits each, packed into one run of bytes for each entry.

A cell is eight consecutive rows (token components) of one channel of one set of KV heads that are coded together. All
eight coefficients have the cell's width, one of 0, 1, 2, 3, 4 or 8 bits, and its step; a cell of width w takes w bytes
(kvcapsule.segments.bit_packing). The widths are the capsule's, so every entry has the same layout and an address is a
constant:

    bytes of an entry = [cells of width 8 | of 4 | of 3 | of 2 | of 1], within a width by heads, group of rows, channel

Whole classes of equal cells are what a kernel can walk without a branch; a cell's product with one query channel gives
eight neighbouring scores.
"""

import copy
import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .bit_packing import GROUP, WIDTHS, pack, spread


class CellClass:
    """The cells of one width: where they are in the matrix, and where their bytes begin."""

    def __init__(self, width: int, start: int, cells: torch.Tensor) -> None:
        """cells [n]: flat numbers over sets of heads, groups and channels."""
        self.width, self.start, self.cells = width, start, cells

    @property
    def run(self) -> slice:
        """Its bytes in an entry."""
        return slice(self.start, self.start + self.width * len(self.cells))


class CellLayout:
    """The layout that widths [S, G, C] fix, for S sets of heads, G groups of eight rows and C channels."""

    def __init__(self, widths: torch.Tensor) -> None:
        self.shape = widths.shape
        flat = widths.flatten()
        self.none = flat.nonzero()[:0, 0]
        """No cells."""
        if wrong := sorted(set(flat.unique().tolist()) - {0, *WIDTHS}):
            raise ValueError(
                f"cells of {', '.join(map(str, wrong))} bits: a cell has 0, {', '.join(map(str, WIDTHS))} bits."
            )
        self.classes: list[CellClass] = []
        self.size = 0
        for width in sorted(WIDTHS, reverse=True):
            cells = (flat == width).nonzero()[:, 0]
            if len(cells):
                self.classes.append(CellClass(width, self.size, cells))
                self.size += width * len(cells)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [E, S, 8 G, C] uint8 to bytes [E, size]."""
        cells = codes.unflatten(2, (-1, GROUP)).transpose(3, 4).flatten(1, 3)  # [E, S * G * C, 8]
        runs = [pack(cells[:, c.cells], c.width).flatten(1) for c in self.classes]
        return torch.cat(runs, dim=1) if runs else codes.new_empty(len(codes), 0)


@dataclass(frozen=True)
class Coding:
    """What coded rows are read with, the same for all entries."""

    widths: torch.Tensor
    """[S, G, C] uint8."""
    step: torch.Tensor
    """[S, G, C]."""
    offset: torch.Tensor
    """[S, 8 G, C]: what is added to every entry's coefficients; the mean."""
    heads: int = 1
    """KV heads of a set: all of them read the same rows."""

    @cached_property
    def layout(self) -> CellLayout:
        return CellLayout(self.widths)

    @cached_property
    def cells(self) -> torch.Tensor:
        """[S, G, C] int32: 16 times the cell's first byte, plus its width: all that a kernel needs to find a cell."""
        cells = self.widths.flatten().to(torch.int32)
        for kind in self.layout.classes:
            first = kind.start + kind.width * torch.arange(len(kind.cells), dtype=torch.int32, device=cells.device)
            cells[kind.cells] += 16 * first
        return cells.view(self.widths.shape)

    @cached_property
    def order(self) -> torch.Tensor:
        """[S * C * G] int32: where the cell of each set, channel and group stands among the coded ones; behind the last
        for none."""
        coded = (
            torch.cat([kind.cells for kind in self.layout.classes])
            if self.layout.classes
            else self.widths.new_zeros(0, dtype=torch.int64)
        )
        places = torch.full((self.widths.numel(),), len(coded), dtype=torch.int32, device=self.widths.device)
        places[coded] = torch.arange(len(coded), dtype=torch.int32, device=self.widths.device)
        return places.view(self.widths.shape).transpose(1, 2).flatten()

    def scale(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and zero, [S, C, G, 8] each: coefficient = step * code + zero."""
        step = self._rows(self.step.to(dtype))
        middle = step * (2.0 ** self._rows(self.widths.to(dtype)) - 1) / 2
        step, zero = (
            x.transpose(1, 2).unflatten(2, (-1, GROUP)).contiguous() for x in (step, self.offset.to(dtype) - middle)
        )
        return step, zero

    def codes(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Nearest codes [E, S, 8 G, C] uint8 of coefficients (the offset still in them); a coefficient of width 0 has
        none."""
        return self._nearest(coefficients, 0)[0].flatten(2, 3).to(torch.uint8)

    def rounded(self, coefficients: torch.Tensor, first: int = 0) -> torch.Tensor:
        """What reading the nearest codes gives, for coefficients [E, S, 8 g, C] of g groups from the group `first`
        on."""
        codes, step, width, offset = self._nearest(coefficients, first)
        return ((codes - (2.0**width - 1) / 2) * step).flatten(2, 3) + offset

    def _nearest(
        self, coefficients: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes [E, S, g, 8, C], step and width of each group [S, g, 1, C], offset [S, 8 g, C], as precise as the
        coefficients."""
        groups = slice(first, first + coefficients.shape[2] // GROUP)
        step, width = (x[:, groups, None].to(coefficients.dtype) for x in (self.step, self.widths))
        offset = self.offset[:, groups.start * GROUP : groups.stop * GROUP].to(coefficients.dtype)
        scaled = (coefficients - offset).unflatten(2, (-1, GROUP)) / step + 2.0 ** (width - 1)
        return torch.minimum(scaled.floor().clamp_min(0), 2.0**width - 1), step, width, offset

    def _rows(self, cells: torch.Tensor) -> torch.Tensor:
        """[S, G, C] to [S, 8 G, C]."""
        return cells.repeat_interleave(GROUP, dim=1)


class CodedRows:
    """Rows [E, H, 8 G, C] as packed cells: coefficient = (code - (2^width - 1) / 2) step + offset, the same for all
    heads of a set.

    `read` builds the coefficients of all coded cells in the working precision (8 G by C, not the T by D of the tile's
    keys): this saves memory; time is saved by kernels that read the cells themselves.
    """

    def __init__(self, packed: torch.Tensor, coding: Coding) -> None:
        """packed [E, size] uint8."""
        self.packed, self.coding = packed, coding
        self._twin: weakref.ref[CodedRows] | None = None
        """Weakly, the same rows on the device that they were last moved from or to."""

    @classmethod
    def encode(cls, coefficients: torch.Tensor, coding: Coding) -> "CodedRows":
        """Coefficients [E, S, 8 G, C] to the nearest codes."""
        # Made by now: a step that is compiled cannot make what is kept.
        _ = coding.order
        return cls(coding.layout.pack(coding.codes(coefficients)), coding)

    @property
    def shape(self) -> torch.Size:
        sets, groups, channels = self.coding.widths.shape
        return torch.Size((self.packed.shape[0], sets * self.coding.heads, groups * GROUP, channels))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """[E, S, 8 G, C]: one matrix for the heads of a set."""
        coding = self.coding
        sets, groups, channels = coding.widths.shape
        words = [
            spread(self.packed[:, kind.run].unflatten(1, (-1, kind.width)), kind.width)
            for kind in coding.layout.classes
        ]
        words.append(torch.zeros(len(self.packed), 1, dtype=torch.int64, device=self.packed.device))
        # Cells move as words of eight codes, and are numbers only where they belong.
        codes = torch.cat(words, dim=1).index_select(1, coding.order)[..., None].view(torch.uint8)
        rows = codes.view(-1, sets, channels, groups, GROUP).to(dtype)
        step, zero = coding.scale(dtype)
        return rows.mul_(step).add_(zero).flatten(3).transpose(2, 3)

    def select(self, index: torch.Tensor) -> "CodedRows":
        return CodedRows(self.packed[index], self.coding)

    def to(self, device: torch.device | str) -> "CodedRows":
        """The same rows for all who ask for them, as the layers of a stack do one after the other, while anybody holds
        them there."""
        if self.packed.device == torch.device(device):
            return self
        twin = self._twin() if self._twin else None
        if twin is None or twin.packed.device != torch.device(device):
            twin = CodedRows(self.packed.to(device), self.coding)
            self._twin, twin._twin = weakref.ref(twin), weakref.ref(self)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "CodedRows":
        """Codes of their own; what all entries are read with is not copied."""
        return CodedRows(copy.deepcopy(self.packed, memo), self.coding)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.packed,)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return (self.coding.widths, self.coding.step, self.coding.offset)
