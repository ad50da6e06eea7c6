"""Buffers and tables of a kernel over coded tiles (coded_tiles.py). `ROWS` is put in by `tiles.kernel`."""

from typing import NamedTuple

import numpy as np

from .coded import RUNS
from .forms import TILES, Array, Size, buffer
from .jit import U, jit
from .turned import turns
from .wide import fetch

ROWS = 8


class Room(NamedTuple):
    """Buffers, and tables of a coding that hold what may be learned."""

    lanes: Array
    maps: Array
    """[blocks, turns, beyond]."""
    beyond: Size
    features: Array
    """[TILES, turns]."""
    queries: Array
    """[P, blocks, C, ROWS, 2]: mapped, and filled up to vectors."""
    shift: Array
    """[n, 16]: the offset of a key cell's rows less the middle of its codes, twice each."""
    key_step: Array
    value_step: Array
    key_bytes: Array
    """[S, 6, 2]: where the bytes of a set's cells of a width begin and end in an entry."""
    value_bytes: Array
    key_base: Array
    value_base: Array
    weights: Array
    """[blocks, M' / 8, ROWS, 8, 2]: of a batch row's tiles together."""
    step: Size
    """From the product with a key row to that with the next, and from those of a tile to those of its neighbour."""
    apart: Size
    offset: Array
    """[M', C']: of the values, filled up to vectors."""
    maps_out: Array
    """[heads of a set, C', D]: filled up to vectors."""
    found: Array
    """[rows, C'] and then [rows, D]: filled up to vectors."""
    out: Array


@jit
def filled(length):
    return (length + U(15)) // U(16) * U(16)


@jit
def stretches(rows, sets, cells):
    """Cells of one set and width lie one behind the other."""
    found = np.empty(sets * U(2 * len(RUNS)), np.uint64)
    for i in range(sets * U(len(RUNS))):
        found[U(2) * i], found[U(2) * i + U(1)] = rows.size, U(0)
    for i in range(U(len(rows.cell))):
        cell = U(rows.cell[i])
        first, bits = U(rows.byte[i]), U(rows.width[cell])
        if bits:
            at = (cell // cells * U(len(RUNS)) + min(bits, U(5))) * U(2)
            found[at], found[at + U(1)] = min(found[at], first), max(found[at + U(1)], first + bits)
    return found


@jit
def expect(rows, bytes_, set_, entry):
    """Fetches the cells of a set of an entry."""
    for i in range(set_ * U(len(RUNS)), (set_ + U(1)) * U(len(RUNS))):
        at, end = entry * rows.size + bytes_[U(2) * i], entry * rows.size + bytes_[U(2) * i + U(1)]
        while at < end + U(63):
            fetch(rows.packed, min(at, end - U(1)))
            at += U(64)


def make(form, keys, values, turn, blocks, length, width):
    features_, columns = turns(turn.half, form.dim), (form.key_channels * U(ROWS) + U(15)) // U(16) * U(16)
    shift, key_step = buffer(U(len(keys.cell)) * U(16)), buffer(U(len(keys.cell)))
    value_step = buffer(U(len(values.cell)))
    groups, channels = form.key_rows // U(8), form.key_channels
    for i in range(U(len(keys.cell))):
        cell, bits = U(keys.cell[i]), keys.width[keys.cell[i]]
        key_step[i] = keys.step[cell]
        middle = key_step[i] * np.float32((1 << bits) - 1) * np.float32(0.5)
        at = cell // channels * U(8) * channels + cell % channels
        for m in range(U(8)):
            shift[i * U(16) + U(2) * m] = shift[i * U(16) + U(2) * m + U(1)] = keys.offset[at + m * channels] - middle
    for i in range(U(len(values.cell))):
        value_step[i] = values.step[values.cell[i]]
    return Room(
        buffer(form.heads * form.dim * U(16)),
        buffer(blocks * features_ * (columns + U(16))),
        columns + U(16),
        buffer(U(TILES) * features_),
        buffer(U(TILES) * blocks * columns),
        shift,
        key_step,
        value_step,
        stretches(keys, form.sets, groups * channels),
        stretches(values, form.sets, form.value_rows // U(8) * form.value_channels),
        np.empty(TILES, np.uint64),
        np.empty(TILES, np.uint64),
        buffer(blocks * width * U(2 * ROWS)),
        U(2),
        U(1),
        buffer(form.value_rows * filled(form.value_channels)),
        buffer(form.heads * form.value_channels * filled(form.dim)),
        buffer(blocks * U(ROWS) * (filled(form.value_channels) + width)),
        buffer(blocks * U(ROWS) * filled(form.dim)),
    )  # fmt: skip


def open_set(form, room, values, after, set_, width):
    """What follows the sums of a set."""
    C, columns, dim = form.value_channels, filled(form.value_channels), filled(form.dim)
    room.offset[:], room.maps_out[:] = np.float32(0), np.float32(0)
    for m in range(form.value_rows):
        for c in range(C):
            room.offset[m * columns + c] = values.offset[(set_ * form.value_rows + m) * C + c]
    for head in range(form.heads):
        first = (set_ * form.heads + head) * after.steps[0]
        for c in range(C):
            for d in range(form.dim):
                room.maps_out[(head * C + c) * dim + d] = after.map[first + c * after.steps[1] + d * after.steps[2]]
