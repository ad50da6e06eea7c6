"""AdaKV's head budgets and LOOK-M's merging, worked out one token at a time."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.builders import rand

from kvcapsule.kernels.reference import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.policy import AdaKV, LookM, SnapKV
from kvcapsule.policy import look_m as lookm_module
from kvcapsule.segments.packed_rows import read_rows
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.vlm.spans import VisualSpan

HEADS, GROUP, DIM = 2, 2, 8


def tokens(spans: list[tuple[int, int, int]], padding: list[int], count: int) -> LayerPrefill:
    """Rows of `count` tokens in float64, the first of each padded. Channel 0 of the values is the token's place."""
    rows = len(padding)
    valid = torch.arange(count) >= torch.tensor(padding)[:, None]
    visual = [VisualSpan(row, start, length, (1, 1, length)) for row, start, length in spans]
    query, keys, values = (
        rand(rows, heads, count, DIM, seed=s) for s, heads in enumerate((HEADS * GROUP, HEADS, HEADS))
    )
    values[..., 0] = torch.arange(count, dtype=torch.float64)
    return LayerPrefill(layer=0, query=query, keys=keys, values=values, spans=visual, valid=valid, scale=DIM**-0.5)


def rows_of(segments: list[Segment], row: int, head: int) -> tuple[list[list[float]], list[list[float]]]:
    """All keys and values that a head stores of a row."""
    keys: list[list[float]] = []
    values: list[list[float]] = []
    for segment in segments:
        for entry in (segment.owner == row).nonzero()[:, 0].tolist():
            if segment.head is not None and int(segment.head[entry]) != head:
                continue
            there = slice(None) if segment.mask is None else segment.mask[entry]
            place = head if segment.head is None else 0
            keys += read_rows(segment.keys, torch.float64)[entry, place, there].tolist()
            values += read_rows(segment.values, torch.float64)[entry, place, there].tolist()
    return keys, values


def places(segments: list[Segment], row: int, head: int) -> list[int]:
    return sorted(round(value[0]) for value in rows_of(segments, row, head)[1])


# AdaKV

SCORES = torch.tensor([[9.0, 1.0, 8.0, 7.0, 6.0, 0.5], [2.0, 5.0, 0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("safeguard", "count", "kept"),
    [
        # Of both heads together the best six: 9 8 7 6 of the first, 5 2 of the second.
        (0.0, 3, [[0, 2, 3, 4], [0, 1]]),
        # The best two: both of the first head.
        (0.0, 1, [[0, 2], []]),
        # One each (half of two, and of three), then 8 and 7; with three, 8, 7, 6 and 2.
        (0.5, 2, [[0, 2, 3], [1]]),
        (0.5, 3, [[0, 2, 3, 4], [0, 1]]),
        # Two each before 7 and 6.
        (0.7, 3, [[0, 2, 3, 4], [0, 1]]),
        (1.0, 2, [[0, 2], [0, 1]]),
        (0.2, 6, [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
    ],
)
def test_a_budget_is_dealt_out(safeguard: float, count: int, kept: list[list[int]]) -> None:
    dealt = AdaKV(0.5, safeguard=safeguard).dealt(SCORES, count)
    assert [head.nonzero()[:, 0].tolist() for head in dealt] == kept


OF = tokens([(0, 6, 20), (1, 9, 12), (1, 24, 8)], [0, 4], 40)


def test_heads_share_the_budget_of_each_image() -> None:
    policy = AdaKV(0.4, window=6, kernel=3)
    scores = SnapKV(0.4, window=6, kernel=3).scores(OF)
    visual, text = policy.compress(OF)
    uneven = False
    for row, begin, length in ((0, 6, 20), (1, 9, 12), (1, 24, 8)):
        count = round(0.4 * length)
        mine = [float(x) for head in range(HEADS) for x in scores[row, head, begin : begin + length]]
        best = sorted(range(HEADS * length), key=lambda i: -mine[i])
        safe = [i for head in range(HEADS) for i in [j for j in best if j // length == head][: int(0.2 * count)]]
        chosen = safe + [i for i in best if i not in safe][: HEADS * count - len(safe)]
        for head in range(HEADS):
            found = [p for p in places(visual, row, head) if begin <= p < begin + length]
            assert found == sorted(begin + i % length for i in chosen if i // length == head)
            uneven |= len(found) != count
    assert uneven, "a test whose heads share alike would not tell"
    assert [places(text, row, 0) for row in (0, 1)] == [
        [i for i in range(40) if not 6 <= i < 26],
        [i for i in range(4, 40) if not (9 <= i < 21 or 24 <= i < 32)],
    ]


def test_a_whole_safeguard_is_snapkv() -> None:
    query = rand(2, HEADS * GROUP, 1, DIM, seed=9)
    ours, theirs = (policy.compress(OF) for policy in (AdaKV(0.4, window=6, safeguard=1.0), SnapKV(0.4, window=6)))
    torch.testing.assert_close(
        attend(query, [*ours.visual, *ours.text], 0.3), attend(query, [*theirs.visual, *theirs.text], 0.3)
    )


def test_what_a_head_gives_away_is_not_stored() -> None:
    """A head that gets all attention: its own tokens, and the others' safeguard, take the bytes of an even budget."""
    of = tokens([(0, 0, 200)], [0], 210)
    of.query[:, :GROUP] *= 40
    adaptive, even = (policy.compress(of).visual for policy in (AdaKV(0.2), AdaKV(0.2, safeguard=1.0)))
    counts = [len(places(adaptive, 0, head)) for head in range(HEADS)]
    assert sum(counts) == 80 and counts[0] != counts[1]
    sizes = [
        storage_bytes(t for s in segments for t in (s.keys, s.values) if isinstance(t, torch.Tensor))
        for segments in (adaptive, even)
    ]
    assert sizes[0] == sizes[1] == 80 * 2 * DIM * 8


# LOOK-M


def received(of: LayerPrefill, row: int, kv_head: int) -> list[float]:
    """Attention that each token gets from all queries of a KV head's query heads."""
    n = of.keys.shape[2]
    got = [0.0] * n
    for q in (q for q in range(n) if of.valid[row, q]):
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            seen = [j for j in range(q + 1) if of.valid[row, j]]
            weights = [math.exp(of.scale * float(of.query[row, head, q] @ of.keys[row, kv_head, j])) for j in seen]
            for j, weight in zip(seen, weights, strict=True):
                got[j] += weight / sum(weights)
    return got


def text_of(of: LayerPrefill, row: int) -> list[int]:
    return [j for j in range(of.keys.shape[2]) if of.valid[row, j] and not of.visual()[row, j]]


@pytest.mark.parametrize(("budget", "recent"), [(0.6, 0.5), (0.7, 0.0), (0.3, 0.5), (0.1, 1.0), (0.05, 0.2)])
def test_text_comes_first(budget: float, recent: float) -> None:
    """Row 0 has 20 text tokens of 40, row 1 has 16 of 36: some budgets are not enough for the text."""
    kept = LookM(budget, recent=recent).kept(OF)
    for row, n in ((0, 40), (1, 36)):
        total = max(1, round(budget * n))
        last = [40 - total_recent for total_recent in range(1, round(recent * total) + 1)]
        for head in range(HEADS):
            got = received(OF, row, head)
            text = [j for j in text_of(OF, row) if j not in last]
            visual = [j for j in range(40) if OF.visual()[row, j] and j not in last]
            order = sorted(text, key=lambda j: -got[j]) + sorted(visual, key=lambda j: -got[j])
            assert kept[row, head].nonzero()[:, 0].tolist() == sorted(last + order[: total - len(last)])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("chunk", [256, 3])
@pytest.mark.parametrize("merge", ["averaged", "pivotal", "weighted", "none"])
def test_evicted_tokens_go_to_the_nearest_kept_one(merge: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookm_module, "_CHUNK", chunk)
    policy = LookM(0.6, merge=merge)
    visual, text = policy.compress(OF)
    for row in (0, 1):
        for head in range(HEADS):
            keys, values = OF.keys[row, head], OF.values[row, head]
            kept = policy.kept(OF)[row, head].nonzero()[:, 0].tolist()
            gone = [j for j in range(40) if OF.visual()[row, j] and j not in kept]
            home = {e: max(kept, key=lambda c: cosine(keys[e], keys[c])) for e in gone}
            expected: dict[bool, tuple[list[list[float]], list[list[float]]]] = {True: ([], []), False: ([], [])}
            for c in kept:
                mine = [e for e in gone if home[e] == c] if merge != "none" else []
                for x, found in zip((keys, values), expected[bool(OF.visual()[row, c])], strict=True):
                    total = x[c].clone()
                    for e in mine:
                        part = {
                            "averaged": x[e],
                            "pivotal": (x[e] + x[c]) / 2,
                            "weighted": cosine(keys[e], keys[c]) * x[e],
                        }
                        total += part[merge]
                    found.append((total / (1 + len(mine))).tolist())
            for segments, marked in ((visual, True), (text, False)):
                for ours, theirs in zip(rows_of(segments, row, head), expected[marked], strict=True):
                    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs))


def test_merging_leaves_the_prefill_alone_and_no_more_is_stored() -> None:
    before = OF.keys.clone(), OF.values.clone()
    sizes = {}
    for merge in ("averaged", "none"):
        sizes[merge] = [
            storage_bytes(t for s in part for t in s.entry_tensors()) for part in LookM(0.5, merge=merge).compress(OF)
        ]
    assert torch.equal(OF.keys, before[0]) and torch.equal(OF.values, before[1])
    assert sizes["averaged"] == sizes["none"]


def test_half_precision_merges_in_single() -> None:
    """A thousand like tokens: summed in half precision, they would not come out as what they are."""
    of = tokens([(0, 4, 1000)], [0], 1010)
    half = LayerPrefill(
        layer=0,
        query=of.query.half(),
        keys=torch.ones_like(of.keys).half(),
        values=3 * torch.ones_like(of.values).half(),
        spans=of.spans,
        valid=of.valid,
        scale=0.3,
    )
    visual, _ = LookM(0.02, merge="averaged").compress(half)
    assert visual and all(
        torch.equal(read_rows(s.values, torch.float16), torch.full(tuple(s.values.shape), 3.0).half()) for s in visual
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaKV(0.0), "retention ratio 0.0 is outside"),
        (lambda: AdaKV(0.5, safeguard=1.5), "safeguard 1.5"),
        (lambda: AdaKV(0.5, kernel=2), "kernel 2"),
        (lambda: LookM(0.0), "budget 0.0 is outside (0, 1]: it is kept tokens / prompt tokens"),
        (lambda: LookM(1.2), "budget 1.2"),
        (lambda: LookM(0.5, recent=2.0), "recent 2.0"),
        (lambda: LookM(0.5, merge="mean"), "merge 'mean' is none of 'averaged', 'pivotal', 'weighted', 'none'"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
