"""The Triton kernels agree with the reference: interpreted on the CPU, or compiled on a GPU where one is there.

Whatever is allocated and not written holds NaN throughout this file.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from support import triton_cases
from support.random_segments import DIM, HEADS, OWNERS, SCALE, Draw, quantised, query_of, with_hidden_tokens
from support.triton_cases import DEVICE, FORMS, SMALL, Case, on_device

from kvcapsule.kernels import reference
from kvcapsule.kernels.triton import arguments, plan, row_launch
from kvcapsule.kernels.triton import attend as kernels
from kvcapsule.policy.kivi import GroupedRows
from kvcapsule.segments.packed_rows import Rows
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment

SINGLE, HALF = 1e-5, 2e-3


pytestmark = pytest.mark.usefixtures("poisoned")


def attended(
    query: torch.Tensor, segments: list[Segment], visible: torch.Tensor | None = None, left: int = 0
) -> torch.Tensor:
    """By the kernels, which leave as many segments as said to the reference."""
    return triton_cases.attended(Case(query, segments, visible), left)


def error(query: torch.Tensor, segments: list[Segment], visible: torch.Tensor | None = None, left: int = 0) -> float:
    """Relative error of the kernels against the reference in double precision."""
    return triton_cases.error(Case(query, segments, visible), left)


@pytest.mark.parametrize("name", [*SMALL, *FORMS])
def test_shared_cases_in_single_precision(name: str) -> None:
    """Odd sizes, every width, and every form with a 7B model's heads; test_triton_gpu.py has them in all precisions."""
    assert triton_cases.error((SMALL | FORMS)[name](torch.float32)) < SINGLE


def test_the_kernels_are_interpreted_or_there_is_a_gpu() -> None:
    assert (DEVICE == "cpu") == arguments.INTERPRETED


def test_each_kind_in_single_precision(kind: str, random_segment: Callable[..., Segment]) -> None:
    segments = [random_segment(kind, owner, seed, torch.float32) for seed, owner in enumerate(OWNERS)]
    assert (
        error(query_of(), [*segments, random_segment("raw", [0, 1, 2, 3], 7, torch.float32)], left=2 * (kind == "mlp"))
        < SINGLE
    )


@pytest.mark.parametrize("kind", ["bias", "quantized", "maps", "joint", "everything"])
def test_each_path_in_half_precision(kind: str, random_segment: Callable[..., Segment]) -> None:
    segments = [
        random_segment(kind, OWNERS[0], 1, torch.float16),
        random_segment("raw", [0, 1, 2, 3], 7, torch.float16),
    ]
    assert error(query_of(dtype=torch.float16), segments) < HALF


@pytest.mark.parametrize("name", ["21-rows-of-8-channels", "70-rows-of-80-channels", "mixed"])
def test_rows_of_a_width_per_channel_in_half_precision(name: str) -> None:
    assert triton_cases.error((SMALL | FORMS)[name](torch.float16)) < HALF


def test_bfloat16_is_kept_from_the_interpreters_product() -> None:
    draw = Draw(dtype=torch.bfloat16)
    assert error(query_of(dtype=torch.bfloat16), [draw.raw([0, 1, 2, 3], 20)]) < 1e-2


def test_latents_in_few_bits_and_pairs_of_unlike_rows() -> None:
    """A codec's latents may be quantised besides, and keys may be stored in another way than values."""
    draw = Draw()
    maps = {"score_map": draw(HEADS, 11, 9), "value_map": draw(1, 11, 9), "value_mean": draw(HEADS, DIM)}
    latents = quantised(Segment(draw(3, HEADS, 9, DIM), draw(3, HEADS, 9, DIM), torch.tensor([0, 1, 0]), **maps), 4, 3)
    raw = draw.raw([1, 1], 9)
    unlike = replace(raw, keys=quantised(raw, 8, 8).keys, mask=torch.rand(2, 9, generator=draw.generator) < 0.7)
    assert isinstance(unlike.values, torch.Tensor)
    hidden = replace(unlike, values=unlike.values.masked_fill(~unlike.mask[:, None, :, None], torch.nan))  # type: ignore[index]
    assert error(query_of(batch=2), [latents, unlike]) < SINGLE
    torch.testing.assert_close(
        attended(query_of(batch=2), [latents, hidden]), attended(query_of(batch=2), [latents, unlike])
    )


def test_several_queries_see_a_causal_tail_in_a_larger_buffer() -> None:
    """What lies past the written tokens, before a row's first one, or outside a mask may be anything."""
    query, (clean, seen) = query_of(3, 3, batch=3), with_hidden_tokens(0.0)
    assert error(query, clean, seen) < SINGLE
    assert torch.equal(attended(query, with_hidden_tokens(torch.nan)[0], seen), attended(query, clean, seen))


def test_tiles_that_are_not_there_may_hold_nan(random_segment: Callable[..., Segment]) -> None:
    whole = random_segment("everything", [0, 1, 2], 5, torch.float32)
    mask = torch.zeros(3, whole.tokens, dtype=torch.bool)
    mask[0] = True
    tail = random_segment("raw", [0, 1, 2], 4, torch.float32)
    results = []
    for poison in (0.0, torch.nan):
        assert isinstance(whole.keys, torch.Tensor) and isinstance(whole.values, torch.Tensor)
        hidden = ~mask.any(dim=1)[:, None, None, None]
        results.append(
            replace(
                whole,
                keys=whole.keys.masked_fill(hidden, poison),
                values=whole.values.masked_fill(hidden, poison),
                mask=mask,
            )
        )
    query = query_of(batch=3)
    assert torch.equal(attended(query, [results[1], tail]), attended(query, [results[0], tail]))


def test_nan_that_a_query_sees_is_not_hidden() -> None:
    raw = Draw().raw([0, 1, 2], 7)
    for part in ("keys", "values"):
        broken = getattr(raw, part).clone()
        broken[1, 0, 3] = torch.nan
        out = attended(query_of(1, batch=3), [replace(raw, **{part: broken})])
        assert out[1, 0].isnan().all() and out[[0, 2]].isfinite().all()


def test_rows_without_anything_to_see_get_nothing() -> None:
    """No entry, none with a token, or a query before its row's first token."""
    raw = Draw().raw([0, 2], 5)
    visible = torch.ones(2, 2, 5, dtype=torch.bool)
    visible[1, 0] = False
    out = attended(query_of(1, 2, batch=3), [raw], visible)
    assert bool((out[1] == 0).all()) and bool((out[2, :, 0] == 0).all())
    assert bool((out[[0, 2]][:, :, 1] != 0).all())
    empty = Draw().raw([0], 0)
    assert bool((attended(query_of(1, batch=1), [empty]) == 0).all())


def test_scores_of_thousands_neither_overflow_nor_vanish() -> None:
    draw = Draw()
    assert error(1e4 * query_of(batch=2), [draw.raw([0, 1], 9), draw.raw([1, 0], 5, bias=True)]) < SINGLE


def test_rows_of_other_strides() -> None:
    """Part of a buffer, and heads that lie behind tokens: what is not dense is left to the reference, not misread."""
    draw = Draw()
    wide = draw.raw([0, 1], 30)
    assert isinstance(wide.keys, torch.Tensor) and isinstance(wide.values, torch.Tensor)
    part = replace(wide, keys=wide.keys[:, :, 3:20], values=wide.values[:, :, 3:20])
    behind = replace(part, keys=part.keys.transpose(1, 2).contiguous().transpose(1, 2))
    assert plan.route(part, 1, False) == "rows" and plan.route(behind, 1, False) == "reference"
    for segment in (part, behind):
        assert error(query_of(batch=2), [segment], left=int(segment is behind)) < SINGLE


def test_which_path_a_segment_takes(random_segment: Callable[..., Segment]) -> None:
    expected = {"mlp": "reference"} | dict.fromkeys("score_map value_map maps coded joint everything".split(), "maps")
    for kind in ("raw", "channels", "bias", "mask", "frame", "quantized", "mlp", *expected):
        segment = random_segment(kind, [0, 1], 0, torch.float32)
        path = expected.get(kind, "rows")
        assert plan.route(segment, 2, False) == path, kind
        assert plan.route(segment, 2, True) == ("rows" if path == "rows" else "reference"), kind
    raw = random_segment("raw", [0, 1], 0, torch.float32)
    assert isinstance(raw.keys, torch.Tensor)
    grouped: Rows = GroupedRows.pack(raw.keys, 4, 4, along_tokens=True)
    assert plan.route(replace(raw, keys=grouped), 2, False) == "reference"
    assert plan.route(random_segment("raw", [0], 0, torch.float64), 2, False) == "reference"
    assert plan.route(random_segment("joint", [0], 0, torch.float32), 100, False) == "reference"


def test_what_no_kernel_covers_is_the_reference_itself(random_segment: Callable[..., Segment]) -> None:
    raw = [random_segment("raw", [0, 1, 2, 3], 0, torch.float32)]
    assert plan.covers(query_of(), raw, HEADS)
    assert not plan.covers(query_of(dtype=torch.float64), raw, HEADS)
    assert not plan.covers(query_of(queries=33), raw, HEADS)
    assert not plan.covers(query_of().requires_grad_(), raw, HEADS)
    with torch.no_grad():
        assert plan.covers(query_of().requires_grad_(), raw, HEADS)
    learned = [replace(raw[0], q_map=torch.randn(HEADS, DIM, DIM).requires_grad_())]
    assert not plan.covers(query_of(), learned, HEADS)
    query = query_of(queries=33)
    assert kernels.attend(query.to(DEVICE), [on_device(s) for s in raw], SCALE).isfinite().all()
    torch.testing.assert_close(attended(query, raw), reference.attend(query, raw, SCALE), rtol=0, atol=1e-6)


def test_plain_segments_share_a_launch() -> None:
    """Raw rows and few-bit ones of one pair of widths; the tail is the last of the last launch."""
    draw = Draw()
    raw, few, fewer = draw.raw([0], 5), quantised(draw.raw([0], 5), 4, 4), quantised(draw.raw([0], 5), 2, 2)
    other, tail = draw.raw([0], 5, dim=4), draw.raw([0], 5)
    half = Draw(dtype=torch.float16).raw([0], 5)

    def numbers(segments: list[Segment]) -> list[list[int]]:
        return [
            [next(i for i, s in enumerate(segments) if s is found) for found in launch]
            for launch in row_launch.group_by_launch(segments)
        ]

    assert numbers([few, raw, tail]) == [[0, 1, 2]]
    assert numbers([few, fewer, raw, tail]) == [[0], [1, 2, 3]]
    assert numbers([other, raw, half, tail]) == [[0], [2], [1, 3]]
    assert numbers([]) == []


def test_a_split_is_as_long_as_the_device_stays_busy() -> None:
    assert plan.split_length([(1000, 4096)], 500) == 1024
    assert plan.split_length([(4, 4096)], 60) == 256
    assert plan.split_length([(1, 70)], 500) == 64


def test_a_segment_that_fetches_its_rows(random_segment: Callable[..., Segment]) -> None:
    raw = random_segment("raw", [0, 1, 2, 3], 0, torch.float32)
    given = []

    @dataclass(frozen=True)
    class Fetched(Segment):
        def for_query(self, q_BHGQD: torch.Tensor, scale: float) -> Segment:
            given.append((q_BHGQD.shape, scale))
            return on_device(raw)

    none = Fetched(raw.keys[:, :, :1], raw.values[:, :, :1], raw.owner)  # type: ignore[index]
    out = kernels.attend(query_of().to(DEVICE), [on_device(none)], SCALE).cpu()
    assert given == [((4, HEADS, 2, 1, DIM), SCALE)]
    assert torch.equal(out, attended(query_of(), [raw]))


def test_entries_of_single_heads() -> None:
    """Heads that keep unlike counts: an entry is of one of them."""

    @dataclass(frozen=True)
    class OfOneHead(Segment):
        head: torch.Tensor | None = None

    draw = Draw()
    owner, head = torch.tensor([1, 0, 0, 1]), torch.tensor([1, 1, 0, 1])
    angle = draw(4, DIM // 2)
    single = OfOneHead(draw(4, 1, 9, DIM), draw(4, 1, 9, DIM), owner, head=head)
    turned = replace(single, frame=Frame(angle.cos(), angle.sin()))
    tail = draw.raw([0, 1], 3)
    assert isinstance(tail.keys, torch.Tensor) and isinstance(tail.values, torch.Tensor)
    query = query_of(3, batch=2)
    for segment in (single, turned):
        keys, values = segment.materialize(torch.float64)
        out = attended(query, [segment, tail])
        for row in range(2):
            for kv_head in range(HEADS):
                own = ((owner == row) & (head == kv_head)).nonzero()[:, 0]
                k, v = (
                    torch.cat([x[own, 0].flatten(0, 1), t[row, kv_head].double()])
                    for x, t in ((keys, tail.keys), (values, tail.values))
                )
                q = query[row, 3 * kv_head : 3 * kv_head + 3, 0].double()
                expected = torch.softmax(q @ k.T * SCALE, dim=-1) @ v
                torch.testing.assert_close(
                    out[row, 3 * kv_head : 3 * kv_head + 3, 0].double(), expected, rtol=SINGLE, atol=SINGLE
                )


def test_the_index_of_units_is_made_once_a_segment() -> None:
    segment = Draw().raw([2, 0, 2], 3)
    index = plan.index_of(segment, 3, HEADS)
    assert index.order.tolist() == [2, 3, 0, 4, 1, 5]
    assert index.bounds.tolist() == [0, 1, 2, 2, 2, 4, 6]
    assert plan.index_of(replace(segment, keys=segment.values), 3, HEADS) is index
    assert plan.index_of(segment, 4, HEADS).bounds.tolist() == [0, 1, 2, 2, 2, 4, 6, 6, 6]
    assert plan.index_of(Draw().raw([0, 0, 0], 3), 3, HEADS).order.tolist() == [0, 2, 4, 1, 3, 5]


def test_the_kernels_need_a_segment() -> None:
    with pytest.raises(ValueError, match="at least one segment"):
        kernels.attend(query_of(), [], SCALE)
