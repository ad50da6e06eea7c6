"""Budgets in whole tokens, and the tokens that fill them."""

from collections.abc import Sequence
from math import floor

import torch

from ..methods.ratios import proportional


def largest_remainder(exact: Sequence[float], total: int) -> list[int]:
    """Whole numbers of sum `total`: the whole part of each, and 1 more for those with the greatest fractions, of equal
    ones the first."""
    counts = [floor(number) for number in exact]
    # A fraction of all but the last bits of a double is a whole number that was computed.
    order = sorted(range(len(exact)), key=lambda i: (round(counts[i] - exact[i], 6), i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def share_out(weights: Sequence[float], least: int, most: int, total: int) -> list[int]:
    """Whole numbers in proportion to `weights`, each from `least` to `most`, whose sum is `total`, or as near as these
    allow."""
    total = min(max(total, least * len(weights)), most * len(weights))
    return largest_remainder(proportional(weights, total, least, most), total)


def layer_counts(shares: Sequence[float], tokens: int) -> list[int]:
    """Tokens of each layer, of `tokens` that there are: at least 1 each, and together the rounded sum of the shares."""
    exact = [min(tokens, max(1.0, share * tokens)) for share in shares]
    return largest_remainder(exact, round(sum(exact)))


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Rank of each score along the last dimension: 0 is the greatest; of equal ones the first comes first."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)


def last_tokens(among_BN: torch.Tensor, counts: torch.Tensor | int) -> torch.Tensor:
    """[B, N] bool: the last `counts` ([B, 1] or one for all) of the marked tokens in each row."""
    behind = among_BN.sum(dim=1, keepdim=True) - among_BN.cumsum(dim=1)
    return among_BN & (behind < counts)


def best_tokens(
    scores_BN: torch.Tensor, among_BN: torch.Tensor, counts_B: torch.Tensor, always_BN: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, N] bool: in each row the `counts_B` tokens with the highest scores, of equal ones the first.

    Args:
        scores_BN: floats.
        among_BN: bool: the tokens that compete.
        counts_B: int64.
        always_BN: bool: tokens that come before all others.
    """
    ranked = scores_BN.masked_fill(~among_BN, -torch.inf)
    if always_BN is not None:
        ranked = ranked.masked_fill(among_BN & always_BN, torch.inf)
    return among_BN & (ranks(ranked) < counts_B[:, None])
