"""The contenders at step level and above: full caches of transformers from slow to fast, and the methods.

    L0  eager attention, DynamicCache      shown so that nobody takes it for the baseline
    L1  sdpa attention, DynamicCache       what generate does by itself
    L2  sdpa attention, StaticCache        on request also compiled, as are methods with tails of a fixed size

Ratios are against whichever of L1 and L2 is faster in the same run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import CompileConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.methods.method import Method
from kvcapsule.segments.segment import storage_bytes

from ..watched_generate import new_cache
from .models import Subject

L0, L1, L2, L2_COMPILED = "L0-eager-dynamic", "L1-sdpa-dynamic", "L2-sdpa-static", "L2-sdpa-static-compiled"
BASELINES = (L1, L2, L2_COMPILED)
"""The full caches that a ratio may be against."""

Measured = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""JSON rows, and entries of `skipped`."""


class DecodeSetup(NamedTuple):
    """One way to decode: a cache, the attention that reads it, and whether the step is compiled."""

    name: str
    cache: Callable[[int], Cache]
    """An empty cache for so many tokens, those of the prompt included."""
    method: Method | None = None
    attention: str = "sdpa"
    compiled: bool = False

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block, the model uses the attention of this setup."""
        before = str(model.config.get_text_config(decoder=True)._attn_implementation)
        if self.attention != before:
            model.set_attn_implementation(self.attention)
        try:
            if self.method is None:
                yield
            else:
                with attach(model):
                    yield
        finally:
            if self.attention != before:
                model.set_attn_implementation(before)

    def call(self, model: PreTrainedModel) -> Callable[..., Any]:
        """The model as a decode step calls it."""
        call: Callable[..., Any] = model.get_compiled_call(_everywhere()) if self.compiled else model
        return call

    def options(self) -> dict[str, Any]:
        """Options of generate, which compiles the steps of a StaticCache unless it is told not to."""
        return {"compile_config": _everywhere()} if self.compiled else {"disable_compile": True}


def _everywhere() -> Any:
    """A CompileConfig that also holds for the CPU, which generate does not compile unless a switch for its tests is
    set."""
    config: Any = CompileConfig()
    config._compile_all_devices = True
    return config


def setups(subject: Subject, compiled: bool) -> list[DecodeSetup]:
    """The full caches, then the methods of a subject."""
    model: Any = subject.model
    text = model.config.get_text_config(decoder=True)

    def static(tokens: int) -> Cache:
        return StaticCache(config=text, max_cache_len=tokens)

    result = [
        DecodeSetup(L0, lambda tokens: new_cache(model, None), attention="eager"),
        DecodeSetup(L1, lambda tokens: new_cache(model, None)),
        DecodeSetup(L2, static),
    ]
    result += [_of_method(model, name, method) for name, method in subject.methods.items()]
    if compiled:
        prompt = subject.batch(1)["input_ids"].shape[1]
        result.append(DecodeSetup(L2_COMPILED, static, compiled=True))
        result += [
            _compiled(model, name, method, prompt)
            for name, method in subject.methods.items()
            if method.decode_time() is None
        ]
    return result


def _of_method(model: PreTrainedModel, name: str, method: Method) -> DecodeSetup:
    return DecodeSetup(name, lambda tokens: new_cache(model, method), method)


def _compiled(model: PreTrainedModel, name: str, method: Method, prompt: int) -> DecodeSetup:
    """A method whose tail has a fixed size, for the tokens after the prompt."""
    return DecodeSetup(
        f"{name}-static-compiled",
        lambda tokens: CapsuleCache(model.config, method, tail_capacity=tokens - prompt),
        method,
        compiled=True,
    )


def cache_storage_bytes(cache: Cache) -> int:
    """Bytes of a cache's storages, with unused capacity and a capsule's maps: what a step may read."""
    if isinstance(cache, CapsuleCache):
        measured = cache.bytes()
        return measured.total + measured.parameters
    return storage_bytes(t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor))


def out_of_memory(level: str, subject: Subject, size: int, setup: DecodeSetup) -> dict[str, Any]:
    """The entry of `skipped` for a contender that did not fit into the device's memory."""
    return {
        "level": level,
        "geometry": subject.name,
        "batch": size,
        "visual_tokens": subject.visual,
        "method": setup.name,
        "reason": "did not fit into the device's memory",
    }
