"""VL-Cache: sparsity, budgets, scores and kept tokens worked out by hand, and the pruning of text beside a capsule."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.builders import DIM as CAPSULE_DIM
from support.builders import prefill as two_rows
from support.builders import transform_capsule
from support.op_recorder import Witness
from support.prefills import HEADS, alone, attention, mixed, places, run, same_answers, scripted, stored_bytes, tokens
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule import attach
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.policy import Full, VLCache, postvision
from kvcapsule.policy.budgets import layer_shares, whole_counts
from kvcapsule.policy.combine import Combined
from kvcapsule.policy.postvision import SparsityMeter, attention_of, layer_sparsity, ranking_queries
from kvcapsule.policy.vl_cache import RankedTokens
from kvcapsule.vlm.spans import find_spans

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
    assert float(layer_sparsity(HAND)) == pytest.approx((3 / 11 + 4 / 11) / 2)
    # A tenth: 1.1, 0.9 and 2 below 10; 0.05, 0.2 and 0.09 below 1; none; four and 20 below 100.
    assert float(layer_sparsity(HAND, threshold=0.1)) == pytest.approx((6 / 11 + 5 / 11) / 2)
    assert float(layer_sparsity(HAND, threshold=0.0)) == 0
    # Only the last token ranks: 2 of 6 and 4 of 6.
    assert float(layer_sparsity(HAND, window=1, post_vision=False)) == pytest.approx(0.5)


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
        # The greater of both heads: 1.18 for token 0, 0.395 for 5, 0.328 for 3.
        ({"budget": 1 / 3, "recent": 0.0, "group": "max"}, [0, 5]),
        # The last token alone ranks: 1.37 for token 0, 0.414 for 5, 0.198 for 4, 0.009 for 2.
        ({"budget": 1 / 2, "recent": 0.0, "queries": "last", "window": 1}, [0, 4, 5]),
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
    assert layer_shares(weights, 0.5, 0.01, 1, "clip") == pytest.approx([0.2, 1.0, 0.04, 0.76])
    # Times 0.4: the third layer is below the least share.
    assert layer_shares(weights, 0.1, 0.01, 1, "clip") == pytest.approx([0.04, 0.2, 0.01, 0.152])
    # Times 3: two layers have more than all; what they cannot take is lost, or shared by the others, 5 to 1.
    assert layer_shares(weights, 0.75, 0.01, 1, "clip") == pytest.approx([0.3, 1.0, 0.06, 1.0])
    assert layer_shares(weights, 0.75, 0.01, 1, "share") == pytest.approx([5 / 6, 1.0, 1 / 6, 1.0])
    # The least share is spent at the others' cost: 0.39 for three of 0.98.
    assert layer_shares(weights, 0.1, 0.01, 1, "share") == pytest.approx(
        [0.39 * w / 0.98 for w in (0.1, 0.5)] + [0.01, 0.39 * 0.38 / 0.98]
    )
    assert layer_shares(weights, 1.0, 0.01, 1, "clip") == [1.0] * 4
    assert layer_shares([0.0, 1.0, 0.0], 0.5, 0.0, 1, "share") == pytest.approx([0.25, 1.0, 0.25]), (
        "no weight: what is left"
    )
    assert layer_shares([0.0, 0.0], 0.5, 0.0, 1, "clip") == [0.5, 0.5]


def test_whole_counts_by_hand() -> None:
    assert whole_counts([0.2, 1.0, 0.04, 0.76], 25) == [5, 25, 1, 19]
    # 2.5 each are ten; 1.2, 1.3 and 3.4 are six.
    assert whole_counts([0.25] * 4, 10) == [3, 3, 2, 2]
    assert whole_counts([0.12, 0.13, 0.34], 10) == [1, 1, 4]
    assert whole_counts([0.001, 0.5], 10) == [1, 5], "one at least"
    assert whole_counts([0.3, 0.6], 0) == [0, 0]


@pytest.mark.parametrize(
    ("recent_of", "counts", "recents"),
    [
        # Half of twenty tokens, in shares of 1 to 5: 3.33 and 16.67, whose last fifths are 0.6 and 3.4, rounded up.
        ("layer", [3, 17], [1, 4]),
        # Two of the mean of ten are the last ones in both layers; of the other eight, 1 to 5, 2.67 and 13.33.
        ("mean", [5, 15], [2, 2]),
    ],
)
def test_counts_and_recents_by_hand(recent_of: str, counts: list[int], recents: list[int]) -> None:
    method = VLCache(0.5, recent=0.2, recent_of=recent_of)
    assert method.counts([0.9, 0.5], 20) == counts
    layers = [scripted({}, 20, 1, []).without_queries() for _ in range(2)]
    first_is_best = -torch.arange(20.0).expand(1, 1, 20)
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
    monkeypatch.setattr(postvision, "_CHUNK", chunk)
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
@pytest.mark.parametrize("sets", ["layer", "head"])
def test_kept_tokens_of_all_layers(sets: str, scope: str) -> None:
    """Every row and layer, from the definition to the tokens that are stored."""
    layers = mixed()
    method = VLCache(0.4, threshold=0.05, window=WINDOW, sets=sets, scope=scope)
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
                readers = received if sets == "layer" else received[2 * head : 2 * head + 2]
                recent = among[len(among) - -(-counts[-1] // 10) :]
                rest = sorted(
                    (j for j in among if j not in recent), key=lambda j: -sum(got.get(j, 0.0) for got in readers)
                )
                assert kept == sorted(recent + rest[: counts[-1] - len(recent)]), (row, head)
                assert [j for j in kept if j not in visual] == (text[head] if text else [])
        assert sum(counts) == round(0.4 * 3 * len(among))


# Properties

EVERY = [
    VLCache(0.4),
    VLCache(0.4, sets="head", group="max"),
    VLCache(0.4, queries="last", window=9, recent_of="mean", overflow="share"),
    VLCache(0.3, scope="text"),
    VLCache(0.3, scope="text", sets="head"),
]
each = pytest.mark.parametrize("method", EVERY, ids=["plain", "heads", "last", "text", "text-heads"])


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


@pytest.mark.parametrize("sets", ["layer", "head"])
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_bytes_fall_as_promised(budget: float, sets: str) -> None:
    """Over four layers of 410 tokens, whatever a layer cannot take; without sharing, less where a layer is full."""
    layers = [tokens([(0, 5, 196), (0, 201, 196)], [0], 410, layer) for layer in range(4)]
    full = sum(stored_bytes(part) for of in layers for part in Full().compress(of))
    for overflow in ("share", "clip"):
        method = VLCache(budget, sets=sets, overflow=overflow)
        found = run(method, layers)
        used = sum(stored_bytes(part) for compressed in found for part in compressed)
        counts = [len(places([*c.visual, *c.text])[0]) for c in found]
        if overflow == "share" or max(counts) < 410:
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
        *(
            ({"budget": 0.1, name: "some"}, f"{name} 'some' is none of ")
            for name in ("queries", "sets", "group", "recent_of", "overflow", "scope")
        ),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        VLCache(**settings)


# Beside a capsule


def test_text_is_pruned_beside_a_capsule() -> None:
    """Visual bytes are the capsule's, text bytes the budget's; the text that is kept is that of the method alone."""
    capsule, method = transform_capsule().double(), VLCache(0.5, scope="text")
    layers = [two_rows(layer) for layer in range(2)]
    text = torch.arange(30.0, dtype=torch.float64)[None, None, :, None].expand(2, 2, 30, CAPSULE_DIM)
    for of, compressed in zip(layers, run(Combined(capsule, method), layers), strict=True):
        assert stored_bytes(compressed.visual) == stored_bytes(capsule.compress(of).visual) > 0
    layers = [replace(of, values=text.clone()) for of in layers]
    paired, by_itself = run(Combined(capsule, method), layers), run(method, layers)
    for row, count in ((0, 6), (1, 20)):
        kept = [places(compressed.text, row) for compressed in paired]
        assert kept == [places(compressed.text, row) for compressed in by_itself]
        assert sum(len(layer[0]) for layer in kept) == count, "half of two layers' text tokens"
        for layer in kept:
            assert layer[0] == layer[1] and set(layer[0]).isdisjoint(range(3, 27) if row == 0 else range(5, 15))


def test_only_text_is_held_until_all_layers_are_known() -> None:
    of = mixed()[0]
    held = VLCache(0.5, scope="text").retain(of)
    assert held.keys.shape == (4, HEADS, 11, 8) and held.query.shape[2] == 0 and not held.spans
    assert held.keys.untyped_storage().nbytes() == held.keys.numel() * 8
    for row, text in enumerate(
        ([9, 10, 11, *range(52, 60)], [0, 1, 42, 43, *range(53, 60)], list(range(50, 60)), list(range(1, 9)))
    ):
        assert held.values[row, 0, held.valid[row], 0].tolist() == text
        assert held.valid[row].tolist() == [False] * (11 - len(text)) + [True] * len(text)


def test_rows_without_text_and_without_images() -> None:
    only_image = tokens([(0, 0, 20)], [0], 20)
    assert run(VLCache(0.5, scope="text"), [only_image])[0] == ([], [])
    (compressed,) = run(VLCache(0.5), [only_image])
    assert compressed.text == [] and len(places(compressed.visual)[0]) == 10
    (compressed,) = run(VLCache(0.5), [tokens([], [0], 20)])
    assert compressed.visual == [] and len(places(compressed.text)[0]) == 10


# Through the model

TOKEN_BYTES = 4 * 2 * 2 * 32 * 4
"""Keys and values of one token in four layers."""


def test_sparsity_is_that_of_the_models_own_attention(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    batch = make_batch((1, "Read line 2."), (2, "What is the number beside the owl?"))
    spans = find_spans(model.config, batch["input_ids"], batch)
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            weights = model(**batch, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})
    meter = SparsityMeter()
    with attach(model, meter):
        model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert sorted(meter.sparsity) == [0, 1, 2, 3]
    for layer, of_layer in enumerate(weights):
        for row in range(2):
            first = int(batch["attention_mask"][row].argmax())
            behind = max(s.start + s.length for s in spans if s.row == row)
            zeros = entries = 0
            for query in range(behind, of_layer.shape[2]):
                given = of_layer[row, :, query, first : query + 1]
                zeros += int((given < 0.01 * given.amax(dim=1, keepdim=True)).sum())
                entries += given.numel()
            assert float(meter.sparsity[layer][row]) == pytest.approx(zeros / entries, abs=2e-4)
    assert len({round(float(s[0]), 2) for s in meter.sparsity.values()}) > 1


def test_generation_beside_a_capsule(
    model: LlavaForConditionalGeneration,
    make_batch: Callable[..., BatchFeature],
    greedy: dict[str, Any],
    identity: Callable[..., Capsule],
    random_transform: Callable[..., Capsule],
) -> None:
    """With all of the text and a capsule that stores everything, the full cache's answer; with half of it, half of its
    bytes."""
    batch = make_batch(
        (1, "Read line 2, please, and tell me which of the owls is beside the number that ends with seven.")
    )
    expected = model.generate(**batch, **greedy)
    stored = {}
    for name, method in (
        ("full", Combined(identity(49), VLCache(1.0, scope="text"))),
        ("whole", Combined(random_transform(49), VLCache(1.0, scope="text"))),
        ("half", Combined(random_transform(49), VLCache(0.5, scope="text"))),
    ):
        with attach(model, method):
            cache = CapsuleCache(model.config, method)
            found = model.generate(**batch, **greedy, **cache_argument(cache))
        if name == "full":
            assert torch.equal(found.sequences, expected.sequences)
        stored[name] = cache.bytes()
    text = batch["input_ids"].shape[1] - 196
    assert stored["whole"].text == text * TOKEN_BYTES + 4 * 8, "and the row's number, in each layer"
    assert stored["half"].text == pytest.approx(0.5 * text * TOKEN_BYTES, rel=0.02)
    assert stored["half"].visual == stored["whole"].visual < 0.5 * stored["full"].visual


@pytest.mark.parametrize("sets", ["layer", "head"])
def test_generation_with_beams_and_padding(
    sets: str, model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    batch = make_batch((1, "Read line 2."), (2, "What is the number beside the owl?"))
    with attach(model):
        cache = CapsuleCache(model.config, VLCache(0.1, sets=sets, overflow="share"))
        output = model.generate(
            **batch, **cache_argument(cache), max_new_tokens=3, min_new_tokens=3, num_beams=2, do_sample=False
        )
    assert output.shape == (2, batch["input_ids"].shape[1] + 3)
    prompt = 2 * int(batch["attention_mask"].sum()) * TOKEN_BYTES
    assert cache.bytes().visual + cache.bytes().text == pytest.approx(0.1 * prompt, rel=0.02)


def test_a_second_turn_is_compressed_by_itself(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    """Of what the second turn brings a tenth is kept, and the first is left as it was."""
    turns = [make_batch((1, "Read line 2.")), make_batch((2, "Which of the two?"))]
    mask, stored = torch.ones(1, 0, dtype=torch.int64), [0]
    with attach(model), torch.no_grad():
        cache = CapsuleCache(model.config, VLCache(0.1, overflow="share"))
        for turn in turns:
            mask = torch.cat([mask, turn["attention_mask"]], dim=1)
            model(
                **{
                    **turn,
                    "attention_mask": mask,
                    "position_ids": (mask.cumsum(1) - 1)[:, -turn["input_ids"].shape[1] :],
                },
                **cache_argument(cache),
            )
            stored.append(cache.bytes().visual + cache.bytes().text)
    for turn, (before, after) in zip(turns, pairwise(stored), strict=True):
        assert after - before == pytest.approx(0.1 * turn["input_ids"].shape[1] * TOKEN_BYTES, rel=0.02)
    assert cache.get_seq_length() == mask.shape[1]
