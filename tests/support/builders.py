"""Prefills and capsules drawn at random for a small geometry, where a test needs no model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.coded_compact import CodedCompactConfig
from kvcapsule.codec.compact import CompactConfig
from kvcapsule.codec.cross_layer import CrossLayerConfig, CrossLayerTransform
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.codec.kvcapsule import KVCapsuleConfig
from kvcapsule.codec.transform import Transform, TransformConfig
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.spans import VisualSpan

GEOMETRY = KVGeometry("llava", 2, 4, 2, 8, "1d")
HEADS, TILE, DIM = 2, 10, 8

Size = tuple[int, int]
"""Rows and channels of the coefficients."""
LADDER = (8, 4, 3, 2, 1, 0)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prefill(
    layer: int = 0, spans: tuple[tuple[int, int, int], ...] = ((0, 3, 24), (1, 5, 10)), rotary: bool = True
) -> LayerPrefill:
    """Two rows of 30 tokens."""
    keys, values, query = rand(2, HEADS, 30, DIM, seed=1), rand(2, HEADS, 30, DIM, seed=2), rand(2, 4, 30, DIM, seed=3)
    angles = torch.arange(30.0, dtype=torch.float64)[None, :, None] / 3 ** torch.arange(4.0)
    rotation = (torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()) if rotary else None
    visual = [VisualSpan(row, start, length, (1, 1, length)) for row, start, length in spans]
    return LayerPrefill(
        layer=layer,
        query=query,
        keys=keys,
        values=values,
        spans=visual,
        valid=torch.ones(2, 30, dtype=torch.bool),
        scale=DIM**-0.5,
        position_embeddings=rotation,
    )


def random_widths(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Every width equally often, as far as the number of cells allows: six cells take 18 bytes."""
    cells = torch.Size(shape).numel()
    widths = torch.tensor(LADDER, dtype=torch.uint8).repeat(-(-cells // len(LADDER)))[:cells]
    return widths[torch.randperm(cells, generator=generator)].view(shape)


def randomise(transform: Transform | CrossLayerTransform, generator: torch.Generator) -> None:
    """Orthonormal axes, decoders that are nearly their transposes, and steps whose range covers coefficients of about
    one."""

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sets, rows, tile = transform.tokens_in.shape
    *parts, dim, channels = transform.channels_in.shape
    wide = torch.Size(parts).numel() // sets * dim
    tokens = torch.linalg.qr(rand(sets, max(rows, tile), max(rows, tile))).Q[:, :rows, :tile]
    axes = torch.linalg.qr(rand(sets, max(wide, channels), max(wide, channels))).Q[:, :wide, :channels]
    # Parts of a stack share axes that are orthonormal over all of them.
    axes = axes.unflatten(1, (-1, dim)).transpose(0, 1).reshape(*parts, dim, channels)
    transform.widths.copy_(random_widths(tuple(transform.widths.shape), generator))
    transform.tokens_in.data.copy_(tokens)
    transform.tokens_out.data.copy_(tokens.transpose(-1, -2) + 0.02 * rand(sets, tile, rows))
    transform.channels_in.data.copy_(axes)
    transform.channels_out.data.copy_(axes + 0.02 * rand(*axes.shape))
    transform.offset.data.copy_(0.3 * rand(*transform.offset.shape))
    spread = 0.5 + torch.rand(transform.step.shape, generator=generator)
    transform.step.data.copy_(6 * spread / 2.0 ** transform.widths.float())


def kv_capsule(
    geometry: KVGeometry, key_ratio: float = 0.25, value_ratio: float = 0.25, tile: int = TILE, **options: Any
) -> Capsule:
    """A KVCapsule whose maps are drawn at random; the values' basis is orthonormal."""
    ratios = [(ratio,) * len(geometry.capsule_layers) for ratio in (key_ratio, value_ratio)]
    capsule = Capsule(CapsuleConfig("kvcapsule", KVCapsuleConfig(tile, True, *ratios, **options), geometry, "tiny"))
    generator = torch.Generator().manual_seed(0)
    for codec in capsule.layers:
        stored = len(codec.keys.kept)
        codec.keys.kept.copy_(torch.randperm(tile, generator=generator)[:stored].sort().values)
        for parameter in codec.keys.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        basis = torch.linalg.qr(torch.randn(codec.values.basis.transpose(1, 2).shape, generator=generator)).Q
        codec.values.basis.copy_(basis.transpose(1, 2))
        codec.values.mean.copy_(torch.randn(codec.values.mean.shape, generator=generator))
    return capsule.requires_grad_(False)


def transform_capsule(
    geometry: KVGeometry = GEOMETRY, tile: int = TILE, keys: Size = (8, 6), values: Size = (16, 5), **options: Any
) -> Capsule:
    """A capsule of the family "transform" whose parameters and widths are drawn at random; the same sizes in every
    layer."""
    sizes = {"key_rows": keys[0], "key_channels": keys[1], "value_rows": values[0], "value_channels": values[1]}
    config = TransformConfig(
        tile, **{name: (size,) * len(geometry.capsule_layers) for name, size in sizes.items()}, **options
    )
    capsule = Capsule(CapsuleConfig("transform", config, geometry, "tiny"))
    generator = torch.Generator().manual_seed(0)
    for layer in capsule.layers:
        randomise(layer.keys.transform, generator)
        randomise(layer.values.transform, generator)
    return capsule.requires_grad_(False)


def cross_layer_capsule(
    geometry: KVGeometry = GEOMETRY,
    tile: int = TILE,
    rows: int = 16,
    channels: int = 20,
    joint_layers: int = 2,
    **options: Any,
) -> Capsule:
    """A capsule of the family "cross-layer" whose parameters and widths are drawn at random; the same sizes in every
    stack."""
    stacks = -(-len(geometry.capsule_layers) // joint_layers)
    config = CrossLayerConfig(
        tile, joint_layers=joint_layers, rows=(rows,) * stacks, channels=(channels,) * stacks, **options
    )
    capsule = Capsule(CapsuleConfig("cross-layer", config, geometry, "tiny"))
    generator = torch.Generator().manual_seed(0)
    for stack in capsule.layers:
        randomise(stack.transform, generator)
    return capsule.requires_grad_(False)


def compact_capsule(geometry: KVGeometry = GEOMETRY, tile: int = TILE, ratio: float = 0.5, **options: Any) -> Capsule:
    """A capsule of the family "compact" whose query bank is drawn at random."""
    config = CompactConfig(tile, ratios=(ratio,) * len(geometry.capsule_layers), bank=16, **options)
    capsule = Capsule(CapsuleConfig("compact", config, geometry, "tiny"))
    generator = torch.Generator().manual_seed(0)
    for codec in capsule.layers:
        codec.bank.copy_(torch.randn(codec.bank.shape, generator=generator))
    return capsule.requires_grad_(False)


def coded_compact_capsule(
    geometry: KVGeometry = GEOMETRY, tile: int = TILE, ratio: float = 0.5, **options: Any
) -> Capsule:
    """A capsule of the family "coded-compact": random banks and axes, keys of 7, 4 and 3 bits, values of all their
    channels but one in 4 bits."""
    layers, dim = len(geometry.capsule_layers), geometry.head_dim
    config = CodedCompactConfig(tile, ratios=(ratio,) * layers, bank=16, **options)
    capsule = Capsule(CapsuleConfig("coded-compact", config, geometry, "tiny"))
    generator = torch.Generator().manual_seed(0)
    for codec in capsule.layers:
        codec.bank.copy_(torch.randn(codec.bank.shape, generator=generator))
        axes = torch.linalg.qr(torch.randn(geometry.kv_heads, dim, dim, generator=generator)).Q
        codec.value_in.copy_(axes)
        codec.value_out.copy_(axes.transpose(1, 2))
        for part in ("key", "value"):
            unit = codec.get_buffer(f"{part}_unit")
            unit.copy_(0.1 + torch.rand(unit.shape, generator=generator))
        codec.key_widths.copy_(torch.tensor([7] + [4] * (dim - 2) + [3], dtype=torch.uint8))
        codec.value_widths.copy_(torch.tensor([0] + [4] * (dim - 1), dtype=torch.uint8))
    return capsule.requires_grad_(False)


def identity_capsule(geometry: KVGeometry = GEOMETRY, tile: int = TILE, **options: Any) -> Capsule:
    """A capsule that stores everything."""
    return Capsule(CapsuleConfig("identity", IdentityConfig(tile, **options), geometry, "tiny"))


EVERY_FAMILY: dict[str, Callable[..., Capsule]] = {
    "cross-layer": cross_layer_capsule,
    "cross-layer, no frames": partial(cross_layer_capsule, canonical_frame=False),
    "cross-layer, head groups, layers apart": partial(cross_layer_capsule, joint_layers=1, joint_heads=2, channels=10),
    "transform": transform_capsule,
    "transform, no frames": partial(transform_capsule, canonical_frame=False),
    "kvcapsule": kv_capsule,
    "kvcapsule in 4 bits": partial(kv_capsule, latent_bits=4),
    "kvcapsule with an MLP": partial(kv_capsule, key_decoder="mlp", hidden=6),
    "compact": compact_capsule,
    "compact in 3 bits": partial(compact_capsule, latent_bits=3),
    "compact, no frames": partial(compact_capsule, canonical_frame=False),
    "coded-compact": coded_compact_capsule,
    "coded-compact, no frames": partial(coded_compact_capsule, canonical_frame=False),
    "identity": identity_capsule,
    "identity in 8 bits": partial(identity_capsule, latent_bits=8),
    "identity, no frames": partial(identity_capsule, canonical_frame=False),
}
"""Capsules of all families with their main settings, by what is special; each builds from a geometry and a tile."""
