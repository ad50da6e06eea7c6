"""Trained codecs. FAMILIES is the one place where a family is registered."""

from typing import Any

from ..extensions import Registry
from .base import (
    CodecConfig,
    Encoded,
    KeyCodec,
    KeyPart,
    LayerCodec,
    LayerGroupCodec,
    LayerGroupEncoding,
    PairCodec,
    ValueCodec,
    ValuePart,
)
from .compact import CompactConfig
from .cross_layer import CrossLayerConfig
from .family import CodecFamily
from .identity import IdentityConfig
from .kvcapsule import KVCapsuleConfig
from .transform import TransformConfig

_FITS = "kvcapsule.training.families"
FAMILIES: dict[str, CodecFamily] = {
    family.name: family
    for family in (
        CodecFamily("identity", IdentityConfig),
        CodecFamily("kvcapsule", KVCapsuleConfig, f"{_FITS}.kvcapsule:KVCapsuleFit"),
        CodecFamily("transform", TransformConfig, f"{_FITS}.transform:TransformFit"),
        CodecFamily("cross-layer", CrossLayerConfig, f"{_FITS}.cross_layer:CrossLayerFit"),
        CodecFamily("compact", CompactConfig, f"{_FITS}.compact:CompactFit"),
    )
}
"""kvcapsule's own families, by name."""


def _is_family(loaded: Any) -> bool:
    return isinstance(loaded, CodecFamily)


REGISTRY: Registry[CodecFamily] = Registry(
    "codec family", "kvcapsule.families", FAMILIES, "a kvcapsule.codec.CodecFamily", _is_family
)
"""FAMILIES and those of other packages."""

__all__ = [
    "FAMILIES",
    "REGISTRY",
    "CodecConfig",
    "CodecFamily",
    "Encoded",
    "KeyCodec",
    "KeyPart",
    "LayerCodec",
    "LayerGroupCodec",
    "LayerGroupEncoding",
    "PairCodec",
    "ValueCodec",
    "ValuePart",
]
