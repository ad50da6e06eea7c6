"""kvcapsule: the KV cache of vision-language models, compressed into capsules that attention reads as they are.

from kvcapsule import Capsule, attach
with attach(model, Capsule.from_pretrained("...")):
    model.generate(**inputs)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .capsule.capsule import Capsule
    from .capsule.config import CapsuleConfig
    from .data.prompts import conversation, encode
    from .errors import CapsuleError, GeometryError, ModelMismatchWarning
    from .inference.attach import attach
    from .inference.cache import CapsuleCache
    from .inference.transformers_api import cache_argument, output_cache
    from .segments.segment import Segment
    from .store.image_store import ImageStore
    from .vlm.geometry import KVGeometry
    from .vlm.loading import load_vlm
    from .vlm.spans import VisualSpan, find_spans


_HOME = {
    "Capsule": "capsule.capsule",
    "CapsuleCache": "inference.cache",
    "CapsuleConfig": "capsule.config",
    "CapsuleError": "errors",
    "GeometryError": "errors",
    "ImageStore": "store.image_store",
    "KVCapsuleError": "errors",
    "KVGeometry": "vlm.geometry",
    "ModelMismatchWarning": "errors",
    "Segment": "segments.segment",
    "VisualSpan": "vlm.spans",
    "attach": "inference.attach",
    "cache_argument": "inference.transformers_api",
    "conversation": "data.prompts",
    "encode": "data.prompts",
    "find_spans": "vlm.spans",
    "load_vlm": "vlm.loading",
    "output_cache": "inference.transformers_api",
}

__all__ = [
    "Capsule",
    "CapsuleCache",
    "CapsuleConfig",
    "CapsuleError",
    "GeometryError",
    "ImageStore",
    "KVCapsuleError",
    "KVGeometry",
    "ModelMismatchWarning",
    "Segment",
    "VisualSpan",
    "__version__",
    "attach",
    "cache_argument",
    "conversation",
    "encode",
    "find_spans",
    "load_vlm",
    "output_cache",
]


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that `kvcapsule --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'kvcapsule' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
