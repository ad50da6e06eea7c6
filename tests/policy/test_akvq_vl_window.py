"""AKVQ-VL: what becomes of tokens that leave the window, and generation past it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.akvq_vl_by_hand import (
    DIM,
    GROUP,
    HEADS,
    POLICY,
    bits_of,
    expected,
    held,
    mixed,
    pivots_of,
    places,
    tokens,
)
from support.builders import rand
from support.prefills import alone
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.kernels.reference import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, DecodeState
from kvcapsule.policy import AkvqVl, Full
from kvcapsule.policy.akvq_vl import PIVOT
from kvcapsule.policy.combine import Combined
from kvcapsule.segments.group_quantized_rows import GroupedRows
from kvcapsule.segments.segment import Segment

# The window moves


def later(compressed: Compressed, of: LayerPrefill, seen: torch.Tensor | None = None) -> DecodeState:
    """The tokens of `of` as written behind what is stored."""
    rows, count = of.keys.shape[0], of.keys.shape[2]
    seen = torch.ones(rows, count, dtype=torch.bool) if seen is None else seen
    query = of.query[:, :, :0]
    return DecodeState(of.layer, compressed.visual, compressed.text, of.keys, of.values, seen, query, of.scale)


def revised(policy: AkvqVl, of: LayerPrefill, *written: LayerPrefill) -> Compressed:
    compressed = policy.compress(of)
    for tail in written:
        compressed = policy.on_decode(later(compressed, tail))
    return compressed


def test_what_leaves_the_window_is_stored_as_its_like() -> None:
    """A text-salient row, one with pivots and one without an image; 40 tokens written, twice; 12 are recent."""
    of, first, second = mixed(), tokens([], [0] * 3, 40), tokens([], [0] * 3, 40)
    second = replace(second, keys=second.keys * 3, values=second.values - 1)
    after = revised(POLICY, of, first, second)
    for row in range(3):
        salient = any(s.tag == 4 and row in s.owner for s in POLICY.compress(of).text if bits_of(s) == 16)
        assert salient == (row == 0) or row == 2
        pivot = [] if salient else pivots_of(of, row, 6)
        bits = 4 if salient else 2
        for visual, segments in ((True, after.visual), (False, after.text)):
            marked = places(of, row, visual)
            own = [p for p in marked if p not in pivot]
            coded, exact = (
                [expected(of, row, own, 2 if visual else bits)],
                [expected(of, row, [p for p in pivot if p in marked], 16)],
            )
            if not visual:
                coded += [expected(first, row, list(range(40)), bits), expected(second, row, list(range(28)), bits)]
                exact += [expected(second, row, list(range(28, 40)), 16)]
            assert_same_tokens(held(segments, row, 2 if visual else bits), torch.cat(coded, dim=2))
            assert_same_tokens(held(segments, row, 16), torch.cat(exact, dim=2))
            assert sum(held(segments, row, n).shape[2] for n in (2, 4, 16)) == sum(x.shape[2] for x in (*coded, *exact))


def assert_same_tokens(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    """[2, H, n, D] each, in whatever order: attention does not mind it."""
    apart = (ours[:, :, :, None] - wanted[:, :, None]).abs().amax(dim=(0, 1, 4))
    assert apart.shape[0] == apart.shape[1]
    matches = (apart < 1e-5).long()
    assert (matches.sum(0) == 1).all() and (matches.sum(1) == 1).all()


def test_a_short_window_moves_in_chunks() -> None:
    assert (AkvqVl().interval, AkvqVl(recent=12).interval, AkvqVl(recent=0).interval) == (128, 32, 32)
    of = mixed()
    after = revised(AkvqVl((), recent=0, pivots=0), of, tokens([], [0] * 3, 40))
    assert all(isinstance(s.keys, GroupedRows) for s in (*after.visual, *after.text))
    assert sum(held(after.text, row, 2).shape[2] for row in range(3)) == int((of.valid & ~of.visual()).sum()) + 3 * 40


def test_segments_do_not_pile_up() -> None:
    tail = tokens([], [0] * 3, 40)
    counts = [len(revised(POLICY, mixed(), *[tail] * times).text) for times in (1, 2, 5)]
    assert counts[0] == counts[1] == counts[2]


def test_padding_of_a_tail_stays_unseen_and_a_closed_tail_leaves() -> None:
    """Row 0 of a tail begins with three tokens of padding; a segment of raw text is what was written before a second
    image."""
    of, tail = mixed(), tokens([], [0] * 3, 40)
    compressed = POLICY.compress(of)
    closed = Segment(tail.keys[:, :, :5].clone(), tail.values[:, :, :5].clone(), torch.arange(3))
    seen = torch.ones(3, 40, dtype=torch.bool)
    seen[0, :3] = False
    after = POLICY.on_decode(later(Compressed(compressed.visual, [*compressed.text, closed]), tail, seen))
    assert held(after.text, 0, 4).shape[2] == len(places(of, 0, False)) + 5 + 28 - 3
    assert held(after.text, 1, 16).shape[2] == 12 + sum(p in places(of, 1, False) for p in pivots_of(of, 1, 6))


def test_a_revised_batch_is_its_rows_one_by_one() -> None:
    of, tail = mixed(), tokens([], [0] * 3, 40)
    query = rand(3, HEADS * GROUP, 2, DIM, seed=9)
    visual, text = revised(POLICY, of, tail, tail)
    together = attend(query, [*visual, *text], 0.3)
    for row in range(3):
        visual, text = revised(POLICY, alone(of, row), alone(tail, row), alone(tail, row))
        torch.testing.assert_close(attend(query[row : row + 1], [*visual, *text], 0.3), together[row : row + 1])


# Through the model


class Listening(AkvqVl):
    """Writes down the hidden states that it is given."""

    taken: dict[int, torch.Tensor] = {}  # noqa: RUF012

    def compress(self, prefill: LayerPrefill) -> Compressed:
        assert prefill.hidden is not None
        self.taken[prefill.layer] = prefill.hidden
        return super().compress(prefill)


@pytest.mark.parametrize("own", [True, False])
def test_hidden_states_are_what_enters_each_layer(
    own: bool, model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    """Whether the method is attached or a cache is passed by hand."""
    batch = make_batch((1, "Read line 2."), (2, "What is the number beside the owl?"))
    with torch.no_grad():
        entered = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    Listening.taken.clear()
    policy = Listening()
    with attach(model, policy if own else None):
        cache = CapsuleCache(model.config, policy)
        model.generate(**batch, **cache_argument(cache), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert sorted(policy.taken) == [0, 1, 2, 3]
    seen = batch["attention_mask"].bool()
    for layer, hidden in policy.taken.items():
        torch.testing.assert_close(hidden[seen], entered[layer][seen], rtol=1e-3, atol=1e-4)
    assert all(layer.hidden is None for layer in cache.layers if isinstance(layer, CapsuleLayer)), "none is held"
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)


def test_methods_that_do_not_ask_cost_no_hook(model: LlavaForConditionalGeneration) -> None:
    for method, hooks in ((Full(), 0), (AkvqVl(), 1), (Combined(Full(), AkvqVl()), 1), (None, 1)):
        with attach(model, method):
            assert all(len(layer._forward_pre_hooks) == hooks for layer in model.get_decoder().layers)


def stored_tokens(cache: CapsuleCache, row: int) -> list[int]:
    """Tokens of a row in each layer, the tail included."""
    counts = []
    for layer in cache.layers:
        assert isinstance(layer, CapsuleLayer)
        count = layer.tail_length
        for s in (*layer.visual, *layer.text):
            mask = torch.ones(len(s.owner), s.tokens, dtype=torch.bool) if s.mask is None else s.mask
            count += int(mask[s.owner == row].sum())
        counts.append(count)
    return counts


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_past_the_window(
    beams: int, model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    """A padded batch, 36 tokens, a window of 20: after a revision every token is stored once, in every layer."""
    batch = make_batch((1, "Read line 2."), (2, "What is the number beside the owl?"))
    policy = AkvqVl(recent=20)
    assert policy.decode_time() is policy
    with attach(model, policy):
        cache = CapsuleCache(model.config, policy)
        model.generate(
            **batch, **cache_argument(cache), max_new_tokens=36, min_new_tokens=36, num_beams=beams, do_sample=False
        )
    for row in range(2 * beams):
        assert stored_tokens(cache, row) == [int(batch["attention_mask"][row // beams].sum()) + 35] * 4
    for layer in cache.layers:
        assert isinstance(layer, CapsuleLayer)
        assert layer.tail_length == 35 - 32
        raw = [s for s in layer.text if isinstance(s.keys, torch.Tensor)]
        assert all(s.tag is not None for s in raw)
        assert sum(len(s.owner) * s.tokens for s in raw if s.tag != PIVOT) == 2 * beams * 20


def test_a_second_turn_with_an_image(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    first, second = make_batch((1, "Read line 2.")), make_batch((1, "Transcribe the page."))
    policy = AkvqVl(recent=20)
    length = first["input_ids"].shape[1] + second["input_ids"].shape[1]
    with attach(model, policy), torch.no_grad():
        cache = CapsuleCache(model.config, policy)
        model(**first, **cache_argument(cache))
        model(input_ids=torch.full((1, 3), 5), **cache_argument(cache))
        out = model(input_ids=second["input_ids"], pixel_values=second["pixel_values"], **cache_argument(cache))
        assert torch.isfinite(out.logits).all()
        assert cache.get_seq_length() == length + 3
        assert stored_tokens(cache, 0) == [length + 3] * 4
        model(input_ids=torch.full((1, 40), 5), **cache_argument(cache))
    assert stored_tokens(cache, 0) == [length + 43] * 4
    raw = [
        s
        for layer in cache.layers
        if isinstance(layer, CapsuleLayer)
        for s in (*layer.visual, *layer.text)
        if bits_of(s) == 16
    ]
    assert {s.tag for s in raw} <= {PIVOT, 2, 4}
    assert all(s.tokens == 20 for s in raw if s.tag != PIVOT), "both prompts' windows and the three tokens have left"


def test_as_the_text_s_method_beside_another(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    method = Combined(Full(), AkvqVl(recent=8))
    batch = make_batch((1, "Read line 2."))
    with attach(model, method):
        cache = CapsuleCache(model.config, method)
        model.generate(**batch, **cache_argument(cache), max_new_tokens=40, min_new_tokens=40, do_sample=False)
    layers = [layer for layer in cache.layers if isinstance(layer, CapsuleLayer)]
    assert all(bits_of(s) == 16 for layer in layers for s in layer.visual)
    assert all(any(bits_of(s) < 16 for s in layer.text) for layer in layers)
    assert stored_tokens(cache, 0) == [int(batch["attention_mask"].sum()) + 39] * 4
