"""VL-Cache through a model, and beside a capsule."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.builders import DIM as CAPSULE_DIM
from support.builders import prefill as two_rows
from support.builders import transform_capsule
from support.prefills import HEADS, mixed, places, run, stored_bytes, tokens
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule import attach
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.policy import VLCache
from kvcapsule.policy.combine import Combined
from kvcapsule.policy.vl_cache import SparsityMeter
from kvcapsule.vlm.spans import find_spans

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


def test_generation_with_beams_and_padding(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    batch = make_batch((1, "Read line 2."), (2, "What is the number beside the owl?"))
    with attach(model):
        cache = CapsuleCache(model.config, VLCache(0.1))
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
        cache = CapsuleCache(model.config, VLCache(0.1))
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
