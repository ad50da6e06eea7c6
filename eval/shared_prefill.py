"""One prefill for all methods: the forward is the same for all of them, so it runs once a batch, and every method
compresses its recording.

The recording has the LayerPrefill of each layer and the model's output. A later `generate` over an empty cache uses
both in place of the forward over its prompt, and runs the decode steps as usual.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.transformers_api import passed_cache, replace_output_cache
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, CompressionPass, Method


class Prefill(NamedTuple):
    """The recorded prefill of a batch, for any method."""

    layers: list[LayerPrefill]
    """Of every layer; all methods read the same tensors, and none writes to them."""
    output: Any
    """The model's output."""


CompressedLayers = dict[int, Sequence[tuple[int, Compressed]]]
"""Results of a method's pass over a prefill, by the layer that was added last: empty at first, then reused for the same
method and prefill."""


class Keeper(Method):
    """A method that records every layer's prefill, and stores nothing."""

    def __init__(self, needs_hidden_states: bool = False) -> None:
        """needs_hidden_states: record hidden states too, for methods that need them."""
        self.needs_hidden_states = needs_hidden_states
        self.layers: list[LayerPrefill] = []

    def compress(self, prefill: LayerPrefill) -> Compressed:
        self.layers.append(prefill)
        return Compressed([], [])


def replayable(model: PreTrainedModel) -> bool:
    """Whether methods see everything that a prefill leaves: layers with a window or linear attention have other caches,
    which no method sees."""
    return all(isinstance(layer, CapsuleLayer) for layer in CapsuleCache(model.config, Keeper()).layers)


@contextmanager
def recording(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Collects what the model returns for each forward within the block."""
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def replaying(
    model: PreTrainedModel, prefill: Prefill | None, compressed: CompressedLayers | None = None
) -> Iterator[None]:
    """Within the block, a forward over an empty cache is replaced by the recorded prefill.

    Args:
        model: a VLM.
        prefill: the recording; None runs every forward.
        compressed: results of the pass of this method over this prefill, read if they are there and filled if not; None
            compresses again.
    """
    if prefill is None:
        yield
        return
    forward, instance_forward = model.forward, model.__dict__.get("forward")

    @wraps(forward)
    def replay(*args: Any, **kwargs: Any) -> Any:
        cache = passed_cache(kwargs)
        if cache is None or cache.get_seq_length() > 0:
            return forward(*args, **kwargs)
        _fill(cache, prefill.layers, {} if compressed is None else compressed)
        return replace_output_cache(prefill.output, cache)

    # By this parameter generate recognises models whose images it may encode before the forward, which needs none here.
    known = signature(forward)
    replay.__dict__["__signature__"] = known.replace(
        parameters=[p for n, p in known.parameters.items() if n != "mm_encoder_outputs"]
    )
    model.__dict__["forward"] = replay
    try:
        yield
    finally:
        if instance_forward is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = instance_forward


class _ReusingPass:
    """A compression pass that reuses known results."""

    def __init__(self, compression: CompressionPass, compressed: CompressedLayers) -> None:
        self.compression, self.compressed = compression, compressed

    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        if prefill.layer not in self.compressed:
            self.compressed[prefill.layer] = self.compression.add(prefill)
        return self.compressed[prefill.layer]


def _fill(cache: Cache, layers: list[LayerPrefill], compressed: CompressedLayers) -> None:
    """Fill an empty cache from recorded prefills, as the layers' attention would."""
    if isinstance(cache, CapsuleCache):
        cache.fill(layers, _ReusingPass(cache.method.begin_pass([prefill.layer for prefill in layers]), compressed))
        return
    for prefill in layers:
        layer = cache.layers[prefill.layer]
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"a {type(layer).__name__} cannot be filled from a recorded prefill: run it (--share_prefill false)."
            )
        layer.update(prefill.keys, prefill.values)
