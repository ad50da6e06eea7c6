"""What an attached model runs: attention over segments, the hooks, and generate with a CapsuleCache.

Blocks of `attach` in several threads share it; what each attached is its own (attached.py).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .attached import bound_generate
from .attention_interface import IMPLEMENTATION, prefill_attention
from .forward_hooks import forward_hooks, hidden_state_hooks
from .generate import generate_with_capsule
from .rope_deltas import RopeDeltas
from .shared_contexts import SharedContexts
from .uncompiled import uncompiled

_shared = SharedContexts()


@contextmanager
def attachment(outer: torch.nn.Module, model: PreTrainedModel, hidden: bool) -> Iterator[None]:
    """While the block lasts, `model` reads CapsuleCaches.

    Args:
        outer: what `attach` was given: the model, or a wrapper around it.
        model: of transformers.
        hidden: whether caches are handed each layer's input states.

    Raises:
        ConfigError, RuntimeError: see `attach`.
    """
    text_config = model.config.get_text_config(decoder=True)
    with ExitStack() as stack:
        # Models that were made from one config share the name of the attention that stands there.
        stack.enter_context(_shared.enter(("attention", id(text_config)), lambda: _attention(model)))
        stack.enter_context(_shared.enter(("model", id(model)), lambda: _model(model)))
        if hidden:
            stack.enter_context(_shared.enter(("hidden", id(model)), lambda: hidden_state_hooks(model)))
        if outer is not model:
            stack.enter_context(_shared.enter(("outer", id(outer)), lambda: _outer(outer, model)))
        yield


@contextmanager
def _attention(model: PreTrainedModel) -> Iterator[None]:
    """The language part runs attention over segments."""
    text_config = model.config.get_text_config(decoder=True)
    before = str(text_config._attn_implementation)
    if before == IMPLEMENTATION:
        raise RuntimeError(
            "this model is a copy of one that was attached when it was copied: choose its attention, with"
            ' model.set_attn_implementation("sdpa"), and attach it then.'
        )
    with ExitStack() as stack:
        stack.enter_context(prefill_attention(_attention_configs(model, before), before))
        _set_text_attention(model, IMPLEMENTATION)
        stack.callback(_set_text_attention, model, before)
        if text_config._attn_implementation != IMPLEMENTATION:
            raise RuntimeError(
                f"{type(model).__name__} does not let its attention be chosen, so it cannot read a CapsuleCache."
            )
        yield


@contextmanager
def _model(model: PreTrainedModel) -> Iterator[None]:
    deltas = RopeDeltas(model)
    with (
        uncompiled(model),
        deltas.per_thread(),
        forward_hooks(model, model, deltas),
        deltas.in_generate(model),
        bound_generate(model, model, partial(generate_with_capsule, model)),
    ):
        yield


@contextmanager
def _outer(outer: torch.nn.Module, model: PreTrainedModel) -> Iterator[None]:
    # Not every version of PEFT runs the hooks of the model within when the wrapper is called; its generate calls the
    # model within.
    with forward_hooks(outer, model, RopeDeltas(model)), bound_generate(outer, model, _call):
        yield


def _call(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return generate(*args, **kwargs)


def _attention_configs(model: PreTrainedModel, implementation: str) -> list[PreTrainedConfig]:
    """The configs that the layers of the language part hold: usually one and the same."""
    configs = {
        id(config): config
        for module in model.get_decoder().modules()
        if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in configs.values() if getattr(config, "_attn_implementation", None) == implementation]


def _set_text_attention(model: PreTrainedModel, implementation: str) -> None:
    text_config = model.config.get_text_config(decoder=True)
    key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is text_config), "")
    model.set_attn_implementation({key: implementation})
