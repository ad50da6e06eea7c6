"""`kvcapsule bench` at operator level: what is stored, what is counted, what is refused, and how time is taken."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvcapsule.codec.bit_allocation import allocate
from kvcapsule.eval.bench import (
    byte_formula,
    bytes_touched,
    correctness,
    full_attention,
    interleaved_timing,
    layer_data,
    operator,
    random_methods,
    random_transform,
)
from kvcapsule.eval.bench.method_names import METHODS
from kvcapsule.eval.bench.shapes import SHAPES, Shape, distinct
from kvcapsule.segments.segment import Segment

CPU = torch.device("cpu")
TINY = Shape("tiny", 2, 6, 2, 16, 32, 64, 100)
LIMITS = operator.Limits(2**30, 3, 0.01)


@pytest.fixture(autouse=True)
def small_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few copies of tiny cells are cold enough for a test."""
    if request.node.name != "test_copies_fill_more_than_the_cache":
        monkeypatch.setattr(interleaved_timing, "last_level_cache", lambda device: 2**16)


def cell(batch: int = 2, visual: int = 70, tile: int = 32, shape: Shape = TINY) -> layer_data.Cell:
    """Six tokens fill no tile."""
    return layer_data.Cell(shape, batch, visual, 5, tile, torch.float32, CPU)


def build(name: str, of: layer_data.Cell) -> tuple[layer_data.Layer, Any, list[Segment]]:
    layer = layer_data.draw(of)
    method = random_methods.make(name, of.shape.geometry(1), of.tile, CPU, torch.float32)
    return layer, method, layer_data.store(of, layer, method)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_are_what_the_closed_form_says(name: str, batch: int) -> None:
    """Measured storages to the byte, but for owners of chosen rows, which share room with their numbers; touched:
    within 2 %."""
    of = cell(batch)
    with torch.no_grad():
        layer, method, segments = build(name, of)
        held = layer_data.bytes_read(segments)
        call = operator._call(layer.query, segments, 0.25)
        call()
        by_kernels = bytes_touched.read_by_kernels(layer.query, segments, 0.25)
        tensors = [t for s in segments for t in (*s.entry_tensors(), *s.parameter_tensors())]
        counted = bytes_touched.count(call, tensors, by_kernels)
    assert held == pytest.approx(
        byte_formula.of(name, of, method), rel=0, abs=8 * sum(len(s.owner) for s in segments) * (batch > 2)
    )
    assert counted.stored == pytest.approx(byte_formula.of(name, of, method), rel=0.02)
    assert counted.traffic >= counted.stored


def test_bytes_at_a_real_size() -> None:
    """A layer of Qwen2.5-VL at 16,384 tokens: a tenth of the rows, and twenty times less than at 16 bits, with their
    text."""
    of = layer_data.Cell(SHAPES["qwen2.5-vl-7b"], 1, 16384, 128, 64, torch.float32, CPU)
    token = 2 * 4 * 128 * 4
    assert byte_formula.full(of) == (16384 + 128 + 16) * token
    text = 144 * token
    kept = byte_formula.of(
        "kept-10%", of, random_methods.make("kept-10%", of.shape.geometry(1), 64, CPU, torch.float32)
    )
    assert kept - text == pytest.approx(1638 * (token + 4 * 4), rel=1e-3)
    capsule = random_methods.make("transform-20x", of.shape.geometry(1), 64, CPU, torch.float32)
    assert isinstance(capsule, torch.nn.Module)
    encoders = ("tokens_in", "channels_in", "queries")
    maps = sum(t.numel() * t.itemsize for name, t in capsule.state_dict().items() if not name.endswith(encoders))
    at_16_bits = 16384 * token / 2
    assert at_16_bits / (byte_formula.of("transform-20x", of, capsule) - text - maps) == pytest.approx(20, rel=0.02)


def test_full_attention_touches_the_cache_once_and_copies_of_it_more() -> None:
    """1 F in place, 3 F with a copy, and more where heads are repeated."""
    of = cell(visual=400)
    layer = layer_data.draw(of)
    cache, ways = (
        full_attention.FullCache(layer.keys, layer.values),
        {**full_attention.IN_PLACE, **full_attention.WITH_COPIES},
    )
    traffic = {}
    for name, way in ways.items():
        counted = bytes_touched.count(lambda way=way: way(layer.query, cache, 0.25), cache)
        assert counted.stored == of.full_bytes == byte_formula.full(of), name
        traffic[name] = counted.traffic / of.full_bytes
    assert all(traffic[name] < 1.4 for name in full_attention.IN_PLACE)
    assert (
        traffic["dynamic-cat"] > 3
        and traffic["static-repeat"] > 1 + 2 * TINY.group
        and traffic["dynamic-cat-repeat"] > 3 + 2 * TINY.group
    )


def test_counter_by_hand() -> None:
    a, b = torch.ones(4, 6), torch.ones(6, 5)
    assert bytes_touched.count(lambda: a @ b, [a]) == (4 * 6 * 4, (24 + 30 + 20) * 4)
    assert bytes_touched.count(lambda: a[:, :3].sum(), [a]).stored == 4 * 3 * 4, "half of every row"
    assert bytes_touched.count(lambda: (a[:2].sum(), a[1:3].sum()), [a]).stored == 3 * 6 * 4, (
        "a row that is read twice counts once"
    )
    assert bytes_touched.count(lambda: a[:1].expand(9, 6).sum(), [a]).stored == 6 * 4
    assert bytes_touched.count(lambda: a.t(), [a]) == (0, 0), "a view reads nothing"
    assert bytes_touched.count(lambda: b.sum(), [a]).stored == 0


def loops(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    out = torch.zeros(query.shape, dtype=torch.float64)
    groups = query.shape[1] // keys.shape[1]
    for b in range(query.shape[0]):
        for head in range(query.shape[1]):
            k, v = keys[b, head // groups].double(), values[b, head // groups].double()
            weights = [math.exp(scale * float(query[b, head, 0].double() @ row)) for row in k]
            out[b, head, 0] = sum(w * row for w, row in zip(weights, v, strict=True)) / sum(weights)
    return out


@pytest.mark.parametrize("name", {**full_attention.IN_PLACE, **full_attention.WITH_COPIES})
def test_ways_of_full_attention_are_attention(name: str) -> None:
    of = cell(visual=9)
    layer = layer_data.draw(of)
    out = {**full_attention.IN_PLACE, **full_attention.WITH_COPIES}[name](
        layer.query, full_attention.FullCache(layer.keys, layer.values), 0.25
    )
    torch.testing.assert_close(out.double(), loops(layer.query, layer.keys, layer.values, 0.25), rtol=1e-5, atol=1e-5)


def test_the_truth_of_the_gate() -> None:
    """Over rows as loops have it; over segments that store all, the same; a bias counts."""
    of = cell(visual=9, tile=4)
    layer, _, segments = build("full-segments", of)
    expected = loops(layer.query, layer.keys, layer.values, 0.25)
    assert correctness.error(expected, correctness.over_rows(layer.query, layer.keys, layer.values, 0.25)) < 1e-12
    assert correctness.error(expected, correctness.over_segments(layer.query, segments, 0.25)) < 1e-6
    _, _, biased = build("kept-10%", of)
    without = correctness.over_segments(layer.query, [Segment(s.keys, s.values, s.owner) for s in biased], 0.25)
    assert float((without - correctness.over_segments(layer.query, biased, 0.25)).norm()) > 0.01
    assert correctness.error(torch.full((2, 6, 1, 16), torch.nan), without) == math.inf


def test_a_cell() -> None:
    rows, skipped = operator.measure(cell(), list(METHODS), LIMITS, 10.0)
    assert not skipped
    by_name = {row["method"]: row for row in rows}
    assert list(by_name) == [*full_attention.IN_PLACE, *full_attention.WITH_COPIES, *METHODS]
    (baseline,) = {row["baseline"] for row in rows}
    assert baseline in full_attention.IN_PLACE and by_name[baseline]["ratio"] == 1.0
    assert by_name[baseline]["seconds"] == min(by_name[name]["seconds"] for name in full_attention.IN_PLACE)
    for row in rows:
        assert row["failed"] is None and row["seconds"] > 0 and row["rounds"] == 3 and row["error"] < 1e-5
        assert row["bandwidth_fraction"] == pytest.approx(row["bytes"] / row["seconds"] / 1e10)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that leaves the tail out, by a hair or with what is not a number."""
    right = operator.attend
    for spoil in (lambda q, s, scale: right(q, s[:-1], scale), lambda q, s, scale: right(q, s, scale) * torch.nan):
        monkeypatch.setattr(operator, "attend", spoil)
        rows, _ = operator.measure(cell(), ["int4"], LIMITS, 10.0)
        row = rows[-1]
        assert row["method"] == "int4" and row["seconds"] is None and row["ratio"] is None and row["rounds"] == 0
        assert "not timed" in row["failed"]
        assert all(other["failed"] is None for other in rows[:-1])


def test_a_cell_that_does_not_fit_is_left_out() -> None:
    of = cell(batch=64, visual=4096)
    rows, skipped = operator.measure(of, ["int4"], operator.Limits(10_000_000, 3, 0.01), 10.0)
    assert rows == [] and len(skipped) == 1 and "GiB" in skipped[0]["reason"]
    assert (skipped[0]["geometry"], skipped[0]["batch"], skipped[0]["visual_tokens"], skipped[0]["method"]) == (
        "tiny",
        64,
        4096,
        None,
    )


def test_a_way_that_does_not_fit_is_left_out_alone() -> None:
    of = cell()
    room = operator._needed(of, ["int4"]) + of.full_bytes
    rows, skipped = operator.measure(of, ["int4"], operator.Limits(room, 3, 0.01), 10.0)
    assert [row["method"] for row in rows] == [*full_attention.IN_PLACE, "dynamic-cat", "int4"]
    assert [left["method"] for left in skipped] == ["dynamic-cat-repeat", "static-repeat"]


def test_what_a_cell_needs_counts_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven ways of the full cache and a method have copies of twice the last-level cache each."""
    of, needed = cell(), []
    for cache in (0, 64 * 2**20):
        monkeypatch.setattr(interleaved_timing, "last_level_cache", lambda device, cache=cache: cache)
        needed.append(operator._needed(of, ["int4"]))
    assert needed[1] - needed[0] == pytest.approx(8 * 2 * 64 * 2**20, rel=0.02)


def test_like_layers_are_timed_once() -> None:
    assert distinct(list(SHAPES)) == {
        "llava-1.5-7b": ["llava-next-vicuna-7b"],
        "llava-next-mistral-7b": [],
        "qwen2.5-vl-7b": ["internvl3-8b"],
    }
    assert distinct(["qwen2.5-vl-7b"]) == {"qwen2.5-vl-7b": []}
    assert {left["geometry"] for left in operator.equal_shapes(list(SHAPES))} == {
        "llava-next-vicuna-7b",
        "internvl3-8b",
    }


@pytest.mark.parametrize(("tile", "channels", "ratio"), [(64, 128, 20), (196, 64, 20), (64, 128, 8), (16, 32, 40)])
def test_widths_are_those_of_one_water_level(tile: int, channels: int, ratio: int) -> None:
    """Greedy allocation against its definition by a level: what is worth a width everywhere above it, by bisection."""
    # log2 of the variance that is worth a width, over that of the first bit (Max, 1960).
    worth = {1: 0.0, 2: 1.38, 3: 2.97, 4: 4.62, 8: 7.80}

    def above(variances: torch.Tensor, level: float) -> torch.Tensor:
        over, width = variances.log2() - level, torch.zeros_like(variances)
        for bits, needed in worth.items():
            width[over >= needed] = bits
        return width

    budget = tile * channels * 4 // ratio
    spectra = [
        random_transform.variance(tile, channels, decay) for decay in (random_transform.KEYS, random_transform.VALUES)
    ]
    low, high = -200.0, 200.0
    for _ in range(60):
        level = (low + high) / 2
        low, high = (level, high) if sum(float(above(v, level).sum()) for v in spectra) > budget else (low, level)
    by_level = torch.cat([above(v, high).flatten() for v in spectra])
    allocated = torch.cat([w.flatten() for w in allocate([v[None] for v in spectra], budget)])
    assert budget * 0.97 < int(allocated.long().sum()) <= budget
    assert float((allocated == by_level).double().mean()) > 0.98


def test_copies_fill_more_than_the_cache() -> None:
    cache = interleaved_timing.last_level_cache(CPU)
    assert cache >= 2**20
    for size in (1000, cache // 3, 5 * cache):
        assert interleaved_timing.copies(size, CPU) * size > interleaved_timing.COLD * cache
    assert interleaved_timing.copies(5 * cache, CPU) == 1
    assert interleaved_timing._size("32768K\n") == 32 * 2**20 and interleaved_timing._size("512") == 512


def test_contenders_take_turns_and_go_through_their_copies() -> None:
    seen: list[str] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: (seen.append(name), time.sleep(0.003))[0]

    found = interleaved_timing.interleave(
        [
            interleaved_timing.Contender("a", [note("a0"), note("a1"), note("a2")]),
            interleaved_timing.Contender("b", [note("b0")]),
        ],
        CPU,
        4,
        9.0,
    )
    assert seen[:3] == ["a0", "a1", "a2"], "warm-up visits every copy"
    timed = seen[-8:]
    assert [name[0] for name in timed] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    order = [int(name[1]) for name in timed if name[0] == "a"]
    assert order == [(order[0] + i) % 3 for i in range(4)]
    assert len(found["a"].rounds) == len(found["b"].rounds) == 4 and found["a"].median > 0.0025


def test_what_is_slow_rests() -> None:
    slow, quick = (
        interleaved_timing.Contender(name, [lambda s=s: time.sleep(s)])
        for name, s in (("slow", 0.02), ("quick", 0.003))
    )
    found = interleaved_timing.interleave([slow, quick], CPU, 8, 0.05)
    assert len(found["slow"].rounds) == interleaved_timing.LEAST and len(found["quick"].rounds) == 8
    assert found["quick"].over(found["slow"]) > 3


def test_ratio_is_of_the_same_round() -> None:
    """Twice as fast in every round, however the machine's speed changes from round to round."""
    ours, theirs = interleaved_timing.Times([1.0, 10.0, 3.0]), interleaved_timing.Times([2.0, 20.0, 6.0, 100.0])
    assert ours.over(theirs) == 2.0 and ours.median == 3.0 and ours.iqr == 4.5
    assert interleaved_timing.Times([5.0]).iqr == 0.0
