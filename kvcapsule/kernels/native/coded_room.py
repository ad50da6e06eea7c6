"""Buffers and tables of a kernel over coded tiles (coded_tiles.py). `ROWS` is put in by `tiles.kernel`."""

from typing import NamedTuple

import numpy as np

from ...segments.bit_packing import WIDTHS
from .forms import TILES, Array, Size, buffer, copied
from .jit import U, jit, lent
from .laid import Rest, at_the_end
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
    """[n, 16]: the offset of a key cell's rows, twice each."""
    key_step: Array
    """[n]."""
    key_words: Array
    """[words of a set, TILES]: see laid.py."""
    value_step: Array
    value_words: Array
    rest: Rest
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


@lent
def filled(length):
    return (length + U(15)) // U(16) * U(16)


@jit
def in_order(rows):
    """Steps in the order of the runs: 0 where there is no cell, or one of no bits."""
    found = buffer(U(len(rows.cell)))
    for i in range(U(len(rows.cell))):
        cell = U(rows.cell[i])
        found[i] = rows.step[cell] if cell < U(len(rows.width)) and rows.width[cell] else np.float32(0)
    return found


@jit
def words(rows):
    """For the words of any set's cells, of eight tiles."""
    most, kinds = U(0), U(len(WIDTHS))
    for i in range(U(len(rows.stretches)) // (U(3) * kinds)):
        # Those of one bit come last.
        at = (i * kinds + kinds - U(1)) * U(3)
        most = max(most, U(rows.stretches[at + U(2)]) + (U(rows.stretches[at + U(1)]) - U(rows.stretches[at]) + U(15)) // U(16) * U(4))
    # The buffer is of another type, and both are 32 bits wide.
    return buffer(most * U(TILES)).view(np.uint32)


@lent
def expect(rows, set_, entry):
    """Fetches the cells of a set of an entry."""
    for i in range(set_ * U(len(WIDTHS)), (set_ + U(1)) * U(len(WIDTHS))):
        at, end = entry * rows.size + rows.stretches[U(3) * i], entry * rows.size + rows.stretches[U(3) * i + U(1)]
        while at < end + U(63):
            fetch(rows.packed, min(at, end - U(1)))
            at += U(64)


@lent
def soon(rows, order, first, stop, set_, part, parts):
    """Fetches one of some parts of the cells of the next tiles."""
    for tile in range(part * U(TILES) // parts, (part + U(1)) * U(TILES) // parts):
        if first + tile < stop:
            expect(rows, set_, order[first + tile])


def make(form, keys, values, turn, blocks, length, width):
    features_, columns = turns(turn.half, form.dim), (form.key_channels * U(ROWS) + U(15)) // U(16) * U(16)
    shift, channels = buffer(U(len(keys.cell)) * U(16)), form.key_channels
    for i in range(U(len(keys.cell))):
        cell = U(keys.cell[i])
        at = cell // channels * U(8) * channels + cell % channels
        for m in range(U(8)):
            moved = keys.offset[at + m * channels] if cell < U(len(keys.width)) else np.float32(0)
            shift[i * U(16) + U(2) * m] = shift[i * U(16) + U(2) * m + U(1)] = moved
    return Room(
        buffer(form.heads * form.dim * U(16)),
        buffer(blocks * features_ * (columns + U(16))),
        columns + U(16),
        buffer(U(TILES) * features_),
        buffer(U(TILES) * blocks * columns),
        shift,
        in_order(keys),
        words(keys),
        in_order(values),
        words(values),
        at_the_end(),
        np.empty(TILES, np.uint64),
        np.empty(TILES, np.uint64),
        buffer(blocks * width * U(2 * ROWS)),
        U(2),
        U(1),
        buffer(form.value_rows * filled(form.value_channels)),
        buffer(form.heads * form.value_channels * filled(form.dim)),
        buffer(blocks * U(ROWS) * (filled(form.value_channels) + width)),
    )  # fmt: skip


def open_set(form, room, values, after, set_, width):
    """What follows the sums of a set."""
    C, columns, dim = form.value_channels, filled(form.value_channels), filled(form.dim)
    room.offset[:], room.maps_out[:] = np.float32(0), np.float32(0)
    copied(values.offset, set_ * form.value_rows * C, form.value_rows, C, C, U(1), room.offset, columns)
    for head in range(form.heads):
        first = (set_ * form.heads + head) * after.steps[0]
        copied(after.map, first, C, after.steps[1], form.dim, after.steps[2], room.maps_out[head * C * dim :], dim)
