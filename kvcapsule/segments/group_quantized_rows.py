"""Group-quantised rows: a scale and a minimum per group of consecutive elements, along the tokens or the channels.

    x^ = scale * code + minimum     scale = (high - low) / (2^bits - 1),  minimum = low

where low and high are the smallest and the largest value of the group. Codes are packed into bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .bit_packing import GROUP, pack, unpack
from .quantized_rows import check_bits


@dataclass(frozen=True)
class GroupedRows:
    """Rows [E, H, M, D] as codes of `bits` bits with a scale and a minimum per group.

    Codes are stored in R runs of C elements: the channels of (D, M), or the tokens of (M, D). `read` builds all M rows
    in the working precision: it saves memory, not time.
    """

    codes: torch.Tensor
    """[E, H, R, bytes] uint8: eight consecutive codes of a run fill `bits` bytes (kvcapsule.segments.bit_packing)."""
    scale: torch.Tensor
    """[E, H, R, groups], in the dtype of the rows."""
    minimum: torch.Tensor
    """As scale."""
    bits: int
    group: int
    length: int
    """C: elements per run."""
    along_tokens: bool
    """True: a run is one channel's tokens (keys). False: a run is one token's channels (values)."""

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
        """Quantise x to the nearest of 2^bits levels between low and high of its group; a run's last group may be
        shorter.

        Args:
            x_EHMD: the rows.
            bits: bits of a code.
            group: elements that share a scale and a minimum.
            along_tokens: see the field.
            clip: factor of the group's smallest and largest value that gives low and high; values outside get the
                nearest level.
            zero_is_code: round the minimum to a multiple of the scale, so that 0 is a level wherever the range
                includes it: x^ = scale * (code - z) with the integer zero point z = -round(low / scale), as many papers
                write it. The stored minimum is -scale * z.
        """
        check_bits(bits)
        runs = x_EHMD.transpose(2, 3) if along_tokens else x_EHMD
        length, levels = runs.shape[3], 2**bits - 1
        missing = -length % group
        # The last group is padded with its last element, which does not widen its range.
        grouped = torch.cat([runs, runs[..., -1:].expand(*runs.shape[:3], missing)], dim=3).unflatten(3, (-1, group))
        low, high = grouped.amin(4) * clip, grouped.amax(4) * clip
        scale = ((high.float() - low.float()) / levels).clamp_min(1e-8).to(runs.dtype)
        # A small scale underflows to 0 in half precision.
        divisor = scale.float().clamp_min(1e-8)
        if zero_is_code:
            low = ((low.float() / divisor).round() * divisor).to(runs.dtype)
        codes = ((grouped - low[..., None]).float() / divisor[..., None]).round().clamp(0, levels).to(torch.uint8)
        padded = F.pad(codes.flatten(3)[..., :length], (0, -length % GROUP))
        return cls(
            pack(padded.unflatten(3, (-1, GROUP)), bits).flatten(3), scale, low, bits, group, length, along_tokens
        )

    @property
    def shape(self) -> torch.Size:
        entries, heads, runs, _ = self.codes.shape
        return torch.Size(
            (entries, heads, self.length, runs) if self.along_tokens else (entries, heads, runs, self.length)
        )

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        codes = unpack(self.codes.unflatten(3, (-1, self.bits)), self.bits).flatten(3)[..., : self.length].to(dtype)
        scale, minimum = (
            t.to(dtype).repeat_interleave(self.group, dim=3)[..., : self.length] for t in (self.scale, self.minimum)
        )
        runs = codes * scale + minimum
        return runs.transpose(2, 3) if self.along_tokens else runs

    @classmethod
    def join(cls, parts: Sequence["GroupedRows"]) -> "GroupedRows":
        """Concatenate rows of the same entries along the tokens; for codes along the channels, whose groups lie within
        one token.

        Raises:
            ValueError: for codes along the tokens, whose groups would be cut.
        """
        first = parts[0]
        if first.along_tokens:
            raise ValueError(
                "rows whose codes run along the tokens cannot be joined: read them and pack them together."
            )
        codes, scale, minimum = (torch.cat(list(x), dim=2) for x in zip(*(p.tensors() for p in parts), strict=True))
        return replace(first, codes=codes, scale=scale, minimum=minimum)

    def select(self, index: torch.Tensor) -> "GroupedRows":
        return replace(self, codes=self.codes[index], scale=self.scale[index], minimum=self.minimum[index])

    def to(self, device: torch.device | str) -> "GroupedRows":
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), minimum=self.minimum.to(device))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.scale, self.minimum)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return ()
