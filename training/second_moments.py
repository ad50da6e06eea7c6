"""Second moments along tokens and channels, streamed in fp64, and the closed forms solved from them.

Adding up the buffers of several ranks gives those of all data, except for Extremes.
"""

from typing import NamedTuple

import torch
from torch import nn

from kvcapsule.segments.map_products import times_map

from .harvest import LayerHarvest

_FLOOR = 1e-4
"""Least eigenvalue of a metric, relative to its greatest: a direction that no query showed is not therefore free."""


class Bases(NamedTuple):
    """Analysis and synthesis of one layer's keys or values, all components, the strongest first."""

    tokens: torch.Tensor
    """[H, T, T] orthonormal rows."""
    channels_in: torch.Tensor
    """[H, D, D]."""
    channels_out: torch.Tensor
    """[H, D, D], the transposed inverse of channels_in."""

    def coefficients(self, x_EHTD: torch.Tensor) -> torch.Tensor:
        """[E, H, T, D]."""
        return self.tokens.to(x_EHTD.dtype) @ times_map(x_EHTD, self.channels_in.to(x_EHTD.dtype))

    def single(self) -> "Bases":
        """In fp32: solved in fp64, they are read in fp32."""
        into = self.channels_in.float()
        out = into if self.channels_out is self.channels_in else self.channels_out.float()
        return Bases(self.tokens.float(), into, out)


class Moments(nn.Module):
    """Sums over tiles of one layer's keys or values: X, X X^T and X^T X. Adding up the buffers of several ranks gives
    those of all data."""

    total: torch.Tensor
    tokens: torch.Tensor
    channels: torch.Tensor
    count: torch.Tensor

    def __init__(self, heads: int, tile: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(heads, tile, dim, dtype=torch.float64))
        self.register_buffer("tokens", torch.zeros(heads, tile, tile, dtype=torch.float64))
        self.register_buffer("channels", torch.zeros(heads, dim, dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def add(self, x_EHTD: torch.Tensor) -> None:
        x = x_EHTD.double()
        self.total += x.sum(0)
        self.tokens += torch.einsum("ehtd,ehsd->hts", x, x)
        self.channels += torch.einsum("ehtd,ehtf->hdf", x, x)
        self.count += len(x)

    def spread(self) -> torch.Tensor:
        """[H, D, D]: sum of (x - mean)^T (x - mean) over tiles and their tokens."""
        mean = self.total / self.count
        return self.channels - self.count * mean.transpose(-1, -2) @ mean

    def bases(self, metric: torch.Tensor | None = None) -> Bases:
        """Principal axes of the tiles about their mean tile.

        Args:
            metric: [H, D, D], how much a squared error in each direction of the channels matters; None: alike in all.
        """
        mean = self.total / self.count
        tokens, channels = self.tokens - self.count * mean @ mean.transpose(-1, -2), self.spread()
        axes = _signed(torch.linalg.eigh(tokens).eigenvectors.flip(-1).transpose(-1, -2), -1)
        if metric is None:
            principal = _signed(torch.linalg.eigh(channels).eigenvectors.flip(-1), -2)
            return Bases(axes, principal, principal)
        root, inverse = _root(metric)
        principal = _signed(torch.linalg.eigh(root @ channels @ root).eigenvectors.flip(-1), -2)
        return Bases(axes, root @ principal, inverse @ principal)


def _root(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of a metric and its inverse."""
    values, vectors = torch.linalg.eigh(metric.double())
    values = values.clamp_min(values[..., -1:] * _FLOOR).sqrt()[:, None]
    return (vectors * values) @ vectors.transpose(-1, -2), (vectors / values) @ vectors.transpose(-1, -2)


def _signed(axes: torch.Tensor, along: int) -> torch.Tensor:
    """An eigenvector has no sign of its own: its greatest entry is made positive, so that runs agree."""
    top = axes.gather(along, axes.abs().argmax(along, keepdim=True))
    return axes * torch.where(top < 0, -1.0, 1.0)


class QueryMoments(nn.Module):
    """Sum of q q^T over the queries that read a layer's tiles, by KV head, in the model's own rotation taken back to
    the tiles' frames."""

    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(heads, dim, dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def add(self, layer: LayerHarvest) -> None:
        heads = self.total.shape[0]
        q = layer.query * layer.reads[:, None, :, None]
        q = q[layer.owner]
        if layer.frame is not None:
            q = layer.frame.unrotate(q)
        # A batch's own sum is of the queries' precision, and that of many batches in fp64.
        rows = q.to(torch.promote_types(q.dtype, torch.float32)).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)
        self.total += rows.transpose(1, 2) @ rows
        self.count += layer.reads[layer.owner].sum()

    def metric(self) -> torch.Tensor:
        """[H, D, D]: the mean of q q^T; q^T e squared is the squared error that a key's error e makes in the scores."""
        return self.total / self.count.clamp_min(1)


class CoefficientMoments(nn.Module):
    """Sums of the coefficients of one layer's keys or values and of their squares, in given bases."""

    total: torch.Tensor
    square: torch.Tensor
    count: torch.Tensor

    def __init__(self, heads: int, tile: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(heads, tile, dim, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(heads, tile, dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def add(self, coefficients: torch.Tensor) -> None:
        c = coefficients.double()
        self.total += c.sum(0)
        self.square += c.square().sum(0)
        self.count += len(c)

    def mean(self) -> torch.Tensor:
        return self.total / self.count

    def variance(self) -> torch.Tensor:
        """[H, T, D]."""
        return (self.square / self.count - self.mean().square()).clamp_min(0)


class Extremes(nn.Module):
    """The greatest and the least coefficients of one layer's keys or values, in given bases.

    Of several ranks the greatest buffers are those of all data, not their sum.
    """

    ends: torch.Tensor

    def __init__(self, heads: int, tile: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("ends", torch.full((2, heads, tile, dim), -torch.inf, dtype=torch.float64))

    def add(self, coefficients: torch.Tensor) -> None:
        c = coefficients.double()
        self.ends = torch.maximum(self.ends, torch.stack([c.amax(0), (-c).amax(0)]))

    def reach(self, mean: torch.Tensor) -> torch.Tensor:
        """[H, T, D]: the greatest distance from the mean that was seen."""
        return torch.maximum(self.ends[0] - mean, self.ends[1] + mean)


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
    vectors: torch.Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)[..., :rank].transpose(-1, -2).contiguous()


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
