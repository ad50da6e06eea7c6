"""The codec that stores everything: a capsule of it is the full cache in another shape. For tests and as a
yardstick."""

from dataclasses import dataclass

import torch

from ..vlm.geometry import KVGeometry
from .base import CodecConfig, KeyCodec, KeyPart, PairCodec, ValueCodec, ValuePart


class IdentityKeys(KeyCodec):
    """Keys as they are."""

    def encode(self, k_EHTD: torch.Tensor) -> KeyPart:
        return KeyPart(k_EHTD.clone(memory_format=torch.contiguous_format))


class IdentityValues(ValueCodec):
    """Values as they are."""

    def encode(self, v_EHTD: torch.Tensor) -> ValuePart:
        return ValuePart(v_EHTD.clone(memory_format=torch.contiguous_format))


@dataclass(frozen=True)
class IdentityConfig(CodecConfig):
    """Nothing but the tile."""

    def build(self, geometry: KVGeometry, layer: int) -> PairCodec:
        return PairCodec(IdentityKeys(), IdentityValues())
