"""One prefill for all methods: whoever is given it answers and stores as if the prefill had been run for them alone."""

from itertools import pairwise

import datasets
import pytest
import torch
from rich.progress import Progress
from support.run_vlm import MIXED, ready, tiny_gemma, tiny_qwen
from transformers import BatchFeature, LlavaProcessor

from kvcapsule.eval import watched_generate
from kvcapsule.eval.ask_first import AskFirst
from kvcapsule.eval.batches import batches, by_task
from kvcapsule.eval.entries import FULL, Entry, full_entry
from kvcapsule.eval.equal_bytes import Layout
from kvcapsule.eval.quality import Answering, evaluate, prompt_bytes
from kvcapsule.eval.shared_prefill import CompressedLayers, Keeper, Prefill, replayable, replaying
from kvcapsule.eval.watched_generate import Generated, generate, new_cache, record
from kvcapsule.inference.attach import attach
from kvcapsule.methods.method import Method
from kvcapsule.policy import POLICIES
from kvcapsule.testbeds import pages
from kvcapsule.vlm.spans import find_spans

METHODS = {
    "full": {},
    "snapkv": {"retention": 0.5},
    "vl-cache": {"budget": 0.5},
    "akvq-vl": {"recent": 8},
    "r-kv": {"budget_tokens": 4, "buffer": 2, "window": 2},
    "quantized": {"bits": 2},
    "hybridkv": {"budget": 0.5},
}
"""One that stores the recorded tensors themselves, one that prunes, one that shares a budget, one that reads hidden
states, one that acts again, one that quantises, one that fetches rows from the host."""


@pytest.fixture(scope="module")
def layout(model, mixed) -> Layout:
    return Layout(find_spans(model.config, mixed["input_ids"], mixed), mixed["attention_mask"].bool())


@pytest.fixture(scope="module")
def prefill(model, mixed, layout) -> Prefill:
    return record(model, mixed, layout, hidden=True)


def _run(model, mixed: BatchFeature, layout: Layout, method: Method | None, **options) -> Generated:
    if method is None:
        return generate(model, mixed, new_cache(model, None), layout, 8, **options)
    with attach(model, method):
        return generate(model, mixed, new_cache(model, method), layout, 8, **options)


def _same(own: Generated, shared: Generated) -> None:
    assert torch.equal(own.tokens, shared.tokens)
    assert own.stored == shared.stored
    for ours, theirs in zip(own.logits, shared.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", [None, *METHODS])
def test_a_shared_prefill_changes_nothing(model, mixed, layout, prefill, name) -> None:
    """One image, several, none, left padding: tokens, logits and bytes to the last bit."""
    assert len(MIXED) == len(mixed["input_ids"])
    method = None if name is None else POLICIES[name](**METHODS[name])
    before = [t.clone() for layer in prefill.layers for t in (layer.query, layer.keys, layer.values)]
    made: CompressedLayers = {}
    own, shared = (_run(model, mixed, layout, method, prefill=given, compressed=made) for given in (None, prefill))
    _same(own, shared)
    _same(
        *(
            _run(model, mixed, layout, method, forced=own.tokens.flip(1), prefill=given, compressed=made)
            for given in (None, prefill)
        )
    )
    # The next method finds what this one was given.
    assert all(
        map(torch.equal, before, (t for layer in prefill.layers for t in (layer.query, layer.keys, layer.values)))
    )


def test_a_codec_reads_the_shared_prefill_in_its_frames(model, mixed, layout, prefill, random_capsule) -> None:
    capsule = random_capsule(0.25, 0.25, 49)
    _same(*(_run(model, mixed, layout, capsule, prefill=given) for given in (None, prefill)))


def test_the_prompt_is_not_run_again(model, mixed, layout, prefill, monkeypatch) -> None:
    """Neither are its images encoded, nor is it compressed twice by one method."""
    lengths, encoded, compressed = [], [], []
    tower = model.model.vision_tower.register_forward_hook(lambda *given: encoded.append(1))
    handle = model.get_decoder().register_forward_hook(
        lambda module, args, output: lengths.append(output.last_hidden_state.shape[1])
    )
    full = POLICIES["full"]
    compress = full.compress
    monkeypatch.setattr(full, "compress", lambda self, layer: compressed.append(layer.layer) or compress(self, layer))
    made: CompressedLayers = {}
    try:
        for method in (None, full(), full()):
            _run(model, mixed, layout, method, prefill=prefill, compressed=made if method is not None else None)
    finally:
        handle.remove()
        tower.remove()
    assert lengths and set(lengths) == {1}
    assert encoded == [] and compressed == [layer.layer for layer in prefill.layers]
    assert "forward" not in vars(model)


def test_another_cache_is_refused(model, mixed, prefill) -> None:
    with (
        replaying(model, prefill),
        pytest.raises(ValueError, match=r"StaticLayer cannot be filled .*--share_prefill false"),
    ):
        model.generate(**mixed, cache_implementation="static", max_new_tokens=2)
    assert "forward" not in vars(model)


def test_models_with_windows_run_every_prefill(model) -> None:
    assert replayable(model) and not replayable(tiny_gemma()[0])


def test_positions_of_mrope_go_on_behind_a_shared_prefill() -> None:
    built, inputs = ready(*tiny_qwen())
    layout = Layout(find_spans(built.config, inputs["input_ids"], inputs), inputs["attention_mask"].bool())
    recorded = record(built, inputs, layout, hidden=False)
    for name in (None, "full"):
        method = None if name is None else POLICIES[name]()
        _same(*(_run(built, inputs, layout, method, prefill=given) for given in (None, recorded)))


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return pages.pages("test", 8)


def test_a_run_is_the_same_with_and_without(model, processor: LlavaProcessor, rows, make_capsule, monkeypatch) -> None:
    entries = [
        full_entry(),
        Entry("noise", make_capsule(0.2), "kvcapsule"),
        Entry("akvq-vl", POLICIES["akvq-vl"](recent=8), FULL),
    ]
    prefills = []
    monkeypatch.setattr(watched_generate, "Keeper", lambda hidden: prefills.append(hidden) or Keeper(hidden))
    own, shared = (
        evaluate(model, processor, rows, entries, Answering(4, 6, share_prefill=share), Progress(disable=True))
        for share in (False, True)
    )
    assert own == shared
    # One a batch, with the hidden states that one of them asks for.
    assert prefills == [True, True]


def test_prompts_weigh_the_same(model, processor, rows) -> None:
    blocks = [AskFirst(batch) for batch in batches(rows, model, processor, 4)]
    method = POLICIES["snapkv"](retention=0.5)
    own = prompt_bytes(model, blocks, method)
    for block in blocks:
        block.record(model, hidden=False)
    assert own == prompt_bytes(model, blocks, method) > 0


def test_questions_of_a_task_are_answered_together(rows) -> None:
    sorted_rows = by_task(rows)
    tasks = list(sorted_rows["task"])
    assert len(set(tasks)) > 1 and len(set(rows["task"][:3])) > 1
    assert sum(a != b for a, b in pairwise(tasks)) == len(set(tasks)) - 1
    for task in set(tasks):
        assert [r["answer"] for r in sorted_rows if r["task"] == task] == [
            r["answer"] for r in rows if r["task"] == task
        ]
