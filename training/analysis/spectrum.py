"""Eigenvalue spectra of second moments: effective rank, components, and energy by rank."""

from typing import NamedTuple

import torch

from ..second_moments import Moments

_POINTS = 64
"""Largest number of ranks at which the energy of a spectrum is recorded."""


class Spectrum(NamedTuple):
    """Spectrum of n components per KV head; the first three fields are [H]."""

    effective_rank: torch.Tensor
    """exp of the entropy of the normalised eigenvalues: n if all are equal, 1 if only one is not zero. 0 without
    variance."""
    components_90: torch.Tensor
    """Smallest number of components with 90 % of the energy."""
    components_99: torch.Tensor
    ranks: list[int]
    """Ranks from 1 to n, in logarithmic steps if n is large."""
    energy: torch.Tensor
    """[len(ranks)]: share of the energy in the first components, averaged over heads."""


def spectrum(moment_HNN: torch.Tensor) -> Spectrum:
    """Spectrum of symmetric matrices; eigenvalues that rounding made negative count as 0."""
    values = torch.linalg.eigvalsh(moment_HNN.double()).flip(-1).clamp_min(0)
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    nonzero = total[:, 0] > 0
    energy = shares.cumsum(-1)
    size = values.shape[-1]

    def components(wanted: float) -> torch.Tensor:
        # The tolerance keeps a share of exactly 90 % from falling below it by rounding.
        count: torch.Tensor = ((energy < wanted - 1e-9).sum(-1) + 1) * nonzero
        return count

    ranks = sorted({round(size ** (i / (_POINTS - 1))) for i in range(_POINTS)})
    at = torch.tensor(ranks, device=energy.device) - 1
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    return Spectrum(entropy.exp() * nonzero, components(0.9), components(0.99), ranks, energy[:, at].mean(0))


class TileMoments:
    """Second moments of one layer's keys or values over tiles, about zero and about three kinds of means."""

    def __init__(self, heads: int, tile: int, dim: int, device: torch.device) -> None:
        self.tile, self.moments = tile, Moments(heads, tile, dim).to(device)
        self.tile_means = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x_EHTD: torch.Tensor) -> None:
        self.moments.add(x_EHTD)
        self.tile_means += self.tile * x_EHTD.double().mean(2).square().sum()

    @property
    def tiles(self) -> int:
        return int(self.moments.count)

    def mean(self) -> torch.Tensor:
        """Mean over tiles and tokens, [H, D]."""
        return self.moments.total.mean(1) / self.moments.count

    def tokens(self) -> torch.Tensor:
        """Covariance of a tile along its tokens, about `mean`, [H, T, T]."""
        mean = self.mean()
        cross = self.moments.total @ mean[..., None]
        gram = (
            self.moments.tokens
            - cross
            - cross.transpose(-1, -2)
            + self.moments.count * mean.square().sum(-1)[:, None, None]
        )
        return gram / self.moments.count

    def channels(self) -> torch.Tensor:
        """Covariance of a tile along its channels, about `mean`, [H, D, D]."""
        mean = self.mean()
        return self.moments.channels / self.moments.count - self.tile * mean[:, :, None] * mean[:, None]

    def variance(self) -> float:
        """Variance of a full tile, all heads, about `mean`: the denominator of unexplained variance
        (training.losses)."""
        return float(self.channels().diagonal(dim1=-2, dim2=-1).sum())

    def variance_within(self) -> float:
        """Variance of a full tile, all heads, about each channel's mean over the tile's tokens."""
        raw = self.moments.channels.diagonal(dim1=-2, dim2=-1).sum()
        return float((raw - self.tile_means) / self.moments.count)


class ChannelMoments:
    """Mean and second moment along channels over any tokens, in fp64."""

    def __init__(self, heads: int, dim: int, device: torch.device) -> None:
        self.total = torch.zeros(heads, dim, dtype=torch.float64, device=device)
        self.gram = torch.zeros(heads, dim, dim, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, x_HND: torch.Tensor) -> None:
        x = x_HND.double()
        self.total += x.sum(1)
        self.gram += x.transpose(-1, -2) @ x
        self.count += x.shape[1]

    def mean(self) -> torch.Tensor:
        """[H, D]."""
        return self.total / self.count

    def covariance(self) -> torch.Tensor:
        """[H, D, D]."""
        mean = self.mean()
        return self.gram / self.count - mean[:, :, None] * mean[:, None]
