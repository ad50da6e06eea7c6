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
from typing import Any, NamedTuple

import torch

from .bit_packing import GROUP, WIDTHS, pack, spread

TOGETHER = {1: 4, 2: 2, 3: 1, 4: 1}
"""Cells of a width that a kernel lays out in one word of 32 bits."""
FIRST_KIND = {1: 0, 2: 4, 3: 6, 4: 7}
"""The kind of a cell that comes first in its word; that of the next one is one more."""


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


class Runs(NamedTuple):
    """All cells of the matrix, two blocks side by side, in two runs: those of 1 to 4 bits, and of 8; and where their
    bytes are.

    A block is a group or a channel; what its cells meet are the channels or the groups. A line of a run is what two
    neighbouring blocks have where they meet the same; where only one has a cell of the run, a cell that does not count
    stands for the other's. A kernel first lays the cells of 1 to 4 bits out as words of 32 bits: 4 cells of one bit in
    each, 2 of two, 1 of three or four.
    """

    bounds: torch.Tensor
    """[S, pairs of blocks, 3], int32: where each run begins, and where the last one ends."""
    line: torch.Tensor
    """[n, 2], int64. The upper half: the group or the channel that a cell meets. The lower: the first byte of a cell of
    8 bits in an entry; of one of 1 to 4 bits its word, and in the highest byte its kind (FIRST_KIND)."""
    cell: torch.Tensor
    """[n, 2], int32: its number over sets, groups and channels; that behind the last where there is none."""
    stretches: torch.Tensor
    """[S, 5, 3], int32: of a set's cells of 8, 4, 3, 2 and 1 bits, where their bytes begin and end in an entry, and
    their first word: a multiple of four."""


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
    def runs_of_groups(self) -> Runs:
        """Of groups of eight rows. Cells of no bits are in the run of few: they have an offset, as all have."""
        return self._runs(self.widths < 8, of_channels=False)

    @cached_property
    def runs_of_channels(self) -> Runs:
        """Of channels, without cells of no bits."""
        return self._runs((self.widths > 0) & (self.widths < 8), of_channels=True)

    def _runs(self, few: torch.Tensor, of_channels: bool) -> Runs:
        """few [S, G, C]: which cells are in the first run."""

        def paired(cells: torch.Tensor) -> torch.Tensor:
            """[S, G, C] as [S, pairs of blocks, 2, what a block meets]; 0 in a block that is not there."""
            blocks = cells.transpose(1, 2) if of_channels else cells
            found: torch.Tensor = torch.nn.functional.pad(blocks, (0, 0, 0, blocks.shape[1] % 2)).unflatten(1, (-1, 2))
            return found

        stretches, number = self._stretches(), torch.arange(self.widths.numel()).view(self.widths.shape)
        there = torch.stack([paired(few), paired(self.widths == 8)], dim=2)  # [S, pairs, runs, 2, met]
        lines = there.any(3)
        set_, pair, run, met = lines.nonzero().unbind(1)
        mine, here = there[set_, pair, run, :, met], (set_, pair, slice(None), met)
        line = torch.where(mine, paired(self._words(stretches))[here], 0) + (met << 32)[:, None]
        cell = torch.where(mine, paired(number)[here], self.widths.numel())
        ends = lines.sum(3).flatten().cumsum(0).view(lines.shape[:3])
        first = torch.cat([ends.new_zeros(1), ends.flatten()[:-1]]).view_as(ends)
        bounds = torch.cat([first, ends[..., -1:]], dim=-1)
        return Runs(bounds.to(torch.int32), line, cell.to(torch.int32), stretches.to(torch.int32).contiguous())

    def _stretches(self) -> torch.Tensor:
        """See Runs. Cells of one width and set lie one behind the other."""
        found, begin = [], torch.zeros(1, dtype=torch.int64)
        word = torch.zeros(len(self.widths), dtype=torch.int64)
        for width in sorted(WIDTHS, reverse=True):
            cells = (self.widths == width).flatten(1).sum(1)
            ends = begin + (width * cells).cumsum(0)
            found.append(torch.stack([ends - width * cells, ends, word], dim=1))
            begin = ends[-1:]
            if width < 8:
                word = word + -(-cells // (4 * TOGETHER[width])) * 4
        return torch.stack(found, dim=1)

    def _words(self, stretches: torch.Tensor) -> torch.Tensor:
        """[S, G, C]: the lower half of `Runs.line`."""
        byte = self.cells.to(torch.int64) // 16
        found = byte.clone()
        for place, width in enumerate(sorted(WIDTHS, reverse=True)):
            if width < 8:
                begin, _, word = (n[:, None, None] for n in stretches[:, place].unbind(1))
                number, many = (byte - begin) // width, TOGETHER[width]
                read = word + number // many + ((FIRST_KIND[width] + number % many) << 24)
                found = torch.where(self.widths == width, read, found)
        return found

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
