"""The attention function that transformers calls: the model's own attention in prefill, attention over segments
afterwards.

Which attention is the model's own (eager, sdpa, flex_attention, ...) is known by the config that its layers hold, for
as long as the model is attached. Its masks differ in form, so the mask function asks what will read the mask: what the
model's own attention reads is made by its own mask function, what segments are read under is boolean.

transformers calls `Cache.update` and then the attention function, layer by layer. `update` registers its cache layer as
the pending layer of the thread; the attention function removes it there. A layer that is still pending at the next
`update` means that the model runs another attention function, which would read the tail alone: that is refused.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import sdpa_mask

from ..errors import ConfigError
from .autocast import as_attention_reads, without_autocast

IMPLEMENTATION = "kvcapsule"
"""The name under which this attention is registered with transformers."""


class PendingLayer(Protocol):
    """A cache layer between its update and its attention."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is stored from earlier calls."""

    def attend(self, query: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention over what the layer holds and the new tokens: [B, H * G, Q, D]."""

    def commit(self, query: torch.Tensor, scale: float) -> None:
        """Store the new tokens."""


_pending: ContextVar[PendingLayer | None] = ContextVar("kvcapsule_pending", default=None)
_over_segments: ContextVar[bool] = ContextVar("kvcapsule_over_segments", default=False)
"""Whether the present forward of this thread is over a CapsuleCache that holds something."""
_traced: list[PendingLayer] = []
"""The pending layer while a forward is traced, which happens in one thread at a time: the compiler cannot follow
context variables."""
_model_attention: dict[int, str] = {}
"""The model's own attention, by the id of each config that its layers hold, while the model is attached."""
_UNSUPPORTED = {
    "softcap": "caps its attention scores",
    "s_aux": "has attention sinks",
    "position_bias": "adds a bias to its attention scores",
}
"""Options of an attention layer that attention over segments does not support."""


@contextmanager
def prefill_attention(configs: list[PreTrainedConfig], implementation: str) -> Iterator[None]:
    """While the block lasts, layers that hold one of `configs` run `implementation` in prefill.

    Raises:
        ConfigError: if it is none that a call of attention can be handed to.
    """
    if implementation.startswith("paged|") or (
        implementation != "eager" and implementation not in AttentionInterface()
    ):
        raise ConfigError(
            f"the model's attention implementation {implementation!r} cannot run the prefill of a CapsuleCache: choose"
            ' another before, with model.set_attn_implementation("sdpa"), "eager" or "flex_attention".'
        )
    _model_attention.update({id(config): implementation for config in configs})
    try:
        yield
    finally:
        for config in configs:
            del _model_attention[id(config)]


def set_mask_over_segments(value: bool) -> None:
    """Say whether the next mask is for attention over segments; in a compiled forward, a decode step, all masks are."""
    if not torch.compiler.is_compiling():
        _over_segments.set(value)


def set_pending_layer(layer: PendingLayer) -> None:
    """Make `layer` the one that the next attention call of this thread reads.

    Raises:
        RuntimeError: if no attention call read the layer before.
    """
    if torch.compiler.is_compiling():
        _traced.append(layer)
        return
    if _pending.get() is not None:
        _pending.set(None)
        raise RuntimeError(
            "a CapsuleCache was filled, but the model's attention never read it: the model does not run the kvcapsule"
            " attention. Generate inside `with kvcapsule.attach(model, ...):`."
        )
    _pending.set(layer)


def clear_pending_layer() -> None:
    """Drop the pending layer of an aborted forward."""
    _pending.set(None)
    _over_segments.set(False)


def capsule_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: query [B, H * G, Q, D], key and value [B, H, N, D]; returns [B, Q, H * G, D].

    The mask is of the form that the model's own attention reads; boolean where segments are read.

    Raises:
        NotImplementedError: for layers that ask for what attention over segments does not do.
    """
    layer = _pop_pending_layer()
    if layer is None:
        return _run_model_attention(module, query, key, value, attention_mask, scaling, **kwargs)
    for option, what in _UNSUPPORTED.items():
        if kwargs.get(option) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} {what} ({option}), which attention over segments does not do yet: "
                "use this model without a CapsuleCache."
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = None
    first, read = layer.is_empty, as_attention_reads(query)
    if first:
        out, weights = _run_model_attention(module, query, key, value, attention_mask, scaling, **kwargs)
    with without_autocast(query.device):
        if not first:
            out = layer.attend(read, scale, attention_mask).transpose(1, 2).contiguous()
        layer.commit(read, scale)
    return out, weights


def _pop_pending_layer() -> PendingLayer | None:
    """Remove and return the pending layer of this thread."""
    if torch.compiler.is_compiling():
        return _traced.pop() if _traced else None
    layer = _pending.get()
    _pending.set(None)
    return layer


def _run_model_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention that the model ran before it was attached."""
    config: Any = module.config
    name = _model_attention_name(config)
    if "flash" not in name:
        out, weights = _function(module, name)(module, query, key, value, mask, scaling=scaling, **kwargs)
        return out, weights
    # Flash attention looks up its kernel by the name in the config, so that stands there during the call: threads must
    # not share the model.
    config._attn_implementation = name
    try:
        out, weights = _function(module, name)(module, query, key, value, mask, scaling=scaling, **kwargs)
    finally:
        config._attn_implementation = IMPLEMENTATION
    return out, weights


def _model_attention_name(config: PreTrainedConfig) -> str:
    # A thread that attached nothing may be in a call when another thread leaves the last block: the config names the
    # model's own attention again, which leaving writes before it takes the entry away.
    name: str | None = _model_attention.get(id(config), config._attn_implementation)
    if name is None or name == IMPLEMENTATION:
        raise RuntimeError(
            "the kvcapsule attention runs inside `with kvcapsule.attach(model, ...):` alone, for the very model"
            " attached."
        )
    return name


def _function(module: torch.nn.Module, name: str) -> Callable[..., Any]:
    if name != "eager":
        function: Callable[..., Any] = AttentionInterface()[name]
        return function
    # Eager attention is registered nowhere: each of transformers' modeling files has its own beside the layers that
    # call it.
    for kind in type(module).__mro__:
        eager = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager  # type: ignore[no-any-return]
    raise NotImplementedError(
        f"{type(module).__name__} has no eager_attention_forward beside it to run in prefill: "
        'call model.set_attn_implementation("sdpa") before attaching.'
    )


def capsule_mask(*args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
    """transformers' mask interface: the mask of the model's own attention, or a boolean one where segments are read."""
    # Layers with a window (local_size) are the model's own cache layers, which its own attention reads.
    if (torch.compiler.is_compiling() or _over_segments.get()) and kwargs.get("local_size") is None:
        return sdpa_mask(*args, config=config, **kwargs)
    function: Callable[..., Any] | None = AttentionMaskInterface().get(_model_attention_name(config))
    # As transformers does, no mask for an attention that has no mask function.
    return None if function is None else function(*args, config=config, **kwargs)


AttentionInterface.register(IMPLEMENTATION, capsule_attention)
AttentionMaskInterface.register(IMPLEMENTATION, capsule_mask)
