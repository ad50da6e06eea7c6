"""Rows in fp8 (e4m3): one byte an element, as they are or in units of a scale for each token and head."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

GREATEST = 448.0
"""The greatest number of e4m3; it has no infinity."""
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Float8Rows:
    """Rows [E, H, M, D]: x^ = scale * x8, or x8 where there is no scale.

    What is beyond 448 (in units of the scale) is read as 448. `read` builds all M rows in the working precision: in
    plain PyTorch this saves memory, not time.
    """

    numbers: torch.Tensor
    """[E, H, M, D] float8_e4m3fn."""
    scale: torch.Tensor | None
    """[E, H, M, 1] fp32."""

    @classmethod
    def pack(cls, x_EHMD: torch.Tensor, scaled: bool) -> "Float8Rows":
        """Round x to fp8, with or without a scale (greatest absolute value / 448) for each token and head."""
        work = x_EHMD.float()
        scale = work.abs().amax(dim=3, keepdim=True).clamp_min(_SMALLEST) / GREATEST if scaled else None
        numbers = work if scale is None else work / scale
        # Beyond the range, PyTorch's conversion saturates in newer versions only; older ones give NaN.
        return cls(numbers.clamp(-GREATEST, GREATEST).to(torch.float8_e4m3fn), scale)

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        numbers = self.numbers.to(dtype)
        return numbers if self.scale is None else numbers * self.scale.to(dtype)

    def select(self, index: torch.Tensor) -> "Float8Rows":
        # As bytes: not every operation of PyTorch knows fp8.
        numbers = self.numbers.view(torch.uint8)[index].view(torch.float8_e4m3fn)
        return replace(self, numbers=numbers, scale=None if self.scale is None else self.scale[index])

    def to(self, device: torch.device | str) -> "Float8Rows":
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, numbers=self.numbers.to(device), scale=scale)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.numbers,) if self.scale is None else (self.numbers, self.scale)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "Float8Rows":
        """See kvcapsule.segments.storable_rows."""
        numbers, scale = (*tensors, None)[:2]
        assert numbers is not None
        return Float8Rows(numbers, scale)

    def shared(self) -> tuple[torch.Tensor, ...]:
        return ()
