"""Eigenvalue spectra of second moments, and what is said of them."""

from typing import NamedTuple

import torch

from ..second_moments import Moments

_POINTS = 64
"""Most ranks at which the energy of a spectrum is written down."""


class Spectrum(NamedTuple):
    """A spectrum of n components for each KV head. The first three [H]."""

    effective_rank: torch.Tensor
    """exp of the entropy of the eigenvalues' shares: n if all are alike, 1 if one has all. 0 where there is no
    variance."""
    components_90: torch.Tensor
    """Least number of components that hold 90 % of the energy."""
    components_99: torch.Tensor
    ranks: list[int]
    """Ranks from 1 to n, evenly spaced by their logarithm where n is large."""
    energy: torch.Tensor
    """[len(ranks)] share of the energy in the first components, mean over the heads."""


def spectrum(moment_HNN: torch.Tensor) -> Spectrum:
    """The spectrum of symmetric matrices; what rounding makes negative counts as 0."""
    values = torch.linalg.eigvalsh(moment_HNN.double()).flip(-1).clamp_min(0)
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    there = total[:, 0] > 0
    energy = shares.cumsum(-1)
    size = values.shape[-1]

    def components(wanted: float) -> torch.Tensor:
        # A share that is 90 % exactly must not fall short of it by rounding.
        found: torch.Tensor = ((energy < wanted - 1e-9).sum(-1) + 1) * there
        return found

    ranks = sorted({round(size ** (i / (_POINTS - 1))) for i in range(_POINTS)})
    at = torch.tensor(ranks, device=energy.device) - 1
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    return Spectrum(entropy.exp() * there, components(0.9), components(0.99), ranks, energy[:, at].mean(0))


class TileMoments:
    """Second moments of one layer's keys or values over tiles, and what is left of them about three kinds of mean."""

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
        """[H, D]: over tiles and tokens."""
        return self.moments.total.mean(1) / self.moments.count

    def tokens(self) -> torch.Tensor:
        """[H, T, T]: along tokens, a tile's, about `mean`."""
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
        """[H, D, D]: along channels, a tile's, about `mean`."""
        mean = self.mean()
        return self.moments.channels / self.moments.count - self.tile * mean[:, :, None] * mean[:, None]

    def variance(self) -> float:
        """Of a whole tile, all heads, about `mean`: what is lost of it is "unexplained", as in training.losses."""
        return float(self.channels().diagonal(dim1=-2, dim2=-1).sum())

    def variance_within(self) -> float:
        """Of a whole tile, all heads, each channel about its mean over the tile's own tokens."""
        raw = self.moments.channels.diagonal(dim1=-2, dim2=-1).sum()
        return float((raw - self.tile_means) / self.moments.count)


class ChannelMoments:
    """Mean and second moment along the channels over any tokens, in fp64."""

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
