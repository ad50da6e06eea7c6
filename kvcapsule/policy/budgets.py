"""Budgets that layers share: from a weight for each layer to whole numbers of tokens, and from scores to the tokens
that are kept."""

from collections.abc import Sequence
from math import floor

import torch

OVERFLOWS = ("clip", "share")
_STEPS = 200
"""Of the bisection: past the precision of a float64."""


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError for a setting that is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is none of {', '.join(map(repr, choices))}.")


def layer_shares(weights: Sequence[float], mean: float, least: float, most: float, overflow: str) -> list[float]:
    """Each layer's share of its own tokens, in proportion to its weight: clip(weight / sum of weights * mean * layers,
    least, most).

    Args:
        weights: of the layers, 0 or more; all of them 0 count as all alike.
        mean: of the shares, before they are clipped.
        least: share of a layer, whatever its weight.
        most: as least; a mean of `most` gives it to every layer, so that the end of the dial is the full cache.
        overflow: "clip": the shares are what the formula gives, and their mean may not be `mean`; "share": what a layer
            cannot take goes to the others, in proportion to their weights, and their mean is `mean`.
    """
    layers, total = len(weights), sum(weights)
    if mean >= most:
        return [most] * layers
    if total <= 0:
        return [min(most, max(least, mean))] * layers

    def clipped(scale: float) -> list[float]:
        return [min(most, max(least, scale * weight)) for weight in weights]

    if overflow == "clip":
        return clipped(mean * layers / total)
    # A layer without weight has its turn once all others are full.
    weights = [max(weight, 1e-9 * max(weights)) for weight in weights]
    low, high = 0.0, most / min(weights)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(middle)) < mean * layers else (low, middle)
    return clipped(high)


def whole_counts(shares: Sequence[float], tokens: int) -> list[int]:
    """Tokens of each layer, of `tokens` that there are: one at least, and together the rounded sum of what the shares
    say.

    Largest remainders: every layer has the whole part of its share, and what is left goes, a token each, to those with
    the greatest fractions, the first layer first where they are alike.
    """
    exact = [min(tokens, max(1.0, share * tokens)) for share in shares]
    counts = [floor(count) for count in exact]
    left = round(sum(exact)) - sum(counts)
    for layer in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[:left]:
        counts[layer] += 1
    return counts


def last_tokens(among: torch.Tensor, counts: torch.Tensor | int) -> torch.Tensor:
    """The last `counts` ([B, 1] or one for all) of the tokens that `among` [B, N] marks, in each row."""
    behind = among.sum(dim=1, keepdim=True) - among.cumsum(dim=1)
    return among & (behind < counts)


def best_tokens(
    scores: torch.Tensor, among: torch.Tensor, counts: torch.Tensor, always: torch.Tensor | None = None
) -> torch.Tensor:
    """Marks [B, R, N]: in each row and for each of its R sets the `counts` [B] tokens with the highest scores, the
    first where alike.

    Args:
        scores: [B, R, N].
        among: [B, N] bool: the tokens that compete.
        counts: [B] int64.
        always: [B, N] bool: tokens that come before all others.
    """
    ranked = scores.masked_fill(~among[:, None], -torch.inf)
    if always is not None:
        ranked = ranked.masked_fill((among & always)[:, None], torch.inf)
    rank = ranked.argsort(dim=2, descending=True, stable=True).argsort(dim=2, stable=True)
    return among[:, None] & (rank < counts[:, None, None])
