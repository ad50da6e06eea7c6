"""Canonical frames: keys as they would be if their tile began at position 0.

RoPE rotates a key by an angle linear in its position, so turning a whole tile back by the rotation of its first position is exact and
orthogonal, and keys then depend on places within the tile alone. The rotation is taken as the model made it (its cos and sin), which
covers 1-D RoPE, its scaled variants, and M-RoPE section by section.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Frame:
    """The rotation of the first position of each of E tiles: cos and sin, each [E, R / 2], R <= D the rotated channels (the first R).

    Channel i turns together with channel i + R / 2, by one angle.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def at(cls, cos_BND: torch.Tensor, sin_BND: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> "Frame":
        """Pick tiles' first positions (rows [E], positions [E]) from the model's position embeddings [B or 1, N, R].

        Raises:
            ValueError: for a rotation of another form than that of channel i with channel i + R / 2.
        """
        if cos_BND.dim() != 3:
            raise ValueError(f"position embeddings {tuple(cos_BND.shape)}: canonical frames need one rotation a token, [B, N, R].")
        if cos_BND.shape[0] == 1:
            rows = torch.zeros_like(rows)
        work = torch.promote_types(cos_BND.dtype, torch.float32)
        cos, sin = cos_BND[rows, positions].to(work), sin_BND[rows, positions].to(work)
        # Some scaled variants (YaRN) multiply cos and sin by an attention factor; a frame is a pure rotation.
        first, second = cos.chunk(2, dim=-1)
        if not torch.equal(first, second):
            raise ValueError(
                "this model rotates neighbouring channels together, canonical frames those that lie half a head apart: "
                "use a capsule with canonical_frame=False."
            )
        norm = (first.square() + sin.chunk(2, dim=-1)[0].square()).sqrt()
        return cls(first / norm, sin.chunk(2, dim=-1)[0] / norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [E, ..., D] by the frame."""
        return self._turn(x, 1.0)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [E, ..., D] back by the frame."""
        return self._turn(x, -1.0)

    def select(self, index: torch.Tensor) -> "Frame":
        return Frame(self.cos[index], self.sin[index])

    def to(self, device: torch.device | str) -> "Frame":
        return Frame(self.cos.to(device), self.sin.to(device))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.cos, self.sin)

    def _turn(self, x: torch.Tensor, sign: float) -> torch.Tensor:
        # Half precision would round cos and sin, and what is rounded is no rotation.
        work = torch.promote_types(x.dtype, torch.float32)
        half = self.cos.shape[-1]
        shape = (-1,) + (1,) * (x.dim() - 2) + (half,)
        cos, sin = self.cos.to(work).view(shape), self.sin.to(work).view(shape) * sign
        first, second, rest = x[..., :half].to(work), x[..., half : 2 * half].to(work), x[..., 2 * half :]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
