"""Quantised rows: asymmetric codes with one scale and one minimum per channel of an entry, packed into bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import ConfigError
from .bit_packing import GROUP, WIDTHS, pack, unpack

BITS = WIDTHS


def check_bits(bits: int) -> None:
    """Raises ConfigError unless codes of `bits` bits can be packed."""
    if bits not in BITS:
        raise ConfigError(f"{bits} bits cannot be packed: choose one of {', '.join(map(str, BITS))}.")


@dataclass(frozen=True)
class QuantizedRows:
    """Rows [E, H, M, D] as codes of `bits` bits: x = scale * code + minimum, one scale and minimum per channel.

    Per channel, because keys (and values of video) have outlier channels (KIVI, arXiv 2402.02750; VidKV, arXiv
    2503.16257), and because scale and minimum then move out of attention's inner loop. In plain PyTorch, reading
    converts codes to the working precision, one code of each byte at a time (`planes`) or all M rows (`read`): it
    saves memory, not time.
    """

    codes: torch.Tensor
    """[E, H, D, bytes] uint8: in each channel, eight consecutive tokens fill `bits` bytes
    (kvcapsule.segments.bit_packing)."""
    scale: torch.Tensor
    """[E, H, 1, D]."""
    minimum: torch.Tensor
    """[E, H, 1, D]."""
    bits: int
    tokens: int

    @classmethod
    def pack(cls, x_EHMD: torch.Tensor, bits: int) -> "QuantizedRows":
        """Quantise x to the nearest of 2^bits levels between the minimum and the maximum of each channel."""
        check_bits(bits)
        low, high = x_EHMD.amin(2, keepdim=True), x_EHMD.amax(2, keepdim=True)
        levels = 2**bits - 1
        scale = ((high.float() - low.float()) / levels).clamp_min(1e-8).to(x_EHMD.dtype)
        # A small scale underflows to 0 in half precision.
        codes = ((x_EHMD - low).float() / scale.float().clamp_min(1e-8)).round().clamp(0, levels).to(torch.uint8)
        tokens = codes.shape[2]
        padded = F.pad(codes.transpose(2, 3), (0, -tokens % GROUP))
        packed = pack(padded.unflatten(3, (-1, GROUP)), bits).flatten(3)
        return cls(packed.contiguous(), scale, low.contiguous(), bits, tokens)

    @property
    def shape(self) -> torch.Size:
        entries, heads, dim, _ = self.codes.shape
        return torch.Size((entries, heads, self.tokens, dim))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        codes = unpack(self.codes.unflatten(3, (-1, self.bits)), self.bits).flatten(3)[..., : self.tokens]
        return codes.transpose(2, 3).to(dtype) * self.scale.to(dtype) + self.minimum.to(dtype)

    @property
    def lanes(self) -> int:
        """Number of code planes: codes per byte, or 1 for 3-bit codes, which lie across bytes."""
        return 1 if self.bits == 3 else 8 // self.bits

    @property
    def midpoint(self) -> torch.Tensor:
        """[E, H, 1, D]: the value of the code 2^(bits - 1), in fp32 or better because products that it is added to may
        be small."""
        work = torch.promote_types(self.scale.dtype, torch.float32)
        midpoint: torch.Tensor = self.minimum.to(work) + 2 ** (self.bits - 1) * self.scale.to(work)
        return midpoint

    def planes(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Codes minus 2^(bits - 1); see `kvcapsule.segments.segment.AffineRows`."""
        half = 2 ** (self.bits - 1)
        if self.bits == 3:
            yield unpack(self.codes.unflatten(3, (-1, self.bits)), self.bits).flatten(3).to(dtype) - half
            return
        for lane in range(self.lanes):
            # The subtraction wraps around in uint8; the bytes are then read as int8.
            yield (((self.codes >> (lane * self.bits)) & (2**self.bits - 1)) - half).view(torch.int8).to(dtype)

    def select(self, index: torch.Tensor) -> "QuantizedRows":
        return QuantizedRows(self.codes[index], self.scale[index], self.minimum[index], self.bits, self.tokens)

    def to(self, device: torch.device | str) -> "QuantizedRows":
        return QuantizedRows(
            self.codes.to(device), self.scale.to(device), self.minimum.to(device), self.bits, self.tokens
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.scale, self.minimum)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "QuantizedRows":
        """See kvcapsule.segments.storable_rows."""
        codes, scale, minimum = tensors
        return QuantizedRows(codes, scale, minimum, self.bits, self.tokens)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return ()
