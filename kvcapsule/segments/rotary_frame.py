"""Rotary frame of a tile: the rotation by which its keys are stored as if the tile began at position 0.

RoPE rotates a key by an angle that is linear in its position. Undoing the rotation of the tile's first position for
all of its keys is therefore exact and orthogonal, and leaves keys that depend on positions relative to the tile alone
(the canonical frame). The rotation is read from the model's own cos and sin, which covers 1-D RoPE, its scaled variants
and M-RoPE, section by section.
"""

from dataclasses import dataclass, replace

import torch

from ..errors import ConfigError


@dataclass(frozen=True)
class Frame:
    """Rotations of the first positions of E tiles: cos and sin, [E, R / 2] each, for the first R <= D channels."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False
    """Which two channels angle i rotates: i and i + R / 2 (False: half-split RoPE), or 2 i and 2 i + 1 (True)."""

    @classmethod
    def at(cls, cos_BND: torch.Tensor, sin_BND: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> "Frame":
        """Frames of tiles that begin at (rows [E], positions [E]) of the model's position embeddings [B or 1, N, R].

        Raises:
            ConfigError: if the model rotates other pairs of channels than half-split and interleaved RoPE.
        """
        if cos_BND.dim() != 3:
            raise ConfigError(
                f"position embeddings {tuple(cos_BND.shape)}: canonical frames need one rotation a token, [B, N, R]."
            )
        if cos_BND.shape[0] == 1:
            rows = torch.zeros_like(rows)
        work = torch.promote_types(cos_BND.dtype, torch.float32)
        cos_ER, sin_ER = cos_BND[rows, positions].to(work), sin_BND[rows, positions].to(work)
        # Some scaled variants (YaRN) multiply cos and sin by an attention factor; a frame is a pure rotation.
        # cos and sin are given per channel, so the channels of a pair are those with equal values.
        for interleaved in (False, True):
            (cos, other), (sin, other_sin) = (_pairs(x, interleaved) for x in (cos_ER, sin_ER))
            if torch.equal(cos, other) and torch.equal(sin, other_sin):
                norm = (cos.square() + sin.square()).sqrt()
                return cls(cos / norm, sin / norm, interleaved)
        raise ConfigError(
            "this model rotates neither channels that lie half a head apart nor neighbouring ones together: "
            "use a capsule with canonical_frame=False."
        )

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [E, ..., D] rotated by the frame: from the canonical frame to the model's positions."""
        return self._rotated(x, 1.0)

    def unrotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [E, ..., D] rotated by the inverse of the frame: from the model's positions to the canonical frame."""
        return self._rotated(x, -1.0)

    def unrotate_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write `unrotate(x)` to out, a tensor of x's shape and dtype that does not overlap x. Without gradients, no
        temporary of that size is allocated."""
        if x.dtype.itemsize < 4 or (torch.is_grad_enabled() and x.requires_grad):
            out.copy_(self.unrotate(x))
            return
        channels, cos, sin = 2 * self.cos.shape[-1], *self._factors(x, -1.0)
        (first, second), pair = (_pairs(t[..., :channels], self.interleaved) for t in (x, out))
        for product, x_cos, x_sin, sign in ((pair[0], first, second, -1), (pair[1], second, first, 1)):
            torch.mul(x_cos, cos, out=product).addcmul_(x_sin, sin, value=sign)
        if channels < x.shape[-1]:
            out[..., channels:] = x[..., channels:]

    def select(self, index: torch.Tensor | slice) -> "Frame":
        return replace(self, cos=self.cos[index], sin=self.sin[index])

    def to(self, device: torch.device | str) -> "Frame":
        return replace(self, cos=self.cos.to(device), sin=self.sin.to(device))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.cos, self.sin)

    def _rotated(self, x: torch.Tensor, sign: float) -> torch.Tensor:
        # In half precision cos and sin would be rounded, and no longer orthogonal.
        work = torch.promote_types(x.dtype, torch.float32)
        half = self.cos.shape[-1]
        cos, sin = self._factors(x, sign)
        (first, second), rest = _pairs(x[..., : 2 * half].to(work), self.interleaved), x[..., 2 * half :]
        # In place: a layer's keys are large, and allocating memory costs more than the arithmetic.
        pair = ((first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin))
        rotated = (torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)).to(x.dtype)
        return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated

    def _factors(self, x: torch.Tensor, sign: float) -> tuple[torch.Tensor, torch.Tensor]:
        work, half = torch.promote_types(x.dtype, torch.float32), self.cos.shape[-1]
        shape = (-1,) + (1,) * (x.dim() - 2) + (half,)
        return self.cos.to(work).view(shape), self.sin.to(work).view(shape) * sign


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second channels of all pairs of x [..., R]: [..., R / 2] each."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
