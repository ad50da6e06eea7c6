"""TGV-KV: weights of text, scores, layer budgets and kept tokens worked out by hand and by loops."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from support.prefills import attention, mixed, places, run, scripted

from kvcapsule.policy import TgvKV, attention_scores
from kvcapsule.policy.vl_cache import ranking_queries

# By hand

HAND = scripted(
    {
        (0, 4): [30, 5, 50, 5, 10],
        (1, 4): [10, 15, 30, 15, 30],
        (0, 5): [10, 45, 10, 15, 10, 10],
        (1, 5): [10, 45, 10, 15, 10, 10],
    },
    6,
    2,
    [(1, 3)],
)
"""Text at 0, an image at 1 to 3, text at 4 and 5. In the mean of both heads 4 gives 0.2 0.1 0.4 0.1 0.2, and 5 gives
0.1 0.45 0.1 0.15 0.1 0.1."""


def test_scores_by_hand() -> None:
    """w of 4 is the mean of 0.2 and 0.1, w of 5 is 0.1. The plain sum would rank token 1 above token 2."""
    guide = TgvKV(0.5).observe(HAND)
    assert guide.scores[0, 1:4].tolist() == pytest.approx(
        [0.15 * 0.1 + 0.1 * 0.45, 0.15 * 0.4 + 0.1 * 0.1, 0.15 * 0.1 + 0.1 * 0.15]
    )
    # Queries 0 to 3 attend evenly.
    assert guide.scores[0, [0, 4, 5]].tolist() == pytest.approx([1 + 1 / 2 + 1 / 3 + 1 / 4 + 0.3, 0.3, 0.1])
    assert float(guide.strength) == pytest.approx(0.6 + 0.7)


@pytest.mark.parametrize(
    ("budget", "sinks", "kept"),
    [
        # The last one, then text by what it gets, then the image by z.
        (1 / 6, 0, [5]),
        (2 / 6, 0, [0, 5]),
        (3 / 6, 0, [0, 4, 5]),
        (4 / 6, 0, [0, 2, 4, 5]),
        (5 / 6, 0, [0, 1, 2, 4, 5]),
        # The first ones before any text, whatever the budget.
        (3 / 6, 2, [0, 1, 5]),
        (4 / 6, 2, [0, 1, 4, 5]),
        (1 / 6, 4, [0, 1, 2, 3, 5]),
    ],
)
def test_kept_tokens_by_hand(budget: float, sinks: int, kept: list[int]) -> None:
    visual, text = TgvKV(budget, sinks=sinks).compress(HAND)
    assert sorted(j for part in (visual, text) for head in places(part) for j in head) == kept
    assert all(1 <= j <= 3 for head in places(visual) for j in head)


@pytest.mark.parametrize(
    ("budget", "sinks", "strength", "counts"),
    [
        (0.5, 0, [3.0, 1.0], [8, 2]),
        (0.5, 0, [9.0, 1.0], [9, 1]),
        # Two at least; what the first layer cannot take goes to the other.
        (0.5, 1, [9.0, 1.0], [8, 2]),
        (0.75, 0, [9.0, 1.0], [10, 5]),
        # No text gives anything to an image: evenly.
        (0.3, 0, [0.0, 0.0], [3, 3]),
        (1.0, 4, [5.0, 1.0], [10, 10]),
        (0.05, 4, [5.0, 1.0], [5, 5]),
    ],
)
def test_layer_counts_by_hand(budget: float, sinks: int, strength: list[float], counts: list[int]) -> None:
    assert TgvKV(budget, sinks=sinks).counts(strength, 10) == counts


# By loops

WINDOW = 6


@pytest.mark.parametrize("chunk", [256, 7])
def test_kept_tokens_of_all_layers(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row and layer, from the definition to the tokens that are stored: padding, several images, no image, and
    one behind which nothing is asked."""
    monkeypatch.setattr(attention_scores, "CHUNK", chunk)
    layers = mixed()
    policy = TgvKV(0.4, sinks=2, window=WINDOW)
    stored = run(policy, layers)
    for row in range(4):
        valid = [j for j in range(60) if layers[0].valid[row, j]]
        images = [j for j in valid if layers[0].visual()[row, j]]
        asking = ranking_queries(layers[0], WINDOW)[row].nonzero()[:, 0].tolist()
        ranked, strength = [], []
        for of in layers:
            a = {q: _mean_head(of, row, q, [j for j in valid if j <= q]) for q in valid}
            weight = {j: sum(a[q].get(j, 0.0) for q in asking if q >= j) / sum(q >= j for q in asking) for j in asking}
            z = {i: sum(weight[j] * a[j].get(i, 0.0) for j in asking) for i in images}
            t = {j: sum(a[q].get(j, 0.0) for q in valid) for j in valid if j not in images}
            first = [*valid[:2], valid[-1]]
            order = sorted(t, key=lambda j: -t[j]) + sorted(z, key=lambda i: -z[i])
            ranked.append(first + [j for j in order if j not in first])
            strength.append(sum(a[q].get(i, 0.0) for q in asking for i in images))
        counts = policy.counts(strength, len(valid))
        assert sum(counts) == round(0.4 * 3 * len(valid)) and (len(set(counts)) > 1) == bool(images)
        for (visual, text), order, count in zip(stored, ranked, counts, strict=True):
            for part, expected in (
                (visual, [j for j in order[:count] if j in images]),
                (text, [j for j in order[:count] if j not in images]),
            ):
                for head in places(part, row) or [[]]:
                    assert head == sorted(expected)


def _mean_head(of: Any, row: int, query: int, seen: list[int]) -> dict[int, float]:
    by_head = [attention(of, row, head, query, seen) for head in range(of.query.shape[1])]
    return {j: sum(a[j] for a in by_head) / len(by_head) for j in seen}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TgvKV(0.0), "budget 0.0 is outside (0, 1]"),
        (lambda: TgvKV(0.5, sinks=-1), "sinks -1"),
        (lambda: TgvKV(0.5, window=0), "window 0"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
