"""Cases on which the Triton kernels must agree with the reference: interpreted on the CPU, compiled on a GPU.

The small cases have 2 KV heads of 8 channels and odd numbers of tokens. The others (`forms`) have 4 KV heads of 128
channels, as models of 7B parameters have them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from kvcapsule.kernels import reference
from kvcapsule.kernels.triton import attend as kernels
from kvcapsule.kernels.triton import plan
from kvcapsule.segments.bit_packing import WIDTHS
from kvcapsule.segments.coefficient_rows import CodedRows, Coding
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment
from support.builders import random_widths
from support.random_segments import (
    SCALE,
    Draw,
    mixed,
    of_cell_width,
    of_odd_size,
    quantised,
    query_of,
    with_hidden_tokens,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest relative error of compiled kernels against the reference in double precision. Interpreted with products of
fp16 operands the cases reach 1.6e-3; bf16 has three bits less."""
HEADS, GROUP, DIM, ENTRIES = 4, 7, 128, 2
"""Sizes of `forms`."""


class Case(NamedTuple):
    """One call of attention; without `visible`, a query sees all tokens."""

    query: torch.Tensor
    segments: list[Segment]
    visible: torch.Tensor | None = None
    scale: float = SCALE


def on_device(segment: Segment) -> Segment:
    moved: dict[str, Any] = {}
    for name, value in vars(segment).items():
        if isinstance(value, Frame):
            moved[name] = Frame(value.cos.to(DEVICE), value.sin.to(DEVICE))
        elif hasattr(value, "to"):
            moved[name] = value.to(DEVICE)
    return replace(segment, **moved)


def attended(case: Case, by_reference: int = 0) -> torch.Tensor:
    """By the kernels, which leave as many segments as said to the reference."""
    heads = max(s.keys.shape[1] for s in case.segments)
    rows = case.query.shape[1] // heads * case.query.shape[2]
    moved = [on_device(s) for s in case.segments]
    paths = [plan.route(s, rows, case.visible is not None and s is moved[-1]) for s in moved]
    assert paths.count("reference") == by_reference, paths
    visible = None if case.visible is None else case.visible.to(DEVICE)
    with torch.no_grad():
        return kernels.attend(case.query.to(DEVICE), moved, case.scale, visible).cpu()


def error(case: Case, by_reference: int = 0) -> float:
    """Relative error of the kernels against the reference in double precision."""
    with torch.no_grad():
        expected = reference.attend(case.query.double(), case.segments, case.scale, case.visible)
    assert expected.norm() > 0.1
    return float((attended(case, by_reference).double() - expected).norm() / expected.norm())


def _odd_size(tokens: int, dtype: torch.dtype) -> Case:
    """Raw rows, quantised rows beside them in one launch, maps and coded rows; 65 tokens take two splits."""
    return Case(query_of(group=1, dtype=dtype), of_odd_size(tokens, dtype))


def _quantised(key_bits: int, value_bits: int, dtype: torch.dtype) -> Case:
    draw = Draw(key_bits, dtype)
    # Beside other rows: what is the same for all scores of a segment shows in its mass alone.
    segments = [quantised(draw.raw([0], 21), key_bits, value_bits), draw.raw([0], 3)]
    return Case(query_of(batch=1, dtype=dtype), segments)


def _cells(width: int, dtype: torch.dtype) -> Case:
    return Case(query_of(batch=1, dtype=dtype), of_cell_width(width, dtype))


def _mixed(tokens: int, dim: int, dtype: torch.dtype) -> Case:
    """Rows of a width per channel and a bias in bytes, in the frames of their tiles, beside a tail."""
    draw = Draw(tokens, dtype)
    angle = draw(3, dim // 2)
    rows = mixed(draw, [2, 0, 0], tokens, Frame(angle.cos(), angle.sin()), dim)
    return Case(query_of(3, dtype=dtype, dim=dim), [rows, draw.raw([0, 1, 2, 3], 5, dim=dim)])


def _hidden_tokens(dtype: torch.dtype) -> Case:
    """Several queries, a mask, and a causal tail in a larger buffer."""
    return Case(query_of(3, 3, batch=3, dtype=dtype), *with_hidden_tokens(0.0, dtype))


def forms(dtype: torch.dtype, widths: tuple[int, ...] = WIDTHS) -> dict[str, list[Segment]]:
    """A capsule of each form that a kernel reads, beside a tail."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def linear(*shape: int) -> torch.Tensor:
        """A map that keeps the size of what it maps."""
        return rand(*shape) * shape[-1] ** -0.5

    owner = torch.arange(ENTRIES)
    tail = Segment(rand(2, HEADS, 100, DIM), rand(2, HEADS, 100, DIM), torch.arange(2))
    rows = Segment(rand(ENTRIES, HEADS, 64, DIM), rand(ENTRIES, HEADS, 64, DIM), owner, bias=rand(ENTRIES, HEADS, 64))
    made = {"bias": [rows, tail]} | {f"{bits}-bit": [quantised(rows, bits, bits), tail] for bits in widths}
    angle = torch.randn(ENTRIES, DIM // 2, generator=generator)
    frame = Frame(angle.cos(), angle.sin())
    out_map = linear(HEADS, DIM, DIM)
    made["frame"] = [Segment(rows.keys, rows.values, owner, frame=frame, out_map=out_map), tail]
    maps = {"score_map": linear(HEADS, 196, 64), "value_map": linear(HEADS, 196, 64), "value_mean": rand(HEADS, DIM)}
    made["maps"] = [Segment(rows.keys, rows.values, owner, frame=frame, **maps), tail]
    one = Segment(
        rand(1, HEADS, 1, DIM),
        rand(1, HEADS, 1, DIM),
        owner[:1],
        bias=rand(1, HEADS, 1),
        mask=torch.ones(1, 1, dtype=torch.bool),
    )
    tiny = {"score_map": rand(1, 1, 1), "value_map": rand(1, 1, 1)}
    # A size of 1 is known to the compiler, and must still be a number to it.
    made["one-token"] = [one]
    made["one-token-maps"] = [replace(one, **tiny), one]
    made["mixed"] = [mixed(Draw(2, dtype), [0, 1], 64, frame, DIM, HEADS), tail]
    codes = quantised(rows, 4, 4)
    made["4-bit-maps"] = [Segment(codes.keys, codes.values, owner, **maps), tail]
    for joint, widest in ((1, 8), (4, 4)):
        sets, channels = HEADS // joint, 64
        keys, values = (_coded((sets, groups, channels), joint, widest, generator, dtype) for groups in (8, 12))
        score_map, value_map = linear(sets, 196, 64), linear(sets, 196, 96)
        q_map, out_map = linear(HEADS, DIM, channels), linear(HEADS, channels, DIM)
        coded = Segment(
            keys, values, owner, frame=frame, score_map=score_map, value_map=value_map, q_map=q_map, out_map=out_map
        )
        made[f"coded-{joint}-heads"] = [coded, tail]
    return made


def _coded(
    shape: tuple[int, int, int], joint: int, widest: int, generator: torch.Generator, dtype: torch.dtype
) -> CodedRows:
    sets, groups, channels = shape
    widths = random_widths(shape, generator).clamp(max=widest)
    step = torch.randn(shape, generator=generator).abs().to(dtype)
    offset = torch.randn(sets, 8 * groups, channels, generator=generator).to(dtype)
    coefficients = torch.randn(ENTRIES, sets, 8 * groups, channels, generator=generator)
    return CodedRows.encode(coefficients, Coding(widths, step, offset, joint))


def query_of_form(dtype: torch.dtype) -> torch.Tensor:
    """The query that `forms` are read with."""
    return torch.randn(2, HEADS * GROUP, 1, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def _form(name: str, dtype: torch.dtype) -> Case:
    segments = forms(dtype)[name]
    return Case(query_of_form(dtype)[: len(segments[-1].owner)], segments, scale=DIM**-0.5)


SMALL: dict[str, Callable[[torch.dtype], Case]] = {
    **{f"{tokens}-tokens": partial(_odd_size, tokens) for tokens in (1, 63, 65)},
    **{f"{bits[0]}-and-{bits[1]}-bits": partial(_quantised, *bits) for bits in ((8, 3), (3, 8), (2, 4), (1, 1))},
    **{f"cells-of-{width}-bits": partial(_cells, width) for width in (0, *WIDTHS)},
    **{f"{n[0]}-rows-of-{n[1]}-channels": partial(_mixed, *n) for n in ((1, 8), (21, 8), (70, 80))},
    "hidden-tokens": _hidden_tokens,
}
"""Cases of odd sizes by name, each for any precision."""
FORMS: dict[str, Callable[[torch.dtype], Case]] = {name: partial(_form, name) for name in forms(torch.float32)}
"""`forms` by name, each for any precision."""
