"""The attention function that transformers calls: the model's own attention in prefill, attention over segments afterwards.

transformers calls `Cache.update` and then the attention function, layer by layer. The cache layer leaves itself as the pending call of
its thread; the attention function takes it from there. A pending call that nobody took means that the model runs another attention
function, which would read the tail alone: the next `update` refuses that.
"""

from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "kvcapsule"
"""The name under which this attention is registered with transformers."""


class PendingLayer(Protocol):
    """A cache layer between its update and its attention."""

    @property
    def fresh(self) -> bool:
        """Whether all that the layer holds are the keys and values of this very call."""

    def attend(self, query: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention over what the layer holds and the new tokens: [B, H * G, Q, D]."""

    def commit(self, query: torch.Tensor, scale: float) -> None:
        """Store the new tokens."""


_pending: ContextVar[PendingLayer | None] = ContextVar("kvcapsule_pending", default=None)


def announce(layer: PendingLayer) -> None:
    """Make `layer` the one that the next attention call of this thread reads.

    Raises:
        RuntimeError: if the layer announced before was never read.
    """
    if _pending.get() is not None:
        _pending.set(None)
        raise RuntimeError(
            "a CapsuleCache was filled, but the model's attention never read it: the model does not run the kvcapsule attention. "
            "Generate inside `with kvcapsule.attach(model, ...):`."
        )
    _pending.set(layer)


def forget() -> None:
    """Drop a pending call that an aborted forward left behind."""
    _pending.set(None)


def capsule_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H * G, Q, D], key and value [B, H, N, D]; returns [B, Q, H * G, D]."""
    layer = _pending.get()
    _pending.set(None)
    if layer is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layer.fresh:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    else:
        out = layer.attend(query, scale, attention_mask).transpose(1, 2).contiguous()
    layer.commit(query, scale)
    return out, None


AttentionInterface.register(IMPLEMENTATION, capsule_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
