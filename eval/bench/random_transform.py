"""A transform code of a chosen number of bytes for a synthetic spectrum: the shape of a trained code, without training.

The variance of a coefficient falls by a power of its token component's number and exponentially over the channels, in
keys faster than in values. The rates divide bytes, rows and channels between keys and values about as in the shipped
capsule of pages-vlm.

Widths are those of training (`kvcapsule.codec.bit_allocation`), for variances that are known.
"""

from typing import NamedTuple

import torch

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec import PairCodec
from kvcapsule.codec.bit_allocation import allocate
from kvcapsule.codec.noise_shaping import TokenWeighting
from kvcapsule.codec.transform import Transform, TransformConfig, TransformKeys, TransformValues
from kvcapsule.segments.bit_packing import GROUP
from kvcapsule.vlm.geometry import KVGeometry

_REACH = 6.0
"""Standard deviations that the levels of a cell cover."""


class Decay(NamedTuple):
    """Decay of the variances of keys or of values."""

    tokens: float
    """Exponent of the token component's number."""
    channels: float
    """Natural log of the ratio of the first channel's variance to the last one's."""
    weight: float
    """Sum of all variances."""


KEYS, VALUES = Decay(0.7, 16.0, 0.5), Decay(0.7, 7.0, 1.0)


def variance(tile: int, channels: int, decay: Decay) -> torch.Tensor:
    """[G, C]: mean variance in each cell of eight token components of a channel, falling as `decay` says; all
    together they are `decay.weight`."""
    rows = torch.arange(1, -(-tile // GROUP) * GROUP + 1, dtype=torch.float64) ** -decay.tokens
    rows[tile:] = 0.0
    cells = (
        rows.view(-1, GROUP).mean(1)[:, None] * torch.linspace(0, -decay.channels, channels, dtype=torch.float64).exp()
    )
    return decay.weight * cells / cells.sum()


_QUERY_BANK = 64
"""Queries of each KV head by which encoding weights tokens: the default of training."""


def capsule(geometry: KVGeometry, tile: int, tile_bytes: int, generator: torch.Generator) -> Capsule:
    """A transform code with random bases whose cells take at most `tile_bytes` a tile in every layer, for all KV heads.

    Data of variance one use all levels of every cell.
    """
    spectra = [variance(tile, geometry.head_dim, decay) for decay in (KEYS, VALUES)]
    widths = allocate([v[None] for v in spectra], tile_bytes // geometry.kv_heads)
    chosen = [_used(w[0]) for w in widths]
    groups, channels = (
        [(size,) * len(geometry.capsule_layers) for size in sizes]
        for sizes in zip(*(w.shape for w in chosen), strict=True)
    )
    config = TransformConfig(
        tile,
        key_rows=tuple(GROUP * n for n in groups[0]),
        key_channels=channels[0],
        value_rows=tuple(GROUP * n for n in groups[1]),
        value_channels=channels[1],
        readers=_QUERY_BANK,
    )
    built = Capsule(CapsuleConfig("transform", config, geometry, "random"))
    for codec in built.layers:
        assert (
            isinstance(codec, PairCodec)
            and isinstance(codec.keys, TransformKeys)
            and isinstance(codec.values, TransformValues)
        )
        for transform, width in zip((codec.keys.transform, codec.values.transform), chosen, strict=True):
            _draw(transform, width, generator)
        for weighting in (m for m in codec.modules() if isinstance(m, TokenWeighting)):
            queries = weighting.queries
            queries.copy_(torch.randn(queries.shape, generator=generator) * geometry.head_dim**-0.5)
    return built.requires_grad_(False)


def _used(width: torch.Tensor) -> torch.Tensor:
    """The widths up to the last row and the last channel that have bits; at least one of each."""
    groups, channels = (int((width.amax(dim) > 0).sum()) for dim in (1, 0))
    return width[: max(1, groups), : max(1, channels)]


def _draw(transform: Transform, width: torch.Tensor, generator: torch.Generator) -> None:
    def axes(count: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.linalg.qr(
            torch.randn(transform.tokens_in.shape[0], count, count, generator=generator)
        ).Q
        return drawn

    _, rows, tile = transform.tokens_in.shape
    dim, channels = transform.channels_in.shape[1:]
    tokens, across = axes(max(rows, tile))[:, :rows, :tile], axes(dim)[:, :, :channels]
    with torch.no_grad():
        transform.tokens_in.copy_(tokens)
        transform.tokens_out.copy_(tokens.transpose(1, 2))
        transform.channels_in.copy_(across)
        transform.channels_out.copy_(across)
        transform.widths.copy_(width.expand_as(transform.widths))
        transform.step.copy_(_REACH / 2.0 ** transform.widths.float())
