"""Canonical frames: keys as they would be if their tile began at position 0.

RoPE rotates a key by an angle linear in its position, so turning a whole tile back by the rotation of its first
position is exact and orthogonal, and keys then depend on places within the tile alone. The rotation is taken as the
model made it (its cos and sin), which covers 1-D RoPE, its scaled variants, and M-RoPE section by section.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Frame:
    """The rotation of the first position of each of E tiles: cos and sin, each [E, R / 2], R <= D the rotated channels
    (the first R)."""

    cos: torch.Tensor
    sin: torch.Tensor
    neighbours: bool = False
    """Which two channels turn together, by angle i: i and i + R / 2, or (neighbours) 2 i and 2 i + 1."""

    @classmethod
    def at(cls, cos_BND: torch.Tensor, sin_BND: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> "Frame":
        """Pick tiles' first positions (rows [E], positions [E]) from the model's position embeddings [B or 1, N, R].

        Raises:
            ValueError: for a rotation that pairs its channels in another way than `neighbours` tells.
        """
        if cos_BND.dim() != 3:
            raise ValueError(
                f"position embeddings {tuple(cos_BND.shape)}: canonical frames need one rotation a token, [B, N, R]."
            )
        if cos_BND.shape[0] == 1:
            rows = torch.zeros_like(rows)
        work = torch.promote_types(cos_BND.dtype, torch.float32)
        cos_ER, sin_ER = cos_BND[rows, positions].to(work), sin_BND[rows, positions].to(work)
        # Some scaled variants (YaRN) multiply cos and sin by an attention factor; a frame is a pure rotation.
        # The angle of each channel is written out, so it shows which two have one in common.
        for neighbours in (False, True):
            (cos, other), (sin, other_sin) = (_pairs(x, neighbours) for x in (cos_ER, sin_ER))
            if torch.equal(cos, other) and torch.equal(sin, other_sin):
                norm = (cos.square() + sin.square()).sqrt()
                return cls(cos / norm, sin / norm, neighbours)
        raise ValueError(
            "this model rotates neither channels that lie half a head apart nor neighbouring ones together: "
            "use a capsule with canonical_frame=False."
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [E, ..., D] by the frame."""
        return self._turn(x, 1.0)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [E, ..., D] back by the frame."""
        return self._turn(x, -1.0)

    def back_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """The same into memory of x's shape and precision, not x's own; where no gradient is wanted, none of that size
        is used besides."""
        if x.dtype.itemsize < 4 or (torch.is_grad_enabled() and x.requires_grad):
            out.copy_(self.back(x))
            return
        turned, cos, sin = 2 * self.cos.shape[-1], *self._factors(x, -1.0)
        (first, second), pair = (_pairs(t[..., :turned], self.neighbours) for t in (x, out))
        for product, x_cos, x_sin, sign in ((pair[0], first, second, -1), (pair[1], second, first, 1)):
            torch.mul(x_cos, cos, out=product).addcmul_(x_sin, sin, value=sign)
        if turned < x.shape[-1]:
            out[..., turned:] = x[..., turned:]

    def select(self, index: torch.Tensor | slice) -> "Frame":
        return replace(self, cos=self.cos[index], sin=self.sin[index])

    def to(self, device: torch.device | str) -> "Frame":
        return replace(self, cos=self.cos.to(device), sin=self.sin.to(device))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.cos, self.sin)

    def _turn(self, x: torch.Tensor, sign: float) -> torch.Tensor:
        # Half precision would round cos and sin, and what is rounded is no rotation.
        work = torch.promote_types(x.dtype, torch.float32)
        half = self.cos.shape[-1]
        cos, sin = self._factors(x, sign)
        (first, second), rest = _pairs(x[..., : 2 * half].to(work), self.neighbours), x[..., 2 * half :]
        # Into the products themselves: a layer's keys are large, and fresh memory costs more than the arithmetic.
        pair = ((first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin))
        turned = (torch.stack(pair, dim=-1).flatten(-2) if self.neighbours else torch.cat(pair, dim=-1)).to(x.dtype)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def _factors(self, x: torch.Tensor, sign: float) -> tuple[torch.Tensor, torch.Tensor]:
        work, half = torch.promote_types(x.dtype, torch.float32), self.cos.shape[-1]
        shape = (-1,) + (1,) * (x.dim() - 2) + (half,)
        return self.cos.to(work).view(shape), self.sin.to(work).view(shape) * sign


def _pairs(x: torch.Tensor, neighbours: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second channel of each pair of x [..., R]: [..., R / 2] each."""
    if neighbours:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
