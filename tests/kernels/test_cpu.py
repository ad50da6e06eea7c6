"""The kernels of the CPU agree with the reference in double precision, for any number of threads.

Whatever is allocated and not written holds NaN throughout this file.
"""

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from support.random_segments import (
    DIM,
    HEADS,
    OWNERS,
    SCALE,
    Draw,
    of_odd_size,
    quantised,
    query_of,
    with_hidden_tokens,
)

from kvcapsule.kernels import reference
from kvcapsule.kernels.cpu.attend import attend
from kvcapsule.policy.kivi import GroupedRows
from kvcapsule.segments.bit_packing import WIDTHS
from kvcapsule.segments.segment import Segment

SINGLE = 1e-5


pytestmark = pytest.mark.usefixtures("poisoned")


def attended(query: torch.Tensor, segments: list[Segment], visible: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return attend(query, segments, SCALE, visible)


def error(query: torch.Tensor, segments: list[Segment], visible: torch.Tensor | None = None) -> float:
    """Relative error against the reference in double precision."""
    with torch.no_grad():
        expected = reference.attend(query.double(), segments, SCALE, visible)
    assert expected.norm() > 0.1
    return float((attended(query, segments, visible).double() - expected).norm() / expected.norm())


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the reference was left to do."""
    calls: list[str] = []
    for name in ("products", "sums"):
        plain = getattr(reference, name)
        monkeypatch.setattr(
            reference, name, lambda *given, name=name, plain=plain: (calls.append(name), plain(*given))[1]
        )
    return calls


def test_each_kind(kind: str, random_segment: Callable[..., Segment], threads: int, left: list[str]) -> None:
    segments = [random_segment(kind, owner, seed, torch.float32) for seed, owner in enumerate(OWNERS)]
    with torch.no_grad():
        attended(query_of(), [*segments, random_segment("raw", [0, 1, 2, 3], 7, torch.float32)])
    assert ("products" in left) == (kind == "mlp")
    assert error(query_of(), [*segments, random_segment("raw", [0, 1, 2, 3], 7, torch.float32)]) < SINGLE


@pytest.mark.parametrize("tokens", [1, 63, 65, 517])
def test_odd_sizes(tokens: int, threads: int) -> None:
    for group in (1, 7):
        assert error(query_of(group=group), of_odd_size(tokens)) < SINGLE


@pytest.mark.parametrize("bits", WIDTHS)
def test_widths_of_few_bit_rows(bits: int, threads: int) -> None:
    draw = Draw(bits)
    assert error(query_of(batch=1), [quantised(draw.raw([0], 77), bits, bits), draw.raw([0], 3)]) < SINGLE


def test_several_queries_see_a_causal_tail_in_a_larger_buffer(threads: int) -> None:
    """What lies past the written tokens, before a row's first one, or outside a mask may be anything."""
    query, (clean, seen) = query_of(3, 3, batch=3), with_hidden_tokens(0.0)
    assert error(query, clean, seen) < SINGLE
    assert torch.equal(attended(query, with_hidden_tokens(torch.nan)[0], seen), attended(query, clean, seen))


def test_nan_that_a_query_sees_is_not_hidden() -> None:
    draw = Draw()
    for place in ("keys", "values"):
        segment = draw.raw([0], 20)
        getattr(segment, place)[0, 0, 11, 3] = torch.nan
        assert attended(query_of(batch=1), [segment])[0, 0].isnan().any()


def test_rows_of_other_strides(left: list[str]) -> None:
    """Parts of a buffer, expanded rows and heads that lie behind tokens are read where they are; channels that are not
    dense are left to the reference."""
    draw = Draw()
    wide = draw.raw([0, 1], 30)
    assert isinstance(wide.keys, torch.Tensor) and isinstance(wide.values, torch.Tensor)
    part = replace(wide, keys=wide.keys[:, :, 3:20], values=wide.values[:, :, 3:20])
    behind = replace(part, keys=part.keys.transpose(1, 2).contiguous().transpose(1, 2))
    one = replace(
        part, keys=part.keys[:, :1].expand(2, HEADS, 17, DIM), values=part.values[:1].expand(2, HEADS, 17, DIM)
    )
    for segment in (part, behind, one):
        attended(query_of(batch=2), [segment])
        assert not left
        assert error(query_of(batch=2), [segment]) < SINGLE
        left.clear()
    across = replace(part, keys=part.keys.transpose(2, 3).contiguous().transpose(2, 3))
    attended(query_of(batch=2), [across])
    assert left == ["products", "sums"]
    assert error(query_of(batch=2), [across]) < SINGLE


def test_what_no_kernel_covers_is_the_reference_itself(random_segment: Callable[..., Segment], left: list[str]) -> None:
    segment = random_segment("raw", [0, 1, 2, 3], 0, torch.float32)
    assert isinstance(segment.keys, torch.Tensor)
    grouped = replace(segment, keys=GroupedRows.pack(segment.keys, 4, 4, along_tokens=True))
    half = random_segment("raw", [0, 1, 2, 3], 0, torch.float16)
    for query, rows, calls in (
        (query_of(dtype=torch.float64), segment, ["products", "sums"]),
        (query_of(queries=33), segment, ["products", "sums"]),
        (query_of(), half, ["products", "sums"]),
        (query_of(), grouped, ["products", "sums"]),
    ):
        left.clear()
        out = attended(query, [rows])
        assert left == calls
        torch.testing.assert_close(out, reference.attend(query, [rows], SCALE), rtol=0, atol=1e-6)


def test_gradients_are_the_references(random_segment: Callable[..., Segment]) -> None:
    segment = random_segment("coded", [0, 1, 2, 3], 0, torch.float32)
    gradients = []
    for by in (reference.attend, attend):
        query = query_of().requires_grad_()
        by(query, [segment], SCALE).square().sum().backward()
        gradients.append(query.grad)
    assert gradients[0] is not None and gradients[0].norm() > 0 and torch.equal(*gradients)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86's are slow")
def test_denormal_numbers_are_0_within_a_call_alone(threads: int) -> None:
    """CPUs take a hundred times as long with numbers below 1.2e-38, which memory that is not yet written may hold."""
    small = torch.tensor([1e-39])
    segment = Draw().raw([0, 1], 300)
    assert isinstance(segment.values, torch.Tensor)
    segment = replace(segment, values=torch.full_like(segment.values, 1e-39))
    assert not attended(query_of(batch=2), [segment]).any()
    assert (small * 1).item() > 0, "PyTorch goes on with them as before"


def test_the_default_dtype_and_device_do_not_matter() -> None:
    draw = Draw()
    query, segments = query_of(batch=1), [draw.raw([0], 300)]
    expected = attended(query, segments)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(attended(query, segments), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_many_threads_may_attend_at_once(threads: int) -> None:
    draw = Draw()
    segments = [draw.transform([0, 1], 40, (3, 5), (4, 7)), quantised(draw.raw([0, 1], 70), 4, 4), draw.raw([0, 1], 9)]
    queries = [query_of(batch=2) * scale for scale in (0.5, 1.0, 2.0, 3.0)]
    alone = [attended(query, segments) for query in queries]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(
            pool.map(lambda query: attended(query, segments), queries * 5), alone * 5, strict=True
        ):
            assert torch.equal(found, expected)
