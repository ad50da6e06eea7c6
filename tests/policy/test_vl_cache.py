"""VL-Cache: sparsity, budgets, scores and kept tokens worked out by hand, and the pruning of text beside a capsule."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.op_recorder import Witness
from support.prefills import HEADS, alone, attention, mixed, places, run, same_answers, scripted, stored_bytes, tokens

from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.ratios import proportional
from kvcapsule.policy import Full, VLCache, attention_scores
from kvcapsule.policy.budgets import layer_counts
from kvcapsule.policy.vl_cache import RankedTokens, attention_of, clipped_shares, ranking_queries

# By hand

WEIGHTS = {
    (0, 4): [100, 1.1, 0.9, 50, 2],
    (0, 5): [10, 0.05, 0.2, 0.09, 5, 10],
    (1, 4): [1, 1, 1, 1, 1],
    (1, 5): [1000, 1, 1, 1, 1, 20],
}
"""Text at 0, an image at 1 to 3, text at 4 and 5. Sums: 154, 25.34, 5 and 1024."""
HAND = scripted(WEIGHTS, 6, 2, [(1, 3)])


def test_sparsity_by_hand() -> None:
    """Of 5 + 6 entries: one below 1 and two below 0.1 in the first head, none below 0.01 and four below 10 in the
    second."""
    queries = ranking_queries(HAND)
    assert float(attention_of(HAND, queries).sparsity) == pytest.approx((3 / 11 + 4 / 11) / 2)
    # A tenth: 1.1, 0.9 and 2 below 10; 0.05, 0.2 and 0.09 below 1; none; four and 20 below 100.
    assert float(attention_of(HAND, queries, 0.1).sparsity) == pytest.approx((6 / 11 + 5 / 11) / 2)
    assert float(attention_of(HAND, queries, 0.0).sparsity) == 0
    # Only the last token ranks: 2 of 6 and 4 of 6.
    last = torch.arange(6)[None] == 5
    assert float(attention_of(HAND, last).sparsity) == pytest.approx(0.5)


def test_token_scores_by_hand() -> None:
    """Sums over both queries, of all of the attention: the filter is for sparsity alone."""
    received = attention_of(HAND, ranking_queries(HAND)).received[0, 0]
    assert received[0].tolist() == pytest.approx(
        [
            100 / 154 + 10 / 25.34,
            1.1 / 154 + 0.05 / 25.34,
            0.9 / 154 + 0.2 / 25.34,
            50 / 154 + 0.09 / 25.34,
            2 / 154 + 5 / 25.34,
            10 / 25.34,
        ]
    )
    assert received[1].tolist() == pytest.approx([0.2 + 1000 / 1024, *[0.2 + 1 / 1024] * 4, 20 / 1024])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        # Sums over both heads: 2.22 for token 0, 0.529 for 3, 0.4142 for 5, 0.4113 for 4, 0.215 for 2, 0.210 for 1.
        ({"budget": 1 / 2, "recent": 0.0}, [0, 3, 5]),
        ({"budget": 2 / 3, "recent": 0.0}, [0, 3, 4, 5]),
        ({"budget": 1 / 3, "recent": 0.0}, [0, 3]),
        # The last token comes first: a tenth of two, rounded up; then the last two and the last three.
        ({"budget": 1 / 3}, [0, 5]),
        ({"budget": 1 / 2, "recent": 0.5}, [0, 4, 5]),
        ({"budget": 1 / 2, "recent": 1.0}, [3, 4, 5]),
        # Of the text alone, half of three.
        ({"budget": 2 / 3, "recent": 0.0, "scope": "text"}, [0, 5]),
    ],
)
def test_kept_tokens_by_hand(settings: dict[str, Any], kept: list[int]) -> None:
    found = VLCache(**settings).compress(HAND)
    assert sorted(j for part in found for head in places(part) for j in head) == kept
    assert all(1 <= j <= 3 for head in places(found.visual) for j in head)
    assert all(not 1 <= j <= 3 for head in places(found.text) for j in head)


def test_layer_shares_by_hand() -> None:
    """1 - gamma: 0.1, 0.5, 0.02, 0.38, which add up to 1."""
    weights = [1 - gamma for gamma in (0.9, 0.5, 0.98, 0.62)]
    assert clipped_shares(weights, 0.5, 0.01) == pytest.approx([0.2, 1.0, 0.04, 0.76])
    # Times 0.4: the third layer is below the least share.
    assert clipped_shares(weights, 0.1, 0.01) == pytest.approx([0.04, 0.2, 0.01, 0.152])
    # Times 3: two layers have more than all; what they cannot take is lost, or shared by the others, 5 to 1.
    assert clipped_shares(weights, 0.75, 0.01) == pytest.approx([0.3, 1.0, 0.06, 1.0])
    assert proportional(weights, 3.0, 0.01, 1) == pytest.approx([5 / 6, 1.0, 1 / 6, 1.0])
    # The least share is spent at the others' cost: 0.39 for three of 0.98.
    assert proportional(weights, 0.4, 0.01, 1) == pytest.approx(
        [0.39 * w / 0.98 for w in (0.1, 0.5)] + [0.01, 0.39 * 0.38 / 0.98]
    )
    assert clipped_shares(weights, 1.0, 0.01) == [1.0] * 4
    assert proportional([0.0, 1.0, 0.0], 1.5, 0.0, 1) == pytest.approx([0.25, 1.0, 0.25]), "no weight: what is left"
    assert clipped_shares([0.0, 0.0], 0.5, 0.0) == [0.5, 0.5]


def test_layer_counts_by_hand() -> None:
    assert layer_counts([0.2, 1.0, 0.04, 0.76], 25) == [5, 25, 1, 19]
    # 2.5 each are ten; 1.2, 1.3 and 3.4 are six.
    assert layer_counts([0.25] * 4, 10) == [3, 3, 2, 2]
    assert layer_counts([0.12, 0.13, 0.34], 10) == [1, 1, 4]
    assert layer_counts([0.001, 0.5], 10) == [1, 5], "one at least"
    assert layer_counts([0.3, 0.6], 0) == [0, 0]


def test_counts_and_recents_by_hand() -> None:
    """Half of twenty tokens, in shares of 1 to 5: 3.33 and 16.67, whose last fifths are 0.6 and 3.4, rounded up."""
    method, counts, recents = VLCache(0.5, recent=0.2), [3, 17], [1, 4]
    assert method.counts([0.9, 0.5], 20) == counts
    layers = [scripted({}, 20, 1, []).without_queries() for _ in range(2)]
    first_is_best = -torch.arange(20.0).expand(1, 20)
    found = method.commit(layers, [RankedTokens(first_is_best, torch.tensor([gamma])) for gamma in (0.9, 0.5)])
    for compressed, count, recent in zip(found, counts, recents, strict=True):
        assert places(compressed.text) == [[*range(count - recent), *range(20 - recent, 20)]]


# By loops


def observed(of: LayerPrefill, row: int, queries: Sequence[int], p: float) -> tuple[list[dict[int, float]], float]:
    """Of each query head what every token gets; and the sparsity."""
    received: list[dict[int, float]] = []
    shares = []
    for head in range(of.query.shape[1]):
        got: dict[int, float] = {}
        zeros = entries = 0
        for query in queries:
            given = attention(of, row, head, query, [j for j in range(query + 1) if of.valid[row, j]])
            zeros += sum(a < p * max(given.values()) for a in given.values())
            entries += len(given)
            got = {j: got.get(j, 0.0) + a for j, a in given.items()}
        received.append(got)
        shares.append(zeros / entries)
    return received, sum(shares) / len(shares)


WINDOW = 6
RANKING = [list(range(52, 60)), list(range(53, 60)), list(range(54, 60)), list(range(54, 60))]
"""In `mixed`: text behind one image and behind two; the last of a row of ten tokens without, and of one that ends with
its image."""


@pytest.mark.parametrize("chunk", [256, 7])
def test_attention_of_padded_rows(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_scores, "CHUNK", chunk)
    of = mixed()[1]
    queries = ranking_queries(of, WINDOW)
    found = attention_of(of, queries, 0.05)
    for row, expected in enumerate(RANKING):
        assert queries[row].nonzero()[:, 0].tolist() == expected
        received, sparsity = observed(of, row, expected, 0.05)
        assert 0.1 < sparsity < 0.9
        assert float(found.sparsity[row]) == pytest.approx(sparsity)
        for head, got in enumerate(received):
            torch.testing.assert_close(
                found.received[row, head // 2, head % 2], torch.tensor([got.get(j, 0.0) for j in range(60)]).double()
            )


@pytest.mark.parametrize("scope", ["all", "text"])
def test_kept_tokens_of_all_layers(scope: str) -> None:
    """Every row and layer, from the definition to the tokens that are stored."""
    layers = mixed()
    method = VLCache(0.4, threshold=0.05, window=WINDOW, scope=scope)
    found = run(method, layers)
    for row, ranking in enumerate(RANKING):
        visual = [j for j in range(60) if layers[0].visual()[row, j]]
        among = [j for j in range(60) if layers[0].valid[row, j] and not (scope == "text" and j in visual)]
        seen = [observed(of, row, ranking, 0.05) for of in layers]
        total = sum(1 - sparsity for _, sparsity in seen)
        exact = [0.4 * 3 * (1 - sparsity) / total * len(among) for _, sparsity in seen]
        assert 0.01 * len(among) < min(exact) < max(exact) < len(among)
        counts = []
        for compressed, (received, _), share in zip(found, seen, exact, strict=True):
            every, text = places([*compressed.visual, *compressed.text], row), places(compressed.text, row)
            assert len(every) == HEADS
            counts.append(len(every[0]))
            assert abs(counts[-1] - share) < 1
            for head, kept in enumerate(every):
                recent = among[len(among) - -(-counts[-1] // 10) :]
                rest = sorted(
                    (j for j in among if j not in recent), key=lambda j: -sum(got.get(j, 0.0) for got in received)
                )
                assert kept == sorted(recent + rest[: counts[-1] - len(recent)]), (row, head)
                assert [j for j in kept if j not in visual] == (text[head] if text else [])
        assert sum(counts) == round(0.4 * 3 * len(among))


# Properties

EVERY = [
    VLCache(0.4),
    VLCache(0.3, scope="text"),
]
each = pytest.mark.parametrize("method", EVERY, ids=["plain", "text"])


@each
def test_a_batch_is_its_rows_one_by_one(method: VLCache) -> None:
    """Each row has its own sparsities and budgets."""
    layers = mixed()
    together = run(method, layers)
    counts = set()
    for row in range(4):
        for of, ours, theirs in zip(layers, together, run(method, [alone(of, row) for of in layers]), strict=True):
            for part, single in zip(ours, theirs, strict=True):
                assert places(part, row) == places(single), (of.layer, row)
            counts.add(len(places([*ours.visual, *ours.text], row)[0]) / int(of.valid[row].sum()))
    assert len(counts) > 6, "rows and layers differ"


@each
def test_it_is_the_same_every_time(method: VLCache) -> None:
    for ours, theirs in zip(run(method, mixed()), run(method, mixed()), strict=True):
        for a, b in zip([*ours.visual, *ours.text], [*theirs.visual, *theirs.text], strict=True):
            assert isinstance(a.keys, torch.Tensor) and isinstance(b.keys, torch.Tensor)
            assert torch.equal(a.keys, b.keys) and torch.equal(a.owner, b.owner)


@each
def test_a_budget_of_one_keeps_everything(method: VLCache) -> None:
    whole = replace(method, budget=1.0)
    for of, found in zip(mixed(), run(whole, mixed()), strict=True):
        full = Full().compress(of)
        assert [places(found.text, row) for row in range(4)] == [places(full.text, row) for row in range(4)]
        if method.scope == "text":
            assert found.visual == []
            found = found._replace(visual=full.visual)
        same_answers(found, full, of)


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_bytes_fall_as_promised(budget: float) -> None:
    """Over four layers of 410 tokens; less where a layer is full, as what it cannot take is not spent."""
    layers = [tokens([(0, 5, 196), (0, 201, 196)], [0], 410, layer) for layer in range(4)]
    full = sum(stored_bytes(part) for of in layers for part in Full().compress(of))
    found = run(VLCache(budget), layers)
    used = sum(stored_bytes(part) for compressed in found for part in compressed)
    counts = [len(places([*c.visual, *c.text])[0]) for c in found]
    if max(counts) < 410:
        assert used == pytest.approx(budget * full, rel=0.02)
    else:
        assert used < budget * full
    assert (max(counts) == 410) == (budget > 0.4)


def test_only_the_ranking_queries_attend() -> None:
    """2,000 tokens, of which ten are behind the image: nothing is as large as the scores of 60 queries."""
    of = tokens([(0, 10, 1980)], [0], 2000)
    with Witness() as witness:
        attention_of(of, ranking_queries(of))
    assert 4 * 10 * 2000 <= witness.most() < 4 * 60 * 2000


def test_half_precision_is_scored_in_single() -> None:
    of = mixed()[2]
    half = replace(of, query=of.query.half(), keys=of.keys.half(), values=of.values.half())
    single = replace(half, query=half.query.float(), keys=half.keys.float())
    assert torch.equal(VLCache(0.4).observe(half).scores, VLCache(0.4).observe(single).scores)
    assert VLCache(0.4).observe(half).scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, "budget 0.0 is outside (0, 1]"),
        ({"budget": 1.2}, "budget 1.2 is outside (0, 1]"),
        ({"budget": 0.005}, "least 0.01 is what every layer keeps: it is from 0 to the budget, 0.005."),
        ({"budget": 0.1, "threshold": -0.1}, "threshold -0.1 and recent 0.1 are shares"),
        ({"budget": 0.1, "recent": 1.1}, "threshold 0.01 and recent 1.1 are shares"),
        ({"budget": 0.1, "window": 0}, "window 0"),
        ({"budget": 0.1, "scope": "some"}, "scope 'some' is none of "),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        VLCache(**settings)
