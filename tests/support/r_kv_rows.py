"""Rows that R-KV ranks, and where they come to lie."""

import math

import torch

from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.policy import RKV
from kvcapsule.policy.head_rows import HeadRows
from kvcapsule.vlm.spans import VisualSpan
from support.builders import DIM, HEADS, rand

GROUP, TOKENS, WINDOW = 2, 30, 4
SMALL = RKV(budget_tokens=12, buffer=8, window=WINDOW, kernel=3, threshold=0.3)
PADDING = (0, 5)
"""Absent tokens at the front of each row."""


def tokens(rows: int = 2, padding: tuple[int, ...] = PADDING, count: int = TOKENS) -> HeadRows:
    """Keys with a direction in common, so that many are similar; values tell a token's place."""
    keys = rand(rows, HEADS, count, DIM, seed=1) + 0.7 * rand(rows, HEADS, 1, DIM, seed=2)
    values = torch.arange(count, dtype=torch.float64)[None, None, :, None].expand(rows, HEADS, count, DIM).clone()
    valid = (torch.arange(count) >= torch.tensor(padding)[:, None])[:, None].expand(-1, HEADS, -1)
    return HeadRows(keys, values, valid, torch.zeros_like(valid))


# Scores, in loops


def softmax(xs: list[float]) -> list[float]:
    top = max(xs)
    weights = [math.exp(x - top) for x in xs]
    return [w / sum(weights) for w in weights]


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def importance(method: RKV, keys: torch.Tensor, queries: torch.Tensor, scale: float) -> list[float]:
    """Of the keys [C, D] of one KV head, asked by queries [G, W, D]."""

    def smoothed(xs: list[float]) -> list[float]:
        reach = method.kernel // 2
        return [max(xs[max(0, j - reach) : j + reach + 1]) for j in range(len(xs))]

    attention = []
    for i in range(queries.shape[1]):
        attention.append(softmax([max(dot(queries[g, i], k) for g in range(queries.shape[0])) * scale for k in keys]))
    attention = [smoothed(row) for row in attention]
    return [sum(row[j] for row in attention) / len(attention) for j in range(len(keys))]


def redundancy(method: RKV, keys: torch.Tensor) -> list[float]:
    """Of all but the last tokens of one KV head, keys [N, D]."""
    n = len(keys) - method.window
    lengths = [math.sqrt(dot(k, k)) for k in keys]
    cosine = [[0.0 if i == j else dot(keys[i], keys[j]) / lengths[i] / lengths[j] for j in range(n)] for i in range(n)]
    for i in range(n):
        similar = [j for j in range(n) if j != i and cosine[i][j] > method.threshold]
        for j in similar[max(0, len(similar) - method.beta) :]:
            cosine[i][j] = 0.0
    return softmax([sum(cosine[i][j] for i in range(n)) / n for j in range(n)])


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:count])


def prompt(
    spans: tuple[tuple[int, int, int], ...] = ((0, 2, 12), (1, 8, 10)), padding: tuple[int, ...] = PADDING
) -> LayerPrefill:
    of = tokens(padding=padding)
    query = rand(2, HEADS * GROUP, TOKENS, DIM, seed=3)
    visual = [VisualSpan(row, start, length, (1, 1, length)) for row, start, length in spans]
    return LayerPrefill(
        layer=0, query=query, keys=of.keys, values=of.values, spans=visual, valid=of.valid[:, 0], scale=DIM**-0.5
    )


def own(cache: CapsuleCache) -> list[CapsuleLayer]:
    return [layer for layer in cache.layers if isinstance(layer, CapsuleLayer)]
