"""AirCache: elite, importance, strength, skewness and budgets worked out by hand, and what is kept from the definition
on."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.prefills import HEADS, alone, attention, mixed, places, run, same_answers, scripted, stored_bytes, tokens
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.policy import AirCache, Full, aircache
from kvcapsule.policy.aircache import EliteAttention, skewness

# By hand

WEIGHTS = {(0, 4): [1, 1, 2, 4, 3, 99, 2], (0, 6): [10, 8, 1, 1, 9.5, 3, 9.2], (0, 5): [7] * 7}
"""Text at 0, an image at 1 to 3, text at 4 to 6. Of the last token's text weights 10, 9.5, 3 and 9.2, nine tenths of 10
are 9."""
HAND = scripted(WEIGHTS, 7, 1, [(1, 3)])


@pytest.mark.parametrize(
    ("settings", "elite"),
    [
        ({}, [4, 6]),
        ({"text": "all"}, [0, 4, 6]),
        ({"text": "all", "alpha": 0.93}, [0, 4]),
        ({"text": "all", "alpha": 1.0}, [0]),
        ({"alpha": 0.3}, [4, 5, 6]),
    ],
)
def test_elite_by_hand(settings: dict[str, Any], elite: list[int]) -> None:
    assert AirCache(0.5, **settings).elite(HAND)[0, 0].nonzero()[:, 0].tolist() == elite


def test_importance_by_hand() -> None:
    """Elite tokens 4 and 6 look at 1, 2, 3, 4 and 6: weights 1, 2, 4, 3, 2 of 12, and 8, 1, 1, 9.5, 9.2 of 28.7."""
    first, second = [1 / 12, 2 / 12, 4 / 12], [8 / 28.7, 1 / 28.7, 1 / 28.7]
    seen = AirCache(0.5).observe(HAND)
    expected = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert seen.importance[0, 0].tolist() == pytest.approx([0, *expected, 0, 0, 0])
    assert float(seen.strength) == pytest.approx((7 / 12 + 10 / 28.7) / 2)
    # As the model is: token 4 does not see token 6.
    causal = AirCache(0.5, causal=True).observe(HAND).importance[0, 0].tolist()
    assert causal == pytest.approx([0, *((a * 1.2 + b) / 2 for a, b in zip(first, second, strict=True)), 0, 0, 0])
    # Half of three tokens is two (1.5 rounds to the even 2): 0.18 for token 1 and 0.18 for 3, 0.10 for 2; text stays.
    visual, text = AirCache(0.5).compress(HAND)
    assert (places(visual), places(text)) == ([[1, 3]], [[0, 4, 5, 6]])
    assert places(AirCache(0.3).compress(HAND).visual) == [[3 if expected[2] > expected[0] else 1]]


def test_skewness_by_hand() -> None:
    """0.1 three times and 0.5: mean 0.2, std 0.2, 4 / 6 of (3 (-1/2)^3 + (3/2)^3) = 2; with signs reversed -2."""
    visual = torch.tensor([[False, True, True, True, True, False]])
    for row, expected in (
        ([9, 0.1, 0.1, 0.1, 0.5, 9], 2.0),
        ([9, 0.5, 0.5, 0.5, 0.1, 9], -2.0),
        ([9, 0.1, 0.1, 0.3, 0.3, 9], 0.0),
    ):
        assert float(skewness(torch.tensor([[row]]), visual)) == pytest.approx(expected, abs=1e-5)
    assert float(skewness(torch.full((1, 1, 6), 0.25), visual)) == 0
    two = torch.tensor([[False, True, True, False, False, False]])
    assert float(skewness(torch.rand(1, 1, 6), two)) == 0


def test_budgets_by_hand() -> None:
    """Strengths of 2 to 1 are 4/3 and 2/3, skewnesses of 4 to 1 are 1.6 and 0.4: means 1.4667 and 0.5333."""
    strength, skew = [0.8, 0.4], [2.0, 0.5]
    assert AirCache(0.3).counts(strength, skew, 50) == [22, 8]
    assert AirCache(0.3, measure="strength").counts(strength, skew, 50) == [20, 10]
    assert AirCache(0.3, measure="skewness").counts(strength, skew, 50) == [24, 6]
    assert AirCache(0.3, measure="uniform").counts(strength, skew, 50) == [15, 15]
    # Of 0.9, the first layer has 1.32 and the second 0.48.
    assert AirCache(0.9).counts(strength, skew, 50) == [50, 40]
    assert AirCache(0.9, overflow="clip").counts(strength, skew, 50) == [50, 24]
    assert AirCache(1.0, overflow="clip").counts(strength, skew, 50) == [50, 50]
    assert AirCache(0.01, measure="skewness").counts([1, 1, 1], [8.0, 1.0, 0.0], 50) == [1, 1, 1], "one at least"


def test_normalisation_by_hand() -> None:
    negative = [2.0, -1.0, 0.0]
    assert AirCache(0.1).normalised(negative) == pytest.approx([3, 0, 0])
    assert AirCache(0.1, negative="shift").normalised(negative) == pytest.approx([2.25, 0, 0.75])
    assert AirCache(0.1, negative="shift").normalised([2.0, 1.0, 3.0]) == pytest.approx([1, 0.5, 1.5])
    total = math.exp(2) + math.exp(-1) + 1
    assert AirCache(0.1, normalisation="softmax").normalised(negative) == pytest.approx(
        [3 * math.exp(x) / total for x in negative]
    )
    assert AirCache(0.1).normalised([-1.0, -2.0]) == [1, 1]


def test_layers_share_what_is_observed() -> None:
    """Of 2 x 20 visual tokens 30 %, by strengths of 3 to 1: 9 and 3, the best of each layer."""
    layers = [tokens([(0, 5, 20)], [0], 30, layer) for layer in range(2)]
    importance = torch.arange(30.0).expand(1, 1, 30)
    seen = [
        EliteAttention(importance * sign, torch.tensor([strength]), torch.zeros(1))
        for sign, strength in ((1, 0.75), (-1, 0.25))
    ]
    found = AirCache(0.3, measure="strength").commit(layers, seen)
    assert [places(c.visual) for c in found] == [[list(range(16, 25))] * HEADS, [[5, 6, 7]] * HEADS]


# By loops

TEXT = [
    [range(52, 60), [9, 10, 11, *range(52, 60)]],
    [range(53, 60), [0, 1, 42, 43, *range(53, 60)]],
    [range(50, 60)] * 2,
    [range(1, 9)] * 2,
]
"""In `mixed`: text behind the last image, and all of it; in a row without image and one that ends with its image, all
there is."""


def by_definition(
    of: LayerPrefill, row: int, text: Sequence[int], heads: Sequence[int], alpha: float, causal: bool
) -> dict[int, float]:
    """Importance of a row's visual tokens, averaged over query heads that share an elite."""
    visual = [j for j in range(of.keys.shape[2]) if of.visual()[row, j]]
    last = [attention(of, row, head, text[-1], text) for head in heads]
    mean = {j: sum(a[j] for a in last) / len(heads) for j in text}
    elite = [j for j in text if mean[j] >= alpha * max(mean.values())]
    found = dict.fromkeys(visual, 0.0)
    for query in elite:
        for head in heads:
            given = attention(of, row, head, query, [j for j in (*visual, *elite) if not causal or j <= query])
            found = {j: found[j] + given.get(j, 0.0) / len(elite) / len(heads) for j in visual}
    return found


@pytest.mark.parametrize("settings", [{}, {"text": "all"}, {"text": "all", "causal": True}, {"heads": "each"}], ids=str)
@pytest.mark.parametrize("chunk", [256, 2])
def test_importance_of_padded_rows(settings: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aircache, "_CHUNK", chunk)
    of = mixed()[1]
    method = AirCache(0.3, alpha=0.5, **settings)
    seen = method.observe(of)
    sizes = method.elite(of).sum(dim=2)
    assert int(sizes.min()) >= 1 and int(sizes.max()) > 1
    groups = [[0, 1], [2, 3]] if settings.get("heads") == "each" else [[0, 1, 2, 3]]
    for row in range(4):
        strengths, skews = [], []
        for index, heads in enumerate(groups):
            expected = by_definition(
                of, row, [*TEXT[row][settings.get("text") == "all"]], heads, 0.5, settings.get("causal", False)
            )
            found = {j: float(x) for j, x in enumerate(seen.importance[row, index]) if j in expected}
            assert found == pytest.approx(expected)
            assert float(seen.importance[row, index].sum()) == pytest.approx(sum(expected.values()))
            strengths.append(sum(expected.values()))
            n, mean = len(expected), sum(expected.values()) / max(1, len(expected))
            deviation = math.sqrt(sum((x - mean) ** 2 for x in expected.values()) / (n - 1)) if n else 0.0
            cubes = sum(((x - mean) / deviation) ** 3 for x in expected.values()) if deviation else 0.0
            skews.append(n / ((n - 1) * (n - 2)) * cubes)
        assert float(seen.strength[row]) == pytest.approx(sum(strengths) / len(groups))
        assert float(seen.skewness[row]) == pytest.approx(sum(skews) / len(groups))


# Properties

EVERY = [
    AirCache(0.3),
    AirCache(0.3, alpha=0.5, heads="each", negative="shift"),
    AirCache(0.3, alpha=0.4, text="all", causal=True, normalisation="softmax", overflow="clip"),
]
each = pytest.mark.parametrize("method", EVERY, ids=["plain", "heads", "all-text"])


@each
def test_a_batch_is_its_rows_one_by_one(method: AirCache) -> None:
    layers = mixed()
    together = run(method, layers)
    counts = set()
    for row in range(4):
        for of, ours, theirs in zip(layers, together, run(method, [alone(of, row) for of in layers]), strict=True):
            assert places(ours.visual, row) == places(theirs.visual), (of.layer, row)
            assert places(ours.text, row) == places(theirs.text) == places(Full().compress(of).text, row)
            counts |= {len(head) for head in places(ours.visual, row)}
    assert len(counts) > 4, "rows and layers differ"


@each
def test_a_ratio_of_one_keeps_everything(method: AirCache) -> None:
    for of, found in zip(mixed(), run(replace(method, retention=1.0), mixed()), strict=True):
        full = Full().compress(of)
        assert [places(found.visual, row) for row in range(4)] == [places(full.visual, row) for row in range(4)]
        same_answers(found, full, of)


@each
def test_it_is_the_same_every_time(method: AirCache) -> None:
    for ours, theirs in zip(run(method, mixed()), run(method, mixed()), strict=True):
        for a, b in zip(ours.visual, theirs.visual, strict=True):
            assert isinstance(a.keys, torch.Tensor) and isinstance(b.keys, torch.Tensor)
            assert torch.equal(a.keys, b.keys) and torch.equal(a.owner, b.owner)


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_bytes_fall_as_promised(ratio: float, heads: str) -> None:
    layers = [tokens([(0, 5, 196), (0, 201, 196)], [0], 410, layer) for layer in range(4)]
    full = sum(stored_bytes(Full().compress(of).visual) for of in layers)
    found = run(AirCache(ratio, heads=heads), layers)
    assert sum(stored_bytes(c.visual) for c in found) == pytest.approx(ratio * full, rel=0.02)
    assert len({len(places(c.visual)[0]) for c in found}) > 1


def test_heads_keep_tokens_of_their_own() -> None:
    for compressed in run(AirCache(0.3, heads="each"), mixed()):
        first, second = places(compressed.visual, 0)
        assert len(first) == len(second) and first != second


def test_rows_without_text_and_without_images() -> None:
    """With no text at all the last token ranks."""
    only_image = tokens([(0, 0, 20)], [0], 20)
    assert AirCache(0.5).elite(only_image)[0, 0].nonzero()[:, 0].tolist() == [19]
    (compressed,) = run(AirCache(0.5), [only_image])
    assert compressed.text == [] and len(places(compressed.visual)[0]) == 10
    assert run(AirCache(0.5), [tokens([], [0], 20)])[0].visual == []


def test_half_precision_is_scored_in_single() -> None:
    of = mixed()[2]
    half = replace(of, query=of.query.half(), keys=of.keys.half(), values=of.values.half())
    single = replace(half, query=half.query.float(), keys=half.keys.float())
    for ours, theirs in zip(AirCache(0.4).observe(half), AirCache(0.4).observe(single), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retention": 0.0}, "retention ratio 0.0 is outside (0, 1]"),
        ({"retention": 0.1, "alpha": 0.0}, "alpha 0.0 is outside (0, 1]"),
        *(
            ({"retention": 0.1, name: "some"}, f"{name} 'some' is none of ")
            for name in ("measure", "text", "heads", "normalisation", "negative", "overflow")
        ),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AirCache(**settings)


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_generation_with_beams_and_padding(
    heads: str, model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    batch = make_batch((1, "Read line 2."), (2, "What is the number beside the owl?"))
    with attach(model):
        cache = CapsuleCache(model.config, AirCache(0.1, heads=heads))
        output = model.generate(
            **batch, **cache_argument(cache), max_new_tokens=3, min_new_tokens=3, num_beams=2, do_sample=False
        )
    assert output.shape == (2, batch["input_ids"].shape[1] + 3)
    images = 2 * 3 * 196 * 4 * 2 * 2 * 32 * 4
    assert cache.bytes().visual == pytest.approx(0.1 * images, rel=0.02)
