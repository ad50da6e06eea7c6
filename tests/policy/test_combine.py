"""A visual method beside a text policy: each sees to its own tokens, and pruning keeps what it says."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.builders import GEOMETRY, prefill, rand, transform_capsule

from kvcapsule import attach
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.errors import GeometryError
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.kernels.reference import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.policy import Combined, EvenlySpaced, Full, LookM, Quantized
from kvcapsule.policy.text import OBSERVED, QuantizedText, TextPruning, last_attention
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.vlm.spans import VisualSpan


def tokens(spans: list[tuple[int, int, int]], padding: list[int], count: int = 60) -> LayerPrefill:
    """Rows of `count` tokens, the first of each padded; 2 KV heads of 8, 4 query heads. Values tell a token's row and
    place."""
    rows = len(padding)
    valid = torch.arange(count) >= torch.tensor(padding)[:, None]
    values = (
        (torch.arange(rows)[:, None] * 1000 + torch.arange(count))
        .double()[:, None, :, None]
        .expand(rows, 2, count, 8)
        .clone()
    )
    visual = [VisualSpan(row, start, length, (1, 1, length)) for row, start, length in spans]
    return LayerPrefill(
        0, rand(rows, 4, count, 8, seed=1), rand(rows, 2, count, 8, seed=2), values, visual, valid, 8**-0.5, None
    )


def stored(segments: list[Segment], row: int) -> list[int]:
    """Places of the tokens that are stored of a row."""
    places: list[int] = []
    for segment in segments:
        for entry in (segment.owner == row).nonzero()[:, 0].tolist():
            there = slice(None) if segment.mask is None else segment.mask[entry]
            places += segment.values[entry, 0, there, 0].long().tolist()
    return sorted(place - 1000 * row for place in places)


def heaviest(of: LayerPrefill, row: int, places: list[int], count: int) -> list[int]:
    """Those that the last queries attend to most, written out one query and head at a time."""
    n = of.keys.shape[2]
    begin = int(of.valid[row].to(torch.int8).argmax())
    received = torch.zeros(n, dtype=torch.float64)
    for q in range(max(begin, n - OBSERVED), n):
        for head in range(4):
            received[begin : q + 1] += (
                of.keys[row, head // 2, begin : q + 1] @ of.query[row, head, q] * of.scale
            ).softmax(dim=0)
    return sorted(sorted(places, key=lambda place: -float(received[place]))[:count])


OF = tokens([(0, 6, 10), (0, 30, 8), (1, 20, 12)], [0, 5])
TEXT = [[i for i in range(60) if not (6 <= i < 16 or 30 <= i < 38)], [i for i in range(5, 60) if not 20 <= i < 32]]


@pytest.mark.parametrize(("ratio", "sinks", "recent"), [(0.8, 4, 16), (0.6, 2, 5), (0.5, 0, 0), (0.99, 4, 16)])
def test_pruning_keeps_sinks_recents_and_what_the_last_queries_look_at(ratio: float, sinks: int, recent: int) -> None:
    """Of 42 and 43 text tokens, ceil(ratio n) in all."""
    segments = TextPruning(ratio, sinks, recent).compress_text(OF)
    for row, text in enumerate(TEXT):
        always = text[:sinks] + text[len(text) - recent :]
        between = text[sinks : len(text) - recent]
        count = {0.8: (34, 35), 0.6: (26, 26), 0.5: (21, 22), 0.99: (42, 43)}[ratio][row]
        assert stored(segments, row) == sorted(always + heaviest(OF, row, between, count - len(always)))


def test_sinks_and_recents_stay_whatever_the_ratio_says() -> None:
    segments = TextPruning(0.01, sinks=4, recent=16).compress_text(OF)
    assert [stored(segments, row) for row in (0, 1)] == [text[:4] + text[-16:] for text in TEXT]
    short = tokens([(0, 1, 50)], [0])
    assert stored(TextPruning(0.01).compress_text(short), 0) == [0, *range(51, 60)]
    assert stored(TextPruning(0.5, sinks=0, recent=0).compress_text(tokens([], [59])), 0) == [59]


def test_keys_are_kept_with_their_values() -> None:
    (segment,) = TextPruning(0.5).compress_text(tokens([], [0]))
    places = segment.values[0, 0, :, 0].long()
    assert len(places) == 30
    torch.testing.assert_close(segment.keys[0], tokens([], [0]).keys[0][:, places], rtol=0, atol=0)


def test_only_the_last_queries_are_looked_at() -> None:
    changed = replace(OF, query=OF.query.clone())
    changed.query[:, :, :-OBSERVED] = 100.0
    torch.testing.assert_close(last_attention(changed), last_attention(OF), rtol=0, atol=0)
    changed.query[:, :, -OBSERVED] = 100.0
    assert not torch.allclose(last_attention(changed), last_attention(OF))


def test_attention_received_sums_to_queries_and_heads() -> None:
    """Nothing goes to padding; a row of three tokens has three queries."""
    of = tokens([], [0, 57])
    received = last_attention(of)
    torch.testing.assert_close(received.sum(1), torch.tensor([4.0 * OBSERVED, 4.0 * 3]))
    assert (received[1, :57] == 0).all()


def test_a_ratio_of_one_is_the_method_alone() -> None:
    for visual in (Full(), EvenlySpaced(0.5), transform_capsule().double()):
        of = prefill()
        alone, paired = visual.compress(of), Combined(visual, TextPruning(1.0)).compress(of)
        query = rand(2, 4, 3, 8, seed=7)
        expected = attend(query, [*alone.visual, *alone.text], of.scale)
        torch.testing.assert_close(attend(query, [*paired.visual, *paired.text], of.scale), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "text", [TextPruning(0.6), TextPruning(1.0), QuantizedText(4)], ids=["pruned", "whole", "quantized"]
)
def test_visual_tokens_are_the_visual_methods(text: Any) -> None:
    visual, _ = Combined(EvenlySpaced(0.5), text).compress(OF)
    assert stored(visual, 0) == stored(EvenlySpaced(0.5).compress(OF).visual, 0)
    assert len(stored(visual, 0)) == 9


def test_bytes_fall() -> None:
    """42 and 43 text tokens of 2 x 2 x 8 numbers of 8 bytes: raw, half of them, and in 4 bits."""
    sizes = []
    for text in (TextPruning(1.0), TextPruning(0.5, sinks=2, recent=4), QuantizedText(4)):
        visual, kept = Combined(Full(), text).compress(OF)
        assert storage_bytes(t for s in visual for t in s.entry_tensors()) == storage_bytes(
            t for s in Full().compress(OF).visual for t in s.entry_tensors()
        )
        sizes.append(storage_bytes(t for s in kept for t in s.entry_tensors()))
    row, owners = 2 * 2 * 8 * 8, 2 * 8
    assert sizes[0] == 2 * 43 * row + owners + 2 * 43, "row 0 is padded by one token and masked"
    assert sizes[1] == 2 * 22 * row + owners + 2 * 22
    assert sizes[2] == 2 * 2 * 2 * 8 * (4 * 6 + 2 * 8) + owners + 2 * 43, (
        "48 codes of half a byte, a step and a zero for each channel"
    )


def test_quantized_text_is_near_the_text() -> None:
    of = prefill()
    query = rand(2, 4, 3, 8, seed=7)
    truth = attend(query, [*Full().compress(of).visual, *Full().compress(of).text], of.scale)
    errors = []
    for bits in (2, 4, 8):
        visual, text = Combined(Full(), QuantizedText(bits)).compress(of)
        assert all(isinstance(s.keys, QuantizedRows) and isinstance(s.values, QuantizedRows) for s in text)
        errors.append(float((attend(query, [*visual, *text], of.scale) - truth).square().sum() / truth.square().sum()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0
    assert errors[2] < 1e-3


@pytest.mark.parametrize("text", [TextPruning(0.5), QuantizedText(8)], ids=["pruned", "quantized"])
def test_prompts_without_text_and_without_images(text: Any) -> None:
    for visual in (Full(), Quantized(4), transform_capsule().double()):
        no_text = replace(prefill(spans=((0, 0, 30), (1, 0, 30))), layer=1)
        compressed = Combined(visual, text).compress(no_text)
        assert compressed.text == [] and compressed.visual
        no_image = prefill(spans=())
        compressed = Combined(visual, text).compress(no_image)
        assert compressed.visual == [] and compressed.text
    one_of_two = prefill(spans=((1, 0, 30),))
    assert {int(row) for s in Combined(Full(), text).compress(one_of_two).text for row in s.owner} == {0}


def test_a_generation_with_both(
    model: Any, make_batch: Callable[..., Any], greedy: dict[str, Any], identity: Callable[..., Capsule]
) -> None:
    """At ratio 1 the answer is the full cache's; with less text it is stored in fewer bytes and goes on."""
    batch = make_batch(
        (1, "Read line 2, please, and tell me which of the owls is beside the number that ends with seven."),
        (0, "What now?"),
    )
    expected = model.generate(**batch, **greedy)
    text_bytes = []
    for text in (TextPruning(1.0), TextPruning(0.5, sinks=2, recent=4), QuantizedText(8)):
        with attach(model, Combined(identity(49), text)):
            cache = CapsuleCache(model.config, Combined(identity(49), text))
            found = model.generate(**batch, **greedy, **cache_argument(cache))
        text_bytes.append(cache.bytes().text)
        if len(text_bytes) == 1:
            assert torch.equal(found.sequences, expected.sequences)
    assert text_bytes[1] < 0.7 * text_bytes[0]
    assert text_bytes[2] < 0.7 * text_bytes[0]


def test_the_geometry_is_the_visual_methods() -> None:
    other = replace(GEOMETRY, layers=3)
    Combined(Full(), TextPruning(0.5)).require_geometry(other)
    Combined(transform_capsule(), TextPruning(0.5)).require_geometry(GEOMETRY)
    with pytest.raises(GeometryError, match="layers"):
        Combined(transform_capsule(), TextPruning(0.5)).require_geometry(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retention": 0.0}, r"text retention ratio 0.0 is outside \(0, 1\]"),
        ({"retention": 1.2}, r"text retention ratio 1.2 is outside \(0, 1\]"),
        ({"retention": 0.5, "sinks": -1}, "sinks -1 and recent 16 count tokens"),
        ({"retention": 0.5, "recent": -1}, "sinks 4 and recent -1 count tokens"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextPruning(**options)


@pytest.mark.parametrize("pair", [(Full(), LookM(0.5)), (LookM(0.5), TextPruning(0.5))], ids=["text", "visual"])
def test_what_stores_both_together_is_a_method_by_itself(pair: tuple[Any, Any]) -> None:
    with pytest.raises(
        ValueError, match="LookM stores visual tokens and text together: it can only be a method by itself"
    ):
        Combined(*pair)


def test_bits_that_do_not_pack_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bits cannot be packed"):
        QuantizedText(5)
