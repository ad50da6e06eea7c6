"""Trained codecs. FAMILIES is the one place where a family is registered."""

from .base import (
    CodecConfig,
    Encoded,
    KeyCodec,
    KeyPart,
    LayerCodec,
    PairCodec,
    StackCodec,
    StackEncoding,
    ValueCodec,
    ValuePart,
)
from .compact import CompactConfig
from .cross_layer import CrossLayerConfig
from .identity import IdentityConfig
from .kvcapsule import KVCapsuleConfig
from .transform import TransformConfig

FAMILIES: dict[str, type[CodecConfig]] = {
    "identity": IdentityConfig,
    "kvcapsule": KVCapsuleConfig,
    "transform": TransformConfig,
    "cross-layer": CrossLayerConfig,
    "compact": CompactConfig,
}

__all__ = [
    "FAMILIES",
    "CodecConfig",
    "Encoded",
    "KeyCodec",
    "KeyPart",
    "LayerCodec",
    "PairCodec",
    "StackCodec",
    "StackEncoding",
    "ValueCodec",
    "ValuePart",
]
