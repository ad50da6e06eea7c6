"""Layers of compact capsules, and how far their attention is from that of the rows."""

from typing import Any

import torch

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec import Encoded
from kvcapsule.codec.base import KeyPart, ValuePart
from kvcapsule.codec.compact import CompactConfig, CompactLayer
from kvcapsule.vlm.geometry import KVGeometry
from support.builders import DIM, GEOMETRY, HEADS, TILE, rand

LONG = 24
"""Tokens of the tiles whose fit is measured."""
BANK = 96


def layer(ratio: float, heads: int = HEADS, tile: int = TILE, dim: int = DIM, **options: Any) -> CompactLayer:
    """One layer with a random bank, in float64."""
    geometry = KVGeometry("llava", 1, 2 * heads, heads, dim, "1d")
    built = CompactConfig(tile, ratios=(ratio,), **{"bank": BANK, **options}).build(geometry, 0).double()
    assert isinstance(built, CompactLayer)
    built.bank.copy_(rand(*built.bank.shape, seed=9))
    if built.selector is not None:
        for seed, parameter in enumerate(built.selector.parameters()):
            parameter.data.copy_(rand(*parameter.shape, seed=seed))
    return built.requires_grad_(False)


def capsule(ratio: float = 0.4, **options: Any) -> Capsule:
    """A capsule of random banks for the small geometry, in float32."""
    built = Capsule(
        CapsuleConfig("compact", CompactConfig(TILE, ratios=(ratio,) * 2, **{"bank": 64, **options}), GEOMETRY, "tiny")
    )
    for seed, codec in enumerate(built.layers):
        codec.bank.copy_(rand(*codec.bank.shape, seed=seed + 30))
        for number, parameter in enumerate(codec.parameters()):
            parameter.data.copy_(rand(*parameter.shape, seed=number + 40))
    return built.requires_grad_(False)


def low_rank(entries: int = 6, rank: int = 4, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [E, H, T, D] that vary in few directions along their tokens, and queries [E, 2 H, 40, D] that no
    bank holds."""
    basis = rand(entries, HEADS, LONG, rank, seed=1)
    keys = 0.5 * (basis @ rand(entries, HEADS, rank, DIM, seed=2) + noise * rand(entries, HEADS, LONG, DIM, seed=3))
    values = basis @ rand(entries, HEADS, rank, DIM, seed=4) + noise * rand(entries, HEADS, LONG, DIM, seed=5)
    return keys, values, rand(entries, 2 * HEADS, 40, DIM, seed=6)


def selected(keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> Encoded:
    """Kept tokens as they are."""
    index = kept[..., None].expand(-1, -1, -1, DIM)
    return Encoded(KeyPart(keys.gather(2, index)), ValuePart(values.gather(2, index)))
