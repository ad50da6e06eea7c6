"""AKVQ-VL worked out by hand, with loops: what a layer of a prompt stores in how many bits."""

import math

import torch

from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.policy import AkvqVl
from kvcapsule.segments.group_quantized_rows import GroupedRows
from kvcapsule.segments.segment import Segment
from kvcapsule.vlm.spans import VisualSpan
from support.builders import rand

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
    return LayerPrefill(
        layer=layer,
        query=query,
        keys=keys,
        values=values,
        spans=visual,
        valid=valid,
        scale=dim**-0.5,
        hidden=rand(rows, count, 5, seed=8),
    )


def mixed() -> LayerPrefill:
    """Left padding; one image, two with text between, none. The first row's text and the second's first tokens draw
    attention."""
    of = tokens([(0, 12, 30), (1, 6, 22), (1, 33, 9)], [3, 0, 25], 60)
    of.keys[0, :, 42:50] = of.query[0, ::GROUP, 50:58] * 2
    assert of.hidden is not None
    of.hidden[1, 2], of.keys[1, :, 2] = -40.0, of.query[1, ::GROUP, 59] * 9
    return of


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


# Layer types, tokens and bits


def places(of: LayerPrefill, row: int, visual: bool) -> list[int]:
    marked = of.visual()[row]
    return [p for p in range(of.keys.shape[2]) if of.valid[row, p] and bool(marked[p]) == visual]


def pivots_of(of: LayerPrefill, row: int, count: int) -> list[int]:
    assert of.hidden is not None
    peaks = {p: float(of.hidden[row, p].abs().max()) for p in range(of.keys.shape[2]) if of.valid[row, p]}
    return sorted(peaks, key=lambda p: -peaks[p])[:count]


# Batches


POLICY = AkvqVl(recent=12, pivots=6)
