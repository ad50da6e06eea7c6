"""H2O (arXiv 2306.14048): each KV head keeps its heavy hitters, the visual tokens that got most attention in the whole
prompt."""

from dataclasses import dataclass

import torch

from ..methods.layer_prefill import LayerPrefill
from .attention_scores import attention_received
from .base import HeadPruning


@dataclass(frozen=True)
class H2O(HeadPruning):
    """Score of token j in KV head h: sum over all prompt queries i >= j and the head's query heads of A_ij, the causal
    softmax.

    The paper splits its budget evenly between heavy hitters and recent tokens, and evicts a token with every one that
    is written. Here the whole budget is heavy hitters (a prompt's recent tokens are text, which stays), chosen once, as
    prefill ends; query heads that share a KV head are summed. As in the paper, earlier tokens have more queries to be
    read by. The cost is that of prefill's scores computed anew.
    """

    reads_question = True

    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        return attention_received(prefill, 0)
