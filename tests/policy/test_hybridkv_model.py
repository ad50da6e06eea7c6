"""HybridKV in a model: exact where nothing is lost, bytes on both sides, batches, beams and later turns."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor

from kvcapsule import attach
from kvcapsule.eval.entries import Entry, full_entry
from kvcapsule.eval.equal_bytes import Layout
from kvcapsule.eval.quality import Tally
from kvcapsule.eval.report.rows import rows, tables
from kvcapsule.eval.watched_generate import generate, new_cache
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.host_retrieval import HostRows, Retrieved
from kvcapsule.methods.method import Method
from kvcapsule.policy import Full, HybridKV
from kvcapsule.policy.hybridkv import Allotment
from kvcapsule.vlm.spans import find_spans

Model = LlavaForConditionalGeneration
Batch = Callable[..., BatchFeature]
THETA = 0.6
"""Some heads of the tiny model are above it, some below."""
PROMPTS = ((1, "Read line 2."), (2, "What is the number beside the owl?"), (0, "What?"))
"""Rows with one image, two and none; the shorter ones are padded."""


class AllRetrieved(HybridKV):
    """Every head is dynamic, and its buffer holds every chunk."""

    def allot(self, scores: Any, tokens: int, always: int, means: float) -> Allotment:
        return Allotment([0] * len(scores), [tokens] * len(scores))


@pytest.fixture(scope="module")
def mixed(make_batch: Batch) -> BatchFeature:
    return make_batch(*PROMPTS)


@pytest.fixture(scope="module")
def mixed64(mixed: BatchFeature) -> BatchFeature:
    return in_dtype(mixed, torch.float64)


def in_dtype(batch: BatchFeature, dtype: torch.dtype) -> BatchFeature:
    """The batch with its pixels in `dtype`."""
    return BatchFeature({name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()})


def answer(
    model: Model, batch: BatchFeature, method: Method, greedy: dict[str, Any], **options: Any
) -> tuple[Any, CapsuleCache]:
    with attach(model):
        cache = CapsuleCache(model.config, method)
        return model.generate(**batch, **cache_argument(cache), **{**greedy, **options}), cache


def assert_same(out: Any, expected: Any) -> None:
    assert torch.equal(out.sequences, expected.sequences)
    for ours, theirs in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def segments(cache: CapsuleCache) -> Iterator[tuple[int, Any]]:
    """Layer and segment, of all that is stored of prompts."""
    for layer in cache.layers:
        assert isinstance(layer, CapsuleLayer)
        yield from ((layer.index, segment) for segment in (*layer.visual, *layer.text))


def retrieved(cache: CapsuleCache) -> list[tuple[int, Retrieved]]:
    return [(layer, segment) for layer, segment in segments(cache) if isinstance(segment, Retrieved)]


def whole_bytes(model: Model, batch: BatchFeature) -> int:
    """Keys and values of all prompt tokens, without padding."""
    text = model.config.text_config
    token = text.num_hidden_layers * text.num_key_value_heads * 2 * text.head_dim * model.dtype.itemsize
    return int(batch["attention_mask"].sum()) * token


def test_rows_have_static_and_dynamic_heads_of_their_own(
    model: Model, mixed: BatchFeature, greedy: dict[str, Any]
) -> None:
    _, cache = answer(model, mixed, HybridKV(0.5, theta=THETA), greedy)
    dynamic = [set[tuple[int, int]]() for _ in PROMPTS]
    for layer, segment in retrieved(cache):
        assert segment.head is not None
        for row, head in zip(segment.owner.tolist(), segment.head.tolist(), strict=True):
            dynamic[row].add((layer, head))
    assert all(0 < len(heads) < 8 for heads in dynamic[:2])
    assert dynamic[0] != dynamic[1]


@pytest.mark.parametrize("theta", [0.0, THETA, 1.1])
def test_a_budget_of_one_is_the_full_cache(
    model64: Model, mixed64: BatchFeature, greedy: dict[str, Any], theta: float
) -> None:
    expected = model64.generate(**mixed64, **greedy)
    given, cache = answer(model64, mixed64, HybridKV(1.0, theta=theta), greedy)
    assert_same(given, expected)
    held = cache.bytes()
    assert held.host == 0
    assert held.visual + held.text == pytest.approx(whole_bytes(model64, mixed64), rel=0.02)


def test_every_chunk_retrieved_is_the_full_cache(model64: Model, mixed64: BatchFeature, greedy: dict[str, Any]) -> None:
    expected = model64.generate(**mixed64, **greedy)
    given, cache = answer(model64, mixed64, AllRetrieved(0.5), greedy)
    assert_same(given, expected)
    assert cache.bytes().host == pytest.approx(whole_bytes(model64, mixed64), rel=0.02)


@pytest.mark.parametrize("budget", [0.2, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("theta", [0.0, THETA, 1.1])
def test_bytes_are_as_promised(
    model: Model, make_batch: Batch, greedy: dict[str, Any], theta: float, budget: float
) -> None:
    """On the device the budget; on the host all tokens of the dynamic heads, in whole chunks."""
    batch = make_batch(*PROMPTS[:2])
    _, cache = answer(model, batch, HybridKV(budget, theta=theta), greedy, max_new_tokens=2, min_new_tokens=2)
    held = cache.bytes()
    assert held.visual + held.text == pytest.approx(budget * whole_bytes(model, batch), rel=0.02)
    moved = sum(len(s.owner) * s.length for _, s in retrieved(cache))
    assert held.host == pytest.approx(moved * 2 * model.config.text_config.head_dim * 4, rel=0.03)
    assert (held.host == 0) == (theta == 0.0)
    assert held.total == held.visual + held.text + held.tail


def test_only_retrieved_chunks_are_moved(
    model: Model, mixed: BatchFeature, greedy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step moves as many bytes to the device as the buffers hold, prefill none."""
    moved: list[int] = []
    load = HostRows.load

    def counted(
        self: HostRows, slots: torch.Tensor, chunks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        moved.append(keys.nbytes + values.nbytes)
        load(self, slots, chunks, keys, values)

    monkeypatch.setattr(HostRows, "load", counted)
    _, cache = answer(model, mixed, HybridKV(0.3, theta=THETA), greedy)
    buffers = sum(
        rows.nbytes for _, s in retrieved(cache) for rows in (s.keys, s.values) if isinstance(rows, torch.Tensor)
    )
    steps = greedy["max_new_tokens"] - 1
    assert len(moved) == steps * len(retrieved(cache)) > 0
    assert sum(moved) == steps * buffers
    assert buffers < 0.4 * cache.bytes().host


def test_nothing_of_a_dynamic_head_stays_on_the_device(
    model: Model, mixed: BatchFeature, greedy: dict[str, Any]
) -> None:
    _, cache = answer(model, mixed, HybridKV(0.3, theta=THETA), greedy)
    device = {t.untyped_storage().data_ptr() for _, s in segments(cache) for t in s.entry_tensors()}
    host = {t.untyped_storage().data_ptr() for _, s in segments(cache) for t in s.host_tensors()}
    assert host and not device & host
    held = {
        (layer, row, head)
        for layer, s in retrieved(cache)
        for row, head in zip(s.owner.tolist(), s.head.tolist(), strict=True)
    }
    for layer, segment in segments(cache):
        if not isinstance(segment, Retrieved):
            heads = [range(2)] * len(segment.owner) if segment.head is None else [[h] for h in segment.head.tolist()]
            assert not held & {
                (layer, row, head) for row, of in zip(segment.owner.tolist(), heads, strict=True) for head in of
            }


@pytest.mark.parametrize("settings", [{}, {"theta": 1.1}, {"chunk": 5}], ids=str)
def test_batch_is_one_by_one(
    model64: Model,
    mixed64: BatchFeature,
    processor: LlavaProcessor,
    images: Any,
    greedy: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    policy = HybridKV(0.3, **{"theta": THETA, **settings})
    together, cache = answer(model64, mixed64, policy, greedy)
    assert retrieved(cache)
    first = 0
    for row, (count, words) in enumerate(PROMPTS):
        text = f"<|user|>{'<image>' * count}{words}<|assistant|>"
        one = in_dtype(
            processor(images=images[first : first + count] or None, text=text, return_tensors="pt"), torch.float64
        )
        first += count
        alone, _ = answer(model64, one, policy, greedy)
        assert torch.equal(alone.sequences[0, -8:], together.sequences[row, -8:])
        for ours, theirs in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(ours[0], theirs[row], rtol=0, atol=1e-6)


def test_deterministic(model: Model, mixed: BatchFeature, greedy: dict[str, Any]) -> None:
    first, second = (answer(model, mixed, HybridKV(0.3, theta=THETA), greedy)[0] for _ in range(2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.logits, second.logits, strict=True))
    full = model.generate(**mixed, **greedy)
    assert torch.equal(first.logits[0], full.logits[0]), "the first token comes out of the prefill"
    assert not torch.allclose(first.logits[1][:2], full.logits[1][:2], atol=1e-3), "the others read what is stored"


def test_beams(model64: Model, mixed64: BatchFeature, greedy: dict[str, Any]) -> None:
    """With every chunk retrieved they are the full cache's, and the host holds no more than the beams had of their
    own."""
    expected = model64.generate(**mixed64, **{**greedy, "num_beams": 3})
    given, cache = answer(model64, mixed64, AllRetrieved(0.5), greedy, num_beams=3)
    assert_same(given, expected)
    assert cache.bytes().host <= 3.1 * whole_bytes(model64, mixed64)


def test_rows_are_reordered(model: Model, mixed: BatchFeature) -> None:
    """What follows a row's prompt does not depend on the row's place in the batch."""
    logits = []
    for order in ([0, 1, 2], [2, 0, 0]):
        with attach(model), torch.no_grad():
            cache = CapsuleCache(model.config, HybridKV(0.3, theta=THETA))
            model(**mixed, **cache_argument(cache))
            cache.reorder_cache(torch.tensor(order))
            mask = torch.cat([mixed["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], dim=1)[order]
            asked = {
                "input_ids": torch.tensor([[20], [21], [22]])[order],
                "position_ids": mask.sum(dim=1, keepdim=True) - 1,
            }
            logits.append(model(**asked, attention_mask=mask, **cache_argument(cache)).logits)
            assert {int(row) for _, s in retrieved(cache) for row in s.owner} <= {0, 1, 2}
    torch.testing.assert_close(logits[1], logits[0][[2, 0, 0]])
    assert (logits[0][0] - logits[0][1]).abs().max() > 0.1


TURNS = (
    ((1, "Read line 2."), (1, "What is the number beside the owl?")),
    ((0, "Hello."), (0, "What is the number beside the cat?")),
    ((1, "And in this one?"), (0, "Hello.")),
    ((2, "Which of the two?"), (1, "Read line 2.")),
)
"""Of two rows each, padded where they are of unlike length."""


def turns(model: Model, make_batch: Batch, cache: Any, rows: slice = slice(None)) -> list[torch.Tensor]:
    """Logits of the turns' own tokens and of a token behind each, by direct forwards."""
    mask, logits = torch.ones(len(range(2)[rows]), 0, dtype=torch.int64), []
    for turn in TURNS:
        batch = make_batch(*turn[rows])
        mask = torch.cat([mask, batch["attention_mask"]], dim=1)
        positions = (mask.cumsum(1) - 1)[:, -batch["input_ids"].shape[1] :].clamp_min(0)
        call = {**in_dtype(batch, model.dtype), "attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            logits.append(model(**call, **cache_argument(cache)).logits[:, -1])
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            step = {
                "input_ids": torch.tensor([[40], [42]])[rows],
                "attention_mask": mask,
                "position_ids": mask.sum(1, keepdim=True) - 1,
            }
            logits.append(model(**step, **cache_argument(cache)).logits[:, -1])
    return logits


def test_four_turns_with_padding_in_each(model64: Model, make_batch: Batch) -> None:
    """With every chunk retrieved, the full cache's logits; and heads, budgets and chunks of each turn's own."""
    with attach(model64):
        found = []
        for method in (Full(), AllRetrieved(0.5)):
            cache = CapsuleCache(model64.config, method)
            found.append(turns(model64, make_batch, cache))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    with_images = [n for turn in (0, 2, 3) for n in make_batch(*TURNS[turn])["attention_mask"].sum(dim=1).tolist()]
    held = [s.length for layer, s in retrieved(cache) for head in s.head.tolist() if (layer, head) == (0, 0)]
    assert sorted(held) == sorted(with_images)


def test_turns_of_a_batch_are_those_of_its_rows(model64: Model, make_batch: Batch) -> None:
    with attach(model64):
        together = turns(model64, make_batch, CapsuleCache(model64.config, HybridKV(0.4, theta=THETA)))
        alone = turns(model64, make_batch, CapsuleCache(model64.config, HybridKV(0.4, theta=THETA)), slice(0, 1))
    for ours, theirs in zip(alone, together, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-8)


def test_half_precision(model: Model, mixed: BatchFeature, greedy: dict[str, Any]) -> None:
    narrow = copy.deepcopy(model).bfloat16()
    expected = model.generate(**mixed, **greedy).logits[1]
    for method, distance in ((AllRetrieved(0.5), 0.2), (HybridKV(0.5, theta=THETA), 4.0)):
        given, cache = answer(narrow, in_dtype(mixed, torch.bfloat16), method, greedy)
        assert (given.logits[1].float() - expected).abs().max() < distance
        assert retrieved(cache) and all(
            s.means.dtype == s.host.keys.dtype == torch.bfloat16 for _, s in retrieved(cache)
        )


def test_bytes_of_both_sides_are_reported(model: Model, make_batch: Batch, greedy: dict[str, Any]) -> None:
    """Of two batches of two questions, a question's bytes; the table has a column for the host where a method keeps
    something there."""
    batch = make_batch(*PROMPTS[:2])
    spans = find_spans(model.config, batch["input_ids"], batch)
    layout = Layout(spans, batch["attention_mask"].bool())
    entries = [full_entry(), Entry("hybridkv", HybridKV(0.3, theta=1.1), "hybridkv")]
    tallies = {}
    for entry in entries:
        with attach(model):
            held = generate(model, batch, new_cache(model, entry.method), layout, max_new_tokens=2).stored
        tallies[entry.name] = tally = Tally(same=4, positions=4)
        tally.scores["count"] = [1.0] * 4
        tally.add_bytes(held)
        tally.add_bytes(held)
    full, hybrid = rows(entries, tallies, {}, torch.float32)
    assert full["host_kv_bytes"] == 0
    assert hybrid["host_kv_bytes"] == pytest.approx(whole_bytes(model, batch) / 2, rel=0.03)
    assert (
        hybrid["kv_bytes"] == hybrid["visual_kv_bytes"] == pytest.approx(0.3 * whole_bytes(model, batch) / 2, rel=0.02)
    )
    shown = [[column.title for column in tables(found, "")[1].columns] for found in ([full], [full, hybrid])]
    assert "on host" not in shown[0] and "on host" in shown[1]
