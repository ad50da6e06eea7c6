"""Few-bit rows in small groups: a step and a zero for every few elements, along the tokens or along the channels;
really packed.

    x^ = step * code + zero     step = (high - low) / (2^bits - 1),  zero = low

with a group's least and greatest value as low and high.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .bit_packing import GROUP, pack, unpack
from .quantized_rows import check_bits


@dataclass(frozen=True)
class GroupedRows:
    """Rows [E, H, M, D] as codes of `bits` bits, a step and a zero for each group; R = runs and C = their length: D and
    M, or M and D.

    `read` builds all M rows in the working precision: this saves memory, not time.
    """

    codes: torch.Tensor
    """[E, H, R, bytes] uint8: every eight consecutive codes of a run fill `bits` bytes
    (kvcapsule.segments.bit_packing)."""
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
    def pack(
        cls,
        x_EHMD: torch.Tensor,
        bits: int,
        group: int,
        along_tokens: bool,
        clip: float = 1.0,
        zero_is_code: bool = False,
    ) -> "GroupedRows":
        """Quantise to the nearest of 2^bits levels between each group's low and high; a run's last group may be
        shorter.

        Args:
            x_EHMD: the rows.
            bits: of a code.
            group: elements that share a step and a zero.
            along_tokens: see the field.
            clip: low and high are a group's least and greatest value, each times this; what lies outside gets the
                nearest level.
            zero_is_code: round the zero to a whole number of steps, so that 0 is a level wherever the range holds it:
                x^ = step * (code - z) with a whole z = -round(low / step), as many papers write it. What is stored is
                -step * z.
        """
        check_bits(bits)
        runs = x_EHMD.transpose(2, 3) if along_tokens else x_EHMD
        length, levels = runs.shape[3], 2**bits - 1
        missing = -length % group
        # What fills up the last group repeats its last element, and so widens no range.
        grouped = torch.cat([runs, runs[..., -1:].expand(*runs.shape[:3], missing)], dim=3).unflatten(3, (-1, group))
        low, high = grouped.amin(4) * clip, grouped.amax(4) * clip
        step = ((high.float() - low.float()) / levels).clamp_min(1e-8).to(runs.dtype)
        # In half precision a small step is stored as 0, and nothing may be divided by it.
        divisor = step.float().clamp_min(1e-8)
        if zero_is_code:
            low = ((low.float() / divisor).round() * divisor).to(runs.dtype)
        codes = ((grouped - low[..., None]).float() / divisor[..., None]).round().clamp(0, levels).to(torch.uint8)
        padded = F.pad(codes.flatten(3)[..., :length], (0, -length % GROUP))
        return cls(
            pack(padded.unflatten(3, (-1, GROUP)), bits).flatten(3), step, low, bits, group, length, along_tokens
        )

    @property
    def shape(self) -> torch.Size:
        entries, heads, runs, _ = self.codes.shape
        return torch.Size(
            (entries, heads, self.length, runs) if self.along_tokens else (entries, heads, runs, self.length)
        )

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        codes = unpack(self.codes.unflatten(3, (-1, self.bits)), self.bits).flatten(3)[..., : self.length].to(dtype)
        step, zero = (
            t.to(dtype).repeat_interleave(self.group, dim=3)[..., : self.length] for t in (self.step, self.zero)
        )
        runs = codes * step + zero
        return runs.transpose(2, 3) if self.along_tokens else runs

    @classmethod
    def join(cls, parts: Sequence["GroupedRows"]) -> "GroupedRows":
        """Rows of the same entries, one behind the other; for codes along the channels, which share nothing between
        tokens.

        Raises:
            ValueError: for codes along the tokens, whose groups would be cut.
        """
        first = parts[0]
        if first.along_tokens:
            raise ValueError(
                "rows whose codes run along the tokens cannot be joined: read them and pack them together."
            )
        codes, step, zero = (torch.cat(list(x), dim=2) for x in zip(*(p.tensors() for p in parts), strict=True))
        return replace(first, codes=codes, step=step, zero=zero)

    def select(self, index: torch.Tensor) -> "GroupedRows":
        return replace(self, codes=self.codes[index], step=self.step[index], zero=self.zero[index])

    def to(self, device: torch.device | str) -> "GroupedRows":
        return replace(self, codes=self.codes.to(device), step=self.step.to(device), zero=self.zero.to(device))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.step, self.zero)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return ()
