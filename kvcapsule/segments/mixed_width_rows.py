"""Mixed-width rows: channels of different bits, each with its scale and minimum in one byte per entry.

For channel c of width w, with a unit u and a centre m that all entries share (WidthForm), and a byte 16 b + a that an
entry stores:

    scale = u * 2^((a - 6) / 3)    minimum = m + scale * (2^w - 1) * (b - 8) / 6    x^ = scale * code + minimum

So the grid follows the range of each entry's channel, from 1/4 to 8 units a level, in steps of 26 %, and begins at a
multiple of a sixth of that range. Of the grids that nearly fit, an entry's channel has the one with the least squared
error: with few bits a smaller one, which clips outliers, may be nearer to most rows. A channel of width 0 is its centre
in every row, and stores nothing.

A row is a string of bits: the codes of its channels one after the other, the lowest bit of each first, in whole bytes.
The rows of a head follow one another, then those of the next head.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

WIDEST = 7
"""Most bits of a code: sixteen codes then lie within sixteen bytes, wherever the first one begins."""
OCTAVE = 3
"""Scales per doubling."""
SCALE_MIDDLE = 6
"""The lower half of the byte of a scale of one unit."""
MINIMUM_MIDDLE = 8
"""The upper half of the byte of a minimum at the centre."""
FRACTIONS = 6
"""Minima per range of a channel."""
_SMALLER = 5
"""Scales that are tried: from the first whose grid reaches over a channel's range downwards."""
_SMALLEST = 1e-30


class Grid(NamedTuple):
    """The numbers that codes stand for, channel by channel of each entry."""

    scale: torch.Tensor
    """[E, H, 1, C]."""
    minimum: torch.Tensor
    """[E, H, 1, C]."""
    levels: torch.Tensor
    """[H, 1, C]: the greatest code."""

    def codes(self, x_EHMC: torch.Tensor) -> torch.Tensor:
        """The nearest codes, whole numbers in the grid's dtype."""
        return torch.minimum(((x_EHMC - self.minimum) / self.scale).round().clamp_min(0), self.levels)

    def values(self, codes_EHMC: torch.Tensor) -> torch.Tensor:
        """What codes stand for."""
        return codes_EHMC * self.scale + self.minimum

    def heads_first(self) -> "Grid":
        """For rows [H, E, M, C]."""
        return Grid(self.scale.transpose(0, 1), self.minimum.transpose(0, 1), self.levels[:, None])


class Window(NamedTuple):
    """Where the bits of each code lie: within two bytes of its row."""

    byte: torch.Tensor
    """[H, C] int64: the first of them, counted from the row's."""
    shift: torch.Tensor
    """[H, C] int32: bits below the code."""


@dataclass(frozen=True)
class WidthForm:
    """Parameters of mixed-width rows, the same for all entries."""

    widths: torch.Tensor
    """[H, C] uint8: bits of a channel's codes, from 0 to WIDEST."""
    unit: torch.Tensor
    """[H, C]: the scale of SCALE_MIDDLE, above 0."""
    centre: torch.Tensor
    """[H, C]: the minimum of MINIMUM_MIDDLE."""

    def named(self) -> tuple[tuple[str, torch.Tensor], ...]:
        """The tensors with their names."""
        return ("widths", self.widths), ("unit", self.unit), ("centre", self.centre)

    @cached_property
    def window(self) -> Window:
        """Where the codes of a row are."""
        widths = self.widths.long()
        first = widths.cumsum(1) - widths
        return Window(first // 8, (first % 8).int())

    @cached_property
    def row_bytes(self) -> list[int]:
        """[H]: bytes of a row of each head."""
        return [-(-bits // 8) for bits in self.widths.sum(1, dtype=torch.int64).tolist()]

    @cached_property
    def places(self) -> torch.Tensor:
        """[H, C] int32: 16 * (first bit of the code in a row) + its width, which is all that a kernel needs to find
        it."""
        widths = self.widths.int()
        return 16 * (widths.cumsum(1, dtype=torch.int32) - widths) + widths

    @cached_property
    def side_places(self) -> torch.Tensor:
        """[H, C] int32: which of the K channels with bits each is."""
        coded = (self.widths > 0).flatten().int()
        return (coded.cumsum(0, dtype=torch.int32) - coded).view(self.widths.shape)

    @cached_property
    def firsts(self) -> torch.Tensor:
        """[H + 1, 2] int64: before each head, and in all, the bytes of a row of each and the channels with bits."""
        sizes = torch.tensor(self.row_bytes, device=self.widths.device), (self.widths > 0).sum(1)
        return F.pad(torch.stack(sizes, dim=1).cumsum(0), (0, 0, 1, 0))

    @cached_property
    def coded(self) -> torch.Tensor:
        """[K] int64: the channels that have bits, among those of all heads."""
        return self.widths.flatten().nonzero()[:, 0]

    @cached_property
    def levels(self) -> torch.Tensor:
        """[H, 1, C] int64: the greatest code of each channel."""
        return (1 << self.widths.long())[:, None] - 1

    def grid(self, side_EHC: torch.Tensor, dtype: torch.dtype) -> Grid:
        """The grid of the bytes of all channels; those of channels of width 0 are not read."""
        side, levels = side_EHC.int(), self.levels.to(dtype)
        scale = self.unit.to(dtype) * _powers(dtype, side.device)[side & 15]
        fraction = ((side >> 4).to(dtype) - MINIMUM_MIDDLE) / FRACTIONS
        minimum = self.centre.to(dtype) + scale * levels[:, 0] * fraction
        return Grid(scale[:, :, None], minimum[:, :, None], levels)

    def heads(self, heads: slice) -> "WidthForm":
        """The form of some heads."""
        return WidthForm(self.widths[heads], self.unit[heads], self.centre[heads])

    def side(self, x_EHMC: torch.Tensor) -> torch.Tensor:
        """The bytes [E, H, C] uint8 of the grids with the least squared error, of those that nearly fit the range of
        each channel."""
        x = x_EHMC.to(torch.promote_types(x_EHMC.dtype, torch.float32))
        low, high = x.amin(2), x.amax(2)
        unit, levels = self.unit.to(x.dtype), self.levels[:, 0].to(x.dtype).clamp_min(1)
        # Minima far from the centre need a long range.
        far = (low - self.centre.to(x.dtype)) * FRACTIONS
        reach = torch.maximum(torch.maximum(far / (15 - MINIMUM_MIDDLE), -far / MINIMUM_MIDDLE), high - low)
        fitting = ((reach.clamp_min(_SMALLEST) / levels / unit).log2() * OCTAVE).ceil() + SCALE_MIDDLE
        best, least = torch.zeros_like(low, dtype=torch.uint8), torch.full_like(low, torch.inf)
        for smaller in range(_SMALLER):
            scale_byte = (fitting - smaller).clamp(0, 15)
            range_ = unit * torch.exp2((scale_byte - SCALE_MIDDLE) / OCTAVE) * levels
            begin = torch.where(range_ < high - low, (low + high - range_) / 2, low)
            place = (begin - self.centre.to(x.dtype)) / range_ * FRACTIONS + MINIMUM_MIDDLE
            for minimum_byte in (place.floor(), place.ceil()):
                side = (scale_byte + 16 * minimum_byte.clamp(0, 15)).to(torch.uint8)
                grid = self.grid(side, x.dtype)
                error = (grid.values(grid.codes(x)) - x).square().sum(2)
                best = torch.where(error < least, side, best)
                least = torch.minimum(error, least)
        return best


@cache
def _powers(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[16]: what scales stand for, in units. A table, because powers of many numbers at once may differ in the last bit
    from those of few."""
    return torch.exp2((torch.arange(16, dtype=torch.float64) - SCALE_MIDDLE) / OCTAVE).to(device, dtype)


class MixedWidthRows:
    """Rows [E, H, M, C] as codes of a width per channel. `read` builds all rows in the working precision; kernels that
    read the codes themselves save time as well."""

    def __init__(self, packed: torch.Tensor, side: torch.Tensor, rows: int, form: WidthForm) -> None:
        """packed: [E, bytes] uint8; side: [E, K] uint8, those of WidthForm.side for the K channels of
        WidthForm.coded; rows: M."""
        self.packed, self.side, self.rows, self.form = packed, side, rows, form

    @classmethod
    def of_codes(cls, codes_EHMC: torch.Tensor, side_EHC: torch.Tensor, form: WidthForm) -> "MixedWidthRows":
        """Pack codes, each below 2 to the width of its channel."""
        byte, shift = form.window
        heads = []
        for head, size in enumerate(form.row_bytes):
            codes = codes_EHMC[:, head].int() << shift[head]
            # A code's bits add to two bytes that no other code has the same bits of.
            row = codes.new_zeros(*codes.shape[:2], size + 1)
            row.index_add_(2, byte[head].clamp_max(size), codes & 255)
            row.index_add_(2, (byte[head] + 1).clamp_max(size), codes >> 8)
            heads.append(row[..., :size].to(torch.uint8).flatten(1))
        return cls(torch.cat(heads, dim=1), side_EHC.flatten(1)[:, form.coded], codes_EHMC.shape[2], form)

    @classmethod
    def encode(cls, x_EHMC: torch.Tensor, form: WidthForm) -> "MixedWidthRows":
        """Round rows to the nearest codes of the best grids."""
        side = form.side(x_EHMC)
        codes = form.grid(side, torch.promote_types(x_EHMC.dtype, torch.float32)).codes(x_EHMC)
        return cls.of_codes(codes.to(torch.uint8), side, form)

    @property
    def shape(self) -> torch.Size:
        heads, channels = self.form.widths.shape
        return torch.Size((len(self.packed), heads, self.rows, channels))

    def codes(self) -> torch.Tensor:
        """The codes, unpacked: [E, H, M, C] int32."""
        form, heads, first = self.form, [], 0
        for head, size in enumerate(form.row_bytes):
            row = self.packed[:, first : first + self.rows * size].unflatten(1, (self.rows, size))
            row = F.pad(row, (0, 2)).int()
            byte = form.window.byte[head]
            window = row[..., byte] | row[..., byte + 1] << 8
            heads.append(window >> form.window.shift[head] & form.levels[head].int())
            first += self.rows * size
        return torch.stack(heads, dim=1)

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The rows that the codes stand for, [E, H, M, C]."""
        return self.grid(dtype).values(self.codes().to(dtype))

    def grid(self, dtype: torch.dtype) -> Grid:
        """The grid of each entry, head and channel."""
        side = self.side.new_full((len(self.side), self.form.widths.numel()), 16 * MINIMUM_MIDDLE)
        side[:, self.form.coded] = self.side
        return self.form.grid(side.unflatten(1, self.form.widths.shape), dtype)

    def select(self, index: torch.Tensor) -> "MixedWidthRows":
        return MixedWidthRows(self.packed[index], self.side[index], self.rows, self.form)

    def to(self, device: torch.device | str) -> "MixedWidthRows":
        return MixedWidthRows(self.packed.to(device), self.side.to(device), self.rows, self.form)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MixedWidthRows":
        """Copies what the entries store; the form, which all entries share, is not copied."""
        packed, side = copy.deepcopy((self.packed, self.side), memo)
        return MixedWidthRows(packed, side, self.rows, self.form)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.packed, self.side)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "MixedWidthRows":
        """See kvcapsule.segments.storable_rows."""
        packed, side = tensors
        return MixedWidthRows(packed, side, self.rows, self.form)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return (self.form.widths, self.form.unit, self.form.centre)
