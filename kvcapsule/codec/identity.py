"""Identity codec: stores keys and values unchanged, so that its capsule equals the full cache. For tests and as a
baseline."""

from dataclasses import dataclass

import torch

from ..vlm.geometry import KVGeometry
from .base import CodecConfig, KeyCodec, KeyPart, PairCodec, ValueCodec, ValuePart


class IdentityKeys(KeyCodec):
    """Key codec that stores a copy of the keys."""

    def encode(self, k_EHTD: torch.Tensor) -> KeyPart:
        return KeyPart(k_EHTD.clone(memory_format=torch.contiguous_format))


class IdentityValues(ValueCodec):
    """Value codec that stores a copy of the values."""

    def encode(self, v_EHTD: torch.Tensor) -> ValuePart:
        return ValuePart(v_EHTD.clone(memory_format=torch.contiguous_format))


@dataclass(frozen=True)
class IdentityConfig(CodecConfig):
    """Settings of the identity codec: the tile alone."""

    def build(self, geometry: KVGeometry, layer: int) -> PairCodec:
        return PairCodec(IdentityKeys(), IdentityValues())
