"""Look-up tables by which kernels find coded cells (kvcapsule.segments.coefficient_rows) as 32-bit words.

Every entry of a capsule has the same layout, so the tables are made once for a coding. Keys are read by groups of eight
rows, values by channels: a *block* is a group or a channel, and what its cells meet are the channels or the groups. Two
neighbouring blocks are read side by side, line by line: a *line* has the two blocks' cells that meet the same. Where
only one of them has such a cell, a null cell stands for the other's.
"""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...segments.bit_packing import WIDTHS
from ...segments.coefficient_rows import Coding

PER_WORD = {1: 4, 2: 2, 3: 1, 4: 1}
"""Cells of a width that lie in one word of 32 bits."""
FIRST_KIND = {1: 0, 2: 4, 3: 6, 4: 7}
"""The kind of a cell that comes first in its word; that of the next is one more. See cell_words.h."""


class CellTables(NamedTuple):
    """For each pair of blocks the lines of cells of few bits (1 to 4, those of keys 0 to 4), then those of 8 bits."""

    bounds: torch.Tensor
    """[S, pairs of blocks, 3] int32: where the lines of few bits and those of 8 begin, and where the last ones end."""
    lines: torch.Tensor
    """[n, 2] int64. The upper half: the group or the channel that a cell meets. The lower: of a cell of 8 bits its
    first byte in an entry; of one of few bits its word, and in the highest byte its kind (FIRST_KIND)."""
    numbers: torch.Tensor
    """[n, 2] int32: the cell's number over sets, groups and channels; the first behind all of them for a null cell."""
    ranges: torch.Tensor
    """[S, 5, 3] int32: of a set's cells of 8, 4, 3, 2 and 1 bits, where their bytes begin and end in an entry, and
    their first word: a multiple of four."""


_known: dict[tuple[int, bool], tuple["weakref.ref[Coding]", CellTables]] = {}


def cell_tables(coding: Coding, of_channels: bool) -> CellTables:
    """The tables of a coding whose blocks are channels (values) or groups (keys); kept as long as the coding lives."""
    key = (id(coding), of_channels)
    if (known := _known.get(key)) is None:
        known = _known[key] = weakref.ref(coding, lambda _: _known.pop(key, None)), _make(coding.widths, of_channels)
    return known[1]


def _make(widths: torch.Tensor, of_channels: bool) -> CellTables:
    addresses, ranges = _addresses(widths)

    def paired(cells: torch.Tensor) -> torch.Tensor:
        """[S, G, C] as [S, pairs of blocks, 2, what a block meets]; 0 in a block that is not there."""
        blocks = cells.transpose(1, 2) if of_channels else cells
        return F.pad(blocks, (0, 0, 0, blocks.shape[1] % 2)).unflatten(1, (-1, 2))  # type: ignore[no-any-return]

    few = (widths < 8) & (widths > 0) if of_channels else widths < 8
    present = torch.stack([paired(few), paired(widths == 8)], dim=2)  # [S, pairs, few or 8 bits, 2, met]
    has_line = present.any(3)
    set_, pair, run, met = has_line.nonzero().unbind(1)
    valid, here = present[set_, pair, run, :, met], (set_, pair, slice(None), met)
    lines = torch.where(valid, paired(addresses)[here], 0) + (met << 32)[:, None]
    numbers = torch.where(valid, paired(torch.arange(widths.numel()).view(widths.shape))[here], widths.numel())
    ends = F.pad(has_line.sum(3).flatten().cumsum(0), (1, 0))
    bounds = torch.stack([ends[:-1:2], ends[1::2], ends[2::2]], dim=1)
    return CellTables(bounds.to(torch.int32), lines, numbers.to(torch.int32), ranges.to(torch.int32))


def _addresses(widths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, G, C], the lower half of CellTables.lines, and CellTables.ranges. Cells of one width lie set by set."""
    addresses, ranges = torch.zeros(widths.shape, dtype=torch.int64), torch.zeros(len(widths), 5, 3, dtype=torch.int64)
    begin, word = 0, torch.zeros(len(widths), dtype=torch.int64)
    for place, width in enumerate(sorted(WIDTHS, reverse=True)):
        cells = (widths == width).flatten(1)
        ends = begin + (width * cells.sum(1)).cumsum(0)
        starts = ends - width * cells.sum(1)
        ranges[:, place] = torch.stack([starts, ends, word], dim=1)
        number = cells.cumsum(1) - 1  # of a cell among those of its set and width
        if width == 8:
            found = starts[:, None] + 8 * number
        else:
            many = PER_WORD[width]
            found = word[:, None] + number // many + ((FIRST_KIND[width] + number % many) << 24)
            word = word + -(-cells.sum(1) // (4 * many)) * 4
        addresses = torch.where(widths == width, found.view(widths.shape), addresses)
        begin = int(ends[-1])
    return addresses, ranges
