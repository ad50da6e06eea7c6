"""Hooks that hand a CapsuleCache what a forward brings: token ids, masks, rotations, each layer's input states."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..methods.method import Method
from .attached import attached_here
from .attention_interface import clear_pending_layer, set_mask_over_segments
from .cache import CapsuleCache
from .rope_deltas import RopeDeltas
from .transformers_api import passed_cache, rotation_per_token

_FULL_ATTENTION = "full_attention"
"""transformers' name of the layers whose cache a CapsuleCache replaces."""

_active: ContextVar[CapsuleCache | None] = ContextVar("kvcapsule_active", default=None)
"""The cache of the present forward of this thread."""


@contextmanager
def forward_hooks(called: torch.nn.Module, model: PreTrainedModel, deltas: RopeDeltas) -> Iterator[None]:
    """While the block lasts, a CapsuleCache that `called` is given knows of the forward.

    Args:
        called: the model, or a wrapper around it.
        model: of transformers, whose rotations are handed over.
        deltas: of the model.
    """

    checked: list[Method] = []

    def check(method: Method) -> None:
        """Of caches that are passed by hand, once each method."""
        attached = attached_here(model)
        if all(method is not one for one in checked) and (attached is None or method is not attached.method):
            method.check_model(model, attached is not None and attached.strict)
            checked.append(method)

    def begin(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            # A compiled forward is a decode step over a static tail: there is nothing to prepare.
            return
        _clear()
        cache = passed_cache(kwargs)
        if isinstance(cache, CapsuleCache):
            check(cache.method)
            input_ids = kwargs.get("input_ids", args[0] if args else None)
            deltas.begin_forward(cache, kwargs)
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

    def end(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        set_mask_over_segments(False)
        cache = _active.get()
        if cache is not None:
            deltas.end_forward(cache, kwargs)
            cache.end_forward()
        _active.set(None)

    with ExitStack() as stack:
        stack.callback(_clear)
        handles = [
            called.register_forward_pre_hook(begin, with_kwargs=True),
            called.register_forward_hook(end, with_kwargs=True),
        ]
        if called is model:
            rotations = [m for n, m in model.get_decoder().named_modules() if n.rpartition(".")[2] == "rotary_emb"]
            handles += [module.register_forward_hook(rotation, with_kwargs=True) for module in rotations]
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def hidden_state_hooks(model: PreTrainedModel) -> Iterator[None]:
    """While the block lasts, caches are handed what enters each decoder layer."""

    def enter(index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = None if torch.compiler.is_compiling() else _active.get()
        if cache is not None:
            cache.set_hidden_states(index, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    with ExitStack() as stack:
        for index, layer in enumerate(getattr(model.get_decoder(), "layers", ())):
            stack.callback(layer.register_forward_pre_hook(partial(enter, index), with_kwargs=True).remove)
        yield


def _clear() -> None:
    clear_pending_layer()
    _active.set(None)
