"""Keep the visual tokens that the text behind them attends to most: the score that VL-Cache ranks by (arXiv
2410.23317)."""

from dataclasses import dataclass

import torch

from ..methods.layer_prefill import LayerPrefill
from .base import TokenPruning


@dataclass(frozen=True)
class PostVisionAttention(TokenPruning):
    """Score of a token: attention that it gets in prefill from the tokens after the last image, summed over queries and
    heads.

    VL-Cache's score alone, at the same retention in every layer; its layer budgets, threshold and recent window are not
    part of this. In a later turn the attention is that among the turn's own tokens: what they give to the turns before
    is left out.
    """

    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        batch, heads, tokens, _ = prefill.keys.shape
        after = torch.zeros_like(prefill.valid)
        for row in range(batch):
            ends = [s.start + s.length for s in prefill.spans if s.row == row]
            after[row, max(ends, default=0) :] = prefill.valid[row, max(ends, default=0) :]
        first = int(after.any(dim=0).to(torch.int8).argmax())
        positions = torch.arange(tokens, device=after.device)
        query = prefill.query[:, :, first:].unflatten(1, (heads, -1)).float()
        logits = (query @ prefill.keys.float().transpose(-1, -2)[:, :, None]) * prefill.scale
        seen = prefill.valid[:, None, :] & (positions <= positions[first:, None])
        attention = logits.masked_fill(~seen[:, None, None], torch.finfo(logits.dtype).min).softmax(dim=-1)
        received: torch.Tensor = (attention * after[:, None, None, first:, None]).sum(dim=(1, 2, 3))
        return received
