"""Prefills whose values tell which token is which, and runs over several layers, for tests of what a policy keeps."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from kvcapsule.kernels.reference import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.vlm.spans import VisualSpan
from support.builders import rand

HEADS, GROUP, DIM = 2, 2, 8


def tokens(spans: Sequence[tuple[int, int, int]], padding: Sequence[int], count: int, layer: int = 0) -> LayerPrefill:
    """Rows of `count` tokens in float64, the first of each padded; a token's place is channel 0 of its values."""
    rows = len(padding)
    valid = torch.arange(count) >= torch.tensor(padding)[:, None]
    visual = [VisualSpan(row, start, length, (1, 1, length)) for row, start, length in spans]
    query, keys, values = (
        rand(rows, heads, count, DIM, seed=10 * layer + s) for s, heads in enumerate((HEADS * GROUP, HEADS, HEADS))
    )
    values[..., 0] = torch.arange(count, dtype=torch.float64)
    return LayerPrefill(
        layer=layer, query=query * (1 + layer), keys=keys, values=values, spans=visual, valid=valid, scale=DIM**-0.5
    )


def mixed(layers: int = 3) -> list[LayerPrefill]:
    """Left padding; one image, two with text between, none, and one at the end of the prompt. Later layers attend more
    sharply."""
    spans = [(0, 12, 40), (1, 2, 40), (1, 44, 9), (3, 9, 51)]
    return [tokens(spans, [9, 0, 50, 1], 60, layer) for layer in range(layers)]


def scripted(
    weights: dict[tuple[int, int], Sequence[float]], count: int, heads: int, spans: Sequence[tuple[int, int]]
) -> LayerPrefill:
    """One row, one KV head; query q of query head h gives token j attention in proportion to weights[h, q][j]. Others:
    all alike."""
    query = torch.zeros(1, heads, count, count, dtype=torch.float64)
    for (head, place), row in weights.items():
        query[0, head, place, : len(row)] = torch.tensor([math.log(w) for w in row], dtype=torch.float64)
    values = torch.arange(count, dtype=torch.float64)[None, None, :, None].expand(1, 1, count, 2).clone()
    visual = [VisualSpan(0, start, length, (1, 1, length)) for start, length in spans]
    keys = torch.eye(count, dtype=torch.float64)[None, None]
    return LayerPrefill(
        layer=0,
        query=query,
        keys=keys,
        values=values,
        spans=visual,
        valid=torch.ones(1, count, dtype=torch.bool),
        scale=1.0,
    )


def alone(of: LayerPrefill, row: int) -> LayerPrefill:
    """A row by itself, its padding cut off."""
    begin = int((~of.valid[row]).sum())
    spans = [s._replace(row=0, start=s.start - begin) for s in of.spans if s.row == row]
    query, keys, values = (t[row : row + 1, :, begin:] for t in (of.query, of.keys, of.values))
    return LayerPrefill(
        layer=of.layer,
        query=query,
        keys=keys,
        values=values,
        spans=spans,
        valid=of.valid[row : row + 1, begin:],
        scale=of.scale,
        hidden=None if of.hidden is None else of.hidden[row : row + 1, begin:],
    )


def run(method: Any, layers: Sequence[LayerPrefill]) -> list[Compressed]:
    """All layers of one forward."""
    going = method.begin_pass([p.layer for p in layers])
    done = {layer: compressed for p in layers for layer, compressed in going.add(p)}
    return [done[p.layer] for p in layers]


def places(segments: Sequence[Segment], row: int = 0) -> list[list[int]]:
    """The tokens that each KV head stores of a row, in order; a token that is stored twice is there twice."""
    found: dict[int, list[int]] = {}
    for segment in segments:
        for entry in (segment.owner == row).nonzero()[:, 0].tolist():
            there = slice(None) if segment.mask is None else segment.mask[entry]
            assert isinstance(segment.values, torch.Tensor)
            for head in range(segment.values.shape[1]):
                stands_for = head if segment.head is None else int(segment.head[entry])
                found[stands_for] = sorted(
                    found.get(stands_for, []) + segment.values[entry, head, there, 0].long().tolist()
                )
    return [found[head] for head in sorted(found)]


def softmax(logits: dict[int, float]) -> dict[int, float]:
    total = sum(math.exp(x) for x in logits.values())
    return {j: math.exp(x) / total for j, x in logits.items()}


def attention(of: LayerPrefill, row: int, head: int, query: int, seen: Sequence[int]) -> dict[int, float]:
    """What one query of one query head gives to each of the tokens `seen`, by the definition."""
    kv_head = head // (of.query.shape[1] // of.keys.shape[1])
    q = of.query[row, head, query].tolist()
    return softmax(
        {j: of.scale * sum(a * b for a, b in zip(q, of.keys[row, kv_head, j].tolist(), strict=True)) for j in seen}
    )


def same_answers(ours: Compressed, theirs: Compressed, of: LayerPrefill) -> None:
    """Attention over both is that over the same tokens, to the last bit but for the order of sums."""
    query = rand(of.keys.shape[0], of.query.shape[1], 2, of.keys.shape[3], seed=9)
    found, expected = (attend(query, [*c.visual, *c.text], of.scale) for c in (ours, theirs))
    torch.testing.assert_close(found, expected)


def stored_bytes(segments: Sequence[Segment]) -> int:
    """Of keys, values and what they need, but the rows' numbers."""
    return storage_bytes(t for s in segments for t in s.entry_tensors() if t is not s.owner)
