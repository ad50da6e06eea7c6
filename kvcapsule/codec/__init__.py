"""Trained codecs. FAMILIES is the one place where a family is registered."""

from .base import CodecConfig, KeyCodec, KeyPart, LayerCodec, ValueCodec, ValuePart
from .identity import IdentityConfig
from .kvcapsule import KVCapsuleConfig

FAMILIES: dict[str, type[CodecConfig]] = {
    "identity": IdentityConfig,
    "kvcapsule": KVCapsuleConfig,
}

__all__ = ["FAMILIES", "CodecConfig", "KeyCodec", "KeyPart", "LayerCodec", "ValueCodec", "ValuePart"]
