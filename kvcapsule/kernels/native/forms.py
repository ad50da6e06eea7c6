"""What a kernel over mapped tiles is given, as it takes it: flat arrays, and sizes that are unsigned (see jit.py)."""

from typing import NamedTuple

import numpy as np

from .jit import U, jit, lent

Size = np.uint64
Array = np.ndarray

TILES = 8
"""Tiles that go through a kernel together, two in each vector register."""


class Form(NamedTuple):
    """Sizes; a set is the KV heads that read the same rows."""

    batch: Size
    sets: Size
    heads: Size
    """KV heads of a set."""
    each: Size
    """Query rows of a KV head."""
    dim: Size
    tokens: Size
    """N."""
    key_rows: Size
    """M."""
    value_rows: Size
    """M'."""
    key_channels: Size
    value_channels: Size


class Entries(NamedTuple):
    """What is stored of the sequences beside rows, and who it is of."""

    owner: Array
    """[E] int64."""
    tokens: Size
    """Of an entry that is read in parts of `Form.tokens`; those of a mapped one are one part."""
    mask: Array
    """[E, N] bool."""
    masked: bool
    visible: Array
    """[E, Q, N] bool."""
    hidden: bool
    """Whether `visible` says anything."""
    queries: Size
    """Q."""
    bias: Array
    """[E, H, N] as it lies in memory; one number where there is none."""
    bias_steps: tuple[Size, Size, Size]
    """How far entries, heads and tokens are apart."""


class Turn(NamedTuple):
    """What queries are turned with: the frames, and the map behind them."""

    cos: Array
    """[E, half]."""
    sin: Array
    half: Size
    """0 where there are no frames."""
    neighbours: bool
    q_map: Array
    """[H, D, C], or whatever where rows are raw."""


class Map(NamedTuple):
    """A map [S, N, M] as it lies in memory, and how far sets (0 where they share one), tokens and rows are apart."""

    numbers: Array
    set: Size
    token: Size
    row: Size


class Coded(NamedTuple):
    """Coded rows with their runs (kvcapsule.segments.coefficient_rows.Runs)."""

    packed: Array
    size: Size
    """Bytes of an entry."""
    bounds: Array
    line: Array
    cell: Array
    stretches: Array
    width: Array
    step: Array
    offset: Array


class Raw(NamedTuple):
    """Raw rows as they lie in memory, and how far entries, heads and rows are apart."""

    rows: Array
    entry: Size
    head: Size
    row: Size


class After(NamedTuple):
    """What follows a set's sums of values: nothing where these are arrays of one number."""

    mean: Array
    """[H, D], for raw rows."""
    map: Array
    """[H, C', D] as it lies in memory, for coded rows."""
    steps: tuple[Size, Size, Size]


class Sums(NamedTuple):
    """What has been found of all segments before, of each batch row and query head."""

    out: Array
    """[B, H, G Q, D]."""
    top: Array
    """[B, H, G Q]: the greatest score; -inf before."""
    mass: Array
    """[B, H, G Q]: of the weights; 0 before."""


@lent
def copied(x, x0, lines, line, numbers, step, out, width):
    """out[i * width + k] = x[x0 + i * line + k * step] for k < numbers, i < lines: read in the order in which it lies in memory."""
    if line < step:
        for k in range(numbers):
            for i in range(lines):
                out[i * width + k] = x[x0 + i * line + k * step]
    elif step == U(1):
        for i in range(lines):
            for k in range(numbers):
                out[i * width + k] = x[x0 + i * line + k]
    else:
        for i in range(lines):
            for k in range(numbers):
                out[i * width + k] = x[x0 + i * line + k * step]


@jit
def buffer(length):
    """fp32 numbers that begin with a line of the cache: a vector that lies across two is read in twice the time."""
    numbers = np.empty(length + U(16), np.float32)
    first = (U(64) - U(numbers.ctypes.data) % U(64)) % U(64) // U(4)
    return numbers[first : first + length]
