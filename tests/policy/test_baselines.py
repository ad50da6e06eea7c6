"""The baselines of the field as policies: scores worked out with loops. What all policies promise is in
test_policy_table.py."""

import math
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from support.baseline_policies import ALL, DIM, GROUP, HEADS, LAYERS, PRUNING
from support.builders import rand
from support.op_recorder import Witness

from kvcapsule.eval.entries import BY_DEFAULT, FIXED, RIVALS, chosen
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.policy import (
    H2O,
    Full,
    Kivi,
    PyramidKV,
    Random,
    SnapKV,
    StreamingLLM,
    VisualPolicy,
    attention_scores,
)
from kvcapsule.policy.attention_scores import attention_received
from kvcapsule.policy.pyramidkv import pyramid_counts
from kvcapsule.segments.group_quantized_rows import GroupedRows
from kvcapsule.segments.packed_rows import Packed
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.vlm.spans import VisualSpan

every_method = pytest.mark.parametrize("name", ALL)
every_pruning = pytest.mark.parametrize("name", PRUNING)


def tokens(spans: list[tuple[int, int, int]], padding: list[int], count: int, layer: int = 0) -> LayerPrefill:
    """Rows of `count` tokens in float64, the first of each padded. Channel 0 of keys and values is the token's
    place."""
    rows = len(padding)
    valid = torch.arange(count) >= torch.tensor(padding)[:, None]
    visual = [VisualSpan(row, start, length, (1, 1, length)) for row, start, length in spans]
    query, keys, values = (
        rand(rows, heads, count, DIM, seed=s) for s, heads in enumerate((HEADS * GROUP, HEADS, HEADS))
    )
    keys[..., 0] = values[..., 0] = torch.arange(count, dtype=torch.float64) / count
    return LayerPrefill(layer=layer, query=query, keys=keys, values=values, spans=visual, valid=valid, scale=DIM**-0.5)


def mixed() -> LayerPrefill:
    """Left padding; one image, two with text between, none; spans of unlike length."""
    return tokens([(0, 12, 40), (1, 2, 40), (1, 44, 9)], [9, 0, 50], 60)


def places(segments: list[Segment], row: int, count: int) -> list[list[int]]:
    """The tokens that each head stores of a row, in the order in which they lie; its values are those of the same
    tokens."""
    found: list[list[int]] = [[] for _ in range(HEADS)]
    for segment in segments:
        for entry in (segment.owner == row).nonzero()[:, 0].tolist():
            there = slice(None) if segment.mask is None else segment.mask[entry]
            assert isinstance(segment.keys, torch.Tensor) and isinstance(segment.values, torch.Tensor)
            assert torch.equal(segment.keys[entry, :, there, 0], segment.values[entry, :, there, 0])
            for head in range(HEADS):
                found[head] += (segment.keys[entry, head, there, 0] * count).round().long().tolist()
    return found


def causal(of: LayerPrefill, row: int, head: int, query: int) -> list[float]:
    """Attention of one query of one query head, by the definition."""
    seen = [j for j in range(query + 1) if of.valid[row, j]]
    logits = {
        j: of.scale * sum(float(of.query[row, head, query, c] * of.keys[row, head // GROUP, j, c]) for c in range(DIM))
        for j in seen
    }
    total = sum(math.exp(x) for x in logits.values())
    return [math.exp(logits[j]) / total if j in logits else 0.0 for j in range(of.keys.shape[2])]


def received(of: LayerPrefill, row: int, kv_head: int, first: int) -> list[float]:
    got = [0.0] * of.keys.shape[2]
    for query in range(first, of.keys.shape[2]):
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            if of.valid[row, query]:
                got = [a + b for a, b in zip(got, causal(of, row, head, query), strict=True)]
    return got


# Scores by hand

SMALL = tokens([(0, 3, 6), (0, 9, 4), (1, 5, 7)], [1, 4], 16)


@pytest.mark.parametrize("chunk", [256, 5, 1])
def test_h2o_by_hand(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunk, and with padding: what all queries give, over the heads that share keys."""
    monkeypatch.setattr(attention_scores, "CHUNK", chunk)
    scores = H2O(0.5).scores(SMALL)
    for row in (0, 1):
        for head in range(HEADS):
            torch.testing.assert_close(
                scores[row, head], torch.tensor(received(SMALL, row, head, 0), dtype=torch.float64)
            )


def test_h2o_keeps_no_scores_of_all_queries() -> None:
    """2,000 tokens: the widest tensor of its scores has 256 queries."""
    of = tokens([(0, 10, 1900)], [0], 2000)
    with Witness() as witness:
        H2O(0.1).compress(of)
    assert HEADS * GROUP * 200 * 2000 < witness.most() <= HEADS * GROUP * 256 * 2000


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_snapkv_by_hand(pooling: str) -> None:
    """A window of 5 that begins within an image, pooled over 3 neighbours of the same span."""
    scores = SnapKV(0.5, window=5, kernel=3, pooling=pooling).scores(SMALL)
    for span in SMALL.spans:
        for head in range(HEADS):
            got = received(SMALL, span.row, head, 11)
            for j in range(span.start, span.start + span.length):
                near = [got[i] for i in (j - 1, j, j + 1) if span.start <= i < span.start + span.length]
                expected = max(near) if pooling == "max" else sum(near) / len(near)
                assert float(scores[span.row, head, j]) == pytest.approx(expected, rel=1e-6), (span, head, j)


def test_a_kernel_of_one_and_the_whole_prompt_is_h2o() -> None:
    torch.testing.assert_close(SnapKV(0.5, window=99, kernel=1).scores(SMALL), H2O(0.5).scores(SMALL))


def test_streaming_by_hand() -> None:
    of = tokens([(0, 2, 10), (1, 0, 4)], [0, 0], 14)
    visual, _ = StreamingLLM(0.6, sinks=2).compress(of)
    assert places(visual, 0, 14) == [[2, 3, 8, 9, 10, 11]] * HEADS
    assert places(visual, 1, 14) == [[0, 1]] * HEADS
    visual, _ = StreamingLLM(0.3).compress(of)
    assert places(visual, 0, 14) == [[2, 3, 4]] * HEADS, "fewer than the sinks: the first of them"
    visual, _ = StreamingLLM(0.3, sinks=0).compress(of)
    assert places(visual, 0, 14) == [[9, 10, 11]] * HEADS


def test_random_depends_on_seed_layer_and_span_alone() -> None:
    def kept(layer: int, seed: int, row: int = 0) -> list[int]:
        return places(
            Random(0.25, seed).compress(tokens([(0, 5, 40), (1, 9, 40), (1, 49, 40)], [0, 4], 100, layer)).visual,
            row,
            100,
        )[0]

    assert kept(0, 0) == kept(0, 0)
    assert len({tuple(kept(layer, seed)) for layer in (0, 1) for seed in (0, 1)}) == 4
    # The first image of another row, four places on, keeps the same; the second image others.
    assert [p + 4 for p in kept(0, 0)] == kept(0, 0, row=1)[:10] != [p - 40 for p in kept(0, 0, row=1)[10:]]
    counts = torch.zeros(40)
    for seed in range(400):
        counts[torch.tensor(kept(0, seed)) - 5] += 1
    assert counts.min() > 60 and counts.max() < 140, "a hundred each is expected"


def test_pyramid_counts_by_hand() -> None:
    """Mean 20, beta 20: from 39 down to 1. Steps of 38 / 3: 39, 26.3, 13.7, 1."""
    assert pyramid_counts(80, 4, 196, 20.0) == (39, 26, 14, 1)
    # At most 30 tokens are there: 30 down to 10.
    assert pyramid_counts(80, 4, 30, 20.0) == (30, 23, 17, 10)
    assert pyramid_counts(80, 4, 196, 1.0) == (20, 20, 20, 20)
    assert pyramid_counts(8, 8, 5, 20.0) == (1,) * 8
    assert pyramid_counts(7, 1, 10, 20.0) == (7,)


@pytest.mark.parametrize("layers", [1, 2, 4, 28])
@pytest.mark.parametrize("length", [1, 3, 49, 196])
def test_pyramid_counts_add_up_and_fit(layers: int, length: int) -> None:
    for total in range(layers, layers * length + 1, max(1, layers * length // 97)):
        counts = pyramid_counts(total, layers, length, 20.0)
        assert sum(counts) == total and min(counts) >= 1 and max(counts) <= length
        # Rounding a running sum may put a token a layer further down.
        assert all(later <= earlier + 1 for earlier, later in pairwise(counts))


def test_pyramid_ranks_as_snapkv_does() -> None:
    policy = PyramidKV(0.5, window=5, kernel=3)
    assert torch.equal(policy.scores(SMALL), SnapKV(0.5, window=5, kernel=3).scores(SMALL))
    one_layer = tokens([(0, 3, 10)], [0], 16)
    assert len(places(policy.compress(one_layer).visual, 0, 16)[0]) == 5, "a model's only layer has the whole budget"


def test_pyramid_learns_its_layers_from_those_that_are_compressed() -> None:
    """Also where the model has others between them."""
    run = PyramidKV(0.5).begin_pass([1, 3])
    for layer, count in ((1, 9), (3, 1)):
        ((index, compressed),) = run.add(tokens([(0, 3, 10)], [0], 16, layer))
        assert index == layer and len(places(compressed.visual, 0, 16)[0]) == count


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kivi_by_hand(bits: int) -> None:
    """70 tokens in groups of 32, 32 and 6; channels of 8 in groups of 5 and 3: each group rounded by itself."""
    of = tokens([(0, 3, 70)], [0], 80)
    (segment,) = Kivi(bits, group=32).compress(of).visual
    read = segment.materialize(torch.float64)
    in_two = Kivi(bits, group=5).compress(of).visual[0].materialize(torch.float64)[1]

    def rounded(group: list[float]) -> list[float]:
        low, step = min(group), (max(group) - min(group)) / (2**bits - 1)
        return [low + step * round((x - low) / step) for x in group]

    for head in range(HEADS):
        for channel in range(DIM):
            column = of.keys[0, head, 3:73, channel].tolist()
            expected = [x for begin in (0, 32, 64) for x in rounded(column[begin : begin + 32])]
            torch.testing.assert_close(
                read[0][0, head, :, channel], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5
            )
        for token in range(70):
            line = of.values[0, head, 3 + token].tolist()
            wide, split = rounded(line), rounded(line[:5]) + rounded(line[5:])
            torch.testing.assert_close(
                read[1][0, head, token], torch.tensor(wide, dtype=torch.float64), rtol=0, atol=1e-5
            )
            torch.testing.assert_close(
                in_two[0, head, token], torch.tensor(split, dtype=torch.float64), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("along_tokens", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 63, 33), (1, 2, 65, 32)])
def test_grouped_rows_are_packed_rows(shape: tuple[int, int, int, int], along_tokens: bool) -> None:
    x = rand(*shape).float()
    rows = GroupedRows.pack(x, 4, 32, along_tokens)
    assert isinstance(rows, Packed) and rows.shape == x.shape and not rows.shared()
    read = rows.read(torch.float32)
    assert read.shape == x.shape
    assert float((read - x).abs().max()) <= float(rows.scale.max()) / 2 + 1e-6
    assert torch.equal(rows.select(torch.tensor([0, 0])).read(torch.float32), read[[0, 0]])
    assert torch.equal(rows.to("cpu").read(torch.float32), read)


def test_a_constant_group_is_exact_in_half_precision() -> None:
    x = torch.full((1, 1, 40, 8), 3.0, dtype=torch.float16)
    assert torch.equal(GroupedRows.pack(x, 2, 32, True).read(torch.float16), x)


# What is kept


def visual_bytes(policy: VisualPolicy, of: LayerPrefill) -> int:
    return storage_bytes(t for s in policy.compress(of).visual for t in s.entry_tensors() if t is not s.owner)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kivi_bytes(bits: int) -> None:
    """Codes, and two numbers of 16 bits for 32 elements; 196 tokens pay for a group of 32 and a byte of codes that are
    not full."""
    for length, groups, eights in ((192, 6, 24), (196, 7, 25)):
        x = rand(1, HEADS, length, 64).half()
        valid = torch.ones(1, length, dtype=torch.bool)
        of = LayerPrefill(
            layer=0,
            query=x,
            keys=x,
            values=x.clone(),
            spans=[VisualSpan(0, 0, length, (1, 1, length))],
            valid=valid,
            scale=1.0,
        )
        keys, values = 64 * (eights * bits + groups * 2 * 2), length * (8 * bits + 2 * 2 * 2)
        assert visual_bytes(Kivi(bits), of) == HEADS * (keys + values)
        # The nominal bits + 1 for an element, and at most 3.1 % more.
        nominal = (bits + 1) / 16 * visual_bytes(Full(), of)
        assert (
            HEADS * (keys + values) == nominal if length == 192 else nominal < HEADS * (keys + values) < 1.031 * nominal
        )


@every_method
def test_text_is_kept_and_visual_is_less(name: str) -> None:
    of = mixed()
    visual, text = ALL[name]().compress(of)
    for row in range(3):
        kept = [j for j in range(60) if of.valid[row, j] and not of.visual()[row, j]]
        assert places(text, row, 60) == [kept] * HEADS
    assert storage_bytes(t for s in visual for t in s.entry_tensors()) < visual_bytes(Full(), of)
    assert {int(row) for s in visual for row in s.owner} == {0, 1}


@every_pruning
def test_every_image_keeps_its_share_in_order(name: str) -> None:
    visual, _ = PRUNING[name](0.3).compress(mixed())
    for row, spans in ((0, [(12, 40)]), (1, [(2, 40), (44, 9)])):
        for kept in places(visual, row, 60):
            assert kept == sorted(set(kept))
            for begin, length in spans:
                share = len([p for p in kept if begin <= p < begin + length])
                in_layers = pyramid_counts(round(0.3 * LAYERS * length), LAYERS, length, 20.0)
                assert share == (in_layers[0] if name == "pyramidkv" else round(0.3 * length))


@pytest.mark.parametrize("name", ["snapkv", "snapkv-max", "h2o", "pyramidkv"])
def test_heads_keep_tokens_of_their_own(name: str) -> None:
    first, second = places(PRUNING[name](0.3).compress(mixed()).visual, 0, 60)
    assert len(first) == len(second) and first != second


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((lambda make=make: make(0.0), "retention ratio 0.0 is outside") for make in PRUNING.values()),
        (lambda: StreamingLLM(0.5, sinks=-1), "sinks -1"),
        (lambda: SnapKV(0.5, window=0), "window 0"),
        (lambda: SnapKV(0.5, kernel=4), "kernel 4"),
        (lambda: SnapKV(0.5, pooling="mean"), "pooling 'mean' is neither 'avg' nor 'max'"),
        (lambda: PyramidKV(0.5, beta=0.5), "beta 0.5"),
        (lambda: Kivi(5), "5 bits cannot be packed"),
        (lambda: Kivi(2, group=0), "group 0"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], VisualPolicy], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_attention_from_the_last_queries_is_a_part_of_all() -> None:
    of = mixed()
    some, every = attention_received(of, 50), attention_received(of, 0)
    assert (some <= every + 1e-12).all()
    assert float(every.sum()) == pytest.approx(float(of.valid.sum()) * HEADS * GROUP)


# eval's registries


def test_a_run_can_name_them_and_by_default_does_not() -> None:
    assert BY_DEFAULT == ("post-vision-attention", "evenly-spaced", "int4")
    assert chosen([], ["transform"]) == ["transform", *BY_DEFAULT]
    named = ["random", "streaming-llm", "snapkv", "h2o", "pyramidkv", "kivi4", "kivi2"]
    assert chosen(named, []) == named
    assert set(named) < {*RIVALS, *FIXED}
