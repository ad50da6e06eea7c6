"""What the text behind the last image attends to: a score for each token, and how sparse a layer's attention is (arXiv
2410.23317).

    A      = softmax(Q_P K^T * scale), causal        P: the prompt's tokens behind its last visual one; Q_P, K: queries
           of P, all keys
    gamma  = share of the A_qj, q in P, j <= q, with A_qj < p max_j A_qj       mean over query heads
    s_j    = sum over q in P of A_qj

Shapes: B rows, N tokens, H KV heads, G query heads per KV head, Q queries.
"""

from typing import NamedTuple

import torch

from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, Method
from .budgets import last_tokens
from .full import Full

THRESHOLD = 0.01
"""The paper's p."""
WINDOW = 50
"""Last prompt tokens that take the place of P in the paper's speed test."""
_CHUNK = 256
"""Queries whose attention is computed at once."""


class PostVision(NamedTuple):
    """Attention of the tokens that rank."""

    received: torch.Tensor
    """[B, H, G, N]: what each token gets from each query head, summed over the queries of P."""
    sparsity: torch.Tensor
    """[B]: gamma."""


def behind_last_image(prefill: LayerPrefill) -> torch.Tensor:
    """[B, N] bool: a row's text behind its last visual token; none in a row without images."""
    visual = prefill.visual()
    to_come = visual.flip(1).cumsum(dim=1).flip(1)
    return prefill.valid & (to_come == 0) & visual.any(dim=1, keepdim=True)


def ranking_queries(prefill: LayerPrefill, window: int = WINDOW, post_vision: bool = True) -> torch.Tensor:
    """[B, N] bool: the queries P; in a row without images, or with an image at its end, the row's last `window` tokens.

    These rank in every row where `post_vision` is False.
    """
    last = last_tokens(prefill.valid, window)
    if not post_vision:
        return last
    behind = behind_last_image(prefill)
    return torch.where(behind.any(dim=1, keepdim=True), behind, last)


def attention_of(prefill: LayerPrefill, queries: torch.Tensor, threshold: float = THRESHOLD) -> PostVision:
    """The attention of the tokens that `queries` [B, N] marks.

    Exact softmax over all keys that a query sees, of no other queries than these and a chunk of them at a time: no more
    than [B, H, G, 256, N] is in memory at once. In fp32 at least.
    """
    batch, heads, tokens, _ = prefill.keys.shape
    work = torch.promote_types(prefill.keys.dtype, torch.float32)
    keys = prefill.keys.to(work)[:, :, None]
    received = torch.zeros(batch, heads, prefill.query.shape[1] // heads, tokens, dtype=work, device=keys.device)
    kept = torch.zeros(batch, dtype=torch.int64, device=keys.device)
    visible = torch.zeros_like(kept)
    places = queries.any(dim=0).nonzero()[:, 0]
    positions = torch.arange(tokens, device=keys.device)
    for chunk in places.split(_CHUNK):
        seen = queries[:, chunk, None] & prefill.valid[:, None] & (positions <= chunk[:, None])
        # Rows of the batch whose token here is none of P attend to nothing, and give nothing.
        hidden = ~seen[:, None, None]
        logits = prefill.query[:, :, chunk].unflatten(1, (heads, -1)).to(work) @ keys.transpose(-1, -2) * prefill.scale
        attention = logits.masked_fill(hidden, torch.finfo(work).min).softmax(dim=-1).masked_fill(hidden, 0.0)
        received += attention.sum(dim=3)
        above = (attention >= threshold * attention.amax(dim=-1, keepdim=True)) & ~hidden
        kept += above.sum(dim=(1, 2, 3, 4))
        visible += seen.sum(dim=(1, 2))
    return PostVision(received, 1 - kept.to(work) / (prefill.query.shape[1] * visible).clamp_min(1))


def layer_sparsity(
    prefill: LayerPrefill, threshold: float = THRESHOLD, window: int = WINDOW, post_vision: bool = True
) -> torch.Tensor:
    """gamma of one layer, [B]; settings as those of VLCache."""
    return attention_of(prefill, ranking_queries(prefill, window, post_vision), threshold).sparsity


class SparsityMeter(Method):
    """The full cache; what it notes is how sparse each layer's attention was in the latest prefill.

        meter = SparsityMeter()
        with attach(model, meter):
            model.generate(**batch, max_new_tokens=1)
        meter.sparsity    # by layer: [B]

    Threshold as VLCache has it; the tokens that rank are those of its defaults.
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self.threshold = threshold
        self.sparsity: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        self.sparsity[prefill.layer] = layer_sparsity(prefill, self.threshold)
        return Full().compress(prefill)
