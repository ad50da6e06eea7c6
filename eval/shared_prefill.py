"""One prefill for all methods: it is the same forward for each of them, so it runs once a batch, and every method
compresses what it left.

What a method sees of a prefill (LayerPrefill) is recorded layer by layer, with what the model returned. A later
`generate` over an empty cache is then given both in place of the forward over its prompt; the steps behind the prompt
are run as ever.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvcapsule.inference.cache import CapsuleCache, CapsuleLayer
from kvcapsule.inference.transformers_api import passed_cache, replace_output_cache
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, CompressionPass, Method


class Prefill(NamedTuple):
    """A batch's prefill, to be given to any method."""

    layers: list[LayerPrefill]
    """Of each layer; every method reads the same tensors and changes none."""
    output: Any
    """What the model returned."""


Made = dict[int, Sequence[tuple[int, Compressed]]]
"""What a method made of a prefill as each layer ended, by that layer: empty at first, then what it would make of the
same prefill again."""


class Keeper(Method):
    """A method that keeps what it is shown, and stores nothing."""

    def __init__(self, needs_hidden_states: bool = False) -> None:
        """needs_hidden_states: whether hidden states are kept too, for the methods that ask for them."""
        self.needs_hidden_states = needs_hidden_states
        self.layers: list[LayerPrefill] = []

    def compress(self, prefill: LayerPrefill) -> Compressed:
        self.layers.append(prefill)
        return Compressed([], [])


def replayable(model: PreTrainedModel) -> bool:
    """Whether all that a prefill leaves is what methods see: layers with a window or linear attention have a cache of
    their own."""
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
def replaying(model: PreTrainedModel, prefill: Prefill | None, made: Made | None = None) -> Iterator[None]:
    """Within the block, a forward over an empty cache is the recorded prefill; with None, every forward is run.

    made: kept from one call to the next of the same method and prefill, it saves the compression too.
    """
    if prefill is None:
        yield
        return
    forward, own = model.forward, model.__dict__.get("forward")

    @wraps(forward)
    def replay(*args: Any, **kwargs: Any) -> Any:
        cache = passed_cache(kwargs)
        if cache is None or cache.get_seq_length() > 0:
            return forward(*args, **kwargs)
        _fill(cache, prefill.layers, {} if made is None else made)
        return replace_output_cache(prefill.output, cache)

    # By this parameter generate knows models whose images it may encode before the forward, which here needs none.
    known = signature(forward)
    replay.__dict__["__signature__"] = known.replace(
        parameters=[p for n, p in known.parameters.items() if n != "mm_encoder_outputs"]
    )
    model.__dict__["forward"] = replay
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own


class _Known:
    """A pass whose results are read where they are known already."""

    def __init__(self, compression: CompressionPass, made: Made) -> None:
        self.compression, self.made = compression, made

    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        if prefill.layer not in self.made:
            self.made[prefill.layer] = self.compression.add(prefill)
        return self.made[prefill.layer]


def _fill(cache: Cache, layers: list[LayerPrefill], made: Made) -> None:
    """What the layers' attention would do to an empty cache, without the attention."""
    if isinstance(cache, CapsuleCache):
        cache.fill(layers, _Known(cache.method.begin_pass([prefill.layer for prefill in layers]), made))
        return
    for prefill in layers:
        layer = cache.layers[prefill.layer]
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"a {type(layer).__name__} cannot be filled from a recorded prefill: run it (--share_prefill false)."
            )
        layer.update(prefill.keys, prefill.values)
