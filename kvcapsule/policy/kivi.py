"""KIVI (arXiv 2402.02750): every visual token in few bits, keys per channel and values per token, in small groups.

    x^ = step * code + zero     step = (max - min) / (2^bits - 1),  zero = min,  over one group

A group is 32 consecutive tokens of one channel of the keys, or 32 consecutive channels of one token of the values.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..packing import GROUP, pack, unpack
from ..prefill import Compressed, LayerPrefill, keep
from ..quantize import check_bits
from ..segment import Segment
from .base import VisualPolicy


@dataclass(frozen=True)
class GroupedRows:
    """Rows [E, H, M, D] as codes of `bits` bits, a step and a zero for each group; R = runs and C = their length: D and M, or M and D.

    `read` builds all M rows in the working precision: this saves memory, not time.
    """

    codes: torch.Tensor
    """[E, H, R, bytes] uint8: every eight consecutive codes of a run fill `bits` bytes (kvcapsule.packing)."""
    step: torch.Tensor
    """[E, H, R, groups] in the dtype of the rows."""
    zero: torch.Tensor
    """As step."""
    bits: int
    group: int
    length: int
    """C: elements of a run."""
    along_tokens: bool
    """Runs go along the tokens of a channel (keys); otherwise along the channels of a token (values)."""

    @classmethod
    def pack(cls, x_EHMD: torch.Tensor, bits: int, group: int, along_tokens: bool) -> "GroupedRows":
        """Quantise to the nearest of 2^bits levels between each group's least and greatest value; a run's last group may be shorter."""
        check_bits(bits)
        runs = x_EHMD.transpose(2, 3) if along_tokens else x_EHMD
        length, levels = runs.shape[3], 2**bits - 1
        missing = -length % group
        # What fills up the last group repeats its last element, and so widens no range.
        grouped = torch.cat([runs, runs[..., -1:].expand(*runs.shape[:3], missing)], dim=3).unflatten(3, (-1, group))
        low, high = grouped.amin(4), grouped.amax(4)
        step = ((high.float() - low.float()) / levels).clamp_min(1e-8).to(runs.dtype)
        # In half precision a small step is stored as 0, and nothing may be divided by it.
        codes = ((grouped - low[..., None]).float() / step.float().clamp_min(1e-8)[..., None]).round().clamp(0, levels).to(torch.uint8)
        padded = F.pad(codes.flatten(3)[..., :length], (0, -length % GROUP))
        return cls(pack(padded.unflatten(3, (-1, GROUP)), bits).flatten(3), step, low, bits, group, length, along_tokens)

    @property
    def shape(self) -> torch.Size:
        entries, heads, runs, _ = self.codes.shape
        return torch.Size((entries, heads, self.length, runs) if self.along_tokens else (entries, heads, runs, self.length))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        codes = unpack(self.codes.unflatten(3, (-1, self.bits)), self.bits).flatten(3)[..., : self.length].to(dtype)
        step, zero = (t.to(dtype).repeat_interleave(self.group, dim=3)[..., : self.length] for t in (self.step, self.zero))
        runs = codes * step + zero
        return runs.transpose(2, 3) if self.along_tokens else runs

    def select(self, index: torch.Tensor) -> "GroupedRows":
        return replace(self, codes=self.codes[index], step=self.step[index], zero=self.zero[index])

    def to(self, device: torch.device | str) -> "GroupedRows":
        return replace(self, codes=self.codes.to(device), step=self.step.to(device), zero=self.zero.to(device))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.step, self.zero)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return ()


@dataclass(frozen=True)
class Kivi(VisualPolicy):
    """Keys and values of all visual tokens in `bits` bits, plus a step and a zero for each group.

    The paper keeps the last tokens (residual, up to 128) in full precision, so that codes come in whole groups; here the residual is the
    prompt's text and what is written after it, all raw, and a row's last group of tokens is shorter. A group may reach from one image of a
    row into the next. Bits for an element: bits + 2 * 16 / group in half precision.
    """

    bits: int = 2
    """Of a code; the paper's are 2 and 4."""
    group: int = 32
    """Elements that share a step and a zero."""

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group < 1:
            raise ValueError(f"group {self.group}: at least one element is needed.")

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        visual = prefill.visual()
        counts = visual.sum(dim=1)
        # Rows of each length by themselves: padding would get into the last group's range.
        segments = [s for count in counts.unique() for s in keep(prefill, visual & (counts == count)[:, None])]
        return Compressed([self._pack(segment) for segment in segments], text)

    def _pack(self, segment: Segment) -> Segment:
        assert isinstance(segment.keys, torch.Tensor) and isinstance(segment.values, torch.Tensor)
        return replace(
            segment,
            keys=GroupedRows.pack(segment.keys, self.bits, self.group, along_tokens=True),
            values=GroupedRows.pack(segment.values, self.bits, self.group, along_tokens=False),
        )
