"""The image store as vLLM's scheduler asks it: which images of a request it knows. Needs no vLLM.

Any doubt about an image is a miss. A key has the values that the vision tower gets, not vLLM's hash of the image, which
a user may set (multi_modal_uuids). As vLLM itself goes by that hash, and computes with what it has of an earlier image
of the same hash, an image whose hash has come with other values is never looked up nor stored. So all requests are
seen here when they come, before anything of them is computed, those included that do not use the store.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..capsule.capsule import Capsule
from ..capsule.digest import capsule_digest
from ..capsule.stored_span import from_bytes
from ..errors import CapsuleError, KVCapsuleError
from ..store.image_store import ImageStore
from ..store.keys import chained_keys
from ..vlm.weights import UnreadableError, tensor_digest
from .model_files import ModelFiles
from .prompt_images import PromptImage, plain_bytes, prompt_images
from .scheduler_half import parts_of

_ELSEWHERE = "address"
"""What vLLM puts in place of an image's values where its processes share memory (--mm-processor-cache-type shm)."""
_HASHES = 1 << 16
"""Hashes of images that are remembered, more than an engine holds anything of."""


class _Seen(NamedTuple):
    """An image of a request, as it came."""

    identifier: str
    """vLLM's hash of it."""
    content: bytes | None
    """What tells its values from all others; None where there is a doubt."""
    digest: str
    """Of that; "" where there is a doubt."""


@dataclass
class _Waiting:
    """A request that waits."""

    images: list[PromptImage]
    data: list[bytes]
    """Of the first images, which the store has."""


class KnownImages:
    """Looks up the images of requests.

    Args:
        store: where.
        capsule: that made the entries.
        block: tokens of the engine's blocks.
        layers: that are compressed.
        dtype: of the engine's keys and values, as spans name it.
        facts: what else all entries depend on, in JSON's types.
        files: the model's; until their digest is known all images are misses.
    """

    def __init__(
        self,
        store: ImageStore,
        capsule: Capsule,
        block: int,
        layers: Sequence[int],
        dtype: str,
        facts: Mapping[str, Any],
        files: ModelFiles,
    ) -> None:
        self.store, self.capsule, self.block = store, capsule, block
        self.layers, self.dtype, self.facts, self.files = tuple(layers), dtype, facts, files
        self._waiting: dict[str, _Waiting] = {}
        self._seen: dict[str, list[_Seen]] = {}
        self._hashes: OrderedDict[str, str] = OrderedDict()
        """Digest of the values that came with each hash; "" where others came later, or values that cannot be told."""

    def see(self, request: Any) -> None:
        """Note what comes with the hashes of a request's images, those included that it got since it was last seen."""
        seen = self._seen.setdefault(request.request_id, [])
        for feature in request.mm_features[len(seen) :]:
            content = _content(feature)
            digest = "" if content is None else _digest(content)
            if self._hashes.setdefault(feature.identifier, digest) != digest:
                self._hashes[feature.identifier] = ""
            self._hashes.move_to_end(feature.identifier)
            if len(self._hashes) > _HASHES:
                self._hashes.popitem(last=False)
            seen.append(_Seen(feature.identifier, content, digest))

    def trusts(self, request: str) -> bool:
        """Whether the hashes of a request's images have come with these images' values alone, ever.

        While that is so, what vLLM has of a hash was computed from these values: it computes nothing of a request that
        was not seen before.
        """
        seen = self._seen.get(request)
        return seen is not None and all(one.digest and self._hashes.get(one.identifier) == one.digest for one in seen)

    def images(self, request: Any) -> list[PromptImage]:
        """The images of one of vLLM's requests; none where the store is not used for it."""
        return self._known(request).images

    def find(self, request: Any) -> list[bytes]:
        """The data of the first images, up to the first that the store does not know."""
        waiting = self._known(request)
        if not waiting.data:
            for image in waiting.images:
                data = self.store.get(image.key)
                if data is None or not self._is_sound(image, data):
                    break
                waiting.data.append(data)
            # An image is of no use without those before it, which therefore go last.
            self.store.touch([image.key for image in reversed(waiting.images[: len(waiting.data)])])
        return waiting.data

    def forget(self, request: str) -> None:
        """A request does not wait any more."""
        self._waiting.pop(request, None)

    def end(self, request: str) -> None:
        """A request is gone."""
        self.forget(request)
        self._seen.pop(request, None)

    def _known(self, request: Any) -> _Waiting:
        self.see(request)
        # Another request may have brought a doubt since it was last asked.
        if not self.trusts(request.request_id):
            self.forget(request.request_id)
            return _Waiting([], [])
        waiting = self._waiting.get(request.request_id)
        if waiting is None:
            waiting = _Waiting(self._images(request), [])
            # Until the weights are known it is worth looking again.
            if waiting.images or self.files.digest() is not None:
                self._waiting[request.request_id] = waiting
        return waiting

    def _images(self, request: Any) -> list[PromptImage]:
        weights, tokens = self.files.digest(), request.prompt_token_ids
        private = getattr(request, "cache_salt", None) or getattr(request, "lora_request", None)
        if weights is None or tokens is None or private or getattr(request, "prompt_embeds", None) is not None:
            return []
        places: list[tuple[int, int]] = []
        contents: list[tuple[int, bytes]] = []
        for feature, seen in zip(request.mm_features, self._seen[request.request_id], strict=True):
            content = seen.content or b""
            for start, length in parts_of(feature):
                places.append((start, length))
                contents.append((start + length, content))
                content = b""
        facts = {**self.facts, "weights": weights, "capsule": capsule_digest(self.capsule), "block": self.block}
        keys = chained_keys(facts, torch.tensor([tokens]), None, contents)
        return prompt_images(places, keys, self.block, self.capsule.config.codec.tile)

    def _is_sound(self, image: PromptImage, data: bytes) -> bool:
        """Whether data is what workers can take; an entry of other data is removed."""
        try:
            header = from_bytes(data, self.capsule).header
            place = header.start, header.length, header.text, header.align, header.layers, header.dtype
            if place != (image.start, image.length, image.text, self.block, self.layers, self.dtype):
                raise CapsuleError("it is of another place of a prompt, or of another engine.")
            if header.weights != self.files.digest():
                raise CapsuleError("it is of another model.")
        except KVCapsuleError as error:
            self.store.log_once("unusable", f"an entry is not used: {str(error).rstrip('.')}")
            self.store.discard(image.key)
            return False
        return True


def _content(feature: Any) -> bytes | None:
    """What tells an image's values from all others; None where there is a doubt."""
    values = {} if feature.data is None else feature.data.get_data()
    if not values or _ELSEWHERE in values:
        return None
    parts = [feature.modality.encode()]
    for name, value in sorted(values.items()):
        part = _value(value)
        if part is None:
            return None
        parts += [name.encode(), part]
    return b"\n".join(parts)


def _digest(content: bytes) -> str:
    return tensor_digest(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def _value(value: Any) -> bytes | None:
    if isinstance(value, torch.Tensor):
        try:
            return tensor_digest(value).encode()
        except UnreadableError:
            return None
    if isinstance(value, list | tuple):
        parts = [_value(item) for item in value]
        return None if None in parts else b"[" + b",".join(part for part in parts if part is not None) + b"]"
    return plain_bytes(value)
