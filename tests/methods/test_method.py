"""Methods that share a budget over layers or act again while tokens are written, and segments whose heads store unlike
counts."""

from collections.abc import Callable, Sequence

import pytest
import torch
from support.builders import rand
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule import attach
from kvcapsule.inference.cache import CapsuleCache, CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.kernels.reference import attend
from kvcapsule.methods.kept_rows import keep, keep_heads
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, DecodeState, DecodeTimeMethod, LayerByLayerPass
from kvcapsule.methods.shared_budget import SharedBudget
from kvcapsule.policy import Combined, EvenlySpaced, Full, TextPruning
from kvcapsule.segments.segment import Segment, storage_bytes

ROWS, HEADS, GROUP, TOKENS, DIM = 3, 2, 2, 40, 8


def prefill() -> LayerPrefill:
    query, keys, values = (
        rand(ROWS, heads, TOKENS, DIM, seed=s) for s, heads in enumerate((HEADS * GROUP, HEADS, HEADS))
    )
    return LayerPrefill(0, query, keys, values, [], torch.ones(ROWS, TOKENS, dtype=torch.bool), DIM**-0.5)


def uneven(seed: int = 0) -> torch.Tensor:
    """[B, H, N]: from none to all tokens of each head."""
    counts = torch.tensor([[40, 3], [17, 17], [0, 29]])
    order = torch.rand(ROWS, HEADS, TOKENS, generator=torch.Generator().manual_seed(seed)).argsort(-1).argsort(-1)
    return order < counts[..., None]


def masked_attention(of: LayerPrefill, kept: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Ordinary attention over all tokens, those that are not kept hidden head by head, and one more token (the tail)
    that all see."""
    keys, values = (x.repeat_interleave(GROUP, dim=1) for x in (of.keys, of.values))
    seen = kept.repeat_interleave(GROUP, dim=1)[:, :, None]
    scores = (query @ keys.transpose(-1, -2) * of.scale).masked_fill(~seen, -torch.inf)
    last = (query @ keys[:, :, -1:].transpose(-1, -2)) * of.scale
    weights = torch.cat([scores, last], dim=-1).softmax(dim=-1)
    return weights @ torch.cat([values, values[:, :, -1:]], dim=2)


def tail(of: LayerPrefill) -> Segment:
    return Segment(of.keys[:, :, -1:], of.values[:, :, -1:], torch.arange(ROWS))


def test_heads_of_unlike_counts_attend_as_if_masked() -> None:
    of, kept = prefill(), uneven()
    query = rand(ROWS, HEADS * GROUP, 2, DIM, seed=7)
    out = attend(query, [*keep_heads(of, kept), tail(of)], of.scale)
    torch.testing.assert_close(out, masked_attention(of, kept, query))


def test_what_a_head_does_not_keep_is_not_stored() -> None:
    of, kept = prefill(), uneven()
    segments = keep_heads(of, kept)
    rows = sum(s.keys.shape[0] * s.keys.shape[2] for s in segments)
    assert int(kept.sum()) <= rows <= 1.02 * int(kept.sum())
    tensors = [t for s in segments for t in (s.keys, s.values)]
    assert storage_bytes(t for t in tensors if isinstance(t, torch.Tensor)) == 2 * rows * DIM * 8
    assert sorted(
        (int(r), int(h)) for s in segments if s.head is not None for r, h in zip(s.owner, s.head, strict=True)
    ) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 1),
    ]


def test_heads_of_like_counts_lie_side_by_side() -> None:
    of = prefill()
    kept = torch.rand(ROWS, HEADS, TOKENS, generator=torch.Generator().manual_seed(1)).argsort(-1).argsort(-1) < 9
    (segment,) = keep_heads(of, kept)
    assert segment.head is None
    assert tuple(segment.keys.shape) == (ROWS, HEADS, 9, DIM)
    query = rand(ROWS, HEADS * GROUP, 1, DIM, seed=7)
    torch.testing.assert_close(attend(query, [segment, tail(of)], of.scale), masked_attention(of, kept, query))
    assert keep_heads(of, torch.zeros_like(kept)) == []


def test_rows_of_single_heads_are_selected_with_their_heads() -> None:
    of, kept = prefill(), uneven()
    query = rand(ROWS, HEADS * GROUP, 1, DIM, seed=7)
    rows = torch.tensor([2, 0, 0])
    chosen = [s.select(rows) for s in [*keep_heads(of, kept), tail(of)]]
    torch.testing.assert_close(attend(query, chosen, of.scale), attend_alone(of, kept, query, rows))


def attend_alone(of: LayerPrefill, kept: torch.Tensor, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Row i of the query against what row rows[i] stores."""
    whole = torch.zeros_like(query).index_copy(0, torch.arange(ROWS), query)
    return torch.stack([masked_attention(of, kept, whole[i].expand_as(query))[r] for i, r in enumerate(rows.tolist())])


def test_a_segment_of_single_heads_has_no_maps_along_tokens() -> None:
    keys, one = torch.zeros(2, 2, 3, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"entries of single KV heads hold 1 head and no maps along the tokens; these hold 2"
    ):
        Segment(keys, keys, one, head=one)
    with pytest.raises(ValueError, match="no maps along the tokens"):
        Segment(keys[:, :1], keys[:, :1], one, head=one, score_map=torch.zeros(1, 3, 3), value_map=torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="all segments are of single KV heads"):
        attend(torch.zeros(2, 4, 1, 4), [Segment(keys[:, :1], keys[:, :1], one, head=one)], 1.0)


class ByLayer(SharedBudget[float]):
    """Layer l keeps the first tokens of a share of the budget that grows with its mean key; what it sees is written
    down."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def observe(self, prefill: LayerPrefill) -> float:
        assert prefill.query.shape[2] == prefill.keys.shape[2]
        return float(prefill.layer + 1)

    def commit(self, prefills: Sequence[LayerPrefill], observations: Sequence[float]) -> list[Compressed]:
        assert all(p.query.shape[2] == 0 for p in prefills)
        self.seen.append([p.layer for p in prefills])
        total = sum(observations)
        return [self.cut(p, share / total) for p, share in zip(prefills, observations, strict=True)]

    def cut(self, of: LayerPrefill, share: float) -> Compressed:
        first = of.valid & (of.valid.cumsum(dim=1) <= round(share * of.valid.shape[1]))
        return Compressed(keep(of, first & of.visual()), keep(of, first & ~of.visual()))


def test_a_shared_budget_is_committed_when_all_layers_are_known(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    method = ByLayer()
    batch = make_batch((1, "Read line 2."), (1, "Transcribe the page."))
    with attach(model):
        cache = CapsuleCache(model.config, method)
        model.generate(**batch, **cache_argument(cache), max_new_tokens=3, do_sample=False)
    assert method.seen == [[0, 1, 2, 3]]
    length = batch["input_ids"].shape[1]
    stored = [
        sum(s.tokens for s in (*layer.visual, *layer.text)) for layer in cache.layers if isinstance(layer, CapsuleLayer)
    ]
    assert stored == sorted(stored)
    assert abs(stored[3] - 0.4 * length) < 12 and stored[0] < 0.15 * length


def test_a_shared_budget_of_one_layer() -> None:
    compressed = ByLayer().compress(prefill())
    assert sum(s.tokens for s in compressed.text) == TOKENS


def test_pairing_waits_for_both_methods() -> None:
    layers = [
        LayerPrefill(i, *(prefill().query, prefill().keys, prefill().values), [], prefill().valid, 1.0)
        for i in range(2)
    ]
    run = Combined(Full(), ByLayer()).begin_pass([0, 1])
    assert list(run.add(layers[0])) == []
    assert [layer for layer, _ in run.add(layers[1])] == [0, 1]
    assert isinstance(Full().begin_pass([0]), LayerByLayerPass)
    direct = Combined(Full(), TextPruning(0.5)).begin_pass([0])
    assert [layer for layer, _ in direct.add(layers[0])] == [0]


class LastOnes(Full, DecodeTimeMethod):
    """Every 4 written tokens: of the tail, the last two are kept, and what was is left as it is."""

    interval, window = 4, 3

    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []

    def decode_time(self) -> DecodeTimeMethod:
        return self

    def on_decode(self, state: DecodeState) -> Compressed:
        self.written.append((state.layer, state.keys.shape[2], state.query.shape[2]))
        assert bool(state.valid.all())
        rows = torch.arange(state.keys.shape[0])
        kept = Segment(state.keys[:, :, -2:].clone(), state.values[:, :, -2:].clone(), rows)
        return Compressed(state.visual, [*state.text, kept])


def test_a_method_acts_again_while_tokens_are_written(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    method = LastOnes()
    batch = make_batch((1, "Read line 2."), (2, "Transcribe the page."))
    with attach(model):
        cache = CapsuleCache(model.config, method)
        model.generate(**batch, **cache_argument(cache), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert method.written == [(layer, 4, 3) for _ in range(2) for layer in range(4)]
    for layer in cache.layers:
        assert isinstance(layer, CapsuleLayer)
        assert layer.tail_length == 3, "eleven tokens went through the cache, eight of them in two revisions"
        assert [s.tokens for s in layer.text[-2:]] == [2, 2]
        assert layer.get_seq_length() == batch["input_ids"].shape[1] + 11
        assert layer.queries is not None and layer.queries.shape[2] == 3
    before = cache.bytes()
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.bytes().tail == before.tail


def test_a_revision_that_keeps_everything_changes_no_answer(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    class All(LastOnes):
        def on_decode(self, state: DecodeState) -> Compressed:
            rows = torch.arange(state.keys.shape[0])
            kept = Segment(state.keys.clone(), state.values.clone(), rows, mask=state.valid.clone())
            return Compressed(state.visual, [*state.text, kept])

    batch = make_batch((1, "Read line 2."), (2, "Transcribe the page."))
    answers = []
    for method in (Full(), All(), Combined(Full(), All())):
        with attach(model, method):
            answers.append(model.generate(**batch, max_new_tokens=14, min_new_tokens=14, do_sample=False))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_only_the_text_s_method_may_act_again() -> None:
    with pytest.raises(ValueError, match="LastOnes acts during decoding: it can only be the method of the text"):
        Combined(LastOnes(), EvenlySpaced(0.5))
