"""`model.generate` with a method's cache, which measures the bytes after the prefill and returns the logits of every
step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from transformers import BatchFeature, DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.method import Method
from kvcapsule.segments.segment import storage_bytes

from .equal_bytes import Layout
from .shared_prefill import CompressedLayers, Keeper, Prefill, recording, replaying

GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
"""The likeliest token at every step. The last three silence warnings of models whose saved defaults are for
sampling."""


class StoredBytes(NamedTuple):
    """Bytes that a cache stores of a batch."""

    visual: int
    total: int
    """On the device, without the codecs' parameters."""
    parameters: int
    host: int = 0
    """In the host's memory, not part of `total`."""


class Generated(NamedTuple):
    """The output of one run of a batch."""

    tokens: torch.Tensor
    """[B, A] the new tokens."""
    logits: Sequence[torch.Tensor]
    """A tensors [B, V]: the model's logits before any logits processor."""
    stored: StoredBytes
    """Measured right after the prefill."""


def new_cache(model: PreTrainedModel, method: Method | None) -> Cache:
    """An empty cache; without a method the one that transformers' generate uses by default."""
    if method is None:
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    return CapsuleCache(model.config, method)


def generate(
    model: PreTrainedModel,
    inputs: BatchFeature,
    cache: Cache,
    layout: Layout,
    max_new_tokens: int,
    forced: torch.Tensor | None = None,
    prefill: Prefill | None = None,
    compressed: CompressedLayers | None = None,
) -> Generated:
    """Answer a batch greedily; a CapsuleCache needs `with attach(model):` around it.

    Args:
        model: a VLM.
        inputs: inputs of the batch.
        cache: an empty one, see `new_cache`.
        layout: layout of the batch.
        max_new_tokens: most tokens of an answer, the end token included.
        forced: [B, A] tokens to write in place of the likeliest ones (teacher forcing).
        prefill: recorded for the same batch, in place of the forward over the prompt; None runs it.
        compressed: see `replaying`.
    """
    watch = _AfterPrefill(cache, layout)
    processors: list[LogitsProcessor] = [watch]
    if forced is not None:
        processors.append(_Forced(forced, inputs["input_ids"].shape[1]))
        max_new_tokens = forced.shape[1]
    with replaying(model, prefill, compressed):
        output = cast("Any", model).generate(
            **inputs,
            **cache_argument(cache),
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList(processors),
            return_dict_in_generate=True,
            output_logits=True,
            **GREEDY,
        )
    assert watch.stored is not None
    return Generated(output.sequences[:, inputs["input_ids"].shape[1] :], output.logits, watch.stored)


def record(model: PreTrainedModel, inputs: BatchFeature, layout: Layout, hidden: bool) -> Prefill:
    """Run a batch's prefill through the model's attention and record everything that methods may see of it.

    hidden: whether to record hidden states too.
    """
    return recorded(model, hidden, lambda cache: generate(model, inputs, cache, layout, max_new_tokens=1))


def recorded(model: PreTrainedModel, hidden: bool, run: Callable[[Cache], Any]) -> Prefill:
    """As `record`, of the forward that `run` runs first; it is given the empty cache."""
    keeper = Keeper(hidden)
    with attach(model), recording(model) as outputs:
        run(CapsuleCache(model.config, keeper))
    return Prefill(keeper.layers, outputs[0])


def stored_bytes(cache: Cache, layout: Layout) -> StoredBytes:
    """Measure a cache that holds the prompts of a batch.

    transformers' cache stores a layer's visual, text and padding tokens in one tensor; its visual bytes are that
    tensor's bytes times the share of visual positions.
    """
    if isinstance(cache, CapsuleCache):
        measured = cache.bytes()
        return StoredBytes(measured.visual, measured.total, measured.parameters, measured.host)
    visual = sum(span.length for span in layout.spans)
    total = storage_bytes(t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor))
    growing = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    growing_bytes = storage_bytes(t for layer in growing for t in (layer.keys, layer.values) if t is not None)
    return StoredBytes(growing_bytes * visual // layout.valid.numel(), total, 0)


class _AfterPrefill(LogitsProcessor):
    """Measures the cache when the first logits arrive, as it then holds only the prompt."""

    def __init__(self, cache: Cache, layout: Layout) -> None:
        self.cache, self.layout = cache, layout
        self.stored: StoredBytes | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.stored is None:
            self.stored = stored_bytes(self.cache, self.layout)
        return scores


class _Forced(LogitsProcessor):
    """Forces the token of an answer at every step."""

    def __init__(self, answer: torch.Tensor, prompt: int) -> None:
        self.answer, self.prompt = answer, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.answer[:, input_ids.shape[1] - self.prompt, None]
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
