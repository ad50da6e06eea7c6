"""The kernels that go over tiles in one pass agree with the reference in double precision, for any number of threads.

Whatever is allocated and not written holds NaN, as does what no query sees.
"""

import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.builders import cross_layer_capsule, prefill
from support.random_segments import (
    HEADS,
    OWNERS,
    Draw,
    mixed,
    of_cell_width,
    of_odd_size,
    quantised,
    query_of,
    with_hidden_tokens,
)

from kvcapsule.kernels import reference
from kvcapsule.kernels.cpu.arguments import CELLS, MIXED, QUANTIZED, RAW, Arguments, arguments
from kvcapsule.kernels.cpu.attend import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.segments.bit_packing import WIDTHS
from kvcapsule.segments.group_quantized_rows import GroupedRows
from kvcapsule.segments.pooled_segment import PooledSegment
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment

SINGLE, DIM = 1e-5, 16

pytestmark = pytest.mark.usefixtures("poisoned")


def given(segment: Segment) -> Arguments | None:
    return arguments(segment, HEADS)


def error(
    query: torch.Tensor, segments: list[Segment], visible: torch.Tensor | None = None, scale: float = 0.3
) -> float:
    """Relative error against the reference in double precision."""
    with torch.no_grad():
        expected = reference.attend(query.double(), segments, scale, visible)
        found = attend(query, segments, scale, visible)
    assert expected.norm() > 0.1 and found.shape == query.shape
    return float((found.double() - expected).norm() / expected.norm())


def frames(draw: Draw, entries: int, half: int, interleaved: bool) -> Frame:
    angles = 3 * draw(entries, half)
    return Frame(angles.cos(), angles.sin(), interleaved)


def retained(draw: Draw, owner: list[int], tokens: int, keys: int, values: int) -> Segment:
    """Raw rows behind maps, as a KVCapsule's."""
    entries = len(owner)
    return Segment(
        draw(entries, HEADS, keys, DIM), draw(entries, HEADS, values, DIM), torch.tensor(owner),
        score_map=draw(HEADS, tokens, keys), value_map=draw(HEADS, values, tokens).transpose(1, 2),
        value_mean=draw(HEADS, DIM),
    )  # fmt: skip


def test_each_kind(kind: str, random_segment: Callable[..., Segment], threads: int) -> None:
    segments = [random_segment(kind, owner, seed, torch.float32) for seed, owner in enumerate(OWNERS)]
    assert error(query_of(), [*segments, random_segment("raw", [0, 1, 2, 3], 7, torch.float32)]) < SINGLE


@pytest.mark.parametrize("tokens", [1, 63, 65, 200])
def test_odd_sizes(tokens: int, threads: int) -> None:
    for group in (2, 7):
        assert error(query_of(group=group), of_odd_size(tokens)) < SINGLE


@pytest.mark.parametrize("width", [0, *WIDTHS])
def test_widths_of_cells(width: int) -> None:
    assert error(query_of(batch=1), of_cell_width(width)) < SINGLE


@pytest.mark.parametrize("owner", [[0] * 19, [0, 0, 0, 1, 1, 2], [2, 0, 1, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0]])
@pytest.mark.parametrize("joint", [1, 2])
def test_coded_tiles_in_any_order(owner: list[int], joint: int, threads: int) -> None:
    """More than go through together, odd numbers of them, rows that have none; one or several KV heads that read the
    same rows."""
    draw = Draw(len(owner))
    segment = draw.transform(owner, 20, (2, 5), (3, 21), joint=joint)
    for group in (2, 7):
        assert error(query_of(group, batch=3), [segment, draw.raw([0, 1, 2], 4, dim=8)]) < SINGLE


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [2, 4])
def test_frames_of_a_part_of_the_channels(half: int, interleaved: bool) -> None:
    draw = Draw()
    coded = replace(draw.transform([0, 1, 1], 12, (2, 5), (1, 4)), frame=frames(draw, 3, half, interleaved))
    assert error(query_of(batch=2), [coded]) < SINGLE
    raw = replace(retained(draw, [0, 1, 1], 12, 5, 3), frame=frames(draw, 3, 2 * half, interleaved))
    assert error(query_of(batch=2, dim=DIM), [raw]) < SINGLE


@pytest.mark.parametrize("rows", [1, 3, 4, 26])
def test_raw_rows_behind_maps(rows: int, threads: int) -> None:
    draw = Draw(rows)
    segments = [retained(draw, [1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0], 30, rows, rows + 1), retained(draw, [0], 17, rows, 2)]
    for group in (2, 7):
        assert error(query_of(group, batch=3, dim=DIM), [*segments, draw.raw([0, 1, 2], 5, dim=DIM)]) < SINGLE


def test_masked_tiles(threads: int) -> None:
    """Some tokens of a tile, or all of it: such a one may hold anything."""
    draw = Draw()
    mask = torch.ones(4, 20, dtype=torch.bool)
    mask[1, 13:], mask[2], mask[3, :19] = False, False, False
    raw = replace(retained(draw, [0, 0, 0, 1], 20, 6, 7), mask=mask)
    for rows in (raw.keys, raw.values):
        assert isinstance(rows, torch.Tensor)
        rows[2] = torch.nan
    query = query_of(batch=2, dim=DIM)
    found = attend(query, [raw], 0.3)
    there = torch.tensor([0, 1, 3])
    kept = replace(raw, keys=raw.keys[there], values=raw.values[there], owner=raw.owner[there], mask=mask[there])  # type: ignore[index]
    torch.testing.assert_close(found.double(), reference.attend(query.double(), [kept], 0.3), rtol=1e-5, atol=1e-5)
    coded = replace(draw.transform([0, 0, 0, 1], 20, (2, 5), (3, 4)), mask=mask)
    assert error(query_of(batch=2), [coded]) < SINGLE


def test_several_queries_see_a_causal_tail_in_a_larger_buffer(threads: int) -> None:
    def widened(segments: list[Segment]) -> list[Segment]:
        return [replace(s, keys=torch.cat([s.keys] * 2, -1), values=torch.cat([s.values] * 2, -1)) for s in segments]  # type: ignore[list-item]

    query, (clean, seen) = query_of(3, 3, batch=3, dim=DIM), with_hidden_tokens(0.0)
    assert error(query, widened(clean), seen) < SINGLE
    found = [attend(query, widened(with_hidden_tokens(poison)[0]), 0.3, seen) for poison in (0.0, torch.nan)]
    assert torch.equal(*found)


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    draw = Draw()
    segment = replace(draw.raw([0, 1], 9, dim=DIM), mask=torch.tensor([[True] * 9, [False] * 9]))
    assert not attend(query_of(batch=2, dim=DIM), [segment], 0.3)[1].any()


def test_rising_scores(threads: int) -> None:
    """Each tile's scores are far above those before: what has been added up counts for less and less."""
    draw = Draw()
    raw = draw.raw([0], 500, bias=True, dim=DIM)
    assert raw.bias is not None
    assert error(query_of(batch=1, dim=DIM), [replace(raw, bias=raw.bias + torch.arange(500) / 5)]) < SINGLE
    assert error(20 * query_of(7, batch=1), [draw.transform([0] * 40, 9, (2, 5), (1, 4))]) < SINGLE


def test_nan_that_a_query_sees_is_not_hidden() -> None:
    draw = Draw()
    for place in ("keys", "values"):
        segment = draw.raw([0], 20, dim=DIM)
        getattr(segment, place)[0, 0, 11, 3] = torch.nan
        assert attend(query_of(batch=1, dim=DIM), [segment], 0.3)[0, 0].isnan().any()


def test_what_is_covered() -> None:
    draw = Draw()
    coded, raw, plain = draw.transform([0], 9, (1, 3), (1, 4)), retained(draw, [0], 9, 3, 2), draw.raw([0], 5, dim=DIM)
    with torch.no_grad():
        few = quantised(plain, 3, 1)
        forms = [made.struct.form for made in map(given, (coded, raw, plain, few)) if made is not None]
        assert forms == [CELLS, RAW, RAW, QUANTIZED]
        half = replace(plain, keys=plain.keys.half(), values=plain.values.half())  # type: ignore[union-attr]
        assert plain.values is not None and few.keys is not None
        mixed, mapless = replace(plain, keys=few.keys), replace(coded, q_map=None)
        grouped = replace(plain, values=GroupedRows.pack(plain.values, 4, 4, along_tokens=False))  # type: ignore[arg-type]
        for other in (half, mixed, mapless, grouped):
            assert given(other) is None


@pytest.mark.parametrize("rows", [3, 7, 70])
def test_rows_in_the_frames_of_their_tiles(rows: int, threads: int) -> None:
    """A compact capsule's: few rows of each tile, with a bias, keys as if the tile began at position 0."""
    draw, owner = Draw(rows), torch.tensor([1, 0, 1, 1, 0])
    raw = [draw(5, HEADS, rows, DIM) for _ in range(2)]
    segment = Segment(
        *raw, owner, bias=draw(5, HEADS, rows), frame=frames(draw, 5, DIM // 2, False), mask=draw(5, rows) > -1
    )
    with torch.no_grad():
        assert given(segment) is not None
    assert error(query_of(7, batch=2, dim=DIM), [segment, draw.raw([0, 1], 4, dim=DIM)]) < SINGLE


@pytest.mark.parametrize("dim", [8, 16, 80])
@pytest.mark.parametrize("rows", [1, 8, 21, 70, 130])
def test_rows_of_a_width_per_channel(rows: int, dim: int, threads: int) -> None:
    """Rows of fewer and of more than sixteen bytes; beside raw rows, and with one kind of rows for the keys and another
    for the values, which is the reference's."""
    draw = Draw(rows)
    segment = mixed(draw, [1, 0, 1, 1, 0], rows, frames(draw, 5, 4, False), dim)
    raw = draw.raw([0, 1], 4, dim=dim)
    with torch.no_grad():
        made = given(segment)
        assert made is not None and made.struct.form == MIXED
        assert given(replace(segment, values=draw(5, HEADS, rows, dim - 3))) is None
    for group in (1, 7):
        assert error(query_of(group, batch=2, dim=dim), [segment, raw]) < SINGLE
    pooled = PooledSegment.of(segment, torch.tensor([1, 0, 0]), torch.tensor([4, 0, 2]))
    assert error(query_of(batch=2, dim=dim), [pooled, raw]) < SINGLE


def test_beside_what_is_not_covered() -> None:
    """Few-bit rows, entries of single heads and a masked tail, each with what it needs to know of the others."""
    draw, query = Draw(), query_of(3, 2, batch=2, dim=DIM)
    tail = draw.raw([0, 1], 7, dim=DIM)
    seen = torch.rand(2, 2, 7, generator=draw.generator) > 0.4
    few = quantised(draw.raw([1, 0], 30, dim=DIM), 4, 2)
    alone = Segment(draw(3, 1, 6, DIM), draw(3, 1, 6, DIM), torch.tensor([0, 1, 1]), head=torch.tensor([1, 0, 1]))
    half = replace(alone, values=quantised(alone, 4, 2).values)
    none = Segment(draw(0, HEADS, 5, DIM), draw(0, HEADS, 5, DIM), torch.zeros(0, dtype=torch.int64))
    for rest in ([few], [alone], [few, alone], [none, half], [none]):
        assert error(query, [retained(draw, [0, 1, 1], 20, 5, 6), *rest, tail], seen) < SINGLE


def test_rows_that_are_fetched_for_a_query_are_the_references() -> None:
    class Fetching(Segment):
        def for_query(self, q_BHGQD: torch.Tensor, scale: float) -> Segment:
            return replace(self, keys=-self.keys)  # type: ignore[operator]

    plain = Draw().raw([0, 1], 7, dim=DIM)
    fetching = Fetching(plain.keys, plain.values, plain.owner)
    assert error(query_of(batch=2, dim=DIM), [fetching, Draw(1).raw([0, 1], 3, dim=DIM)]) < SINGLE


def test_gradients_are_the_references() -> None:
    draw = Draw()
    segment = draw.transform([0, 1], 9, (1, 3), (1, 4))
    assert segment.score_map is not None
    gradients = []
    for by in (reference.attend, attend):
        map_ = segment.score_map.clone().requires_grad_()
        by(query_of(batch=2), [replace(segment, score_map=map_)], 0.3).square().sum().backward()
        gradients.append(map_.grad)
    assert gradients[0] is not None and gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_parameters_that_change_or_move_are_read() -> None:
    draw = Draw()
    segment = draw.transform([0], 6, (1, 3), (2, 3))
    query, before = query_of(batch=1), []
    coding = segment.keys.coding  # type: ignore[union-attr]
    for change in (
        lambda: None,
        lambda: coding.scale.mul_(2),
        lambda: setattr(coding.offset, "data", coding.offset.data * 3),
    ):
        change()
        assert error(query, [segment]) < SINGLE
        before.append(attend(query, [segment], 0.3))
    assert not torch.allclose(before[0], before[1]) and not torch.allclose(before[1], before[2])


def test_exponentials(probe: ctypes.CDLL) -> None:
    x = np.concatenate([np.linspace(-86, 0, 4096), np.full(16, -88.0), np.full(16, -np.inf), np.full(16, np.nan)])
    x = x.astype(np.float32)
    out = np.empty_like(x)
    for i in range(0, len(x), 16):
        probe.probe_exp(ctypes.c_void_p(x[i:].ctypes.data), ctypes.c_void_p(out[i:].ctypes.data))
    np.testing.assert_allclose(out[:4096], np.exp(x[:4096].astype(np.float64)), rtol=3e-7)
    assert not out[4096:4128].any() and np.isnan(out[4128:]).all()


@pytest.mark.parametrize("joint_heads", [1, 2])
def test_a_stack_is_read_in_one_pass_by_each_of_its_layers(joint_heads: int, threads: int) -> None:
    """One code as keys and as values, and a part of the maps each."""
    capsule = cross_layer_capsule(joint_heads=joint_heads, channels=37)
    of = [single(prefill(layer)) for layer in (0, 1)]
    run = capsule.begin_pass([0, 1])
    done = [compressed for p in of for _, compressed in run.add(p)]
    outputs = []
    for p, (visual, text) in zip(of, done, strict=True):
        assert visual[0].keys is visual[0].values and given(visual[0]) is not None
        assert error(p.query[:, :, -1:].contiguous(), [*visual, *text], scale=p.scale) < SINGLE
        outputs.append(attend(of[0].query[:, :, -1:].contiguous(), [visual[0], *text], p.scale))
    assert not torch.allclose(*outputs, atol=1e-2)


def single(of: LayerPrefill) -> LayerPrefill:
    rotation = of.position_embeddings
    assert rotation is not None
    floats = {name: getattr(of, name).float() for name in ("keys", "values", "query")}
    return replace(of, **floats, position_embeddings=(rotation[0].float(), rotation[1].float()), shared={})
