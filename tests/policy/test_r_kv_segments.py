"""R-KV's segments: what is written stays at the budget, and where rows lie."""

from dataclasses import replace

import pytest
import torch
from support.builders import DIM, HEADS, rand
from support.r_kv_rows import GROUP, PADDING, SMALL, TOKENS, WINDOW, best, importance, prompt, redundancy

from kvcapsule.methods.method import DecodeState
from kvcapsule.policy.head_rows import side_by_side
from kvcapsule.policy.r_kv import PROMPT
from kvcapsule.segments.quantized_rows import QuantizedRows
from kvcapsule.segments.segment import Segment, storage_bytes

# Segments


def written(
    own: list[Segment], count: int = 8, rows: int = 2, visual: list[Segment] | None = None, first: int = 100
) -> DecodeState:
    """A tail of `count` tokens whose values tell their places, from `first` on."""
    keys = rand(rows, HEADS, count, DIM, seed=first)
    values = torch.arange(first, first + count, dtype=torch.float64)[None, None, :, None].expand(
        rows, HEADS, count, DIM
    )
    query = rand(rows, HEADS * GROUP, WINDOW, DIM, seed=first + 1)
    return DecodeState(0, visual or [], own, keys, values, torch.ones(rows, count, dtype=torch.bool), query, DIM**-0.5)


def places(segments: list[Segment], row: int, head: int) -> list[int]:
    """What a head of a row stores, in the order of the segments."""
    found: list[int] = []
    for s in segments:
        for entry in (s.owner == row).nonzero()[:, 0].tolist():
            if s.head is not None and int(s.head[entry]) != head:
                continue
            there = slice(None) if s.mask is None else s.mask[entry]
            assert isinstance(s.values, torch.Tensor)
            found += s.values[entry, 0 if s.head is not None else head, there, 0].long().tolist()
    return found


def test_the_prompt_is_left_alone() -> None:
    of = prompt()
    visual, text = SMALL.compress(of)
    own = list(text)
    for turn in range(5):
        visual, own = SMALL.on_decode(written(own, visual=visual, first=100 * (turn + 1)))
    assert [s for s in own if s.tag == PROMPT] == text
    for row, begin in enumerate(PADDING):
        for head in range(HEADS):
            held = places(own, row, head)
            inside = range(2, 14) if row == 0 else range(8, 18)
            assert held[:-12] == [t for t in range(begin, TOKENS) if t not in inside]
            assert held[-4:] == [504, 505, 506, 507], "the observed tokens"
            assert held[-12:] == sorted(held[-12:]) and min(held[-12:]) >= 100
            assert places(visual, row, head) == list(inside)


def test_what_is_within_the_budget_is_kept() -> None:
    _, own = SMALL.on_decode(written([], count=9))
    (segment,) = own
    assert places(own, 0, 1) == list(range(100, 109)) and segment.mask is None
    _, own = SMALL.on_decode(written(own, count=8, first=200))
    assert len(places(own, 0, 1)) == 12


def test_dropped_rows_are_not_stored() -> None:
    _, own = SMALL.on_decode(written([], count=40))
    assert storage_bytes(t for s in own for t in s.entry_tensors()) == 2 * (2 * HEADS * 12 * DIM * 8) + 2 * 8


def test_a_revision_of_chosen_rows_is_the_chosen_rows_revision() -> None:
    """Beams that were reordered go on as if they had always been these."""
    _, own = SMALL.on_decode(written([], count=20))
    later, rows = written(own, first=300), torch.tensor([1, 1, 0])
    chosen = later._replace(
        text=[s.select(rows) for s in later.text],
        **{name: getattr(later, name)[rows] for name in ("keys", "values", "valid", "query")},
    )
    expected = [s.select(rows) for s in SMALL.on_decode(later).text]
    found = SMALL.on_decode(chosen).text
    for row in range(3):
        for head in range(HEADS):
            assert places(found, row, head) == places(expected, row, head)
    assert places(found, 0, 0) != places(found, 2, 0)


def test_marks_of_a_prompt_survive_a_selection() -> None:
    assert all(s.select(torch.tensor([1, 0])).tag == PROMPT for s in SMALL.compress(prompt()).text)


def test_rows_of_unlike_heads_come_side_by_side() -> None:
    """Head 0 of row 1 holds nothing in the first segment; unwritten places are not numbers."""
    nan = torch.full((3, 1, 4, DIM), torch.nan, dtype=torch.float64)
    ragged = Segment(
        nan.clone(), nan.clone(), torch.tensor([0, 0, 1]), head=torch.tensor([0, 1, 1]), mask=torch.zeros(3, 4).bool()
    )
    assert ragged.mask is not None and isinstance(ragged.keys, torch.Tensor) and isinstance(ragged.values, torch.Tensor)
    for entry, count in enumerate((4, 2, 3)):
        ragged.mask[entry, :count] = True
        ragged.keys[entry, :, :count] = ragged.values[entry, :, :count] = (
            torch.arange(count, dtype=torch.float64)[:, None] + 10 * entry
        )
    last = written([], count=2).values
    joined = side_by_side([ragged], [Segment(last, last, torch.arange(2))], 2, HEADS)
    assert tuple(joined.keys.shape) == (2, HEADS, 6, DIM)
    expected = {(0, 0): [0, 1, 2, 3], (0, 1): [10, 11], (1, 0): [], (1, 1): [20, 21, 22]}
    for (row, head), older in expected.items():
        there = joined.valid[row, head]
        assert (
            joined.keys[row, head, there, 0].tolist()
            == joined.values[row, head, there, 0].tolist()
            == [*older, 100, 101]
        )
        assert joined.visual[row, head, there].tolist() == [True] * len(older) + [False] * 2
        assert not there[: 6 - len(older) - 2].any()
    assert joined.keys.isfinite().all() and joined.values.isfinite().all()


def test_what_is_not_raw_cannot_be_ranked() -> None:
    rows = rand(2, HEADS, 8, DIM)
    packed = Segment(QuantizedRows.pack(rows, 4), QuantizedRows.pack(rows, 4), torch.arange(2))
    with pytest.raises(ValueError, match="only raw keys and values can be ranked"):
        SMALL.on_decode(written([packed]))


# Scope "all"


def test_a_prompt_beyond_the_budget_is_cut_to_it() -> None:
    """As the formulas say, head by head; visual rows and text apart, and no byte more than these take."""
    method, of = replace(SMALL, scope="all"), prompt()
    visual, text = method.compress(of)
    for row, begin in enumerate(PADDING):
        span = range(2, 14) if row == 0 else range(8, 18)
        for head in range(HEADS):
            keys = of.keys[row, head, begin:]
            i = importance(method, keys[:-WINDOW], of.query[row, head * GROUP : (head + 1) * GROUP, -WINDOW:], of.scale)
            r = redundancy(method, keys)
            z = [0.1 * a - 0.9 * b for a, b in zip(i, r, strict=True)]
            kept = [begin + j for j in best(z, 12 - WINDOW)] + list(range(TOKENS - WINDOW, TOKENS))
            assert places(visual, row, head) == [t for t in kept if t in span]
            assert places(text, row, head) == [t for t in kept if t not in span]
    held = sum(storage_bytes(t for t in (s.keys, s.values) if isinstance(t, torch.Tensor)) for s in (*visual, *text))
    promised = 2 * 2 * HEADS * 12 * DIM * 8
    assert promised <= held <= 1.02 * promised


def test_everything_stays_at_the_budget() -> None:
    method = replace(SMALL, scope="all")
    visual, text = method.compress(prompt())
    for turn in range(4):
        visual, text = method.on_decode(written(text, visual=visual, first=100 * (turn + 1)))
        for row in range(2):
            for head in range(HEADS):
                assert len(places(visual, row, head)) + len(places(text, row, head)) == 12
                assert set(places(text, row, head)) >= set(range(100 * (turn + 1) + 4, 100 * (turn + 1) + 8))
                assert all(2 <= t < 18 for t in places(visual, row, head))
    kept_all = replace(method, budget_tokens=TOKENS).compress(prompt())
    for row, begin in enumerate(PADDING):
        assert sorted(places(kept_all.visual + kept_all.text, row, 0)) == list(range(begin, TOKENS))
