"""Few-bit rows: asymmetric codes, one step and one zero for each channel of an entry, really packed into bytes."""

from dataclasses import dataclass

import torch

BITS = (2, 4, 8)
"""Widths that divide a byte."""


def check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{bits} bits cannot be packed: choose one of {', '.join(map(str, BITS))}.")


@dataclass(frozen=True)
class QuantizedRows:
    """Rows [E, H, M, D] as codes of `bits` bits: x = step * code + zero, step and zero per channel over the M tokens.

    Per channel, because keys (and values of video) have outlier channels (KIVI, arXiv 2402.02750; VidKV, arXiv 2503.16257), and because
    step and zero then leave the inner loop of attention. `read` builds all M rows in the working precision: this saves memory, not time.
    """

    codes: torch.Tensor
    """[E, H, bytes, D] uint8: 8 / bits consecutive tokens of a channel share a byte, the first in the lowest bits."""
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
        per_byte = 8 // bits
        tokens = codes.shape[2]
        padded = torch.nn.functional.pad(codes, (0, 0, 0, -tokens % per_byte))
        lanes = padded.unflatten(2, (-1, per_byte))
        packed = torch.zeros_like(lanes[:, :, :, 0])
        for lane in range(per_byte):
            packed |= lanes[:, :, :, lane] << (lane * bits)
        return cls(packed, step, low.contiguous(), bits, tokens)

    @property
    def shape(self) -> torch.Size:
        entries, heads, _, dim = self.codes.shape
        return torch.Size((entries, heads, self.tokens, dim))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        shifts = torch.arange(0, 8, self.bits, device=self.codes.device, dtype=torch.uint8)
        lanes = (self.codes[:, :, :, None] >> shifts[:, None]) & (2**self.bits - 1)
        codes: torch.Tensor = lanes.flatten(2, 3)[:, :, : self.tokens].to(dtype)
        return codes * self.step.to(dtype) + self.zero.to(dtype)

    def select(self, index: torch.Tensor) -> "QuantizedRows":
        return QuantizedRows(self.codes[index], self.step[index], self.zero[index], self.bits, self.tokens)

    def to(self, device: torch.device | str) -> "QuantizedRows":
        return QuantizedRows(self.codes.to(device), self.step.to(device), self.zero.to(device), self.bits, self.tokens)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.step, self.zero)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return ()
