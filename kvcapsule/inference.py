"""Attach a capsule or a policy to a model, for as long as a `with` block lasts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from .attention import IMPLEMENTATION, forget
from .cache import CapsuleCache
from .geometry import KVGeometry
from .method import reads_hidden
from .prefill import Method

_FULL_ATTENTION = "full_attention"
"""transformers' name of the layers whose cache a CapsuleCache replaces."""


@contextmanager
def attach(model: PreTrainedModel, method: Method | None = None) -> Iterator[PreTrainedModel]:
    """Let `model` read CapsuleCaches, and with a method given, make `model.generate` use one wherever no cache is passed.

        with attach(model, Capsule.from_pretrained("...")):
            model.generate(**inputs)

    Inside the block prefill runs the model's sdpa attention; on leaving it, the model is as it was.

    Args:
        model: a decoder-only VLM of transformers.
        method: a Capsule or a policy. None: caches are passed by hand (`past_key_values=CapsuleCache(model.config, method)`).

    Raises:
        GeometryError: if the method was made for another KV geometry.
        RuntimeError: if the model is attached already.
    """
    text_config = model.config.get_text_config(decoder=True)
    before = str(text_config._attn_implementation)
    if before == IMPLEMENTATION:
        raise RuntimeError("this model is attached already: leave the other `with attach(...)` block first.")
    geometry = KVGeometry.from_config(model.config)
    check = getattr(method, "require_geometry", None)
    if check is not None:
        check(geometry)
    with ExitStack() as stack:
        stack.callback(forget)
        _set_text_attention(model, IMPLEMENTATION)
        stack.callback(_set_text_attention, model, before)
        active: list[CapsuleCache] = []
        for handle in _hooks(model, active, hidden=method is None or reads_hidden(method)):
            stack.callback(handle.remove)
        if text_config._attn_implementation != IMPLEMENTATION:
            raise RuntimeError(f"{type(model).__name__} does not let its attention be chosen, so it cannot read a CapsuleCache.")
        if method is not None:
            generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
            own = model.__dict__.get("generate")

            def generate_with_capsule(*args: Any, **kwargs: Any) -> Any:
                if kwargs.get("past_key_values") is None and _wants_cache(model, args, kwargs):
                    kwargs["past_key_values"] = CapsuleCache(model.config, method)
                return generate(*args, **kwargs)

            model.__dict__["generate"] = generate_with_capsule
            if own is None:
                stack.callback(model.__dict__.pop, "generate", None)
            else:
                stack.callback(model.__dict__.__setitem__, "generate", own)
        yield model


def _hooks(model: PreTrainedModel, active: list[CapsuleCache], hidden: bool) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Tell the cache of a forward what the forward brings: its token ids before the layers run, its rotation once it is made.

    And, where a method may ask for them, the hidden states that enter each layer.
    """

    def begin(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        active.clear()
        forget()
        cache = kwargs.get("past_key_values")
        if isinstance(cache, CapsuleCache):
            input_ids = kwargs.get("input_ids", args[0] if args else None)
            cache.begin(input_ids, kwargs.get("attention_mask"), kwargs)
            active.append(cache)

    def rotation(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Models with several kinds of layers make one rotation for each kind; capsules are of full-attention layers.
        kind = kwargs.get("layer_type", next((a for a in args if isinstance(a, str)), _FULL_ATTENTION))
        if active and kind == _FULL_ATTENTION and isinstance(output, tuple) and len(output) == 2:
            active[0].set_position_embeddings(*output)

    def enter(index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if active:
            active[0].set_hidden(index, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    yield model.register_forward_pre_hook(begin, with_kwargs=True)
    for index, layer in enumerate(getattr(model.get_decoder(), "layers", ()) if hidden else ()):
        yield layer.register_forward_pre_hook(partial(enter, index), with_kwargs=True)
    for name, module in model.get_decoder().named_modules():
        if name.rpartition(".")[2] == "rotary_emb":
            yield module.register_forward_hook(rotation, with_kwargs=True)


def _wants_cache(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of generate uses a cache: its own option, then that of its generation config, then that of the model's."""
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    options = (kwargs.get("use_cache"), getattr(given, "use_cache", None), getattr(model.generation_config, "use_cache", None))
    return next((bool(option) for option in options if option is not None), True)


def _set_text_attention(model: PreTrainedModel, implementation: str) -> None:
    text_config = model.config.get_text_config(decoder=True)
    key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is text_config), "")
    model.set_attn_implementation({key: implementation})
