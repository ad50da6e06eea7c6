"""AKVQ-VL: its matrix, quantiser, layer types and bytes worked out by hand, and what becomes of tokens that leave the
window."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.akvq_vl_by_hand import DIM, GROUP, HEADS, Line, bits_of, expected, held, mixed, pivots_of, places, tokens
from support.builders import rand

from kvcapsule.kernels.reference import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed
from kvcapsule.policy import AkvqVl, Full, akvq_vl
from kvcapsule.policy.akvq_vl import PIVOT
from kvcapsule.segments.group_quantized_rows import GroupedRows
from kvcapsule.segments.hadamard import hadamard
from kvcapsule.segments.segment import Segment


def assert_holds(segments: list[Segment], of: LayerPrefill, row: int, places: dict[int, list[int]]) -> None:
    """Segments hold these tokens of a row, in so many bits each, and no others."""
    for bits in (16, 4, 2):
        wanted = expected(of, row, places.get(bits, []), bits)
        torch.testing.assert_close(held(segments, row, bits), wanted, rtol=0, atol=1e-5 if bits < 16 else 0)


def received(of: LayerPrefill, row: int, first: int) -> Line:
    """Attention that each token draws from the valid queries from `first` on, over all heads."""
    got = [0.0] * of.keys.shape[2]
    for query in range(first, len(got)):
        for head in range(HEADS * GROUP):
            seen = [j for j in range(query + 1) if of.valid[row, j] and of.valid[row, query]]
            weights = [
                math.exp(of.scale * float(of.query[row, head, query] @ of.keys[row, head // GROUP, j])) for j in seen
            ]
            for j, weight in zip(seen, weights, strict=True):
                got[j] += weight / sum(weights)
    return got


# The matrix


def test_hadamard_by_hand() -> None:
    four = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert torch.equal(hadamard(4), torch.tensor(four) / 2)
    eight = [[*row, *row] for row in four] + [[*row, *(-x for x in row)] for row in four]
    torch.testing.assert_close(
        hadamard(8, torch.float64), torch.tensor(eight, dtype=torch.float64) / math.sqrt(8), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("dim", [2, 12, 80, 96, 128])
def test_hadamard_is_its_own_inverse(dim: int) -> None:
    matrix = hadamard(dim, torch.float64)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-14)


def test_hadamard_of_other_sizes_is_in_blocks() -> None:
    """80 = 5 * 16, and each channel's outlier is spread evenly over 16."""
    matrix = hadamard(80, torch.float64)
    assert torch.equal(matrix.abs(), torch.block_diag(*[torch.full((16, 16), 0.25, dtype=torch.float64)] * 5))
    with pytest.raises(ValueError, match="5 channels cannot be rotated"):
        hadamard(5)


def test_hadamard_made_in_inference_mode_can_be_trained_through() -> None:
    hadamard.cache_clear()
    with torch.inference_mode():
        hadamard(8)
    x = torch.ones(8, requires_grad=True)
    (x @ hadamard(8)).square().sum().backward()
    assert x.grad is not None


# The quantiser


def test_two_bits_with_clip_by_hand() -> None:
    """Two groups of four channels, 0.8.

    a = -0.8, c = 2.8, s = 1.2, z = 1: codes 0 1 2 4, of which 4 is clipped to 3.
    a = 1.76, c = 5.6, s = 1.28, z = -round(1.375) = -1: codes 1 2 3 4, of which 4 is clipped to 3.
    """
    x = torch.tensor([-1.0, 0.3, 0.9, 3.5, 2.2, 4.0, 5.0, 7.0])
    rows = GroupedRows.pack(x[None, None, None], 2, 4, along_tokens=False, clip=0.8, zero_is_code=True)
    wanted = torch.tensor([-1.2, 0.0, 1.2, 2.4, 2.56, 3.84, 5.12, 5.12])
    torch.testing.assert_close(rows.read(torch.float32)[0, 0, 0], wanted)
    assert rows.codes.flatten().tolist() == [0 + 1 * 4 + 2 * 16 + 3 * 64, 1 + 2 * 4 + 3 * 16 + 3 * 64]


def test_four_bits_by_hand() -> None:
    """a = -1, c = 2, s = 0.2, z = 5: codes 0 7 9 15."""
    x = torch.tensor([-1.0, 0.33, 0.87, 2.0])
    rows = GroupedRows.pack(x[None, None, None], 4, 128, along_tokens=False, zero_is_code=True)
    torch.testing.assert_close(rows.read(torch.float32)[0, 0, 0], torch.tensor([-1.0, 0.4, 0.8, 2.0]))
    assert rows.codes.flatten().tolist() == [0 + 7 * 16, 9 + 15 * 16, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_groups_without_a_range(dtype: torch.dtype) -> None:
    """All zero stays zero; a constant becomes what the clip leaves of it."""
    x = torch.tensor([[0.0] * 8, [3.0] * 8, [-3.0] * 8], dtype=dtype)[None, None]
    read = GroupedRows.pack(x, 2, 128, False, clip=0.8, zero_is_code=True).read(torch.float32)[0, 0, :, 0]
    torch.testing.assert_close(read, torch.tensor([0.0, 2.4, -2.4]), rtol=0.01, atol=0)


def test_rows_are_joined_token_by_token() -> None:
    x = rand(2, 2, 9, 12).float()
    parts = [GroupedRows.pack(part, 2, 5, False) for part in (x[:, :, :4], x[:, :, 4:])]
    assert torch.equal(
        GroupedRows.join(parts).read(torch.float32), GroupedRows.pack(x, 2, 5, False).read(torch.float32)
    )
    with pytest.raises(ValueError, match="cannot be joined"):
        GroupedRows.join([GroupedRows.pack(x, 2, 5, True)])


@pytest.mark.parametrize("dim", [8, 12])
def test_the_rotation_changes_no_attention(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rotated rows in place of codes, in float64."""
    of = tokens([(0, 3, 20)], [1], 30, dim=dim)
    query = rand(1, HEADS * GROUP, 3, dim, seed=9)
    kept: list[torch.Tensor] = []

    def keep_as_is(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept.append(x)
        return x

    monkeypatch.setattr(GroupedRows, "pack", keep_as_is)
    ours, full = AkvqVl((), recent=4, pivots=2).compress(of), Full().compress(of)
    out = attend(query, [*ours.visual, *ours.text], 0.3)
    torch.testing.assert_close(out, attend(query, [*full.visual, *full.text], 0.3), rtol=0, atol=1e-13)
    assert len(kept) == 4 and not any(bool(torch.isin(x, of.keys).any()) for x in kept[::2]), "they are rotated"


def assert_stored(ours: Compressed, of: LayerPrefill, row: int, salient: bool, recent: int, pivots: int) -> None:
    """The table of the module, token by token."""
    raw = {p for p in range(of.keys.shape[2] - recent, of.keys.shape[2])} | (
        set() if salient else set(pivots_of(of, row, pivots))
    )
    pivot = [] if salient else pivots_of(of, row, pivots)
    for visual, segments, bits in ((True, ours.visual, 2), (False, ours.text, 4 if salient else 2)):
        # Pivots lie before the recent tokens.
        first = [p for p in places(of, row, visual) if p in pivot]
        exact = first + [p for p in places(of, row, visual) if p in raw and p not in first]
        assert_holds(segments, of, row, {16: exact, bits: [p for p in places(of, row, visual) if p not in raw]})


@pytest.mark.parametrize("salient", [True, False])
def test_every_token_in_its_bits(salient: bool) -> None:
    of = replace(mixed(), layer=3)
    ours = AkvqVl((1, 3) if salient else (1, 2), recent=12, pivots=6).compress(of)
    assert any(p in places(of, 1, True) for p in pivots_of(of, 1, 6)), "a pivot within an image"
    for row in range(3):
        assert_stored(ours, of, row, salient, 12, 6)


def test_the_prompt_decides_by_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(akvq_vl, "OBSERVED", 10)
    of = mixed()
    decided = []
    for row in range(3):
        got, pivot, count = received(of, row, 60 - 10), pivots_of(of, row, 6), of.keys.shape[2]

        def mean(of_these: list[int], got: Line = got) -> float:
            return sum(got[p] for p in of_these) / len(of_these) if of_these else 0.0

        text, visual = ([p for p in places(of, row, v) if p not in pivot and p < count - 12] for v in (False, True))
        among = mean(text), mean(visual), mean([p for p in pivot if p < count - 12])
        decided.append(among[0] > max(among[1:]))
    assert decided == [True, False, decided[2]], "of both types there is one"
    ours = AkvqVl(recent=12, pivots=6).compress(of)
    for row in range(3):
        assert_stored(ours, of, row, decided[row], 12, 6)


@pytest.mark.parametrize(
    ("text", "visual", "pivot", "salient"),
    [
        (2.0, 1.0, 1.5, True),
        (2.0, 1.5, 1.0, True),
        (1.5, 2.0, 1.0, False),
        (1.5, 1.0, 2.0, False),
        (1.0, 1.0, 1.0, False),
    ],
)
def test_text_is_to_draw_more_than_either(
    text: float, visual: float, pivot: float, salient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of the three kinds of tokens, the same for all queries; recent tokens and padding, which are left out,
    score highest."""
    monkeypatch.setattr(akvq_vl, "OBSERVED", 4)
    of = tokens([(0, 13, 30)], [2], 60)
    assert of.hidden is not None
    of.hidden[0, [3, 20, 55]] = 40.0
    of.query[:], scores = 1.0, torch.full((60,), text, dtype=torch.float64)
    scores[13:43], scores[[3, 20]], scores[48:], scores[:2] = visual, pivot, 9.0, 9.0
    of.keys[:] = (scores / (of.scale * DIM))[:, None]
    stored = AkvqVl(recent=12, pivots=3).compress(of).text
    assert {s.tag for s in stored if bits_of(s) == 16} == ({4} if salient else {2, PIVOT})


def test_only_what_needs_pivots_asks_for_hidden_states() -> None:
    of = replace(mixed(), hidden=None)
    with pytest.raises(ValueError, match="brings no hidden states"):
        AkvqVl().compress(of)
    for policy in (AkvqVl(pivots=0), AkvqVl((0,))):
        assert policy.compress(of).text
    assert replace(mixed()).without_queries().hidden is None
