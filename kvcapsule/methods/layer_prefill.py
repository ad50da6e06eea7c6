"""One layer as a method sees it when its prefill ends: queries, keys, values and visual spans."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..vlm.spans import VisualSpan


@dataclass(frozen=True, kw_only=True)
class LayerPrefill:
    """One layer's keys, values and queries of the tokens of one forward, rotated as the model does.

    Shapes: B rows, N tokens (left padding included), H KV heads, D head dim.
    """

    layer: int
    query: torch.Tensor
    """[B, H * G, N, D]."""
    keys: torch.Tensor
    """[B, H, N, D]."""
    values: torch.Tensor
    """[B, H, N, D]."""
    spans: Sequence[VisualSpan]
    """Visual spans, positions counted within these N tokens."""
    valid: torch.Tensor
    """[B, N] bool: False at padding."""
    scale: float
    """Factor of the attention scores."""
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    """The model's rotary cos and sin, each [B or 1, N, R]; None for models without RoPE."""
    shared: dict[Hashable, Any] = field(default_factory=dict)
    """What the layers of one forward (those of one device) have in common, so that it is computed and stored once."""
    before: Sequence[int] | None = None
    """[B]: tokens of each row before this forward's, padding not counted; None: none."""
    hidden: torch.Tensor | None = None
    """[B, N, C]: the residual stream as it enters the layer, for a method that asks
    (Method.needs_hidden_states); None otherwise."""

    def visual(self) -> torch.Tensor:
        """[B, N] bool: True at visual tokens."""
        marked = torch.zeros_like(self.valid)
        for span in self.spans:
            marked[span.row, span.start : span.start + span.length] = True
        return marked

    def tokens(self) -> list[int]:
        """Tokens of each row that are no padding.

        The host waits for an accelerator in a forward's first layer alone.
        """
        key = ("tokens", self.valid.shape[1])
        if key not in self.shared:
            self.shared[key] = self.valid.sum(dim=1).tolist()
        known: list[int] = self.shared[key]
        return known

    def position(self, span: VisualSpan) -> int:
        """Position of a span's first token in its row's sequence: padding does not count, tokens before this forward
        do."""
        before = 0 if self.before is None else self.before[span.row]
        return before + int(self.valid[span.row, : span.start].sum())

    def without_queries(self) -> "LayerPrefill":
        """The same without queries and hidden states, for those who hold it longer than they need them."""
        return replace(self, query=self.query[:, :, :0].clone(), hidden=None)

    def without_last(self, tokens: int) -> "LayerPrefill":
        """The prefill as it would be had its last `tokens` tokens not been fed.

        Raises:
            ValueError: if a visual span reaches into them.
        """
        if tokens == 0:
            return self
        end = self.keys.shape[2] - tokens
        if end < 0 or any(span.start + span.length > end for span in self.spans):
            raise ValueError(
                f"cannot remove {tokens} tokens of a prefill of {self.keys.shape[2]}: they are more, or an image is"
                " among them."
            )
        rotation = self.position_embeddings
        return replace(
            self,
            query=self.query[:, :, :end],
            keys=self.keys[:, :, :end],
            values=self.values[:, :, :end],
            valid=self.valid[:, :end],
            position_embeddings=None if rotation is None else (rotation[0][..., :end, :], rotation[1][..., :end, :]),
            hidden=None if self.hidden is None else self.hidden[:, :end],
        )
