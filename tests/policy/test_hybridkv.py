"""HybridKV: head types, budgets and what static heads keep, worked out one number at a time (in a model:
test_hybrid_model.py)."""

from typing import Any

import pytest
import torch
from support.builders import rand

from kvcapsule.methods.host_retrieval import Retrieved
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.policy import HybridKV, StreamingLLM
from kvcapsule.policy.combine import Combined
from kvcapsule.policy.concentration import concentration
from kvcapsule.policy.head_budgets import nearest_power, share_out
from kvcapsule.policy.text import TextPruning
from kvcapsule.segments.segment import Segment
from kvcapsule.vlm.spans import VisualSpan

HEADS, GROUP, DIM = 2, 2, 8


def prefill(valid: torch.Tensor, *spans: tuple[int, int, int], layer: int = 0) -> LayerPrefill:
    batch, tokens = valid.shape
    query, keys, values = (
        rand(batch, h, tokens, DIM, seed=3 * layer + i) for i, h in enumerate((HEADS * GROUP, HEADS, HEADS))
    )
    visual = [VisualSpan(row, start, length, (1, 1, length)) for row, start, length in spans]
    return LayerPrefill(layer, 2 * query, keys, values, visual, valid, DIM**-0.5)


VALID = torch.ones(2, 30, dtype=torch.bool)
VALID[1, :7] = False
SPANS = ((0, 2, 20), (1, 9, 12))
"""Row 0: text at 0, 1 and 22..29. Row 1: padding up to 6, text at 7, 8 and 21..29."""


def by_hand(of: LayerPrefill, row: int, head: int, query: int) -> torch.Tensor:
    """[N]: softmax attention of one query of one query head, over what it sees."""
    weights = torch.zeros(of.valid.shape[1], dtype=torch.float64)
    for token in range(query + 1):
        if of.valid[row, token]:
            weights[token] = torch.exp(of.query[row, head, query] @ of.keys[row, head // GROUP, token] * of.scale)
    return weights / weights.sum()


class TestHeadTypes:
    @pytest.mark.parametrize("top", [0.05, 0.2, 1.0])
    def test_concentration_by_hand(self, top: float) -> None:
        """The text queries' greatest weights: ceil(0.2 * 3) = 1 for the third token of a row, ceil(0.2 * 23) = 5 for
        the 23rd."""
        of = prefill(VALID, *SPANS)
        found = concentration(of, top)
        for row, first, text in ((0, 0, [0, 1, *range(22, 30)]), (1, 7, [7, 8, *range(21, 30)])):
            for head in range(HEADS * GROUP):
                masses = []
                for query in text:
                    count = -(-round(top * 100) * (query + 1 - first) // 100)
                    masses.append(float(by_hand(of, row, head, query).sort(descending=True).values[:count].sum()))
                assert float(found[row, head // GROUP, head % GROUP]) == pytest.approx(
                    sum(masses) / len(text), abs=1e-12
                )
        assert bool((found <= 1 + 1e-12).all()) and (top < 1 or bool((found > 1 - 1e-12).all()))

    def test_more_queries_than_are_computed_at_once(self) -> None:
        of = prefill(torch.ones(1, 600, dtype=torch.bool), (0, 10, 20))
        masses = []
        for query in (q for q in range(600) if not 10 <= q < 30):
            weights = (of.keys[0, 1, : query + 1] @ of.query[0, 2, query] * of.scale).softmax(dim=0)
            masses.append(float(weights.sort(descending=True).values[: -(-(query + 1) // 10)].sum()))
        assert float(concentration(of, 0.1)[0, 1, 0]) == pytest.approx(sum(masses) / 580, abs=1e-12)

    def test_a_row_without_text_has_no_focused_head(self) -> None:
        of = prefill(VALID, (0, 0, 30), (1, 7, 23))
        assert concentration(of, 0.05).tolist() == [[[0.0, 0.0], [0.0, 0.0]]] * 2
        assert HybridKV(0.3).compress(of).text == []

    def test_query_heads_are_joined(self) -> None:
        of = prefill(VALID, *SPANS)
        each = concentration(of, 0.05)
        torch.testing.assert_close(HybridKV(0.3).observe(of).score, (each[..., 0] + each[..., 1]) / 2)
        torch.testing.assert_close(
            HybridKV(0.3, group="min").observe(of).score, torch.minimum(each[..., 0], each[..., 1])
        )

    def test_theta(self) -> None:
        assert HybridKV(0.3).static([0.89, 0.90, 0.91, 1.0]) == [False, True, True, True]
        assert HybridKV(0.3, theta=0.0).static([0.0, 1.0]) == [True, True]
        assert HybridKV(0.3, theta=1.1).static([0.0, 1.0]) == [False, False]
        # The middle of 0.2, 0.3, 0.5 and 0.6 is 0.4.
        assert HybridKV(0.3, theta=0.5, quantile=True).static([0.6, 0.2, 0.3, 0.5]) == [True, False, False, True]


class TestBudgets:
    def test_by_hand(self) -> None:
        """Four heads of 100 tokens at half: 200. Two are dynamic: ceil(0.75 * 50 * 2) = 75, 37.5 each, the nearest
        power of two is 32.

        The static heads have 200 - 64 = 136, a quarter of it evenly: 17 each and 102 in the ratio 0.9 to 1: 65.3 and
        70.7 in whole tokens.
        """
        policy = HybridKV(0.5, uniform=0.25, index="beside")
        assert policy.allot([0.9, 0.2, 0.1, 1.0], 100, 20, 6.5) == ([65, 0, 0, 71], [0, 4, 4, 0])

    def test_means_are_paid_for_first(self) -> None:
        """200 - 2 * 6.5 = 187; ceil(0.75 * 46.75 * 2) = 71, 35.5 each: 32; static 187 - 64 = 123: 30.75 / 2 + 92.25 *
        0.9 / 1.9 = 59.07."""
        policy = HybridKV(0.5, uniform=0.25)
        assert policy.allot([0.9, 0.2, 0.1, 1.0], 100, 20, 6.5) == ([59, 0, 0, 64], [0, 4, 4, 0])

    def test_without_padding(self) -> None:
        """75 for the two dynamic heads, 125 for the static ones; of nine chunks of 8 the first has one more."""
        policy = HybridKV(0.5, index="beside", padded=False)
        kept, loaded = policy.allot([0.9, 0.2, 0.1, 0.9], 100, 20, 6.5)
        assert (kept, loaded) == ([63, 0, 0, 62], [0, 5, 4, 0])

    def test_dynamic_heads_alone_have_all(self) -> None:
        """Three heads at 0.4: 120 tokens, 15 chunks; with means of 6.5: 100.5 and 13 chunks (12.56 to the nearest)."""
        assert HybridKV(0.4, index="beside").allot([0.1] * 3, 100, 20, 6.5) == ([0, 0, 0], [5, 5, 5])
        assert HybridKV(0.4).allot([0.1] * 3, 100, 20, 6.5) == ([0, 0, 0], [5, 4, 4])

    def test_static_heads_alone_have_all(self) -> None:
        assert HybridKV(0.4).allot([0.95] * 3, 100, 20, 6.5) == ([40, 40, 40], [0, 0, 0])

    def test_what_static_heads_cannot_keep_is_loaded(self) -> None:
        """At 0.9, 360: dynamic heads have 67.5, or 64; the static ones cannot keep more than 100, and 160 are left: 80
        each."""
        assert HybridKV(0.9, index="beside").allot([0.95, 0.1, 0.1, 0.95], 100, 20, 6.5) == (
            [100, 0, 0, 100],
            [0, 10, 10, 0],
        )

    def test_what_static_heads_need_is_not_loaded(self) -> None:
        """At 0.25, 100: two static heads keep 40 each in any case, and 20 are left, two chunks and a half; at 0.26
        three chunks."""
        assert HybridKV(0.25, index="beside").allot([0.95, 0.1, 0.1, 0.95], 100, 40, 6.5) == (
            [40, 0, 0, 40],
            [0, 1, 1, 0],
        )
        assert HybridKV(0.26, index="beside").allot([0.95, 0.1, 0.1, 0.95], 100, 40, 6.5) == (
            [40, 0, 0, 40],
            [0, 2, 1, 0],
        )

    def test_rows_of_a_few_tokens_stay_on_the_device(self) -> None:
        """A chunk of 8 and a mean, half a token each for 9 tokens in two chunks, are as much as all 9; of 10 tokens
        they are less."""
        assert HybridKV(0.1).allot([0.1, 0.95], 9, 9, 1.0) == ([9, 9], [0, 0])
        assert HybridKV(0.1).allot([0.1, 0.95], 10, 10, 1.0) == ([0, 10], [1, 0])

    @pytest.mark.parametrize("index", ["within", "beside"])
    @pytest.mark.parametrize("tokens", [1, 7, 99, 100])
    @pytest.mark.parametrize("scores", [[0.95, 0.1, 0.2], [0.1] * 3, [0.95] * 3])
    def test_a_budget_of_one_keeps_all(self, scores: list[float], tokens: int, index: str) -> None:
        allotted = HybridKV(1.0, index=index).allot(scores, tokens, min(tokens, 10), -(-tokens // 8) / 2)
        assert allotted == ([tokens] * 3, [0] * 3)

    @pytest.mark.parametrize(
        "count, power", [(0.2, 1), (1.4, 1), (1.5, 2), (2, 2), (2.9, 2), (3, 4), (47.9, 32), (48, 64), (96, 128)]
    )
    def test_the_nearest_power_of_two(self, count: float, power: int) -> None:
        assert nearest_power(count) == power

    def test_shares_hold_their_bounds_and_the_total(self) -> None:
        assert share_out([1.0, 1.0, 1.0], 0, 9, 8) == [3, 3, 2]
        assert share_out([1.0, 2.0, 3.0], 0, 100, 60) == [10, 20, 30]
        # 30 would be above 25: the others share the 5 that are left over, in their ratio of 1 to 2.
        assert share_out([1.0, 2.0, 3.0], 0, 25, 60) == [12, 23, 25]
        # 10 would be below 16: the others have 44 in their ratio of 2 to 3.
        assert share_out([1.0, 2.0, 3.0], 16, 100, 60) == [16, 18, 26]
        assert share_out([1.0, 5.0], 4, 9, 3) == [4, 4]
        assert share_out([1.0, 5.0], 4, 9, 30) == [9, 9]
        generator = torch.Generator().manual_seed(0)
        for total in range(30, 400, 7):
            shares = share_out((torch.rand(8, generator=generator) + 0.01).tolist(), 3, 51, total)
            assert sum(shares) == min(max(total, 24), 408) and all(3 <= share <= 51 for share in shares)

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"budget": 0.0}, r"budget 0.0 is outside \(0, 1\]"),
            ({"uniform": 0.0}, r"uniform 0.0 is outside \(0, 1\]: it is the share of the static"),
            ({"top": 1.5}, r"top 1.5 is outside \(0, 1\]: it is the share of the tokens"),
            ({"theta": -0.1}, "theta -0.1 is an attention mass"),
            ({"theta": 1.5, "quantile": True}, "a quantile from 0 to 1"),
            ({"dynamic": 0.0}, "dynamic 0.0 is a dynamic head's budget"),
            ({"window": 0}, "window 0 and chunk 8 count tokens"),
            ({"chunk": 0}, "window 16 and chunk 0 count tokens"),
            ({"group": "max"}, "group 'max' is neither 'mean' nor 'min'"),
            ({"index": "off"}, "index 'off' is neither 'within' nor 'beside'"),
        ],
    )
    def test_settings_that_cannot_work_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HybridKV(**{"budget": 0.3, **settings})


def stored(segments: list[Segment], row: int, head: int) -> torch.Tensor:
    """All keys that segments hold of a row's KV head, [n, D], retrieved ones from the host."""
    parts = [torch.zeros(0, DIM, dtype=torch.float64)]
    for segment in segments:
        keys, _ = segment.materialize(torch.float64)
        for entry in (segment.owner == row).nonzero()[:, 0].tolist():
            if segment.head is None or int(segment.head[entry]) == head:
                of_head = keys[entry, head if segment.head is None else 0]
                parts.append(of_head if segment.mask is None else of_head[segment.mask[entry]])
    return torch.cat(parts)


class TestStaticHeads:
    def test_window_text_and_the_most_attended(self) -> None:
        """All heads static with 14 of 30 (or of 23) tokens each: text and the last 4, then the visual tokens that these
        attend to most."""
        of = prefill(VALID, *SPANS)
        policy = HybridKV(0.5, theta=0.0, uniform=1.0, window=12)
        visual, text = policy.compress(of)
        for row, (begin, length), total in ((0, (2, 20), 30), (1, (9, 12), 23)):
            shares = sum(len(stored(visual, row, head)) + len(stored(text, row, head)) for head in range(HEADS))
            fixed = [t for t in range(30) if VALID[row, t] and (not begin <= t < begin + length or t >= 18)]
            assert shares == max(HEADS * len(fixed), total)
            for head in range(HEADS):
                received = torch.zeros(30, dtype=torch.float64)
                for query_head in (2 * head, 2 * head + 1):
                    for query in range(18, 30):
                        received += by_hand(of, row, query_head, query)
                earlier = sorted(range(begin, 18), key=lambda t, got=received: -float(got[t]))
                count = len(stored(visual, row, head)) + len(stored(text, row, head)) - len(fixed)
                kept = sorted([t for t in fixed if begin <= t < begin + length] + earlier[:count])
                torch.testing.assert_close(stored(visual, row, head), of.keys[row, head, kept], rtol=0, atol=0)
                words = [t for t in fixed if not begin <= t < begin + length]
                torch.testing.assert_close(stored(text, row, head), of.keys[row, head, words], rtol=0, atol=0)

    def test_rows_have_head_types_of_their_own(self) -> None:
        of = prefill(VALID, *SPANS)
        scores = HybridKV(0.5).observe(of).score
        policy = HybridKV(0.5, theta=float(scores.flatten().sort().values[1:3].mean()), window=4)
        retrieved = [s for s in policy.compress(of).visual if isinstance(s, Retrieved)]
        dynamic = {(int(r), int(h)) for s in retrieved for r, h in zip(s.owner, s.head, strict=True)}
        assert dynamic == {
            (row, head) for row in range(2) for head in range(HEADS) if float(scores[row, head]) < policy.theta
        }
        assert len(dynamic) == 2
        for row in range(2):
            for head in range(HEADS):
                keys = stored([s for s in policy.compress(of).visual if isinstance(s, Retrieved)], row, head)
                assert len(keys) == (int(VALID[row].sum()) if (row, head) in dynamic else 0)


def test_retrieved_heads_count_as_visual_where_there_is_an_image() -> None:
    compressed = HybridKV(0.4, theta=1.1).compress(prefill(torch.ones(2, 30, dtype=torch.bool), (0, 2, 20)))
    for side, row in ((compressed.visual, 0), (compressed.text, 1)):
        assert side and all(isinstance(s, Retrieved) and bool((s.owner == row).all()) for s in side)


def test_it_stands_alone() -> None:
    with pytest.raises(
        ValueError, match="HybridKV stores visual tokens and text together: it can only be a method by itself"
    ):
        Combined(HybridKV(0.5), TextPruning(0.5))
    with pytest.raises(ValueError, match="can only be a method by itself"):
        Combined(StreamingLLM(0.5), HybridKV(0.5))
