"""AKVQ-VL: its matrix, quantiser, layer types and bytes worked out by hand, and what becomes of tokens that leave the
window."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.builders import rand
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule import attach
from kvcapsule.errors import GeometryError
from kvcapsule.inference.cache import CapsuleCache, CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.kernels.reference import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, DecodeState
from kvcapsule.policy import POLICIES, AkvqVl, Full
from kvcapsule.policy.combine import Combined
from kvcapsule.policy.recent_window import Exact
from kvcapsule.segments.group_quantized_rows import GroupedRows
from kvcapsule.segments.hadamard import hadamard
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.spans import VisualSpan

HEADS, GROUP, DIM = 2, 2, 8
Line = list[float]


def tokens(
    spans: list[tuple[int, int, int]], padding: list[int], count: int, layer: int = 0, dim: int = DIM
) -> LayerPrefill:
    """Rows of `count` tokens in float64, the first of each padded; hidden states of 5 channels."""
    rows = len(padding)
    valid = torch.arange(count) >= torch.tensor(padding)[:, None]
    visual = [VisualSpan(row, start, length, (1, 1, length)) for row, start, length in spans]
    query, keys, values = (
        rand(rows, heads, count, dim, seed=s) for s, heads in enumerate((HEADS * GROUP, HEADS, HEADS))
    )
    return LayerPrefill(layer, query, keys, values, visual, valid, dim**-0.5, hidden=rand(rows, count, 5, seed=8))


def mixed() -> LayerPrefill:
    """Left padding; one image, two with text between, none. The first row's text and the second's first tokens draw
    attention."""
    of = tokens([(0, 12, 30), (1, 6, 22), (1, 33, 9)], [3, 0, 25], 60)
    of.keys[0, :, 42:50] = of.query[0, ::GROUP, 50:58] * 2
    assert of.hidden is not None
    of.hidden[1, 2], of.keys[1, :, 2] = -40.0, of.query[1, ::GROUP, 59] * 9
    return of


def alone(of: LayerPrefill, row: int) -> LayerPrefill:
    """A row by itself, its padding cut off."""
    begin = int((~of.valid[row]).sum())
    assert of.hidden is not None
    spans = [s._replace(row=0, start=s.start - begin) for s in of.spans if s.row == row]
    query, keys, values, hidden = (t[row : row + 1, ..., begin:, :] for t in (of.query, of.keys, of.values, of.hidden))
    return LayerPrefill(of.layer, query, keys, values, spans, of.valid[row : row + 1, begin:], of.scale, hidden=hidden)


# Worked out independently, with loops


def rotated(line: Line) -> Line:
    """sum_i x_i (-1)^(bits that i and j share) / sqrt(n)."""
    n = len(line)
    return [sum(x * (-1) ** (i & j).bit_count() for i, x in enumerate(line)) / math.sqrt(n) for j in range(n)]


def rounded(line: Line, bits: int, clip: float) -> Line:
    low, high = clip * min(line), clip * max(line)
    step = (high - low) / (2**bits - 1)
    zero = -round(low / step)
    return [step * (min(max(round(x / step) + zero, 0), 2**bits - 1) - zero) for x in line]


def recoded(line: Line, bits: int) -> Line:
    """What attention reads of a token stored in so many bits."""
    return line if bits == 16 else rotated(rounded(rotated(line), bits, {2: 0.8, 4: 1.0}[bits]))


def expected(of: LayerPrefill, row: int, places: list[int], bits: int) -> torch.Tensor:
    """[2, H, n, D]: keys and values of tokens as read."""
    read = [
        [[recoded(x[row, h, p].tolist(), bits) for p in places] for h in range(HEADS)] for x in (of.keys, of.values)
    ]
    return torch.tensor(read, dtype=torch.float64).view(2, HEADS, len(places), DIM)


def bits_of(segment: Segment) -> int:
    return segment.keys.bits if isinstance(segment.keys, GroupedRows) else 16


def held(segments: list[Segment], row: int, bits: int) -> torch.Tensor:
    """[2, H, n, D]: what segments of so many bits hold of a row."""
    parts = []
    for segment in segments:
        for entry in (segment.owner == row).nonzero()[:, 0].tolist() if bits_of(segment) == bits else []:
            there = slice(None) if segment.mask is None else segment.mask[entry]
            parts.append(torch.stack([x[entry] for x in segment.materialize(torch.float64)])[:, :, there])
    return torch.cat(parts, dim=2) if parts else torch.zeros(2, HEADS, 0, DIM, dtype=torch.float64)


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


# Layer types, tokens and bits


def places(of: LayerPrefill, row: int, visual: bool) -> list[int]:
    marked = of.visual()[row]
    return [p for p in range(of.keys.shape[2]) if of.valid[row, p] and bool(marked[p]) == visual]


def pivots_of(of: LayerPrefill, row: int, count: int) -> list[int]:
    assert of.hidden is not None
    peaks = {p: float(of.hidden[row, p].abs().max()) for p in range(of.keys.shape[2]) if of.valid[row, p]}
    return sorted(peaks, key=lambda p: -peaks[p])[:count]


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


def test_the_prompt_decides_by_its_attention() -> None:
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
    ours = AkvqVl(recent=12, pivots=6, observed=10).compress(of)
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
def test_text_is_to_draw_more_than_either(text: float, visual: float, pivot: float, salient: bool) -> None:
    """Scores of the three kinds of tokens, the same for all queries; recent tokens and padding, which are left out,
    score highest."""
    of = tokens([(0, 13, 30)], [2], 60)
    assert of.hidden is not None
    of.hidden[0, [3, 20, 55]] = 40.0
    of.query[:], scores = 1.0, torch.full((60,), text, dtype=torch.float64)
    scores[13:43], scores[[3, 20]], scores[48:], scores[:2] = visual, pivot, 9.0, 9.0
    of.keys[:] = (scores / (of.scale * DIM))[:, None]
    stored = AkvqVl(recent=12, pivots=3, observed=4).compress(of).text
    assert {s.later for s in stored if isinstance(s, Exact)} == ({4} if salient else {2, None})


def test_only_what_needs_pivots_asks_for_hidden_states() -> None:
    of = replace(mixed(), hidden=None)
    with pytest.raises(ValueError, match="brings no hidden states"):
        AkvqVl().compress(of)
    for policy in (AkvqVl(pivots=0), AkvqVl((0,))):
        assert policy.compress(of).text
    assert replace(mixed()).without_queries().hidden is None


def test_values_without_rotation() -> None:
    of = tokens([(0, 3, 20)], [0], 30)
    (segment,) = AkvqVl((), recent=7, pivots=0, rotate=False).compress(of).visual
    assert segment.q_map is None and segment.out_map is None
    line = segment.materialize(torch.float64)[1][0, 1, 4].tolist()
    assert line == pytest.approx(rounded(of.values[0, 1, 7].tolist(), 2, 0.8), abs=1e-6)


# Bytes


@pytest.mark.parametrize(("count", "printed"), [(4096, 2.49), (500, 6.0)])
def test_bits_for_an_element(count: int, printed: float) -> None:
    """2 + 14 * 143 / T of payload, as the method's readers count it, and two numbers of 16 bits for 128 channels of
    coded tokens."""
    dim, low = 128, 143
    x = rand(1, 1, count, dim).half()
    hidden = torch.zeros(1, count, 4)
    hidden[0, 20:35, 2] = 100.0
    of = LayerPrefill(
        0,
        x,
        x,
        x.clone(),
        [VisualSpan(0, 5, 300, (1, 1, 300))],
        torch.ones(1, count, dtype=torch.bool),
        1.0,
        hidden=hidden,
    )
    stored = AkvqVl(()).compress(of)
    segments = [*stored.visual, *stored.text]
    elements = 2 * count * dim
    packed = [x for s in segments for x in (s.keys, s.values) if isinstance(x, GroupedRows)]
    raw = [x for s in segments for x in (s.keys, s.values) if isinstance(x, torch.Tensor)]
    payload = 8 * storage_bytes(iter([*raw, *(p.codes for p in packed)]))
    assert payload == elements * 2 + 14 * low * 2 * dim
    assert payload / elements == pytest.approx(printed, abs=0.01)
    scales = 8 * storage_bytes(t for p in packed for t in (p.scale, p.minimum))
    assert scales == (count - low) * 2 * 2 * 16
    everything = 8 * storage_bytes(t for s in segments for t in s.entry_tensors() if t is not s.owner)
    assert everything == payload + scales


def test_bits_for_an_element_of_a_text_salient_layer() -> None:
    """2 + 14 * n16 / T + 2 * n4 / T."""
    count, dim, recent, visual = 600, 128, 128, 300
    x = rand(1, 1, count, dim).half()
    of = LayerPrefill(
        0, x, x, x.clone(), [VisualSpan(0, 5, visual, (1, 1, visual))], torch.ones(1, count, dtype=torch.bool), 1.0
    )
    stored = AkvqVl((0,)).compress(of)
    everything = 8 * storage_bytes(
        t for s in (*stored.visual, *stored.text) for t in s.entry_tensors() if t is not s.owner
    )
    text = count - recent - visual
    payload = 2 + 14 * recent / count + 2 * text / count
    assert everything == pytest.approx(2 * count * dim * (payload + 2 * 16 / 128 * (count - recent) / count), rel=1e-9)


def test_the_rotation_is_stored_once() -> None:
    stored = [AkvqVl((), recent=4, pivots=0).compress(tokens([(0, 3, 20)], [0], 30, layer)) for layer in (0, 1)]
    maps = [t for c in stored for s in (*c.visual, *c.text) for t in s.parameter_tensors()]
    assert storage_bytes(iter(maps)) == DIM * DIM * 8


# Batches


POLICY = AkvqVl(recent=12, pivots=6)


def test_a_batch_is_its_rows_one_by_one() -> None:
    of = mixed()
    query = rand(3, HEADS * GROUP, 2, DIM, seed=9)
    visual, text = POLICY.compress(of)
    together = attend(query, [*visual, *text], 0.3)
    for row in range(3):
        visual, text = POLICY.compress(alone(of, row))
        torch.testing.assert_close(attend(query[row : row + 1], [*visual, *text], 0.3), together[row : row + 1])


def test_rows_can_be_chosen() -> None:
    visual, text = POLICY.compress(mixed())
    query = rand(3, HEADS * GROUP, 2, DIM, seed=9)
    before = attend(query, [*visual, *text], 0.3)
    rows = torch.tensor([1, 1, 0])
    chosen = [s.select(rows) for s in (*visual, *text)]
    torch.testing.assert_close(attend(query[rows], chosen, 0.3), before[rows])
    assert [s.later for s in chosen if isinstance(s, Exact)] == [
        s.later for s in (*visual, *text) if isinstance(s, Exact)
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    of = mixed()
    assert of.hidden is not None
    tensors = {name: getattr(of, name).to(dtype) for name in ("query", "keys", "values", "hidden")}
    query = rand(3, HEADS * GROUP, 2, DIM, seed=9)
    near, far = (POLICY.compress(prefill) for prefill in (of, replace(of, **tensors)))
    difference = (
        attend(query, [*near.visual, *near.text], 0.3) - attend(query.to(dtype), [*far.visual, *far.text], 0.3).double()
    )
    assert float(difference.abs().mean()) < 0.02


# The window moves


def later(compressed: Compressed, of: LayerPrefill, seen: torch.Tensor | None = None) -> DecodeState:
    """The tokens of `of` as written behind what is stored."""
    rows, count = of.keys.shape[0], of.keys.shape[2]
    seen = torch.ones(rows, count, dtype=torch.bool) if seen is None else seen
    query = of.query[:, :, :0]
    return DecodeState(of.layer, compressed.visual, compressed.text, of.keys, of.values, seen, query, of.scale)


def revised(policy: AkvqVl, of: LayerPrefill, *written: LayerPrefill) -> Compressed:
    compressed = policy.compress(of)
    for tail in written:
        compressed = policy.on_decode(later(compressed, tail))
    return compressed


def test_what_leaves_the_window_is_stored_as_its_like() -> None:
    """A text-salient row, one with pivots and one without an image; 40 tokens written, twice; 12 are recent."""
    of, first, second = mixed(), tokens([], [0] * 3, 40), tokens([], [0] * 3, 40)
    second = replace(second, keys=second.keys * 3, values=second.values - 1)
    after = revised(POLICY, of, first, second)
    for row in range(3):
        salient = any(s.later == 4 and row in s.owner for s in POLICY.compress(of).text if isinstance(s, Exact))
        assert salient == (row == 0) or row == 2
        pivot = [] if salient else pivots_of(of, row, 6)
        bits = 4 if salient else 2
        for visual, segments in ((True, after.visual), (False, after.text)):
            marked = places(of, row, visual)
            own = [p for p in marked if p not in pivot]
            coded, exact = (
                [expected(of, row, own, 2 if visual else bits)],
                [expected(of, row, [p for p in pivot if p in marked], 16)],
            )
            if not visual:
                coded += [expected(first, row, list(range(40)), bits), expected(second, row, list(range(28)), bits)]
                exact += [expected(second, row, list(range(28, 40)), 16)]
            assert_same_tokens(held(segments, row, 2 if visual else bits), torch.cat(coded, dim=2))
            assert_same_tokens(held(segments, row, 16), torch.cat(exact, dim=2))
            assert sum(held(segments, row, n).shape[2] for n in (2, 4, 16)) == sum(x.shape[2] for x in (*coded, *exact))


def assert_same_tokens(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    """[2, H, n, D] each, in whatever order: attention does not mind it."""
    apart = (ours[:, :, :, None] - wanted[:, :, None]).abs().amax(dim=(0, 1, 4))
    assert apart.shape[0] == apart.shape[1]
    matches = (apart < 1e-5).long()
    assert (matches.sum(0) == 1).all() and (matches.sum(1) == 1).all()


def test_a_short_window_moves_in_chunks() -> None:
    assert (AkvqVl().interval, AkvqVl(recent=12).interval, AkvqVl(recent=0).interval) == (128, 32, 32)
    of = mixed()
    after = revised(AkvqVl((), recent=0, pivots=0), of, tokens([], [0] * 3, 40))
    assert all(isinstance(s.keys, GroupedRows) for s in (*after.visual, *after.text))
    assert sum(held(after.text, row, 2).shape[2] for row in range(3)) == int((of.valid & ~of.visual()).sum()) + 3 * 40


def test_segments_do_not_pile_up() -> None:
    tail = tokens([], [0] * 3, 40)
    counts = [len(revised(POLICY, mixed(), *[tail] * times).text) for times in (1, 2, 5)]
    assert counts[0] == counts[1] == counts[2]


def test_padding_of_a_tail_stays_unseen_and_a_closed_tail_leaves() -> None:
    """Row 0 of a tail begins with three tokens of padding; a segment of raw text is what was written before a second
    image."""
    of, tail = mixed(), tokens([], [0] * 3, 40)
    compressed = POLICY.compress(of)
    closed = Segment(tail.keys[:, :, :5].clone(), tail.values[:, :, :5].clone(), torch.arange(3))
    seen = torch.ones(3, 40, dtype=torch.bool)
    seen[0, :3] = False
    after = POLICY.on_decode(later(Compressed(compressed.visual, [*compressed.text, closed]), tail, seen))
    assert held(after.text, 0, 4).shape[2] == len(places(of, 0, False)) + 5 + 28 - 3
    assert held(after.text, 1, 16).shape[2] == 12 + sum(p in places(of, 1, False) for p in pivots_of(of, 1, 6))


def test_a_revised_batch_is_its_rows_one_by_one() -> None:
    of, tail = mixed(), tokens([], [0] * 3, 40)
    query = rand(3, HEADS * GROUP, 2, DIM, seed=9)
    visual, text = revised(POLICY, of, tail, tail)
    together = attend(query, [*visual, *text], 0.3)
    for row in range(3):
        visual, text = revised(POLICY, alone(of, row), alone(tail, row), alone(tail, row))
        torch.testing.assert_close(attend(query[row : row + 1], [*visual, *text], 0.3), together[row : row + 1])


# Through the model


class Listening(AkvqVl):
    """Writes down the hidden states that it is given."""

    taken: dict[int, torch.Tensor] = {}  # noqa: RUF012

    def compress(self, prefill: LayerPrefill) -> Compressed:
        assert prefill.hidden is not None
        self.taken[prefill.layer] = prefill.hidden
        return super().compress(prefill)


@pytest.mark.parametrize("own", [True, False])
def test_hidden_states_are_what_enters_each_layer(
    own: bool, model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    """Whether the method is attached or a cache is passed by hand."""
    batch = make_batch((1, "Read line 2."), (2, "What is the number beside the owl?"))
    with torch.no_grad():
        entered = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    Listening.taken.clear()
    policy = Listening()
    with attach(model, policy if own else None):
        cache = CapsuleCache(model.config, policy)
        model.generate(**batch, **cache_argument(cache), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert sorted(policy.taken) == [0, 1, 2, 3]
    seen = batch["attention_mask"].bool()
    for layer, hidden in policy.taken.items():
        torch.testing.assert_close(hidden[seen], entered[layer][seen], rtol=1e-3, atol=1e-4)
    assert all(layer.hidden is None for layer in cache.layers if isinstance(layer, CapsuleLayer)), "none is held"
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)


def test_methods_that_do_not_ask_cost_no_hook(model: LlavaForConditionalGeneration) -> None:
    for method, hooks in ((Full(), 0), (AkvqVl(), 1), (Combined(Full(), AkvqVl()), 1), (None, 1)):
        with attach(model, method):
            assert all(len(layer._forward_pre_hooks) == hooks for layer in model.get_decoder().layers)


def stored_tokens(cache: CapsuleCache, row: int) -> list[int]:
    """Tokens of a row in each layer, the tail included."""
    counts = []
    for layer in cache.layers:
        assert isinstance(layer, CapsuleLayer)
        count = layer.tail_length
        for s in (*layer.visual, *layer.text):
            mask = torch.ones(len(s.owner), s.tokens, dtype=torch.bool) if s.mask is None else s.mask
            count += int(mask[s.owner == row].sum())
        counts.append(count)
    return counts


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_past_the_window(
    beams: int, model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    """A padded batch, 36 tokens, a window of 20: after a revision every token is stored once, in every layer."""
    batch = make_batch((1, "Read line 2."), (2, "What is the number beside the owl?"))
    policy = AkvqVl(recent=20)
    assert policy.decode_time() is policy
    with attach(model, policy):
        cache = CapsuleCache(model.config, policy)
        model.generate(
            **batch, **cache_argument(cache), max_new_tokens=36, min_new_tokens=36, num_beams=beams, do_sample=False
        )
    for row in range(2 * beams):
        assert stored_tokens(cache, row) == [int(batch["attention_mask"][row // beams].sum()) + 35] * 4
    for layer in cache.layers:
        assert isinstance(layer, CapsuleLayer)
        assert layer.tail_length == 35 - 32
        raw = [s for s in layer.text if isinstance(s.keys, torch.Tensor)]
        assert all(isinstance(s, Exact) for s in raw)
        assert sum(len(s.owner) * s.tokens for s in raw if isinstance(s, Exact) and s.later) == 2 * beams * 20


def test_a_second_turn_with_an_image(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    first, second = make_batch((1, "Read line 2.")), make_batch((1, "Transcribe the page."))
    policy = AkvqVl(recent=20)
    length = first["input_ids"].shape[1] + second["input_ids"].shape[1]
    with attach(model, policy), torch.no_grad():
        cache = CapsuleCache(model.config, policy)
        model(**first, **cache_argument(cache))
        model(input_ids=torch.full((1, 3), 5), **cache_argument(cache))
        out = model(input_ids=second["input_ids"], pixel_values=second["pixel_values"], **cache_argument(cache))
        assert torch.isfinite(out.logits).all()
        assert cache.get_seq_length() == length + 3
        assert stored_tokens(cache, 0) == [length + 3] * 4
        model(input_ids=torch.full((1, 40), 5), **cache_argument(cache))
    assert stored_tokens(cache, 0) == [length + 43] * 4
    raw = [
        s
        for layer in cache.layers
        if isinstance(layer, CapsuleLayer)
        for s in (*layer.visual, *layer.text)
        if bits_of(s) == 16
    ]
    assert {s.later for s in raw if isinstance(s, Exact)} <= {None, 2, 4} and all(isinstance(s, Exact) for s in raw)
    assert all(s.tokens == 20 for s in raw if isinstance(s, Exact) and s.later), (
        "both prompts' windows and the three tokens have left"
    )


def test_as_the_text_s_method_beside_another(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    method = Combined(Full(), AkvqVl(recent=8))
    batch = make_batch((1, "Read line 2."))
    with attach(model, method):
        cache = CapsuleCache(model.config, method)
        model.generate(**batch, **cache_argument(cache), max_new_tokens=40, min_new_tokens=40, do_sample=False)
    layers = [layer for layer in cache.layers if isinstance(layer, CapsuleLayer)]
    assert all(bits_of(s) == 16 for layer in layers for s in layer.visual)
    assert all(any(bits_of(s) < 16 for s in layer.text) for layer in layers)
    assert stored_tokens(cache, 0) == [int(batch["attention_mask"].sum()) + 39] * 4


# What cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_layers": "first"}, "text_layers 'first': 'auto', or the indices"),
        ({"recent": -1}, "recent -1 counts tokens"),
        ({"pivots": -2}, "pivots -2 counts tokens"),
        ({"group": 0}, "group 0: at least one"),
        ({"observed": 0}, "observed 0: at least one"),
        ({"clip": 0.0}, "clip 0.0 is outside (0, 1]"),
        ({"text_clip": 1.5}, "text_clip 1.5 is outside (0, 1]"),
        ({"bits": 5}, "5 bits cannot be packed"),
        ({"bits": 4}, "text_bits 4 are to be more than the 4 bits"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AkvqVl(**settings)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(GeometryError, match=re.escape("text_layers (0, 4): the model's layers are 0 to 3")):
        AkvqVl((0, 4)).require_geometry(KVGeometry("llava", 4, 4, 2, 8, "1d"))
    odd = KVGeometry("llava", 4, 4, 2, 9, "none")
    with pytest.raises(GeometryError, match="a head dim of 9 has no Walsh-Hadamard rotation: pass rotate=False"):
        AkvqVl().require_geometry(odd)
    AkvqVl(rotate=False).require_geometry(odd)
    assert POLICIES["akvq-vl"] is AkvqVl
