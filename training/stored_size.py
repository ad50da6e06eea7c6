"""What a capsule really stores of images, measured in a cache."""

from typing import NamedTuple

import torch
from transformers import BatchFeature, PreTrainedModel

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.spans import find_spans

from .recipe import REFERENCE_BITS


class StoredSize(NamedTuple):
    """Bytes of visual keys and values."""

    stored: int
    """Of the batch's images, in the cache."""
    full: int
    """Of the same at 16 bits an element."""
    images: int

    @property
    def compression(self) -> float:
        """How many times fewer bytes are stored."""
        return self.full / self.stored


@torch.no_grad()
def stored_size(capsule: Capsule, model: PreTrainedModel, inputs: BatchFeature, geometry: KVGeometry) -> StoredSize:
    """Read a batch with the capsule attached, and measure what its cache holds of the images."""
    spans = find_spans(model.config, inputs["input_ids"], inputs)
    tokens = sum(span.length for span in spans)
    capsule.to(model.device)
    with attach(model, capsule):
        cache = CapsuleCache(model.config, capsule)
        model(**inputs.to(model.device), **cache_argument(cache), logits_to_keep=1)
    element = 2 * len(geometry.capsule_layers) * geometry.kv_heads * geometry.head_dim
    return StoredSize(cache.bytes().visual, tokens * element * REFERENCE_BITS // 8, len(spans))
