"""Attention over the full cache of one layer: in place, and with the copies that transformers' caches make.

In place means preallocated keys and values [B, H, N, D] that are neither copied nor repeated over query heads. Four
implementations are timed, and the fastest one of a cell is its baseline. A DynamicCache (a `torch.cat` of all keys and
values at every step) and the repeated KV heads of transformers under a mask are timed as well, to show that they are no
baseline.

Shapes: B batch, H KV heads, G query heads per KV head, N tokens, D head dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class FullCache(NamedTuple):
    """Keys and values of one layer, [B, H, N, D], the new token's included."""

    keys: torch.Tensor
    values: torch.Tensor


Attend = Callable[[torch.Tensor, FullCache, float], torch.Tensor]
"""Attention of a query [B, H * G, 1, D] to a full cache with a scale: [B, H * G, 1, D]."""


def products(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """q K^T, softmax, p V by two batched products."""
    q, k, v = _flat(query, cache)
    out = torch.bmm(torch.bmm(q * scale, k.transpose(1, 2)).softmax(-1), v)
    return out.view(query.shape)


def products_by_rows(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """The same with the first product as K q^T, which is faster in some libraries."""
    q, k, v = _flat(query, cache)
    out = torch.bmm(torch.bmm(k, (q * scale).transpose(1, 2)).softmax(1).transpose(1, 2), v)
    return out.view(query.shape)


def sdpa(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """PyTorch's attention with grouped queries."""
    grouped = query.shape[1] != cache.keys.shape[1]
    return F.scaled_dot_product_attention(query, cache.keys, cache.values, scale=scale, enable_gqa=grouped)


def sdpa_by_group(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """PyTorch's attention with the query heads of a KV head as its queries, so that no kernel repeats KV heads."""
    q = query.view(query.shape[0], cache.keys.shape[1], -1, query.shape[3])
    return F.scaled_dot_product_attention(q, cache.keys, cache.values, scale=scale).view(query.shape)


def dynamic(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """A DynamicCache's step: keys and values concatenated with the new token's, then PyTorch's attention without a
    mask."""
    return sdpa(query, _concatenated(cache), scale)


def dynamic_repeated(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """A DynamicCache's step under a mask, as for padded prompts: the KV heads are repeated as well."""
    return static_repeated(query, _concatenated(cache), scale)


def static_repeated(query: torch.Tensor, cache: FullCache, scale: float) -> torch.Tensor:
    """A StaticCache's step, which always has a mask: no copy, but repeated KV heads."""
    groups = query.shape[1] // cache.keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in cache)
    return F.scaled_dot_product_attention(query, keys, values, scale=scale)


IN_PLACE: dict[str, Attend] = {
    "in-place-products": products,
    "in-place-products-by-rows": products_by_rows,
    "in-place-sdpa": sdpa,
    "in-place-sdpa-by-group": sdpa_by_group,
}
WITH_COPIES: dict[str, Attend] = {
    "dynamic-cat": dynamic,
    "dynamic-cat-repeat": dynamic_repeated,
    "static-repeat": static_repeated,
}


def extra_bytes(name: str, stored: int, group: int) -> int:
    """Bytes that an implementation allocates while it runs, beside the cache of `stored` bytes."""
    return stored * (("cat" in name) + group * (name.endswith("repeat") and group > 1))


def _flat(query: torch.Tensor, cache: FullCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, _, dim = cache.keys.shape
    return query.view(batch * heads, -1, dim), cache.keys.flatten(0, 1), cache.values.flatten(0, 1)


def _concatenated(cache: FullCache) -> FullCache:
    """Keys and values with a new token, as DynamicLayer.update concatenates them."""
    parts = ((x[:, :, :-1], x[:, :, -1:]) for x in cache)
    return FullCache(*(torch.cat(pair, dim=2) for pair in parts))
