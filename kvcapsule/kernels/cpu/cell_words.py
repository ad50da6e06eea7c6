"""Look-up tables by which kernels find coded cells (kvcapsule.segments.coefficient_rows) as 32-bit words.

Every entry of a capsule has the same layout, so the tables are made once for a coding. Keys are read by groups of eight
rows, values by channels: a *block* is a group or a channel, and what its cells meet are the channels or the groups.
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
    """For each block its cells of few bits (1 to 4; of keys 0 to 4), then those of 8 bits."""

    bounds: torch.Tensor
    """[S, blocks, 3] int32: where a block's cells of few bits and of 8 bits begin, and where the last ones end."""
    cells: torch.Tensor
    """[n] int64. The upper half: the group or the channel that a cell meets. The lower: of a cell of 8 bits its first
    byte in an entry; of one of few bits its word, and in the highest byte its kind (FIRST_KIND)."""
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
    if of_channels:
        widths, addresses = widths.transpose(1, 2), addresses.transpose(1, 2)
    few = (widths < 8) & (widths > 0) if of_channels else widths < 8
    present = torch.stack([few, widths == 8], dim=2)  # [S, blocks, few or 8 bits, met]
    set_, block, _, met = present.nonzero().unbind(1)
    ends = F.pad(present.sum(3).flatten().cumsum(0), (1, 0))
    bounds = torch.stack([ends[:-1:2], ends[1::2], ends[2::2]], dim=1)
    return CellTables(bounds.to(torch.int32), addresses[set_, block, met] + (met << 32), ranges.to(torch.int32))


def _addresses(widths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, G, C], the lower half of CellTables.cells, and CellTables.ranges. Cells of one width lie set by set."""
    addresses, ranges = torch.zeros(widths.shape, dtype=torch.int64), torch.zeros(len(widths), 5, 3, dtype=torch.int64)
    begin, word = 0, torch.zeros(len(widths), dtype=torch.int64)
    for place, width in enumerate(sorted(WIDTHS, reverse=True)):
        cells = (widths == width).flatten(1)
        ends = begin + (width * cells.sum(1)).cumsum(0)
        starts = ends - width * cells.sum(1)
        ranges[:, place] = torch.stack([starts, ends, word], dim=1)
        number = cells.cumsum(1) - 1  # of a cell among those of its set and width
        if width == 8:
            address = starts[:, None] + 8 * number
        else:
            many = PER_WORD[width]
            address = word[:, None] + number // many + ((FIRST_KIND[width] + number % many) << 24)
            word = word + -(-cells.sum(1) // (4 * many)) * 4
        addresses = torch.where(widths == width, address.view(widths.shape), addresses)
        begin = int(ends[-1])
    return addresses, ranges
