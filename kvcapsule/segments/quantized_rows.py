"""Few-bit rows: asymmetric codes, one step and one zero for each channel of an entry, really packed into bytes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .bit_packing import GROUP, WIDTHS, pack, unpack

BITS = WIDTHS


def check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{bits} bits cannot be packed: choose one of {', '.join(map(str, BITS))}.")


@dataclass(frozen=True)
class QuantizedRows:
    """Rows [E, H, M, D] as codes of `bits` bits: x = step * code + zero, step and zero per channel over the M tokens.

    Per channel, because keys (and values of video) have outlier channels (KIVI, arXiv 2402.02750; VidKV, arXiv
    2503.16257), and because step and zero then leave the inner loop of attention. Plain PyTorch builds the codes as
    numbers in the working precision, one of each byte's at a time (`planes`), or all M rows (`read`): this saves
    memory, not time.
    """

    codes: torch.Tensor
    """[E, H, D, bytes] uint8: of each channel, every eight consecutive tokens fill `bits` bytes
    (kvcapsule.segments.bit_packing)."""
    step: torch.Tensor
    """[E, H, 1, D]."""
    zero: torch.Tensor
    """[E, H, 1, D]."""
    bits: int
    tokens: int

    @classmethod
    def pack(cls, x_EHMD: torch.Tensor, bits: int) -> "QuantizedRows":
        """Quantise to the nearest of 2^bits levels between each channel's least and greatest value."""
        check_bits(bits)
        low, high = x_EHMD.amin(2, keepdim=True), x_EHMD.amax(2, keepdim=True)
        levels = 2**bits - 1
        step = ((high.float() - low.float()) / levels).clamp_min(1e-8).to(x_EHMD.dtype)
        # In half precision a small step is stored as 0, and nothing may be divided by it.
        codes = ((x_EHMD - low).float() / step.float().clamp_min(1e-8)).round().clamp(0, levels).to(torch.uint8)
        tokens = codes.shape[2]
        padded = F.pad(codes.transpose(2, 3), (0, -tokens % GROUP))
        packed = pack(padded.unflatten(3, (-1, GROUP)), bits).flatten(3)
        return cls(packed.contiguous(), step, low.contiguous(), bits, tokens)

    @property
    def shape(self) -> torch.Size:
        entries, heads, dim, _ = self.codes.shape
        return torch.Size((entries, heads, self.tokens, dim))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        codes = unpack(self.codes.unflatten(3, (-1, self.bits)), self.bits).flatten(3)[..., : self.tokens]
        return codes.transpose(2, 3).to(dtype) * self.step.to(dtype) + self.zero.to(dtype)

    @property
    def lanes(self) -> int:
        """Codes of a byte; those of 3 bits lie across bytes, and are one plane."""
        return 1 if self.bits == 3 else 8 // self.bits

    @property
    def middle(self) -> torch.Tensor:
        """[E, H, 1, D]: what the code 2^(bits - 1) stands for; in fp32 or better, for a product adds it to what may be
        small."""
        work = torch.promote_types(self.step.dtype, torch.float32)
        middle: torch.Tensor = self.zero.to(work) + 2 ** (self.bits - 1) * self.step.to(work)
        return middle

    def planes(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Codes less 2^(bits - 1); see `kvcapsule.segments.segment.Stepped`."""
        half = 2 ** (self.bits - 1)
        if self.bits == 3:
            yield unpack(self.codes.unflatten(3, (-1, self.bits)), self.bits).flatten(3).to(dtype) - half
            return
        for place in range(self.lanes):
            # Bytes wrap around, and are then read as signed.
            yield (((self.codes >> (place * self.bits)) & (2**self.bits - 1)) - half).view(torch.int8).to(dtype)

    def select(self, index: torch.Tensor) -> "QuantizedRows":
        return QuantizedRows(self.codes[index], self.step[index], self.zero[index], self.bits, self.tokens)

    def to(self, device: torch.device | str) -> "QuantizedRows":
        return QuantizedRows(self.codes.to(device), self.step.to(device), self.zero.to(device), self.bits, self.tokens)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.step, self.zero)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return ()
