"""Trained codecs. FAMILIES is the one place where a family is registered."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..extensions import Registry
from .family import CodecFamily

if TYPE_CHECKING:
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

_CODECS, _FITS = "kvcapsule.codec", "kvcapsule.training.families"
FAMILIES: dict[str, CodecFamily] = {
    family.name: family
    for family in (
        CodecFamily("identity", f"{_CODECS}.identity:IdentityConfig"),
        CodecFamily(
            "kvcapsule",
            f"{_CODECS}.kvcapsule:KVCapsuleConfig",
            f"{_FITS}.kvcapsule:KVCapsuleFit",
            f"{_FITS}.kvcapsule_options:KVCapsuleRecipe",
        ),
        CodecFamily(
            "transform",
            f"{_CODECS}.transform:TransformConfig",
            f"{_FITS}.transform:TransformFit",
            f"{_FITS}.transform_options:TransformRecipe",
        ),
        CodecFamily(
            "cross-layer",
            f"{_CODECS}.cross_layer:CrossLayerConfig",
            f"{_FITS}.cross_layer:CrossLayerFit",
            f"{_FITS}.cross_layer_options:CrossLayerRecipe",
        ),
        CodecFamily(
            "compact",
            f"{_CODECS}.compact:CompactConfig",
            f"{_FITS}.compact:CompactFit",
            f"{_FITS}.compact_options:CompactRecipe",
        ),
        CodecFamily(
            "coded-compact",
            f"{_CODECS}.coded_compact:CodedCompactConfig",
            f"{_FITS}.coded_compact:CodedCompactFit",
            f"{_FITS}.coded_compact_options:CodedCompactRecipe",
        ),
    )
}
"""kvcapsule's own families, by name; the names and the options of their training need no torch."""


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


def __getattr__(name: str) -> Any:
    """The classes of codecs are imported when first used, so that a family's name does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".base", __name__), name)
