"""MixKV: the mixed score worked out by hand, and on both bases by loops."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.prefills import HEADS, mixed, places

from kvcapsule.policy import AdaKV, MixKV, SnapKV
from kvcapsule.policy.mixkv import mixed_scores


def test_scores_by_hand() -> None:
    """Two keys point the same way, so the mean cosine of a pair is 1/3; values are 3, 1 and 2 long."""
    attention = torch.tensor([[0.2, 0.1, 0.3]], dtype=torch.float64)
    keys = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]], dtype=torch.float64)
    values = torch.tensor([[[0.0, 3.0], [1.0, 0.0], [2.0, 0.0]]], dtype=torch.float64)
    # Both measures have the mean 0.2 of the attention: diversity 0, 0.6, 0; lengths 0.4, 0, 0.2.
    expected = [2 / 3 * (0.2 + 0.4), 1 / 3 * 0.6 + 2 / 3 * 0.1, 2 / 3 * (0.3 + 0.2)]
    assert mixed_scores(attention, keys, values)[0].tolist() == pytest.approx(expected)


def test_keys_that_are_alike_leave_the_importance_out() -> None:
    """Redundancy 1: only diversity counts, of which there is none."""
    keys = torch.ones(1, 4, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]
    attention, values = torch.rand(1, 4, dtype=torch.float64), torch.rand(1, 4, 3, dtype=torch.float64)
    assert float(mixed_scores(attention, keys, values).abs().max()) < 1e-12


def test_one_token_has_a_score() -> None:
    one = torch.full((2, 1, 4), 0.5, dtype=torch.float64)
    assert bool(mixed_scores(one[..., 0], one, one).isfinite().all())


def by_loops(attention: list[float], keys: torch.Tensor, values: torch.Tensor) -> list[float]:
    """z of one head's tokens, from every pair of keys."""
    n = len(attention)
    unit = F.normalize(keys, dim=1)
    pairs = [float(unit[i] @ unit[j]) for i in range(n) for j in range(n) if i != j]
    redundancy = sum(pairs) / len(pairs)
    mean = sum(attention) / n

    def like(measure: list[float]) -> list[float]:
        normal = [(x - min(measure)) / (max(measure) - min(measure)) for x in measure]
        return [x * mean / (sum(normal) / n) for x in normal]

    diversity = like([-float(F.cosine_similarity(k, unit.mean(dim=0), dim=0)) for k in keys])
    lengths = like([float(v.norm()) for v in values])
    return [redundancy * d + (1 - redundancy) * (a + v) for d, a, v in zip(diversity, attention, lengths, strict=True)]


@pytest.mark.parametrize("base", ["snapkv", "adakv"])
def test_each_head_keeps_the_greatest(base: str) -> None:
    """Rows of unlike padding and several images. On AdaKV's base a head keeps as many as AdaKV gives it, others."""
    of = mixed(1)[0]
    visual, _ = MixKV(0.3, window=6, kernel=3, base=base).compress(of)
    attention = SnapKV(0.3, window=6, kernel=3).scores(of)
    rival, _ = (SnapKV if base == "snapkv" else AdaKV)(0.3, window=6, kernel=3).compress(of)
    differs = False
    for row in (0, 1, 3):
        for head in range(HEADS):
            expected = []
            for span in (s for s in of.spans if s.row == row):
                run = slice(span.start, span.start + span.length)
                z = by_loops(attention[row, head, run].tolist(), of.keys[row, head, run], of.values[row, head, run])
                count = sum(span.start <= j < span.start + span.length for j in places(rival, row)[head])
                expected += [span.start + j for j in sorted(range(span.length), key=lambda j: -z[j])[:count]]
            assert places(visual, row)[head] == sorted(expected)
            differs |= places(visual, row)[head] != places(rival, row)[head]
    assert differs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixKV(0.0), "retention ratio 0.0 is outside"),
        (lambda: MixKV(0.5, base="h2o"), "base 'h2o' is neither 'snapkv' nor 'adakv'"),
        (lambda: MixKV(0.5, kernel=2), "kernel 2"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
