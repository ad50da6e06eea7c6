"""The methods that are timed, for any KV geometry: policies, and capsules of the real codecs with random maps.

Time and bytes depend on the shapes of the maps, not on their numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec import CodecConfig, PairCodec
from kvcapsule.codec.coded_compact import CodedCompactConfig, CodedCompactLayer
from kvcapsule.codec.compact import CompactConfig, CompactLayer
from kvcapsule.codec.kvcapsule import KVCapsuleConfig, PcaValues, RetainedKeys
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.policy import EvenlySpaced, Fp8, Full, Quantized, TurboQuant
from kvcapsule.vlm.geometry import KVGeometry

from . import random_transform

RETAINED = 0.4
"""Retention of the KVCapsule, of keys and of values (the paper's)."""
KEPT = 0.1
"""Share of the tokens that pruning and compact capsules keep."""
COMPRESSION = 20
"""Compression of the transform code against 16 bits an element."""


@dataclass(frozen=True)
class WithBias(Method):
    """A policy whose visual rows have biases, as those of a compact capsule have."""

    policy: EvenlySpaced

    def compress(self, prefill: LayerPrefill) -> Compressed:
        compressed = self.policy.compress(prefill)
        biased = [replace(s, bias=prefill.keys.new_full((*s.keys.shape[:3],), 0.5)) for s in compressed.visual]
        return compressed._replace(visual=biased)


def transform(geometry: KVGeometry, tile: int, generator: torch.Generator) -> Capsule:
    """A transform code of 20x, the bytes of a tile's frame and owner included."""
    budget = tile * 2 * geometry.kv_heads * geometry.head_dim * 2 // COMPRESSION - 8 - 4 * geometry.head_dim
    return random_transform.capsule(geometry, tile, budget, generator)


def kvcapsule(geometry: KVGeometry, tile: int, generator: torch.Generator) -> Capsule:
    """A capsule of the family kvcapsule that retains RETAINED of the rows of keys and values."""
    ratios = (RETAINED,) * len(geometry.capsule_layers)
    capsule = _capsule("kvcapsule", KVCapsuleConfig(tile, key_ratios=ratios, value_ratios=ratios), geometry)
    for codec in capsule.layers:
        assert (
            isinstance(codec, PairCodec)
            and isinstance(codec.keys, RetainedKeys)
            and isinstance(codec.values, PcaValues)
        )
        for map_ in (codec.keys.theta, codec.values.basis):
            map_.copy_(torch.randn(map_.shape, generator=generator) * map_.shape[-1] ** -0.5)
    return capsule


def compact(geometry: KVGeometry, tile: int, generator: torch.Generator) -> Capsule:
    """A compact capsule that keeps KEPT of the rows, with a random query bank."""
    capsule = _capsule("compact", CompactConfig(tile, ratios=(KEPT,) * len(geometry.capsule_layers)), geometry)
    for codec in capsule.layers:
        assert isinstance(codec, CompactLayer)
        codec.bank.copy_(torch.randn(codec.bank.shape, generator=generator))
    return capsule


def coded_compact(geometry: KVGeometry, tile: int, generator: torch.Generator) -> Capsule:
    """A tenth of the rows as well, in 4 bits a channel on average."""
    layers, dim = len(geometry.capsule_layers), geometry.head_dim
    capsule = _capsule("coded-compact", CodedCompactConfig(tile, ratios=(KEPT,) * layers), geometry)
    widths = torch.tensor([7, 5, 4, 4, 3, 3, 3, 3], dtype=torch.uint8).repeat_interleave(-(-dim // 8))[:dim]
    for codec in capsule.layers:
        assert isinstance(codec, CodedCompactLayer)
        codec.bank.copy_(torch.randn(codec.bank.shape, generator=generator))
        axes = torch.linalg.qr(torch.randn(geometry.kv_heads, dim, dim, generator=generator)).Q
        codec.value_in.copy_(axes)
        codec.value_out.copy_(axes.transpose(1, 2))
        for part in ("key", "value"):
            codec.get_buffer(f"{part}_widths").copy_(widths)
    return capsule


def _capsule(family: str, config: CodecConfig, geometry: KVGeometry) -> Capsule:
    return Capsule(CapsuleConfig(family, config, geometry, "random")).requires_grad_(False)


_BUILD: dict[str, Callable[[KVGeometry, int, torch.Generator], Method]] = {
    "full-segments": lambda *_: Full(),
    "fp8": lambda *_: Fp8(),
    "int8": lambda *_: Quantized(8),
    "int4": lambda *_: Quantized(4),
    "int2": lambda *_: Quantized(2),
    "turboquant4": lambda *_: TurboQuant(4),
    "kvcapsule-r0.4": kvcapsule,
    "kept-10%": lambda *_: WithBias(EvenlySpaced(KEPT)),
    "compact-10%": compact,
    "coded-compact-10%": coded_compact,
    "transform-20x": transform,
}


def make(name: str, geometry: KVGeometry, tile: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Method:
    """A method of `method_names.METHODS` for all layers of a geometry, on a device and in a precision."""
    method = _BUILD[name](geometry, tile, torch.Generator().manual_seed(seed))
    return method.to(device, dtype) if isinstance(method, Capsule) else method
