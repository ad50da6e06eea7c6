"""Attention weights by which policies rank tokens, computed anew for a chunk of queries at a time.

Shapes: B rows, N tokens, H KV heads, G query heads per KV head, A = H G, Q queries of a chunk, K keys of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..methods.kept_rows import indices
from ..methods.layer_prefill import LayerPrefill

CHUNK = 256
"""Queries whose attention is in memory at once."""


class AttentionChunk(NamedTuple):
    """What up to CHUNK queries attend to."""

    queries: torch.Tensor
    """[Q] int64: their positions."""
    visible: torch.Tensor
    """[B, Q, K] bool: the keys of each query; none in a row that does not select this query."""
    weights: torch.Tensor
    """[B, H, G, Q, K], fp32 at least: softmax over the visible keys; 0 elsewhere."""


def masked_softmax(
    query_BAQD: torch.Tensor, keys_BHKD: torch.Tensor, visible_BQK: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention weights [B, H, G, Q, K] over the visible keys, 0 elsewhere; in fp32 at least."""
    work = torch.promote_types(keys_BHKD.dtype, torch.float32)
    query = query_BAQD.unflatten(1, (keys_BHKD.shape[1], -1)).to(work)
    hidden = ~visible_BQK[:, None, None]
    logits = query @ keys_BHKD.to(work)[:, :, None].transpose(-1, -2) * scale
    weights: torch.Tensor = logits.masked_fill_(hidden, torch.finfo(work).min).softmax(dim=-1)
    return weights.masked_fill_(hidden, 0.0)


def attention_chunks(
    prefill: LayerPrefill,
    queries_BN: torch.Tensor,
    keys_BN: torch.Tensor | None = None,
    causal: bool = True,
    alike: str | None = None,
) -> Iterator[AttentionChunk]:
    """The attention of the queries that `queries_BN` marks, and of no others; chunks are of up to K = N keys.

    Args:
        prefill: of the layer.
        queries_BN: bool.
        keys_BN: bool: the keys that the softmax is over; None: all that are no padding.
        causal: each query attends to keys up to its own position only.
        alike: a name for the queries if they are the same in all layers of the forward: an accelerator is then asked
            in the first layer alone which they are.
    """
    tokens = prefill.keys.shape[2]
    keys_BN = prefill.valid if keys_BN is None else keys_BN
    work = torch.promote_types(prefill.keys.dtype, torch.float32)
    keys_BHND, positions = prefill.keys.to(work), torch.arange(tokens, device=keys_BN.device)
    key = ("positions of queries", alike, tokens)
    chosen: list[int] | None = None if alike is None else prefill.shared.get(key)
    if chosen is None:
        marked: list[bool] = queries_BN.any(dim=0).tolist()
        chosen = [position for position, is_marked in enumerate(marked) if is_marked]
        if alike is not None:
            prefill.shared[key] = chosen
    selected = indices(chosen, queries_BN.device)
    ends = [position + 1 if causal else tokens for position in chosen]
    for begin in range(0, len(ends), CHUNK):
        queries = selected[begin : begin + CHUNK]
        end = ends[begin + len(queries) - 1]
        visible = queries_BN[:, queries, None] & keys_BN[:, None, :end]
        if causal:
            visible = visible & (positions[:end] <= queries[:, None])
        weights = masked_softmax(prefill.query[:, :, queries], keys_BHND[:, :, :end], visible, prefill.scale)
        yield AttentionChunk(queries, visible, weights)


def attention_from(prefill: LayerPrefill, queries_BN: torch.Tensor, alike: str | None = None) -> torch.Tensor:
    """[B, H, N]: causal attention that each token gets from the marked queries, summed over them and over the query
    heads of a KV head; alike: see attention_chunks."""
    batch, heads, tokens, _ = prefill.keys.shape
    work = torch.promote_types(prefill.keys.dtype, torch.float32)
    received = torch.zeros(batch, heads, tokens, dtype=work, device=prefill.keys.device)
    for chunk in attention_chunks(prefill, queries_BN, alike=alike):
        received[:, :, : chunk.weights.shape[4]] += chunk.weights.sum(dim=(2, 3))
    return received


def attention_received(prefill: LayerPrefill, first: int) -> torch.Tensor:
    """[B, H, N]: as `attention_from`, of all queries from position `first` on that are no padding."""
    positions = torch.arange(prefill.valid.shape[1], device=prefill.valid.device)
    return attention_from(prefill, prefill.valid & (positions >= first), f"from {first} on")


def behind_last_image(prefill: LayerPrefill) -> torch.Tensor:
    """[B, N] bool: a row's text behind its last visual token; none in a row without images."""
    visual = prefill.visual()
    visual_ahead = visual.flip(1).cumsum(dim=1).flip(1)
    return prefill.valid & (visual_ahead == 0) & visual.any(dim=1, keepdim=True)
