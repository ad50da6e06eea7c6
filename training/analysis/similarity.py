"""Similarity of an image's visual tokens: mean cosines between neighbours and between all pairs."""

from typing import NamedTuple

import torch


class Cosines(NamedTuple):
    """Mean cosines per KV head, [H] each; NaN if no image has such a pair."""

    neighbours: torch.Tensor
    """Between a token and the next one in its row of the token grid."""
    pairs: torch.Tensor
    """Between any two tokens of an image."""


class Similarity:
    """Sums of cosines over images, in fp64. H KV heads, N tokens per image, D head dim."""

    def __init__(self, mean_HD: torch.Tensor | None = None) -> None:
        """mean_HD: subtracted from every token first."""
        self.mean_HD = mean_HD
        self.sums: dict[str, torch.Tensor] = {}
        self.counts = {"neighbours": 0, "pairs": 0}

    def add(self, x_HND: torch.Tensor, width: int) -> None:
        """Add one image, whose token grid has rows of `width` tokens."""
        x = x_HND.double()
        if self.mean_HD is not None:
            x = x - self.mean_HD[:, None]
        tokens = x.shape[1]
        unit = x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        beside = torch.arange(1, tokens, device=x.device) % width != 0
        cosines = (unit[:, 1:] * unit[:, :-1]).sum(-1) * beside
        self._add("neighbours", cosines.sum(1), int(beside.sum()))
        # Over all ordered pairs of different tokens: the square of the sum, less each token's cosine with itself.
        self._add("pairs", unit.sum(1).square().sum(-1) - unit.square().sum((1, 2)), tokens * (tokens - 1))

    def means(self) -> Cosines:
        return Cosines(*(self.sums[name] / (self.counts[name] or torch.nan) for name in Cosines._fields))

    def _add(self, name: str, total: torch.Tensor, count: int) -> None:
        self.sums[name] = self.sums.get(name, torch.zeros_like(total)) + total
        self.counts[name] += count
