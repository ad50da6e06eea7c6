"""R-KV: its scores worked out in loops, and what is written stays at the budget however long the answer."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.builders import DIM, HEADS, rand
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule import attach
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.cache import CapsuleCache, CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, DecodeState
from kvcapsule.policy import RKV, Full, r_kv
from kvcapsule.policy.combine import Combined
from kvcapsule.policy.head_rows import HeadRows, side_by_side
from kvcapsule.policy.r_kv import Prompt
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.vlm.spans import VisualSpan

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


def asked(rows: int = 2, count: int = WINDOW) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Queries, all of them of real tokens, and the scale."""
    return rand(rows, HEADS * GROUP, count, DIM, seed=3), torch.ones(rows, count, dtype=torch.bool), DIM**-0.5


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
    if method.pooling == "query":
        attention = [smoothed(row) for row in attention]
    mean = [sum(row[j] for row in attention) / len(attention) for j in range(len(keys))]
    return mean if method.pooling == "query" else smoothed(mean)


def redundancy(method: RKV, keys: torch.Tensor) -> list[float]:
    """Of all but the last tokens of one KV head, keys [N, D]."""
    n = len(keys) - (method.window if method.similar_to == "candidates" else 0)
    lengths = [math.sqrt(dot(k, k)) for k in keys]
    cosine = [[0.0 if i == j else dot(keys[i], keys[j]) / lengths[i] / lengths[j] for j in range(n)] for i in range(n)]
    for i in range(n):
        similar = [j for j in range(n) if j != i and cosine[i][j] > method.threshold]
        for j in similar[max(0, len(similar) - method.beta) :]:
            cosine[i][j] = 0.0
        if not similar and method.spare_first:
            cosine[i][0] = 0.0
    if method.spared == "neighbour":
        mean = [sum(cosine[i][j] for i in range(n)) / n for j in range(n)]
    else:
        mean = [sum(cosine[i]) / n for i in range(n)]
    return softmax(mean)[: len(keys) - method.window]


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:count])


CHOICES: list[dict[str, Any]] = [
    {},
    {"pooling": "mean"},
    {"similar_to": "all"},
    {"spared": "token"},
    {"beta": 0},
    {"beta": 3, "spared": "token", "similar_to": "all"},
    {"threshold": 0.85, "spare_first": True},
    {"kernel": 1, "mix": 1.0},
    {"mix": 0.0},
    {"mix": 0.07, "pooling": "mean", "similar_to": "all", "spare_first": True},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "defaults")
def test_scores_are_those_of_the_formulas(choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In every row and head, padded or not; similarities in chunks of seven tokens."""
    monkeypatch.setattr(r_kv, "_CHUNK", 7)
    method, of = replace(SMALL, **choice), tokens()
    query, asking, scale = asked()
    important = method.importance(query, of.keys[:, :, :-WINDOW], of.valid[:, :, :-WINDOW], asking, scale)
    redundant = method.redundancy(of.keys, of.valid)
    kept = method.kept(of, query, asking, scale)
    for row, begin in enumerate(PADDING):
        for head in range(HEADS):
            keys = of.keys[row, head, begin:]
            i = importance(method, keys[:-WINDOW], query[row, head * GROUP : (head + 1) * GROUP], scale)
            r = redundancy(method, keys)
            for found, expected in ((important, i), (redundant, r)):
                torch.testing.assert_close(
                    found[row, head], torch.tensor([0.0] * begin + expected, dtype=torch.float64)
                )
            z = [method.mix * a - (1 - method.mix) * b for a, b in zip(i, r, strict=True)]
            expected_kept = [begin + j for j in best(z, 12 - WINDOW)] + list(range(TOKENS - WINDOW, TOKENS))
            assert kept[row, head].nonzero()[:, 0].tolist() == expected_kept


@pytest.mark.parametrize("choice", CHOICES[1:-1], ids=str)
def test_every_choice_matters(choice: dict[str, Any]) -> None:
    def scores(method: RKV) -> torch.Tensor:
        of, (query, asking, scale) = tokens(), asked()
        important = method.importance(query, of.keys[:, :, :-WINDOW], of.valid[:, :, :-WINDOW], asking, scale)
        return method.mix * important - (1 - method.mix) * method.redundancy(of.keys, of.valid)

    assert not torch.allclose(scores(replace(SMALL, **choice)), scores(SMALL))


def test_of_near_duplicates_the_newest_stays() -> None:
    """Tokens a, b and c are alike and d is at right angles to them. a spares c, b spares c and c spares b."""
    east, north = [1.0, 0.0], [0.0, 1.0]
    keys = torch.tensor([east, east, east, north, *[north] * WINDOW], dtype=torch.float64)[None, None]
    valid = torch.ones(1, 1, 8, dtype=torch.bool)

    def expected(*means: float) -> torch.Tensor:
        return torch.tensor([[softmax(list(means))]], dtype=torch.float64)

    held_against_others = SMALL.redundancy(keys, valid)
    torch.testing.assert_close(held_against_others, expected(2 / 4, 1 / 4, 0.0, 0.0))
    torch.testing.assert_close(
        replace(SMALL, spared="token").redundancy(keys, valid), expected(1 / 4, 1 / 4, 1 / 4, 0.0)
    )
    torch.testing.assert_close(replace(SMALL, beta=0).redundancy(keys, valid), expected(2 / 4, 2 / 4, 2 / 4, 0.0))
    # Observed tokens are like d; all five spare the last of them, which spares the one before it.
    among_all = softmax([2 / 8, 1 / 8, 0, 4 / 8, 4 / 8, 4 / 8, 3 / 8, 0])[:4]
    found = replace(SMALL, similar_to="all").redundancy(keys, valid)
    torch.testing.assert_close(found, torch.tensor([[among_all]], dtype=torch.float64))


def test_heads_may_share_what_they_keep() -> None:
    of, (query, asking, scale) = tokens(padding=(0, 0)), asked()
    kept = replace(SMALL, heads="shared").kept(of, query, asking, scale)
    for row in range(2):
        z = [0.0] * (TOKENS - WINDOW)
        for head in range(HEADS):
            i = importance(SMALL, of.keys[row, head, :-WINDOW], query[row, head * GROUP : (head + 1) * GROUP], scale)
            r = redundancy(SMALL, of.keys[row, head])
            z = [total + 0.1 * a - 0.9 * b for total, a, b in zip(z, i, r, strict=True)]
        for head in range(HEADS):
            assert kept[row, head].nonzero()[:, 0].tolist() == best(z, 12 - WINDOW) + list(
                range(TOKENS - WINDOW, TOKENS)
            )
    assert not torch.equal(kept, SMALL.kept(of, query, asking, scale))


def test_the_observed_tokens_count_within_the_budget_or_beyond_it() -> None:
    for beyond, count in ((False, 12), (True, 16)):
        kept = replace(SMALL, beyond=beyond).kept(tokens(), *asked())
        assert (kept.sum(dim=2) == count).all()
        assert kept[:, :, -WINDOW:].all()


def test_padding_does_not_ask() -> None:
    """Queries of padding change nothing, and the mean is over the others."""
    of, (query, asking, scale) = tokens(1, (0,)), asked(1)
    asking[0, :2] = False
    candidates = of.valid[:, :, :-WINDOW]
    found = SMALL.importance(query, of.keys[:, :, :-WINDOW], candidates, asking, scale)
    alone = SMALL.importance(query[:, :, 2:], of.keys[:, :, :-WINDOW], candidates, asking[:, 2:], scale)
    torch.testing.assert_close(found, alone)


def test_what_lies_at_padding_does_not_matter() -> None:
    of, (query, asking, scale) = tokens(), asked()
    asking[1, 0] = False
    expected = SMALL.kept(of, query, asking, scale)
    query[1, :, 0] = torch.nan
    poisoned = replace(of, keys=of.keys.masked_fill(~of.valid[..., None], torch.nan))
    assert torch.equal(SMALL.kept(poisoned, query, asking, scale), expected)


def test_scores_are_computed_in_full_precision() -> None:
    half = tokens(padding=(0, 0))
    half = replace(half, keys=half.keys.bfloat16())
    query, asking, scale = asked()
    expected = SMALL.kept(replace(half, keys=half.keys.float()), query.bfloat16().float(), asking, scale)
    assert torch.equal(SMALL.kept(half, query.bfloat16(), asking, scale), expected)


# Segments


def written(
    own: list[Segment], count: int = 8, rows: int = 2, visual: list[Segment] | None = None, first: int = 100
) -> DecodeState:
    """A tail of `count` tokens whose values tell their places, from `first` on."""
    keys = rand(rows, HEADS, count, DIM, seed=first)
    values = torch.arange(first, first + count, dtype=torch.float64)[None, None, :, None].expand(
        rows, HEADS, count, DIM
    )
    query = rand(rows, HEADS * GROUP, WINDOW, DIM, seed=first + 1)
    return DecodeState(0, visual or [], own, keys, values, torch.ones(rows, count, dtype=torch.bool), query, DIM**-0.5)


def places(segments: list[Segment], row: int, head: int) -> list[int]:
    """What a head of a row stores, in the order of the segments."""
    found: list[int] = []
    for s in segments:
        for entry in (s.owner == row).nonzero()[:, 0].tolist():
            if s.head is not None and int(s.head[entry]) != head:
                continue
            there = slice(None) if s.mask is None else s.mask[entry]
            assert isinstance(s.values, torch.Tensor)
            found += s.values[entry, 0 if s.head is not None else head, there, 0].long().tolist()
    return found


def prompt(
    spans: tuple[tuple[int, int, int], ...] = ((0, 2, 12), (1, 8, 10)), padding: tuple[int, ...] = PADDING
) -> LayerPrefill:
    of = tokens(padding=padding)
    query = rand(2, HEADS * GROUP, TOKENS, DIM, seed=3)
    visual = [VisualSpan(row, start, length, (1, 1, length)) for row, start, length in spans]
    return LayerPrefill(0, query, of.keys, of.values, visual, of.valid[:, 0], DIM**-0.5)


def test_the_prompt_is_left_alone() -> None:
    of = prompt()
    visual, text = SMALL.compress(of)
    own = list(text)
    for turn in range(5):
        visual, own = SMALL.on_decode(written(own, visual=visual, first=100 * (turn + 1)))
    assert [s for s in own if isinstance(s, Prompt)] == text
    for row, begin in enumerate(PADDING):
        for head in range(HEADS):
            held = places(own, row, head)
            inside = range(2, 14) if row == 0 else range(8, 18)
            assert held[:-12] == [t for t in range(begin, TOKENS) if t not in inside]
            assert held[-4:] == [504, 505, 506, 507], "the observed tokens"
            assert held[-12:] == sorted(held[-12:]) and min(held[-12:]) >= 100
            assert places(visual, row, head) == list(inside)


def test_what_is_within_the_budget_is_kept() -> None:
    _, own = SMALL.on_decode(written([], count=9))
    (segment,) = own
    assert places(own, 0, 1) == list(range(100, 109)) and segment.mask is None
    _, own = SMALL.on_decode(written(own, count=8, first=200))
    assert len(places(own, 0, 1)) == 12


def test_dropped_rows_are_not_stored() -> None:
    _, own = SMALL.on_decode(written([], count=40))
    assert storage_bytes(t for s in own for t in s.entry_tensors()) == 2 * (2 * HEADS * 12 * DIM * 8) + 2 * 8


def test_a_revision_of_chosen_rows_is_the_chosen_rows_revision() -> None:
    """Beams that were reordered go on as if they had always been these."""
    _, own = SMALL.on_decode(written([], count=20))
    later, rows = written(own, first=300), torch.tensor([1, 1, 0])
    chosen = later._replace(
        text=[s.select(rows) for s in later.text],
        **{name: getattr(later, name)[rows] for name in ("keys", "values", "valid", "query")},
    )
    expected = [s.select(rows) for s in SMALL.on_decode(later).text]
    found = SMALL.on_decode(chosen).text
    for row in range(3):
        for head in range(HEADS):
            assert places(found, row, head) == places(expected, row, head)
    assert places(found, 0, 0) != places(found, 2, 0)


def test_marks_of_a_prompt_survive_a_selection() -> None:
    assert all(isinstance(s.select(torch.tensor([1, 0])), Prompt) for s in SMALL.compress(prompt()).text)


def test_rows_of_unlike_heads_come_side_by_side() -> None:
    """Head 0 of row 1 holds nothing in the first segment; unwritten places are not numbers."""
    nan = torch.full((3, 1, 4, DIM), torch.nan, dtype=torch.float64)
    ragged = Segment(
        nan.clone(), nan.clone(), torch.tensor([0, 0, 1]), head=torch.tensor([0, 1, 1]), mask=torch.zeros(3, 4).bool()
    )
    assert ragged.mask is not None and isinstance(ragged.keys, torch.Tensor) and isinstance(ragged.values, torch.Tensor)
    for entry, count in enumerate((4, 2, 3)):
        ragged.mask[entry, :count] = True
        ragged.keys[entry, :, :count] = ragged.values[entry, :, :count] = (
            torch.arange(count, dtype=torch.float64)[:, None] + 10 * entry
        )
    last = written([], count=2).values
    joined = side_by_side([ragged], [Segment(last, last, torch.arange(2))], 2, HEADS)
    assert tuple(joined.keys.shape) == (2, HEADS, 6, DIM)
    expected = {(0, 0): [0, 1, 2, 3], (0, 1): [10, 11], (1, 0): [], (1, 1): [20, 21, 22]}
    for (row, head), older in expected.items():
        there = joined.valid[row, head]
        assert (
            joined.keys[row, head, there, 0].tolist()
            == joined.values[row, head, there, 0].tolist()
            == [*older, 100, 101]
        )
        assert joined.visual[row, head, there].tolist() == [True] * len(older) + [False] * 2
        assert not there[: 6 - len(older) - 2].any()
    assert joined.keys.isfinite().all() and joined.values.isfinite().all()


def test_what_is_not_raw_cannot_be_ranked() -> None:
    rows = rand(2, HEADS, 8, DIM)
    packed = Segment(QuantizedRows.pack(rows, 4), QuantizedRows.pack(rows, 4), torch.arange(2))
    with pytest.raises(ValueError, match="only raw keys and values can be ranked"):
        SMALL.on_decode(written([packed]))


# Scope "all"


def test_a_prompt_beyond_the_budget_is_cut_to_it() -> None:
    """As the formulas say, head by head; visual rows and text apart, and no byte more than these take."""
    method, of = replace(SMALL, scope="all"), prompt()
    visual, text = method.compress(of)
    for row, begin in enumerate(PADDING):
        span = range(2, 14) if row == 0 else range(8, 18)
        for head in range(HEADS):
            keys = of.keys[row, head, begin:]
            i = importance(method, keys[:-WINDOW], of.query[row, head * GROUP : (head + 1) * GROUP, -WINDOW:], of.scale)
            r = redundancy(method, keys)
            z = [0.1 * a - 0.9 * b for a, b in zip(i, r, strict=True)]
            kept = [begin + j for j in best(z, 12 - WINDOW)] + list(range(TOKENS - WINDOW, TOKENS))
            assert places(visual, row, head) == [t for t in kept if t in span]
            assert places(text, row, head) == [t for t in kept if t not in span]
    held = sum(storage_bytes(t for t in (s.keys, s.values) if isinstance(t, torch.Tensor)) for s in (*visual, *text))
    promised = 2 * 2 * HEADS * 12 * DIM * 8
    assert promised <= held <= 1.02 * promised


def test_everything_stays_at_the_budget() -> None:
    method = replace(SMALL, scope="all")
    visual, text = method.compress(prompt())
    for turn in range(4):
        visual, text = method.on_decode(written(text, visual=visual, first=100 * (turn + 1)))
        for row in range(2):
            for head in range(HEADS):
                assert len(places(visual, row, head)) + len(places(text, row, head)) == 12
                assert set(places(text, row, head)) >= set(range(100 * (turn + 1) + 4, 100 * (turn + 1) + 8))
                assert all(2 <= t < 18 for t in places(visual, row, head))
    kept_all = replace(method, budget_tokens=TOKENS).compress(prompt())
    for row, begin in enumerate(PADDING):
        assert sorted(places(kept_all.visual + kept_all.text, row, 0)) == list(range(begin, TOKENS))


# Generation


@contextmanager
def positions(model: LlavaForConditionalGeneration) -> Iterator[list[list[int]]]:
    """Position ids that the language model is given, forward by forward, of the first row."""
    seen: list[list[int]] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


class Watched(CapsuleCache):
    """Writes down what its layers hold at every forward."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.log: list[list[tuple[int, int, int]]] = []

    def begin(self, *args: Any) -> None:
        super().begin(*args)
        self.log.append([(written_rows(layer), layer.tail_length, layer.get_seq_length()) for layer in own(self)])


def own(cache: CapsuleCache) -> list[CapsuleLayer]:
    return [layer for layer in cache.layers if isinstance(layer, CapsuleLayer)]


def written_rows(layer: CapsuleLayer) -> int:
    return sum(s.tokens for s in layer.text if not isinstance(s, Prompt))


def answer(
    model: LlavaForConditionalGeneration, batch: BatchFeature, method: Any, count: int, **options: Any
) -> tuple[torch.Tensor, Any]:
    with attach(model):
        cache = Watched(model.config, method)
        options = {"do_sample": False, "suppress_tokens": [model.config.image_token_id], **options}
        out = model.generate(**batch, **cache_argument(cache), max_new_tokens=count, min_new_tokens=count, **options)
    return out[:, batch["input_ids"].shape[1] :], cache


def test_a_long_answer_is_held_at_the_budget(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    """300 tokens: beside the prompt, a layer never holds more than the budget and the buffer, while the model counts
    every token."""
    method = RKV(budget_tokens=48, buffer=32)
    batch = make_batch((1, "Read line 2."), (1, "Transcribe the page."))
    length = batch["input_ids"].shape[1]
    with positions(model) as counted:
        tokens, cache = answer(model, batch, method, 300)
    assert tokens.shape == (2, 300)
    stored = [[rows + tail for rows, tail, _ in step] for step in cache.log]
    assert max(map(max, stored)) == 48 + 32 - 1, "when the next token comes; with it the buffer is full and goes"
    assert all(rows <= 48 and tail < 32 for step in cache.log for rows, tail, _ in step)
    # 299 tokens go through the cache; the buffer fills nine times.
    assert [written_rows(layer) for layer in own(cache)] == [48] * 4
    assert [layer.tail_length for layer in own(cache)] == [299 - 9 * 32] * 4
    assert [step[0][2] for step in cache.log] == [0, *range(length, length + 299)]
    starts = [ids[-1] for ids in counted]
    assert starts == list(range(starts[0], starts[0] + 300))
    rows = 2 * 2 * 2 * 32 * 4  # batch, keys and values, KV heads, head dim, bytes
    after = cache.bytes()
    assert after.tail == 4 * (64 * rows + 2 * 4 * 8 * 32 * 4), "room for 64 tokens and the queries of 8"
    text = sum(s.tokens for layer in own(cache) for s in layer.text)
    assert after.text == pytest.approx(text * rows, rel=0.02)


def test_an_answer_within_the_budget_is_the_full_caches(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    batch = make_batch((1, "Read line 2."), (2, "Transcribe the page."), (0, "What now?"))
    expected, _ = answer(model, batch, Full(), 30)
    for method in (
        RKV(budget_tokens=64, buffer=9),
        RKV(budget_tokens=500, buffer=9, scope="all"),
        Combined(Full(), RKV(64, 9)),
    ):
        found, cache = answer(model, batch, method, 30)
        assert torch.equal(found, expected)
        assert own(cache)[0].tail_length == 29 - 27
    cut, _ = answer(model, batch, RKV(budget_tokens=12, buffer=9), 30)
    assert not torch.equal(cut, expected)


@pytest.mark.parametrize("scope", ["generated", "all"])
def test_a_batch_answers_as_one_by_one(
    scope: str, model64: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    """Rows with one, two and no images, padded on the left; and a second run is the first."""
    method = RKV(budget_tokens=14, buffer=8, scope=scope)
    prompts = [(1, "Read line 2."), (2, "Transcribe both pages, the second one first, please."), (0, "What now?")]
    batch = make_batch(*prompts)
    batch["pixel_values"] = batch["pixel_values"].double()
    together, cache = answer(model64, batch, method, 26)
    assert torch.equal(answer(model64, batch, method, 26)[0], together)
    images = 0
    for row, one in enumerate(prompts):
        single = make_batch(one)
        if one[0]:
            single["pixel_values"] = batch["pixel_values"][images : images + one[0]]
        images += one[0]
        alone, alone_cache = answer(model64, single, method, 26)
        assert torch.equal(alone[0], together[row])
        for layer, alone_layer in zip(own(cache), own(alone_cache), strict=True):
            for head in range(2):
                for held in ("visual", "text"):
                    mine, theirs = (content(getattr(x, held), r, head) for x, r in ((layer, row), (alone_layer, 0)))
                    torch.testing.assert_close(mine, theirs)


def content(segments: list[Segment], row: int, head: int) -> torch.Tensor:
    """All keys that a head of a row stores."""
    found = [torch.zeros(0, 32, dtype=torch.float64)]
    for s in segments:
        assert isinstance(s.keys, torch.Tensor)
        for entry in (s.owner == row).nonzero()[:, 0].tolist():
            if s.head is None or int(s.head[entry]) == head:
                keys = s.keys[entry, head if s.head is None else 0]
                found.append(keys if s.mask is None else keys[s.mask[entry]])
    return torch.cat(found)


def test_beams(model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]) -> None:
    """Within the budget the beams are the full cache's; beyond it they go on, and hold no more than it."""
    batch = make_batch((1, "Read line 2."), (1, "Transcribe the page."))
    expected, _ = answer(model, batch, Full(), 24, num_beams=2)
    found, _ = answer(model, batch, RKV(budget_tokens=64, buffer=8), 24, num_beams=2)
    assert torch.equal(found, expected)
    cut, cache = answer(model, batch, RKV(budget_tokens=12, buffer=8), 24, num_beams=2)
    assert [written_rows(layer) for layer in own(cache)] == [12] * 4
    assert torch.equal(cut, answer(model, batch, RKV(budget_tokens=12, buffer=8), 24, num_beams=2)[0])


def test_later_turns(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature], processor: Any, images: Any
) -> None:
    """Text of a later turn counts as written; an image closes the buffer early, and still no more is held than budget
    and buffer."""
    method = RKV(budget_tokens=24, buffer=16)
    turn = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "suppress_tokens": [model.config.image_token_id],
    }
    with attach(model):
        cache = CapsuleCache(model.config, method)
        said = model.generate(**make_batch((1, "Read line 2.")), **cache_argument(cache), **turn)
        first = [list(layer.text) for layer in own(cache)]
        assert [layer.tail_length for layer in own(cache)] == [11] * 4

        def go_on(words: str, *pages: Any) -> torch.Tensor:
            more = processor(
                images=list(pages) or None,
                text=[f"<|user|>{'<image>' * len(pages)}{words}<|assistant|>"],
                return_tensors="pt",
            )
            ids = torch.cat([said, more["input_ids"]], dim=1)
            inputs = {"pixel_values": more["pixel_values"]} if pages else {}
            return model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, **cache_argument(cache), **turn
            )

        said = go_on("And line 3, and after it all of the lines that are left on this page, please?")
        for layer, before in zip(own(cache), first, strict=True):
            assert layer.text[: len(before)] == before
            assert written_rows(layer) + layer.tail_length <= 24 + 16
            assert layer.tail.keys.shape[2] <= 16 + 64, "the buffer that a long turn took is given back"
        for number in range(5):
            said = go_on("And here?", images[number])
            for layer in own(cache):
                assert written_rows(layer) + layer.tail_length < 24 + 16 + method.window
                assert layer.get_seq_length() == said.shape[1] - 1
                assert sum(isinstance(s, Prompt) for s in layer.text) == len(first[0]) + number + 1


def test_beside_a_capsule(
    model: LlavaForConditionalGeneration,
    make_batch: Callable[..., BatchFeature],
    random_transform: Callable[..., Capsule],
) -> None:
    """The capsule stores the image as it does alone, and what is written stays at the budget."""
    capsule, batch = random_transform(tile=49), make_batch((1, "Read line 2."), (1, "Transcribe the page."))
    _, alone = answer(model, batch, capsule, 70)
    _, paired = answer(model, batch, Combined(capsule, RKV(budget_tokens=24, buffer=16)), 70)
    assert paired.bytes().visual == alone.bytes().visual > 0
    assert max(rows + tail for step in paired.log for rows, tail, _ in step) == 24 + 16 - 1
    assert [written_rows(layer) for layer in own(paired)] == [24] * 4
    assert paired.bytes().total < alone.bytes().total


def test_beside_a_capsule_that_keeps_everything_it_is_itself(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature], identity: Callable[..., Capsule]
) -> None:
    batch, method = make_batch((1, "Read line 2."), (2, "Transcribe the page.")), RKV(budget_tokens=24, buffer=16)
    expected, _ = answer(model, batch, method, 60)
    assert torch.equal(answer(model, batch, Combined(identity(49), method), 60)[0], expected)


def test_it_is_a_method_that_acts_again() -> None:
    assert SMALL.decode_time() is SMALL and (SMALL.interval, SMALL.window) == (8, WINDOW)
    assert RKV.budget_field is None
    assert isinstance(SMALL.compress(prompt(spans=())), Compressed) and SMALL.compress(prompt(spans=())).visual == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "prompt"}, "scope 'prompt' is neither 'generated' nor 'all'"),
        ({"pooling": "max"}, "pooling 'max' is neither 'query' nor 'mean'"),
        ({"similar_to": "none"}, "similar_to 'none' is neither"),
        ({"spared": "all"}, "spared 'all' is neither"),
        ({"heads": "all"}, "heads 'all' is neither"),
        ({"window": 0}, "window 0: at least one"),
        ({"buffer": 7}, "buffer 7 is smaller than the window 8"),
        ({"budget_tokens": 8}, "budget_tokens 8 leaves no room beside the 8 observed"),
        ({"budget_tokens": 0, "beyond": True}, "budget_tokens 0 leaves no room"),
        ({"kernel": 4}, "kernel 4 is to be odd"),
        ({"mix": 1.1}, "mix 1.1 is the share"),
        ({"threshold": -2.0}, "threshold -2.0 is a cosine"),
        ({"beta": -1}, "beta -1 counts tokens"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RKV(**options)
