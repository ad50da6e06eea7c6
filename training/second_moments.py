"""Second moments along the token axis, streamed in fp64: what the closed-form parts of a codec are solved from."""

import torch
from torch import nn

from .harvest import LayerHarvest


class TokenMoments(nn.Module):
    """Sums over samples and channels for one layer: X X^T of the keys and of the values, and what centring the values
    needs.

    A token Gram matrix does not change when all tokens are rotated alike, so it needs no canonical frame.
    """

    key_gram: torch.Tensor
    value_gram: torch.Tensor
    value_sum: torch.Tensor
    samples: torch.Tensor

    def __init__(self, heads: int, tile: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("key_gram", torch.zeros(heads, tile, tile, dtype=torch.float64))
        self.register_buffer("value_gram", torch.zeros(heads, tile, tile, dtype=torch.float64))
        self.register_buffer("value_sum", torch.zeros(heads, tile, dim, dtype=torch.float64))
        self.register_buffer("samples", torch.zeros((), dtype=torch.float64))

    def add(self, layer: LayerHarvest) -> None:
        keys, values = (
            x.double().transpose(0, 1).transpose(1, 2).flatten(2) for x in (layer.keys, layer.values)
        )  # [H, T, E * D]
        self.key_gram += keys @ keys.transpose(-1, -2)
        self.value_gram += values @ values.transpose(-1, -2)
        self.value_sum += layer.values.double().sum(dim=0)
        self.samples += layer.keys.shape[0]

    def value_mean(self) -> torch.Tensor:
        """[H, D]: mean over samples and tokens."""
        return self.value_sum.mean(dim=1) / self.samples

    def centred_value_gram(self) -> torch.Tensor:
        """[H, T, T] of V - 1 mu^T, from V V^T - S mu^T - mu S^T + n |mu|^2."""
        mean = self.value_mean()
        cross = self.value_sum @ mean[..., None]  # [H, T, 1]
        return self.value_gram - cross - cross.transpose(-1, -2) + self.samples * mean.square().sum(-1)[:, None, None]


def principal_basis(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """The `rank` leading eigenvectors of [H, T, T] as rows: [H, rank, T]."""
    return torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :rank].transpose(-1, -2).contiguous()


def ridge_reconstruction(gram: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """theta [H, T, m] that rebuilds all tokens from the kept ones with least squared error, ridge relative to the mean
    diagonal."""
    inner = gram[:, kept][:, :, kept]
    scale = inner.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    inner = inner + ridge * scale * torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
    solved: torch.Tensor = torch.linalg.solve(inner, gram[:, kept]).transpose(-1, -2)
    return solved


def greedy_subset(gram: torch.Tensor, count: int) -> torch.Tensor:
    """Pivoted Cholesky: one after the other, the token that explains most of what is left, summed over heads. Returns
    [count], sorted."""
    left = gram / gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    chosen: list[int] = []
    for _ in range(count):
        diagonal = left.diagonal(dim1=-2, dim2=-1)
        gain = (left.square().sum(-1) / diagonal.clamp_min(1e-12)).sum(0)
        gain[chosen] = -torch.inf
        pick = int(gain.argmax())
        chosen.append(pick)
        column = left[:, :, pick]
        left = left - column[:, :, None] * column[:, None, :] / column[:, pick].clamp_min(1e-12)[:, None, None]
    return torch.tensor(sorted(chosen), device=gram.device)
