"""Look-up tables by which kernels find coded cells (kvcapsule.segments.coefficient_rows) as 32-bit words.

Every entry of a capsule has the same layout, so the tables are made once for a coding. Keys are read by groups of eight rows, values by
channels: a *block* is a group or a channel, and what its cells meet are the channels or the groups. Two neighbouring blocks are read side
by side, by *lines*: a line has the two blocks' cells that meet the same; where only one of them has such a cell, a null cell stands for
the other's.
"""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...segments.coefficient_rows import Coding
from ...segments.bit_packing import WIDTHS

PER_WORD = {1: 4, 2: 2, 3: 1, 4: 1}
"""Cells of a width that lie in one word of 32 bits."""
FIRST_KIND = {1: 0, 2: 4, 3: 6, 4: 7}
"""The kind of a cell that comes first in its word; that of the next one is one more. cell_words.h has what a kind is read with."""


class CellTables(NamedTuple):
    """Lines of cells of 0 to 4 bits (keys; values have none of 0), then those of 8 bits, for each pair of blocks."""

    bounds: torch.Tensor
    """[S, pairs of blocks, 3] int32: where the lines of few bits and those of 8 begin, and where the last ones end."""
    lines: torch.Tensor
    """[n, 2] int64. The upper half: the group or the channel that a cell meets. The lower: the first byte of a cell of 8 bits in an entry; of
    one of few bits its word, and in the highest byte its kind (FIRST_KIND)."""
    numbers: torch.Tensor
    """[n, 2] int32: the cell's number over sets, groups and channels; the first behind all of them for a null cell."""
    ranges: torch.Tensor
    """[S, 5, 3] int32: of a set's cells of 8, 4, 3, 2 and 1 bits, where their bytes begin and end in an entry, and their first word: a
    multiple of four."""


_known: dict[tuple[int, bool], tuple["weakref.ref[Coding]", CellTables]] = {}


def cell_tables(coding: Coding, of_channels: bool) -> CellTables:
    """The tables of a coding whose blocks are channels (values) or groups (keys); kept as long as the coding lives."""
    key = (id(coding), of_channels)
    if (known := _known.get(key)) is None:
        known = _known[key] = (weakref.ref(coding, lambda _: _known.pop(key, None)), _make(coding, of_channels))
    return known[1]


def _make(coding: Coding, of_channels: bool) -> CellTables:
    widths = coding.widths
    few = (widths < 8) & (widths > 0) if of_channels else widths < 8

    def paired(cells: torch.Tensor) -> torch.Tensor:
        """[S, G, C] as [S, pairs of blocks, 2, what a block meets]; 0 in a block that is not there."""
        blocks = cells.transpose(1, 2) if of_channels else cells
        pairs: torch.Tensor = F.pad(blocks, (0, 0, 0, blocks.shape[1] % 2)).unflatten(1, (-1, 2))
        return pairs

    ranges, number = _ranges(widths), torch.arange(widths.numel()).view(widths.shape)
    present = torch.stack([paired(few), paired(widths == 8)], dim=2)  # [S, pairs, few or 8 bits, 2, met]
    has_line = present.any(3)
    set_, pair, run, met = has_line.nonzero().unbind(1)
    valid, here = present[set_, pair, run, :, met], (set_, pair, slice(None), met)
    lines = torch.where(valid, paired(_addresses(coding, ranges))[here], 0) + (met << 32)[:, None]
    numbers = torch.where(valid, paired(number)[here], widths.numel())
    ends = has_line.sum(3).flatten().cumsum(0).view(has_line.shape[:3])
    first = torch.cat([ends.new_zeros(1), ends.flatten()[:-1]]).view_as(ends)
    bounds = torch.cat([first, ends[..., -1:]], dim=-1)
    return CellTables(bounds.to(torch.int32), lines, numbers.to(torch.int32), ranges.to(torch.int32).contiguous())


def _ranges(widths: torch.Tensor) -> torch.Tensor:
    """See CellTables. Cells of one width and set lie one behind the other."""
    ranges, begin = [], torch.zeros(1, dtype=torch.int64)
    word = torch.zeros(len(widths), dtype=torch.int64)
    for width in sorted(WIDTHS, reverse=True):
        cells = (widths == width).flatten(1).sum(1)
        ends = begin + (width * cells).cumsum(0)
        ranges.append(torch.stack([ends - width * cells, ends, word], dim=1))
        begin = ends[-1:]
        if width < 8:
            word = word + -(-cells // (4 * PER_WORD[width])) * 4
    return torch.stack(ranges, dim=1)


def _addresses(coding: Coding, ranges: torch.Tensor) -> torch.Tensor:
    """[S, G, C]: the lower half of CellTables.lines."""
    byte = coding.cells.to(torch.int64) // 16
    addresses = byte.clone()
    for place, width in enumerate(sorted(WIDTHS, reverse=True)):
        if width < 8:
            begin, _, word = (n[:, None, None] for n in ranges[:, place].unbind(1))
            number, many = (byte - begin) // width, PER_WORD[width]
            of_few = word + number // many + ((FIRST_KIND[width] + number % many) << 24)
            addresses = torch.where(coding.widths == width, of_few, addresses)
    return addresses
