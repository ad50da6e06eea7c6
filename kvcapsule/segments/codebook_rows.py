"""Codebook rows: a length for each row, and for each of its channels the number of a level that all rows share.

    x^ = length * levels[code]

The levels are those with the least squared error for a Gaussian (Lloyd, Max). Rows are expected to be rotated at
random, which makes the channels of a row of length 1 nearly Gaussian of variance 1 / channels, whatever the data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F

from .bit_packing import GROUP, pack, unpack

LONGEST = float(torch.finfo(torch.float16).max)
"""Lengths are stored in half precision; greater ones as this."""
_SMALLEST = 1e-12
_ROUNDS = 3000
"""Of Lloyd's iteration; 16 levels move less than 1e-12 by then."""


@lru_cache
def gaussian_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels, in order, with the least mean squared error for a Gaussian of variance 1."""
    levels = [-2 + 4 * (i + 0.5) / 2**bits for i in range(2**bits)]
    for _ in range(_ROUNDS):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        levels = [_mean_between(low, high) for low, high in pairwise(edges)]
    return tuple(levels)


def _mean_between(low: float, high: float) -> float:
    """Mean of a Gaussian between two numbers."""
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high)]
    share = [(1 + math.erf(x / math.sqrt(2))) / 2 for x in (low, high)]
    return (density[0] - density[1]) / (share[1] - share[0])


@lru_cache(maxsize=32)
def _levels(bits: int, channels: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        levels: torch.Tensor = torch.tensor(gaussian_levels(bits), dtype=torch.float64) * channels**-0.5
        return levels.to(device, torch.float32)


def pack_channels(codes_EHMD: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [E, H, M, bits * ceil(D / 8)] of codes along the channels."""
    padded = F.pad(codes_EHMD, (0, -codes_EHMD.shape[3] % GROUP))
    return pack(padded.unflatten(3, (-1, GROUP)), bits).flatten(3)


def unpack_channels(packed: torch.Tensor, bits: int, channels: int) -> torch.Tensor:
    """Codes [E, H, M, D] uint8."""
    return unpack(packed.unflatten(3, (-1, bits)), bits).flatten(3)[..., :channels]


@dataclass(frozen=True)
class CodebookRows:
    """Rows [E, H, M, D] of `bits` bits a channel and 16 bits a row. `read` builds all M rows in the working precision:
    it saves memory, not time."""

    codes: torch.Tensor
    """[E, H, M, bytes] uint8: eight consecutive channels fill `bits` bytes (kvcapsule.segments.bit_packing)."""
    length: torch.Tensor
    """[E, H, M, 1] fp16."""
    levels: torch.Tensor
    """[2^bits] fp32, shared."""
    bits: int
    channels: int
    """D."""

    @classmethod
    def pack(cls, x_EHMD: torch.Tensor, bits: int, keep_length: bool = False) -> "CodebookRows":
        """Code x by the nearest levels.

        Args:
            x_EHMD: the rows, rotated.
            bits: bits of a code.
            keep_length: store the length with which the row is read as long as it was, in place of its own.
        """
        channels = x_EHMD.shape[3]
        levels = _levels(bits, channels, x_EHMD.device)
        work = x_EHMD.float()
        length = work.norm(dim=3, keepdim=True)
        codes = torch.bucketize(work / length.clamp_min(_SMALLEST), (levels[1:] + levels[:-1]) / 2)
        if keep_length:
            length = length / levels[codes].norm(dim=3, keepdim=True)
        packed = pack_channels(codes.to(torch.uint8), bits)
        return cls(packed, length.clamp_max(LONGEST).half(), levels, bits, channels)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:3], self.channels))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        codes = unpack_channels(self.codes, self.bits, self.channels)
        return self.levels.to(dtype)[codes.long()] * self.length.to(dtype)

    def select(self, index: torch.Tensor) -> "CodebookRows":
        return replace(self, codes=self.codes[index], length=self.length[index])

    def to(self, device: torch.device | str) -> "CodebookRows":
        return replace(self, codes=self.codes.to(device), length=self.length.to(device))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.length)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "CodebookRows":
        """See kvcapsule.segments.storable_rows."""
        codes, length = tensors
        return replace(self, codes=codes, length=length)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return (self.levels,)
