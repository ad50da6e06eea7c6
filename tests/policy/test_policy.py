"""Policies keep what they say: worked out by hand on small prefills, and against the attention weights of the model
itself."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule.inference.attach import attach
from kvcapsule.methods.kept_rows import keep
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.tiles import cut_tiles, tiled
from kvcapsule.policy import (
    EvenlySpaced,
    Full,
    PostVisionAttention,
    Quantized,
    TokenPruning,
    VisualPolicy,
)
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.segment import Segment
from kvcapsule.vlm.spans import VisualSpan, find_spans


def prefill(spans: list[VisualSpan], valid: torch.Tensor, dim: int = 4, seed: int = 0) -> LayerPrefill:
    """Two KV heads of two query heads each."""
    batch, tokens = valid.shape
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (torch.randn(batch, heads, tokens, dim, generator=generator) for heads in (4, 2, 2))
    return LayerPrefill(0, query, keys, values, spans, valid, dim**-0.5)


def span(row: int, start: int, length: int) -> VisualSpan:
    return VisualSpan(row, start, length, (1, 1, length))


ONE = prefill([span(0, 1, 6), span(0, 7, 3)], torch.ones(1, 12, dtype=torch.bool))
"""Text at 0, images at 1..6 and 7..9, text at 10 and 11."""
PADDED_VALID = torch.tensor([[False, False] + [True] * 8, [True] * 10, [False] * 7 + [True] * 3])
PADDED = prefill([span(0, 3, 4), span(1, 0, 4), span(1, 5, 4)], PADDED_VALID)
"""Rows with one image, with two, and with none."""


def stored(segments: list[Segment], row: int) -> torch.Tensor:
    """All keys that segments hold of a row, [H, n, D]."""
    parts = []
    for segment in segments:
        for entry in (segment.owner == row).nonzero()[:, 0].tolist():
            keys = segment.materialize()[0][entry]
            parts.append(keys if segment.mask is None else keys[:, segment.mask[entry]])
    return torch.cat(parts, dim=1) if parts else torch.zeros(2, 0, 4)


class Scripted(TokenPruning):
    """Scores that are written down."""

    def __init__(self, ratio: float, scores: list[float]) -> None:
        super().__init__(ratio)
        self.written = torch.tensor(scores)

    def scores(self, of: LayerPrefill) -> torch.Tensor:
        return self.written.expand(of.valid.shape)


def test_the_best_of_every_span_are_kept_in_order() -> None:
    scores = [9.0, 5.0, 1.0, 7.0, 2.0, 6.0, 0.0, 1.0, 3.0, 2.0, 9.0, 9.0]
    visual, text = Scripted(0.5, scores).compress(ONE)
    # Three of the six: 1, 3 and 5. Two of the three (1.5 rounds to the even 2): 8 and 9.
    torch.testing.assert_close(stored(visual, 0), ONE.keys[0][:, [1, 3, 5, 8, 9]])
    torch.testing.assert_close(stored(text, 0), ONE.keys[0][:, [0, 10, 11]])
    torch.testing.assert_close(torch.cat([s.values for s in visual], dim=2)[0], ONE.values[0][:, [1, 3, 5, 8, 9]])


def test_at_least_one_token_of_a_span_is_kept() -> None:
    visual, _ = Scripted(0.01, [0.0] * 6 + [1.0] + [0.0] * 2 + [1.0] * 3).compress(ONE)
    torch.testing.assert_close(stored(visual, 0), ONE.keys[0][:, [6, 9]])


def test_evenly_spaced_by_hand() -> None:
    """Two of six tokens: the middles of two halves, floor(1.5) = 1 and floor(4.5) = 4; one of three: 1."""
    visual, _ = EvenlySpaced(1 / 3).compress(ONE)
    torch.testing.assert_close(stored(visual, 0), ONE.keys[0][:, [1 + 1, 1 + 4, 7 + 1]])


@pytest.mark.parametrize("length", [1, 2, 3, 49, 196, 577])
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.4, 0.5, 0.77, 0.99, 1.0])
def test_evenly_spaced_keeps_its_share(length: int, ratio: float) -> None:
    of = prefill([span(0, 0, length)], torch.ones(1, length, dtype=torch.bool))
    chosen = EvenlySpaced(ratio).scores(of)[0].nonzero()[:, 0]
    assert len(chosen) == max(1, round(ratio * length))
    assert int(chosen.diff().max() - chosen.diff().min()) <= 1 if len(chosen) > 1 else True


def test_post_vision_attention_by_hand() -> None:
    """Attention of the tokens behind the last image, summed over heads and queries, one at a time."""
    scores = PostVisionAttention(0.4).scores(PADDED)
    for row, begin, behind in ((0, 2, [7, 8, 9]), (1, 0, [9])):
        expected = torch.zeros(10)
        for q in behind:
            for head in range(4):
                logits = PADDED.keys[row, head // 2, begin : q + 1] @ PADDED.query[row, head, q] / 2.0
                expected[begin : q + 1] += logits.softmax(dim=0)
        torch.testing.assert_close(scores[row], expected)


def test_post_vision_attention_is_the_models_own(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    """In every layer, with padding: the column sums of the model's eager attention weights."""
    batch = make_batch((1, "Read line 2."), (2, "What is the number beside the owl?"))
    spans = find_spans(model.config, batch["input_ids"], batch)
    ends = [max(s.start + s.length for s in spans if s.row == row) for row in range(2)]
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            weights = model(**batch, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})
    taken: list[torch.Tensor] = []

    class Listening(PostVisionAttention):
        def scores(self, of: LayerPrefill) -> torch.Tensor:
            taken.append(super().scores(of))
            return taken[-1]

    with attach(model, Listening(0.4)):
        model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert len(taken) == len(weights) == 4
    for scores, attention in zip(taken, weights, strict=True):
        for row, end in enumerate(ends):
            expected = attention[row, :, end:].sum(dim=(0, 1))
            for s in (s for s in spans if s.row == row):
                run = slice(s.start, s.start + s.length)
                torch.testing.assert_close(scores[row, run], expected[run], rtol=1e-4, atol=1e-6)
    assert float(weights[2][0, :, ends[0] :].max()) > 0.2, "attention is not uniform"


def test_post_vision_attention_without_text_behind() -> None:
    """An image at the end of the prompt: nothing ranks its tokens, and as many are kept."""
    of = prefill([span(0, 2, 8), span(1, 1, 8)], torch.ones(2, 10, dtype=torch.bool))
    scores = PostVisionAttention(0.5).scores(of)
    assert (scores[0] == 0).all()
    assert (scores[1, 1:9] > 0).all()
    visual, _ = PostVisionAttention(0.5).compress(of)
    assert stored(visual, 0).shape[1] == stored(visual, 1).shape[1] == 4


@pytest.mark.parametrize(
    "policy", [Full(), Quantized(8), EvenlySpaced(1.0), PostVisionAttention(1.0)], ids=lambda p: type(p).__name__
)
def test_every_valid_token_is_stored_once(policy: VisualPolicy) -> None:
    for of in (ONE, PADDED):
        visual, text = policy.compress(of)
        marked = of.visual()
        for row in range(of.valid.shape[0]):
            torch.testing.assert_close(stored(visual, row), of.keys[row][:, marked[row]], rtol=0, atol=0.02)
            torch.testing.assert_close(stored(text, row), of.keys[row][:, of.valid[row] & ~marked[row]], rtol=0, atol=0)


def test_quantized_by_hand() -> None:
    visual, text = Quantized(2).compress(ONE)
    (segment,) = visual
    assert isinstance(segment.keys, QuantizedRows)
    x = ONE.keys[:, :, 1:10]
    step = (x.amax(2, keepdim=True) - x.amin(2, keepdim=True)) / 3
    torch.testing.assert_close(
        segment.materialize()[0], ((x - x.amin(2, keepdim=True)) / step).round() * step + x.amin(2, keepdim=True)
    )
    assert all(isinstance(s.keys, torch.Tensor) for s in text)


def test_padding_of_uneven_rows_does_not_widen_a_range() -> None:
    """Rows with 4 and 5 visual tokens share a segment; each row's codes are those of the row alone."""
    valid = torch.ones(2, 8, dtype=torch.bool)
    of = prefill([span(0, 2, 5), span(1, 2, 4)], valid)
    of.keys[:, :, 7], of.values[:, :, 7] = 100.0, -100.0
    (both,) = Quantized(2).compress(of).visual
    assert both.mask is not None
    for row, length in ((0, 5), (1, 4)):
        alone = LayerPrefill(
            0,
            of.query[row : row + 1],
            of.keys[row : row + 1],
            of.values[row : row + 1],
            [span(0, 2, length)],
            valid[:1],
            0.5,
        )
        (one,) = Quantized(2).compress(alone).visual
        for ours, theirs in zip(both.materialize(), one.materialize(), strict=True):
            torch.testing.assert_close(ours[row, :, :length], theirs[0], rtol=0, atol=0)


def test_rows_of_like_length_share_a_segment_and_others_do_not() -> None:
    valid = torch.ones(3, 40, dtype=torch.bool)
    of = prefill([], valid)
    counts = torch.tensor([10, 9, 10])
    (near,) = keep(of, torch.arange(40) < counts[:, None])
    assert near.mask is not None
    assert near.mask.sum(1).tolist() == [10, 9, 10]
    far = keep(of, torch.arange(40) < torch.tensor([30, 4, 30])[:, None])
    assert [(s.owner.tolist(), s.tokens, s.mask) for s in far] == [([1], 4, None), ([0, 2], 30, None)]
    assert keep(of, torch.zeros(3, 40, dtype=torch.bool)) == []
    (some,) = keep(of, (torch.arange(40) < 5) & torch.tensor([[True], [False], [True]]))
    assert some.owner.tolist() == [0, 2]
    torch.testing.assert_close(some.values, of.values[[0, 2], :, :5])


def test_tiles() -> None:
    of = prefill([span(0, 3, 4), span(1, 0, 7), span(1, 8, 2)], torch.ones(2, 10, dtype=torch.bool))
    tiles = cut_tiles(of, 3)
    assert tiles is not None
    assert tiles.owner.tolist() == [0, 1, 1]
    torch.testing.assert_close(tiles.keys, torch.stack([of.keys[0][:, 3:6], of.keys[1][:, 0:3], of.keys[1][:, 3:6]]))
    torch.testing.assert_close(
        tiles.values, torch.stack([of.values[0][:, 3:6], of.values[1][:, 0:3], of.values[1][:, 3:6]])
    )
    assert tiles.frame is None
    assert tiled(of, 3).nonzero().tolist() == [[0, 3], [0, 4], [0, 5], *([1, i] for i in range(6))]
    assert cut_tiles(of, 8) is None
    assert not tiled(of, 8).any()


@pytest.mark.parametrize("spans", [[span(1, 2, 7)], [span(0, 3, 4), span(1, 0, 7)]], ids=["one span", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_that_are_lent_are_the_same(spans: list[VisualSpan], dtype: torch.dtype) -> None:
    """One layer after the other has them in the same memory, or in the prefill's own."""
    of = prefill(spans, torch.ones(2, 10, dtype=torch.bool))
    angles = torch.arange(10.0)[None, :, None] / 3 ** torch.arange(of.keys.shape[3] // 2)
    rotation = [torch.cat([x, x], -1) for x in (angles.cos(), angles.sin())]
    of = replace(of, keys=of.keys.to(dtype), values=of.values.to(dtype), position_embeddings=(rotation[0], rotation[1]))
    places = set()
    for layer in (of, replace(of, keys=2 * of.keys, values=of.values + 1)):
        before = layer.keys.clone()
        own, lent = cut_tiles(layer, 3, turned=True), cut_tiles(layer, 3, turned=True, lent=True)
        plain = cut_tiles(layer, 3)
        assert own is not None and lent is not None and plain is not None and plain.frame is not None
        torch.testing.assert_close(own.keys, plain.frame.unrotate(plain.keys))
        for one, other in (
            (own.keys, lent.keys),
            (own.values, lent.values),
            (plain.values, lent.values),
            (layer.keys, before),
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        kept = {x.untyped_storage().data_ptr() for x in (own.keys, own.values, plain.keys)}
        given = {x.untyped_storage().data_ptr() for x in (layer.keys, layer.values)}
        assert not kept & given
        assert (lent.values.untyped_storage().data_ptr() in given) == (len(spans) == 1)
        assert lent.keys.untyped_storage().data_ptr() not in given | kept
        places.add(lent.keys.untyped_storage().data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("spans", [[span(1, 2, 7)], [span(0, 3, 4), span(1, 0, 7)]], ids=["one span", "two"])
def test_gradients_go_through_tiles(spans: list[VisualSpan]) -> None:
    of = prefill(spans, torch.ones(2, 10, dtype=torch.bool))
    angles = torch.arange(10.0)[None, :, None].expand(1, 10, of.keys.shape[3])
    of = replace(
        of,
        position_embeddings=(angles.cos(), angles.sin()),
        keys=of.keys.requires_grad_(),
        values=of.values.requires_grad_(),
    )
    tiles, plain = cut_tiles(of, 3, turned=True), cut_tiles(of, 3)
    assert tiles is not None and plain is not None and plain.frame is not None
    one, other = (
        torch.autograd.grad((keys * values).sum(), (of.keys, of.values))
        for keys, values in ((tiles.keys, tiles.values), (plain.frame.unrotate(plain.keys), plain.values))
    )
    torch.testing.assert_close(one, other)
    assert float(one[0].abs().sum()) > 0 and int((one[1] != 0).any(-1).sum()) == 2 * 3 * len(tiles.owner)


@pytest.mark.parametrize("policy", [PostVisionAttention, EvenlySpaced])
@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, 40])
def test_ratios_outside_are_refused(policy: type[TokenPruning], ratio: float) -> None:
    with pytest.raises(ValueError, match=r"retention ratio .* is outside \(0, 1\]"):
        policy(ratio)


def test_bits_that_do_not_pack_are_refused_before_the_prompt() -> None:
    with pytest.raises(ValueError, match="5 bits cannot be packed"):
        Quantized(5)
