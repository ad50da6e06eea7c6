"""Sketched rows: codebook rows, and what they miss as one bit a channel (a quantised Johnson-Lindenstrauss sketch).

    r    = x - x^                                     of the codebook, over D channels
    b    = sign(S r)                                  S [D, D]: independent Gaussian numbers of variance 1
    q x  is estimated by  q x^ + sqrt(pi / 2) / D |r| (S q) b

The estimate is right on average over S, for every q and x. A row is read as the 2 D channels [x^, sqrt(pi / 2) / D |r|
b], for queries [q, S q]: attention needs to know no more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .codebook_rows import LONGEST, CodebookRows, pack_channels, unpack_channels


@dataclass(frozen=True)
class SketchedRows:
    """Rows [E, H, M, 2 D] of one bit a channel of x more than the codebook's, and 16 bits a row more."""

    coded: CodebookRows
    """x^."""
    signs: torch.Tensor
    """[E, H, M, bytes] uint8: 1 where b is 1."""
    missed: torch.Tensor
    """[E, H, M, 1] fp16: |r|."""

    @classmethod
    def pack(cls, x_EHMD: torch.Tensor, bits: int, sketch: torch.Tensor, keep_length: bool = False) -> "SketchedRows":
        """Code x in `bits` bits a channel, the sketch's bit included. sketch: S."""
        coded = CodebookRows.pack(x_EHMD, bits - 1, keep_length)
        rest = x_EHMD.float() - coded.read(torch.float32)
        signs = rest @ sketch.to(rest.dtype).T >= 0
        missed = rest.norm(dim=3, keepdim=True).clamp_max(LONGEST)
        return cls(coded, pack_channels(signs.to(torch.uint8), 1), missed.half())

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.coded.shape[:3], 2 * self.coded.channels))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        channels = self.coded.channels
        signs = unpack_channels(self.signs, 1, channels).to(dtype).mul_(2).sub_(1)
        return torch.cat(
            [self.coded.read(dtype), signs * (self.missed.to(dtype) * (math.sqrt(math.pi / 2) / channels))], dim=3
        )

    def select(self, index: torch.Tensor) -> "SketchedRows":
        return SketchedRows(self.coded.select(index), self.signs[index], self.missed[index])

    def to(self, device: torch.device | str) -> "SketchedRows":
        return SketchedRows(self.coded.to(device), self.signs.to(device), self.missed.to(device))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self.coded.tensors(), self.signs, self.missed)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "SketchedRows":
        """See kvcapsule.segments.storable_rows."""
        *coded, signs, missed = tensors
        return replace(self, coded=self.coded.with_tensors(coded), signs=signs, missed=missed)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return self.coded.shared()
