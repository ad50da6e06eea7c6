"""Mixed-width rows: channels of different bits, each with its scale and minimum in one byte per entry.

For channel c of width w, with a unit u and a centre m that all entries share (WidthForm), and two bytes a and b that an
entry stores:

    scale = u * 2^((a - 128) / 16)    minimum = m + scale * (2^w - 1) * (b - 128) / 32    x^ = scale * code + minimum

So the grid follows the range of each entry's channel, from 2^-8 to 2^8 units, in steps of 4 %; its ends are off by up
to 1/64 of the range, and it is wide enough to begin within four ranges of the centre. Outliers are clipped only where
that lowers the squared error of an entry's channel. The codes of channel c fill w * ceil(M / 8) bytes, channel after
channel; a head's channels follow one another.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .bit_packing import GROUP, pack, unpack

OCTAVE = 16
"""Scales per doubling."""
MIDDLE = 128
"""The byte of a scale of one unit, and of a minimum at the centre."""
FRACTIONS = 32
"""Minima per range of a channel."""
REACHES = (0.8, 0.6, 0.4)
"""Inner parts of a channel's range that a grid may reach over instead of all of it."""
_SMALLEST = 1e-30


class Grid(NamedTuple):
    """The numbers that codes stand for, channel by channel of each entry."""

    scale: torch.Tensor
    """[E, H, 1, C]."""
    minimum: torch.Tensor
    """[E, H, 1, C]."""
    levels: torch.Tensor
    """[1, C]: the greatest code."""

    def codes(self, x_EHMC: torch.Tensor) -> torch.Tensor:
        """The nearest codes, whole numbers in the grid's dtype."""
        return torch.minimum(((x_EHMC - self.minimum) / self.scale).round().clamp_min(0), self.levels)

    def values(self, codes_EHMC: torch.Tensor) -> torch.Tensor:
        """What codes stand for."""
        return codes_EHMC * self.scale + self.minimum


@dataclass(frozen=True)
class WidthForm:
    """Parameters of mixed-width rows, the same for all entries."""

    widths: torch.Tensor
    """[C] uint8: bits of a channel's codes, one of bit_packing.WIDTHS, the same for all heads."""
    unit: torch.Tensor
    """[H, C]: the scale of the byte MIDDLE, above 0."""
    centre: torch.Tensor
    """[H, C]: the minimum of the byte MIDDLE."""

    def named(self) -> tuple[tuple[str, torch.Tensor], ...]:
        """The tensors with their names."""
        return ("widths", self.widths), ("unit", self.unit), ("centre", self.centre)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """(first channel, one behind the last, bits) of neighbouring channels of equal bits."""
        widths, runs, first = self.widths.tolist(), list[tuple[int, int, int]](), 0
        for channel in range(1, len(widths) + 1):
            if channel == len(widths) or widths[channel] != widths[first]:
                runs.append((first, channel, widths[first]))
                first = channel
        return runs

    @cached_property
    def total(self) -> int:
        """Bits of a row of one head."""
        return sum((end - first) * bits for first, end, bits in self.runs)

    def levels(self, dtype: torch.dtype) -> torch.Tensor:
        """[1, C]: the greatest code of each channel."""
        levels: torch.Tensor = (2.0 ** self.widths.to(dtype) - 1)[None]
        return levels

    def grid(self, side_EH2C: torch.Tensor, dtype: torch.dtype) -> Grid:
        """The grid of the stored bytes."""
        levels, table = self.levels(dtype), _powers(dtype, side_EH2C.device)
        scale = self.unit.to(dtype) * table[side_EH2C[:, :, 0].int()]
        minimum = self.centre.to(dtype) + scale * levels * ((side_EH2C[:, :, 1].to(dtype) - MIDDLE) / FRACTIONS)
        return Grid(scale[:, :, None], minimum[:, :, None], levels)

    def heads(self, heads: slice) -> "WidthForm":
        """The form of some heads."""
        form = WidthForm(self.widths, self.unit[heads], self.centre[heads])
        # The widths are the same, and an accelerator's are read once.
        vars(form).update(runs=self.runs, total=self.total)
        return form

    def side(self, x_EHMC: torch.Tensor) -> torch.Tensor:
        """The bytes [E, H, 2, C] uint8 of the grids with the least squared error, of those that reach over all, or over
        the inner part (REACHES), of each channel's range: with 1 or 2 bits a smaller one may be nearer to most rows."""
        x = x_EHMC.to(torch.promote_types(x_EHMC.dtype, torch.float32))
        low, high = x.amin(2), x.amax(2)
        best = self._covering(low, high)
        least = self._error(x, best)
        for reach in REACHES:
            margin = (1 - reach) / 2 * (high - low)
            side = self._covering(low + margin, high - margin)
            error = self._error(x, side)
            best = torch.where((error < least)[:, :, None], side, best)
            least = torch.minimum(error, least)
        return best

    def _covering(self, low_EHC: torch.Tensor, high_EHC: torch.Tensor) -> torch.Tensor:
        """The bytes of grids from low to high, wider where low is far from the centre."""
        unit, levels = self.unit.to(low_EHC.dtype), self.levels(low_EHC.dtype)
        offset = low_EHC - self.centre.to(low_EHC.dtype)
        reach = torch.maximum(high_EHC - low_EHC, offset.abs() * (FRACTIONS / (MIDDLE - 1))).clamp_min(_SMALLEST)
        scale_byte = (reach / levels / unit).log2().mul(OCTAVE).ceil().clamp(-MIDDLE, MIDDLE - 1)
        scale = unit * torch.exp2(scale_byte / OCTAVE)
        minimum_byte = (offset / (scale * levels) * FRACTIONS).round()
        sides = torch.stack([scale_byte, minimum_byte.clamp(-MIDDLE, MIDDLE - 1)], dim=2)
        return (sides + MIDDLE).to(torch.uint8)

    def _error(self, x_EHMC: torch.Tensor, side_EH2C: torch.Tensor) -> torch.Tensor:
        """Squared error [E, H, C] of the nearest codes."""
        grid = self.grid(side_EH2C, x_EHMC.dtype)
        return (grid.values(grid.codes(x_EHMC)) - x_EHMC).square().sum(2)


@cache
def _powers(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256]: what the bytes of scales stand for, in units. A table, because powers of many numbers at once may differ
    in the last bit from those of few."""
    return torch.exp2((torch.arange(256, dtype=torch.float64) - MIDDLE) / OCTAVE).to(device, dtype)


class MixedWidthRows:
    """Rows [E, H, M, C] as codes of a width per channel. `read` builds all rows in the working precision; kernels that
    read the codes themselves save time as well."""

    def __init__(self, packed: torch.Tensor, side: torch.Tensor, rows: int, form: WidthForm) -> None:
        """packed: [E, H, bytes] uint8; side: [E, H, 2, C] uint8, the scales' bytes before the minima's; rows: M."""
        self.packed, self.side, self.rows, self.form = packed, side, rows, form

    @classmethod
    def of_codes(cls, codes_EHMC: torch.Tensor, side_EH2C: torch.Tensor, form: WidthForm) -> "MixedWidthRows":
        """Pack codes, each below 2 to the width of its channel."""
        rows = codes_EHMC.shape[2]
        cells = F.pad(codes_EHMC.transpose(2, 3), (0, -rows % GROUP)).unflatten(3, (-1, GROUP))
        runs = [pack(cells[:, :, first:end], bits).flatten(2) for first, end, bits in form.runs]
        return cls(torch.cat(runs, dim=2).contiguous(), side_EH2C, rows, form)

    @classmethod
    def encode(cls, x_EHMC: torch.Tensor, form: WidthForm) -> "MixedWidthRows":
        """Round rows to the nearest codes of grids that reach from their smallest to their largest numbers."""
        side = form.side(x_EHMC)
        codes = form.grid(side, torch.promote_types(x_EHMC.dtype, torch.float32)).codes(x_EHMC)
        return cls.of_codes(codes.to(torch.uint8), side, form)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.packed.shape[:2], self.rows, len(self.form.widths)))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """[E, H, M, C]."""
        groups, first, channels = -(-self.rows // GROUP), 0, []
        for start, end, bits in self.form.runs:
            size = (end - start) * groups * bits
            cells = self.packed[:, :, first : first + size].unflatten(2, (end - start, groups, bits))
            channels.append(unpack(cells, bits).flatten(3)[..., : self.rows])
            first += size
        return self.form.grid(self.side, dtype).values(torch.cat(channels, dim=2).transpose(2, 3).to(dtype))

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
