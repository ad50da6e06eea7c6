"""Keep the visual tokens that the text behind them attends to most: the score that VL-Cache ranks by (arXiv
2410.23317)."""

from dataclasses import dataclass

import torch

from ..methods.layer_prefill import LayerPrefill
from .attention_scores import attention_from, behind_last_image
from .base import TokenPruning


@dataclass(frozen=True)
class PostVisionAttention(TokenPruning):
    """Score of a token: attention that it gets in prefill from the tokens after the last image, summed over queries and
    heads.

    VL-Cache's score alone, at the same retention in every layer; its layer budgets, threshold and recent window are not
    part of this. In a later turn the attention is that among the turn's own tokens: what they give to the turns before
    is left out.
    """

    reads_question = True

    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        return attention_from(prefill, behind_last_image(prefill), "behind the last image").sum(dim=1)
