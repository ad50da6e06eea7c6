"""The methods that are timed, for any KV geometry: policies, and capsules of the real codecs with maps drawn at random.

What their maps hold does not matter to time and bytes; their shapes do.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec import CodecConfig, PairCodec
from kvcapsule.codec.compact import CompactConfig, CompactLayer
from kvcapsule.codec.kvcapsule import KVCapsuleConfig, PcaValues, RetainedKeys
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.policy import EvenlySpaced, Full, Quantized
from kvcapsule.vlm.geometry import KVGeometry

from . import random_transform

RETAINED = 0.4
"""The retention ratio of the KVCapsule, keys and values alike (the paper's)."""
KEPT = 0.1
"""Share of the tokens that pruning and compact capsules keep."""
TIMES = 20
"""How many times less than at 16 bits an element the transform code stores."""


@dataclass(frozen=True)
class WithBias(Method):
    """A policy whose visual rows carry a bias each, as rows that stand for many do."""

    policy: EvenlySpaced

    def compress(self, prefill: LayerPrefill) -> Compressed:
        made = self.policy.compress(prefill)
        return made._replace(
            visual=[replace(s, bias=prefill.keys.new_full((*s.keys.shape[:3],), 0.5)) for s in made.visual]
        )


def transform(geometry: KVGeometry, tile: int, generator: torch.Generator) -> Capsule:
    """A tile's frame and number are on the account of its codes."""
    budget = tile * 2 * geometry.kv_heads * geometry.head_dim * 2 // TIMES - 8 - 4 * geometry.head_dim
    return random_transform.capsule(geometry, tile, budget, generator)


def kvcapsule(geometry: KVGeometry, tile: int, generator: torch.Generator) -> Capsule:
    ratios = (RETAINED,) * geometry.layers
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
    capsule = _capsule("compact", CompactConfig(tile, ratios=(KEPT,) * geometry.layers), geometry)
    for codec in capsule.layers:
        assert isinstance(codec, CompactLayer)
        codec.bank.copy_(torch.randn(codec.bank.shape, generator=generator))
    return capsule


def _capsule(family: str, config: CodecConfig, geometry: KVGeometry) -> Capsule:
    return Capsule(CapsuleConfig(family, config, geometry, "random")).requires_grad_(False)


METHODS: dict[str, Callable[[KVGeometry, int, torch.Generator], Method]] = {
    "full-segments": lambda *given: Full(),
    "int8": lambda *given: Quantized(8),
    "int4": lambda *given: Quantized(4),
    "int2": lambda *given: Quantized(2),
    "kvcapsule-r0.4": kvcapsule,
    "kept-10%": lambda *given: WithBias(EvenlySpaced(KEPT)),
    "compact-10%": compact,
    "transform-20x": transform,
}
"""What is timed beside the full cache."""
SHARES = {
    "int8": 0.55,
    "int4": 0.3,
    "int2": 0.2,
    "kvcapsule-r0.4": 0.45,
    "kept-10%": 0.15,
    "compact-10%": 0.15,
    "transform-20x": 0.15,
}
"""At most so much of the full cache's bytes at 16 bits an element; what is not here, all of them."""


def make(name: str, geometry: KVGeometry, tile: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Method:
    """A method of METHODS for all layers of a geometry, on a device and in a precision."""
    made = METHODS[name](geometry, tile, torch.Generator().manual_seed(seed))
    return made.to(device, dtype) if isinstance(made, Capsule) else made
