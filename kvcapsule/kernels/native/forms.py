"""What a kernel over mapped tiles is given, as it takes it: flat arrays, and sizes that are unsigned (see jit.py)."""

from typing import NamedTuple

import numpy as np

from .jit import U, jit

Size = np.uint64
Array = np.ndarray

TILES = 8
"""Tiles that go through a kernel together, two in each vector register."""


class Form(NamedTuple):
    """Sizes; a set is the KV heads that read the same rows."""

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
    """The entries in the order in which they are read: those of a batch row follow each other."""

    order: Array
    """[E'] uint64: those that have a token."""
    owner: Array
    """[E] uint64."""
    mask: Array
    """[E, N] bool; whatever, where all tokens are there."""
    masked: bool


class Turn(NamedTuple):
    """Queries, and the frames that they are turned into."""

    query: Array
    """[B, S, R, D], scaled."""
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
    """Coded rows with their runs (kvcapsule.codec.cells.Runs)."""

    packed: Array
    size: Size
    """Bytes of an entry."""
    bounds: Array
    byte: Array
    group: Array
    channel: Array
    cell: Array
    width: Array
    step: Array
    offset: Array


class Raw(NamedTuple):
    """Raw rows as they lie in memory, and how far entries, heads and rows are apart."""

    rows: Array
    entry: Size
    head: Size
    row: Size


class Sums(NamedTuple):
    """What a kernel finds, of each batch row, set and query row."""

    out: Array
    """[B, S, R, C']: values without what they have in common, weighted; 0 before."""
    weights: Array
    """[B, S, R, M']: of each stored row; for coded rows alone."""
    top: Array
    """[B, S, R]: the greatest score; -inf before."""
    mass: Array
    """[B, S, R]: of the weights; 0 before."""


@jit
def buffer(length):
    """fp32 numbers that begin with a line of the cache: a vector that lies across two is read in twice the time."""
    numbers = np.empty(length + U(16), np.float32)
    first = (U(64) - U(numbers.ctypes.data) % U(64)) % U(64) // U(4)
    return numbers[first : first + length]
