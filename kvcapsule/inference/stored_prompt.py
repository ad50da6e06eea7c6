"""Reading a prompt through an image store: images seen before behind the same prefix are not read again.

The prompt is read in pieces, each image with the text before it and then the rest, whether the store knows them or not.
A piece reads the images before it through the capsule, as the answer does. Before each piece the cache is put together
from stored spans alone, so what follows is the same whichever of them were known.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from .._version import __version__
from ..capsule.capsule import Capsule
from ..capsule.stored_span import StoredSpan, capsule_digest, from_bytes, to_bytes
from ..errors import CapsuleError, ConfigError, KVCapsuleError
from ..methods.method import Method
from ..store.entry import StoreKey
from ..store.image_store import ImageStore
from ..store.keys import image_keys
from ..vlm.placement import on_several_devices
from ..vlm.weights import Identity, ModelIdentity, UnreadableError
from .cache import CapsuleCache
from .cache_layer import CapsuleLayer
from .prompt_pieces import GRIDS, MASK, PIXELS, SIZES, TOKEN_TYPES, Piece, PiecedPrompt, UnservedError, pieced_prompt
from .transformers_api import cache_argument, last_logits_argument, prompt_positions, set_cache

_ROPE_BY_LENGTH = {"dynamic", "longrope"}
"""Kinds of rotary positions whose frequencies change with the prompt's length."""


class StoredPrompts:
    """What reads the prompts of one attached model through a store.

    Raises:
        ConfigError: for a method that is no capsule.
    """

    def __init__(self, model: PreTrainedModel, method: Method | None, store: ImageStore) -> None:
        if not isinstance(method, Capsule):
            raise ConfigError(
                "an image store keeps the spans of a capsule, and"
                f" {'no method' if method is None else type(method).__name__} is none: attach a Capsule with it."
            )
        self.model, self.capsule, self.store = model, method, store
        self._identity = ModelIdentity(model)
        self._compresses_all = all(isinstance(layer, CapsuleLayer) for layer in self._cache([]).layers)

    @torch.no_grad()
    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments with which generate goes on behind the last image; None if it has to read the prompt itself."""
        try:
            prompt = pieced_prompt(self.model, args, kwargs)
            if prompt is None:
                return None
            self._require_readable()
            identity = self._identity.get()
        except (UnreadableError, UnservedError) as reason:
            self.store.count("skipped")
            self.store.log_once(f"skipped {reason}", f"not used for a call of generate: {reason}")
            return None
        device = self.model.device
        inputs = {name: value.to(device) for name, value in prompt.inputs.items() if name != PIXELS}
        positions = prompt_positions(self.model, prompt.input_ids, inputs)
        types = {name: value for name, value in inputs.items() if name == TOKEN_TYPES}
        images = [
            (piece.end, {**piece.inputs, **{name: value[:, : piece.end] for name, value in types.items()}})
            for piece in prompt.pieces
        ]
        keys = image_keys(self._facts(identity), prompt.input_ids, positions, images)
        spans, cache = self._known(keys, prompt.pieces, identity)
        for key, piece in list(zip(keys, prompt.pieces, strict=True))[len(spans) :]:
            self._prefill(cache, prompt, piece, positions)
            spans.append(cache.stored_spans(0, identity.weights, identity.adapter)[-1])
            self._put(key, spans[-1])
            cache = self._cache(spans)
        # An image is of no use without those before it, which therefore go last.
        self.store.touch(list(reversed(keys)))
        rest = {name: value for name, value in kwargs.items() if name not in (PIXELS, GRIDS, SIZES, TOKEN_TYPES)}
        rest[MASK] = torch.ones_like(prompt.input_ids)
        if positions is not None:
            rest["position_ids"] = positions
        set_cache(rest, cache)
        return rest

    def _require_readable(self) -> None:
        """Raises UnservedError for a state of the model in which an image's capsule depends on more than its key."""
        model = self.model
        if model.training:
            raise UnservedError("a model in training mode")
        if torch.is_autocast_enabled(model.device.type):
            raise UnservedError("autocast")
        devices = {str(parameter.device) for parameter in model.parameters()}
        if len(devices) > 1 or on_several_devices(model):
            raise UnservedError("a model on several devices")
        if _ROPE_BY_LENGTH & set(_rope_types(model.config.get_text_config(decoder=True))):
            raise UnservedError("rotations that depend on the prompt's length")
        if not self._compresses_all:
            raise UnservedError("layers with a cache of the model's own")

    def _facts(self, identity: Identity) -> dict[str, Any]:
        return {
            "weights": identity.weights,
            "adapter": identity.adapter,
            "capsule": capsule_digest(self.capsule),
            "dtype": str(self.model.dtype),
            "transformers": transformers.__version__,
            "kvcapsule": __version__,
        }

    def _known(
        self, keys: Sequence[StoreKey], pieces: Sequence[Piece], identity: Identity
    ) -> tuple[list[StoredSpan], CapsuleCache]:
        """The spans of the longest chain of images that the store knows, and a cache that holds them."""
        spans: list[StoredSpan] = []
        for key, piece in zip(keys, pieces, strict=True):
            data = self.store.get(key)
            if data is None:
                break
            try:
                span = from_bytes(data, self.capsule, self.model.device)
                _require_place(span, piece, identity)
            except KVCapsuleError as error:
                self._discard([key], error)
                break
            spans.append(span)
        try:
            return spans, self._cache(spans)
        except KVCapsuleError as error:
            self._discard(keys[: len(spans)], error)
            return [], self._cache([])

    def _discard(self, keys: Sequence[StoreKey], error: KVCapsuleError) -> None:
        self.store.log_once("unusable", f"an entry is not used: {str(error).rstrip('.')}")
        for key in keys:
            self.store.discard(key)

    def _cache(self, spans: Sequence[StoredSpan]) -> CapsuleCache:
        cache = CapsuleCache(self.model.config, self.capsule)
        if spans:
            cache.take_in(spans)
            # Positions are passed with every forward: the model has none to compute.
            cache.taken_in = False
        return cache

    def _prefill(self, cache: CapsuleCache, prompt: PiecedPrompt, piece: Piece, positions: torch.Tensor | None) -> None:
        """Read a piece behind what the cache holds; the cache compresses it."""
        device = self.model.device
        arguments: dict[str, Any] = {name: value.to(device) for name, value in piece.inputs.items()}
        for name, tensor in ((TOKEN_TYPES, prompt.inputs.get(TOKEN_TYPES)), ("position_ids", positions)):
            if tensor is not None:
                arguments[name] = tensor[..., piece.start : piece.end].to(device)
        ids = prompt.input_ids[:, piece.start : piece.end]
        self.model(
            input_ids=ids, use_cache=True, **arguments, **last_logits_argument(self.model), **cache_argument(cache)
        )

    def _put(self, key: StoreKey, span: StoredSpan) -> None:
        config = self.model.config
        name = str(getattr(config, "_name_or_path", "")).rstrip("/").rpartition("/")[2] or type(self.model).__name__
        about = {
            "model": name,
            "capsule": f"{span.header.family} {span.header.capsule[:8]}",
            "grid": list(span.header.grid),
            "tokens": span.header.length,
            "text": span.header.text,
        }
        try:
            data = to_bytes(span, self.capsule)
        except CapsuleError as error:
            self.store.log_once("unstorable", f"an image is not stored: {str(error).rstrip('.')}")
            return
        self.store.put(key, data, about)


def _require_place(span: StoredSpan, piece: Piece, identity: Identity) -> None:
    """Raises CapsuleError for a span of another model, or of another place of a prompt."""
    header = span.header
    if (header.start, header.length, header.text) != (
        piece.span.start,
        piece.span.length,
        piece.span.start - piece.start,
    ):
        raise CapsuleError("it is of another place of a prompt.")
    if (header.weights, header.adapter) != identity:
        raise CapsuleError("it is of another model or adapter.")


def _rope_types(config: PreTrainedConfig) -> Iterator[str]:
    """Kinds of rotary positions of a language model; some have one for each kind of layer."""
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    for values in (parameters, *parameters.values()):
        if isinstance(values, Mapping) and "rope_type" in values:
            yield str(values["rope_type"])
