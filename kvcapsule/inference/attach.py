"""Attach a capsule or a policy to a model, for as long as a `with` block lasts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError
from ..methods.method import Method
from ..store.image_store import ImageStore
from ..vlm.geometry import KVGeometry
from .attention_interface import IMPLEMENTATION, clear_pending_layer, prefill_attention, set_mask_over_segments
from .cache import CapsuleCache
from .generate import wrap_generate
from .stored_prompt import StoredPrompts
from .transformers_api import passed_cache, require_supported, rotation_per_token

_FULL_ATTENTION = "full_attention"
"""transformers' name of the layers whose cache a CapsuleCache replaces."""


_active: ContextVar[CapsuleCache | None] = ContextVar("kvcapsule_active", default=None)
"""The cache of the present forward of this thread."""

Model = TypeVar("Model", bound=torch.nn.Module)


@contextmanager
def attach(
    model: Model, method: Method | None = None, store: ImageStore | None = None, strict: bool = False
) -> Iterator[Model]:
    """Let `model` read CapsuleCaches, and with a method given, make `model.generate` use one wherever no cache is
    passed.

        with attach(model, Capsule.from_pretrained("...")):
            model.generate(**inputs)

    Inside the block prefill runs the attention that the model ran before (eager, sdpa, flex_attention, ...); on leaving
    it, the model is as it was. docs/generation.md says what works with generate.

    Args:
        model: a decoder-only VLM of transformers, or a PEFT wrapper around one.
        method: a Capsule or a policy. None: caches are passed by hand (`cache=CapsuleCache(model.config, method)`;
            `past_key_values=` before transformers 5.24).
        store: where the capsules of images are kept: an image seen before behind the same prefix is not read again
            (docs/store.md). Prompts with images are then read in pieces, so answers are those of a question that is
            asked once the images are compressed.
        strict: refuse a capsule of another model, and one of which that cannot be known, where otherwise a
            ModelMismatchWarning says that the weights or the active adapter differ.

    Raises:
        CapsuleError: with strict, if the capsule was trained on another model.
        GeometryError: if the method was made for another KV geometry.
        ModelError: if the installed transformers is not of a supported version.
        RuntimeError: if the model is attached already.
        TypeError: for what is no model of transformers.
        ConfigError: for an attention that cannot run prefill, for adapters that put tokens of their own before the
        prompt, and for a store with a method that is no capsule.
    """
    require_supported()
    inner = _unwrapped(model)
    text_config = inner.config.get_text_config(decoder=True)
    before = str(text_config._attn_implementation)
    if before == IMPLEMENTATION:
        raise RuntimeError("this model is attached already: leave the other `with attach(...)` block first.")
    geometry = KVGeometry.from_config(inner.config)
    if method is not None:
        method.require_geometry(geometry)
        method.check_model(inner, strict)
    prompts = None if store is None else StoredPrompts(inner, method, store)
    with ExitStack() as stack:
        stack.callback(_clear)
        stack.enter_context(prefill_attention(_attention_configs(inner, before), before))
        _set_text_attention(inner, IMPLEMENTATION)
        stack.callback(_set_text_attention, inner, before)
        for handle in _hooks(model, inner, method, strict):
            stack.callback(handle.remove)
        if text_config._attn_implementation != IMPLEMENTATION:
            raise RuntimeError(
                f"{type(inner).__name__} does not let its attention be chosen, so it cannot read a CapsuleCache."
            )
        previous = inner.__dict__.get("generate")
        inner.__dict__["generate"] = wrap_generate(inner, method, prompts)
        if previous is None:
            stack.callback(inner.__dict__.pop, "generate", None)
        else:
            stack.callback(inner.__dict__.__setitem__, "generate", previous)
        yield model


def _unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper; any other model is itself."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        if getattr(inner.active_peft_config, "is_prompt_learning", False):
            raise ConfigError(
                f"an adapter of the type {inner.active_peft_config.peft_type!s} puts tokens of its own before the"
                " prompt's, past the token ids by which visual tokens are found. Use an adapter of weights, such as"
                " LoRA."
            )
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"attach expects a model of transformers, or a PEFT wrapper around one, not {type(model).__name__}."
        )
    return inner


def _attention_configs(model: PreTrainedModel, implementation: str) -> list[PreTrainedConfig]:
    """The configs that the layers of the language part hold: usually one and the same."""
    configs = {
        id(config): config
        for module in model.get_decoder().modules()
        if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in configs.values() if getattr(config, "_attn_implementation", None) == implementation]


def _clear() -> None:
    clear_pending_layer()
    _active.set(None)


def _hooks(
    model: torch.nn.Module, inner: PreTrainedModel, method: Method | None, strict: bool
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Hooks that hand the cache the forward's token ids, its rotation and, where a method may read them, each layer's
    input states. The methods of caches that are passed by hand are checked as `method` was."""
    hidden = method is None or method.needs_hidden_states
    checked = method

    def begin(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            # A compiled forward is a decode step over a static tail: there is nothing to prepare.
            return
        _clear()
        cache = passed_cache(kwargs)
        if isinstance(cache, CapsuleCache):
            nonlocal checked
            if cache.method is not checked:
                cache.method.check_model(inner, strict)
                checked = cache.method
            input_ids = kwargs.get("input_ids", args[0] if args else None)
            cache.begin_forward(input_ids, kwargs.get("attention_mask"), kwargs)
            _active.set(cache)

    def rotation(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Models with several kinds of layers make one rotation for each kind; capsules are of full-attention layers.
        if torch.compiler.is_compiling():
            return
        kind = kwargs.get("layer_type", next((a for a in args if isinstance(a, str)), _FULL_ATTENTION))
        cache = _active.get()
        if cache is not None and kind == _FULL_ATTENTION and isinstance(output, tuple) and len(output) == 2:
            cache.set_position_embeddings(*rotation_per_token(module, *output))

    def enter(index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = None if torch.compiler.is_compiling() else _active.get()
        if cache is not None:
            cache.set_hidden_states(index, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def end(*args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        set_mask_over_segments(False)
        cache = _active.get()
        if cache is not None:
            cache.end_forward()
        _active.set(None)

    # Not every version of PEFT runs the hooks of the model within when the wrapper is called; its generate calls the
    # model within.
    for called in {id(m): m for m in (model, inner)}.values():
        yield called.register_forward_pre_hook(begin, with_kwargs=True)
        yield called.register_forward_hook(end)
    for index, layer in enumerate(getattr(inner.get_decoder(), "layers", ()) if hidden else ()):
        yield layer.register_forward_pre_hook(partial(enter, index), with_kwargs=True)
    for name, module in inner.get_decoder().named_modules():
        if name.rpartition(".")[2] == "rotary_emb":
            yield module.register_forward_hook(rotation, with_kwargs=True)


def _set_text_attention(model: PreTrainedModel, implementation: str) -> None:
    text_config = model.config.get_text_config(decoder=True)
    key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is text_config), "")
    model.set_attn_implementation({key: implementation})
