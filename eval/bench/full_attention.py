"""The full cache of one layer and the ways to attend to it: in place, and as transformers' caches make it.

In place means preallocated keys and values [B, H, N, D], no copy of them, and KV heads that are not repeated. Four ways
are timed, and what is measured against is whichever is quickest in that very cell. What a DynamicCache does (a
`torch.cat` of all keys and values a step) and what transformers does under a mask (repeat the KV heads) is timed too,
so that nobody takes such a row for the baseline.

Shapes: B batch, H KV heads, G query heads per KV head, N tokens, D head dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class FullCache(NamedTuple):
    """Keys and values of one layer, [B, H, N, D], the new token's included, and its own again for those who append
    it."""

    keys: torch.Tensor
    values: torch.Tensor


Attend = Callable[[torch.Tensor, FullCache, float], torch.Tensor]
"""Attention of a query [B, H * G, 1, D]; [B, H * G, 1, D]."""


def products(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """q K^T, softmax, p V by two batched products."""
    q, k, v = _flat(query, cache)
    out = torch.bmm(torch.bmm(q * scale, k.transpose(1, 2)).softmax(-1), v)
    return out.view(query.shape)


def products_by_rows(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """The same with the first product the other way round, K q^T: some libraries have a better loop for it."""
    q, k, v = _flat(query, cache)
    out = torch.bmm(torch.bmm(k, (q * scale).transpose(1, 2)).softmax(1).transpose(1, 2), v)
    return out.view(query.shape)


def sdpa(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """PyTorch's attention with grouped queries."""
    grouped = query.shape[1] != cache.keys.shape[1]
    return F.scaled_dot_product_attention(query, cache.keys, cache.values, scale=scale, enable_gqa=grouped)


def sdpa_by_group(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """PyTorch's attention with the query heads of a KV head as if they were queries: nothing is repeated whatever its
    kernel does."""
    q = query.view(query.shape[0], cache.keys.shape[1], -1, query.shape[3])
    return F.scaled_dot_product_attention(q, cache.keys, cache.values, scale=scale).view(query.shape)


def dynamic(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """A DynamicCache's step: keys and values joined with the new token's, then PyTorch's attention without a mask."""
    return sdpa(query, _joined(cache), scale)


def dynamic_repeated(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """A DynamicCache's step under a mask, as in a batch of prompts that are padded: the KV heads are repeated as
    well."""
    return static_repeated(query, _joined(cache), scale)


def static_repeated(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """A StaticCache's step, which always has a mask: no copy, but the KV heads repeated."""
    groups = query.shape[1] // cache.keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in cache)
    return F.scaled_dot_product_attention(query, keys, values, scale=scale)


IN_PLACE: dict[str, Attend] = {
    "in-place-products": products,
    "in-place-products-by-rows": products_by_rows,
    "in-place-sdpa": sdpa,
    "in-place-sdpa-by-group": sdpa_by_group,
}
AMPLIFIED: dict[str, Attend] = {
    "dynamic-cat": dynamic,
    "dynamic-cat-repeat": dynamic_repeated,
    "static-repeat": static_repeated,
}


def extra_bytes(name: str, stored: int, group: int) -> int:
    """What a way to attend makes besides the cache of `stored` bytes, while it runs."""
    return stored * (("cat" in name) + group * (name.endswith("repeat") and group > 1))


def _flat(query: torch.Tensor, cache: FullCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, _, dim = cache.keys.shape
    return query.view(batch * heads, -1, dim), cache.keys.flatten(0, 1), cache.values.flatten(0, 1)


def _joined(cache: FullCache) -> FullCache:
    """As DynamicLayer.update joins what it holds with a new token."""
    parts = ((x[:, :, :-1], x[:, :, -1:]) for x in cache)
    return FullCache(*(torch.cat(pair, dim=2) for pair in parts))
