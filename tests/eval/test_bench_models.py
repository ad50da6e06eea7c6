"""`kvcapsule bench` above operator level: the models, the ladder of full caches, decode steps, generation, encoding and
serving."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvcapsule.eval.bench import contenders, decode_step, encode, end_to_end, models, peak_memory, serving, shapes
from kvcapsule.eval.bench.layer_data import Cell
from kvcapsule.eval.bench.models import Subject
from kvcapsule.eval.bench.shapes import SHAPES, Shape
from kvcapsule.segments.segment import storage_bytes
from kvcapsule.vlm.spans import find_spans

CPU = torch.device("cpu")
SMALL = Shape("small", 2, 4, 2, 16, 32, 64, 60)
IMAGES, SIDE, TEXT, TILE = 2, 8, 6, 16
PROMPT = IMAGES * (SIDE * SIDE + 1) + TEXT
TOKEN = 2 * 2 * 2 * 16 * 4
"""Bytes of a token: two layers, keys and values, two KV heads of 16."""
METHODS = ["int4", "kvcapsule-r0.4", "kept-10%", "compact-10%", "transform-20x"]
FULL = [contenders.L0, contenders.L1, contenders.L2]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return models.random_llava(SMALL, IMAGES, SIDE, CPU, torch.float32, TEXT, TILE, seed=0)


def test_a_random_model_sees_its_images(subject: Subject) -> None:
    inputs = subject.batch(3)
    spans = find_spans(subject.model.config, inputs["input_ids"], inputs)
    assert [span.length for span in spans] == [SIDE * SIDE] * 3 * IMAGES
    assert inputs["input_ids"].shape == (3, PROMPT) and subject.visual == IMAGES * SIDE * SIDE
    assert subject.shape == {
        "layers": 2,
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "hidden": 32,
        "intermediate": 64,
    }
    with torch.no_grad():
        logits = subject.model(**inputs, logits_to_keep=1).logits
    assert not torch.allclose(logits[0], logits[1])


def test_visual_tokens_are_those_of_the_models_of_that_name() -> None:
    counts = {name: images * side * side for name, (images, side) in shapes.IMAGES.items()}
    assert counts == {
        "kv-bound": 2304,
        "llava-1.5-7b": 576,
        "llava-next-vicuna-7b": 2880,
        "llava-next-mistral-7b": 2880,
        "internvl3-8b": 3328,
        "qwen2.5-vl-7b": 16384,
    }
    assert set(SHAPES) < set(counts) and models.default(torch.device("cuda")) == list(SHAPES)


def test_weights_that_a_step_reads(subject: Subject) -> None:
    attention, mlp, norms = 32 * 64 * 2 + 32 * 32 * 2, 3 * 32 * 64, 2 * 32
    assert models.weight_bytes(subject.model) == 4 * (2 * (attention + mlp + norms) + 60 * 32)


def test_the_ladder_leaves_the_model_as_it_was_and_computes_the_same(subject: Subject) -> None:
    text, seen = subject.model.config.get_text_config(decoder=True), {}
    inputs = subject.batch(2)
    for setup in contenders.setups(subject, compiled=False)[:3]:
        cache = decode_step.filled(subject, setup, inputs, setup.cache(PROMPT + 2))
        with setup.on(subject.model):
            assert text._attn_implementation == ("eager" if setup.name == contenders.L0 else "sdpa")
            seen[setup.name] = decode_step.stepper(subject.model, setup, cache, 2)()
        assert text._attn_implementation == "sdpa"
        assert contenders.cache_storage_bytes(cache) == pytest.approx(
            2 * (PROMPT + (2 if setup.name == contenders.L2 else 1)) * TOKEN, abs=100
        )
    for logits in seen.values():
        torch.testing.assert_close(logits, seen[contenders.L1], atol=1e-5, rtol=1e-4)


def test_step_rows(subject: Subject) -> None:
    rows, skipped = decode_step.measure(subject, 2, 4, False, 10.0)
    assert [row["method"] for row in rows] == [*FULL, *METHODS] and not skipped
    by_name = {row["method"]: row for row in rows}
    baseline = rows[0]["baseline"]
    assert (
        baseline in (contenders.L1, contenders.L2) and by_name[baseline]["ratio"] == by_name[baseline]["bound"] == 1.0
    )
    written = 4 + 2
    assert by_name[contenders.L1]["bytes"] == 2 * (PROMPT + written) * TOKEN
    for row in rows:
        assert row["tokens_s"] == pytest.approx(2 / row["seconds"]) and row["rounds"] == 4
        assert row["weight_bytes"] == models.weight_bytes(subject.model)
        assert row["bandwidth_fraction"] == pytest.approx((row["weight_bytes"] + row["bytes"]) / row["seconds"] / 1e10)
        bound = (row["weight_bytes"] + by_name[baseline]["bytes"]) / (row["weight_bytes"] + row["bytes"])
        assert row["bound"] == pytest.approx(bound)
    assert by_name["kept-10%"]["bytes"] < by_name["int4"]["bytes"] < by_name[contenders.L1]["bytes"]


def test_end_to_end_rows(subject: Subject) -> None:
    rows, skipped = end_to_end.measure(subject, 2, 3, 3, 60.0, False)
    assert [row["method"] for row in rows] == [*FULL, *METHODS] and not skipped
    for row in rows:
        assert row["new_tokens"] == 4 and row["rounds"] == 3 and row["ttft_seconds"] > 0
        assert row["tokens_s"] == pytest.approx(2 / row["seconds"])
        assert row["peak_bytes"] > row["bytes"] - 100_000
    assert any(row["ttft_overhead"] == 0.0 for row in rows if row["method"] in contenders.BASELINES)
    baseline = next(row for row in rows if row["method"] == row["baseline"])
    assert baseline["ratio"] == 1.0


def test_compiled_steps_are_asked_for() -> None:
    """generate is told what to do with a StaticCache, and a step's call is the compiled one."""

    class Model:
        def get_compiled_call(self, config: Any) -> tuple[str, bool]:
            return "compiled", config._compile_all_devices

    plain, compiled = (contenders.DecodeSetup("x", lambda room: None, compiled=yes) for yes in (False, True))
    assert plain.options() == {"disable_compile": True} and compiled.options()["compile_config"]._compile_all_devices
    model: Any = Model()
    assert plain.call(model) is model and compiled.call(model) == ("compiled", True)


def test_compiled_methods_write_into_a_room(subject: Subject) -> None:
    """Of what comes behind the prompt; a batch that was widened goes on as the growing tail does."""
    setups = {setup.name: setup for setup in contenders.setups(subject, compiled=True)}
    grown, fixed = setups["kept-10%"], setups["kept-10%-static-compiled"]
    assert fixed.compiled and not grown.compiled
    seen = []
    for setup in (grown, fixed._replace(compiled=False)):
        cache = decode_step.widened(decode_step.filled(subject, setup, subject.batch(2), setup.cache(PROMPT + 5)), 3)
        with setup.on(subject.model):
            step = decode_step.stepper(subject.model, setup, cache, 3)
            seen.append([step(), step()][1])
    assert cache.layers[0].tail_capacity == 5 and cache.layers[0].tail.keys.shape[:3] == (3, 2, 5)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-5)


def test_what_does_not_fit_into_memory_is_left_out(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    right = end_to_end.peak_bytes

    def full(work: Any, device: torch.device) -> int:
        if work.args[2].layers[0].__class__.__name__ == "StaticLayer":
            raise torch.OutOfMemoryError
        return right(work, device)

    monkeypatch.setattr(end_to_end, "peak_bytes", full)
    rows, skipped = end_to_end.measure(subject, 1, 2, 1, 60.0, False)
    assert [row["method"] for row in rows] == [contenders.L0, contenders.L1, *METHODS]
    assert [(left["method"], left["level"]) for left in skipped] == [(contenders.L2, "end-to-end")]


def test_peak_memory_by_hand() -> None:
    def work() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        torch.cat([second, second])

    assert peak_memory.peak_bytes(work, CPU) == 3 * 4000


@pytest.mark.parametrize("budget", [0, 9, 10, 11, 79, 80, 81, 255, 1000])
def test_the_largest_batch_is_found(budget: int) -> None:
    """As trying every count would find it, in few questions."""
    asked: list[int] = []

    def weigh(count: int) -> int:
        asked.append(count)
        return 3 + 7 * count

    most = max((n for n in range(500) if n and 3 + 7 * n <= budget), default=0)
    assert serving.largest(weigh, budget) == (most, 3 + 7 * max(most, 1))
    assert len(asked) <= 2 * max(1, most).bit_length() + 1 and len(set(asked)) == len(asked)


def test_nobody_serves_without_end() -> None:
    assert serving.largest(lambda count: 0, 1) == (serving._MOST, 0)


def test_a_widened_cache_is_in_memory_of_its_own(subject: Subject) -> None:
    for setup in contenders.setups(subject, compiled=False)[1:]:
        prompts = decode_step.filled(subject, setup, subject.batch(2), setup.cache(PROMPT + 3))
        before = contenders.cache_storage_bytes(prompts)
        with setup.on(subject.model):
            two = decode_step.stepper(subject.model, setup, decode_step.widened(prompts, 2), 2)()
            five = decode_step.stepper(subject.model, setup, decode_step.widened(prompts, 5), 5)()
        assert contenders.cache_storage_bytes(prompts) == before
        torch.testing.assert_close(five[[0, 1]], two, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(five[[2, 3, 4]], two[[0, 1, 0]], atol=1e-5, rtol=1e-4)


def test_serving_rows(subject: Subject) -> None:
    """Of the full cache as many as the formula says; of others more; a budget that is too small for any is said."""
    mib = 12.5 * (PROMPT + 1) * TOKEN / 2**20
    rows, skipped = serving.measure(subject, mib, 4)
    by_name = {row["method"]: row for row in rows}
    assert by_name[contenders.L1]["batch"] == 12 and by_name[contenders.L2]["batch"] == 12
    assert by_name["kept-10%"]["batch"] > 12 and not skipped
    baseline = by_name[rows[0]["baseline"]]
    assert baseline["method"] in FULL and baseline["ratio"] == baseline["batch_ratio"] == 1.0
    for row in rows:
        assert row["bytes"] <= mib * 2**20 and row["tokens_s"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["batch_ratio"] == pytest.approx(row["batch"] / baseline["batch"])
    rows, skipped = serving.measure(subject, 0.001, 4)
    assert rows == [] and [left["method"] for left in skipped] == [contenders.L1, contenders.L2, *METHODS]
    assert "--memory-mib allows 0.001" in skipped[0]["reason"]


def test_a_layer_is_a_decoder_layer_of_matrix_products() -> None:
    shape = SMALL
    layer = encode.DecoderLayer.draw(shape, CPU, torch.float64)
    x = torch.randn(1, 5, shape.hidden, dtype=torch.float64)
    out = layer.prefill(x, shape)
    query, (keys, values) = x[0] @ layer.query.T, (x[0] @ layer.keys_and_values.T).chunk(2, dim=1)
    mixed = torch.zeros(5, 4, 16, dtype=torch.float64)
    for place in range(5):
        for head in range(4):
            of_head, of_group = slice(16 * head, 16 * head + 16), slice(16 * (head // 2), 16 * (head // 2) + 16)
            weights = (keys[: place + 1, of_group] @ query[place, of_head] / 4).softmax(0)
            mixed[place, head] = weights @ values[: place + 1, of_group]
    middle = x[0] + mixed.flatten(1) @ layer.output.T
    gate, up = (middle @ layer.gate_and_up.T).chunk(2, dim=1)
    torch.testing.assert_close(out[0], middle + (F.silu(gate) * up) @ layer.down.T)
    parameters = sum(w.numel() for w in layer)
    assert parameters == 32 * 64 * 2 + 32 * 32 * 2 + 3 * 32 * 64


def test_encode_rows() -> None:
    cell = Cell(SMALL, 1, 70, 5, TILE, torch.float32, CPU)
    rows = encode.measure(cell, METHODS, 3, 1.0)
    assert [row["method"] for row in rows] == [encode.PREFILL, *METHODS]
    assert rows[0]["share"] == rows[0]["ratio"] == 1.0
    for row in rows:
        assert row["share"] == pytest.approx(1 / row["ratio"]) and row["baseline"] == encode.PREFILL


def test_encoding_is_the_methods_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is `compress` over the whole prompt."""
    seen: list[int] = []

    class Noting:
        def compress(self, prefill: Any) -> None:
            seen.append(prefill.keys.shape[2])

    monkeypatch.setattr(encode.random_methods, "make", lambda *given: Noting())
    encode.measure(Cell(SMALL, 1, 70, 5, TILE, torch.float32, CPU), ["int4"], 3, 1.0)
    assert set(seen) == {75}


def test_the_bytes_of_a_cache_are_its_storages(subject: Subject) -> None:
    setup = next(r for r in contenders.setups(subject, compiled=False) if r.name == "transform-20x")
    cache: Any = decode_step.filled(subject, setup, subject.batch(2), setup.cache(0))
    segments = [s for layer in cache.layers for s in (*layer.visual, *layer.text)]
    kept: Callable[..., int] = storage_bytes
    assert contenders.cache_storage_bytes(cache) == kept(
        t for s in segments for t in (*s.entry_tensors(), *s.parameter_tensors())
    )
