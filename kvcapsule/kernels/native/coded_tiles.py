"""The part of a kernel over mapped tiles that reads coded cells. `ROWS` is put in by `tiles.kernel`; see there for the buffers."""

import numpy as np

from .blocks import rows_by_map
from .coded import key_cells, value_cells
from .coded_room import filled, make, open_set, soon
from .forms import TILES
from .jit import U
from .laid import lay
from .products import turn_tiles
from .softmax import fall
from .turned import features, in_lanes, row_map, turns
from .wide import each, load, plus, store

__all__ = ["add", "begin", "end", "lower", "make", "meet", "open_set"]

ROWS = 8
_BOUNDS = U(3)
"""Of the runs of two groups or channels."""


def begin(form, room, query, scale, turn, set_, row, blocks):
    """A batch row and a set."""
    first, mine = (row * form.sets + set_) * form.heads * form.each * form.dim, turns(turn.half, form.dim) * room.beyond
    for block in range(blocks):
        in_lanes(query, scale, first, form.dim, form.heads, form.each, block * U(ROWS), U(ROWS), room.lanes)
        m0 = set_ * form.heads * form.dim * form.key_channels
        row_map(form, turn, m0, room.lanes, U(ROWS), room.maps, block * mine, room.beyond)
    room.weights[:] = np.float32(0)


def meet(form, room, turn, keys, values, entries, order, first, stop, tiles, set_, blocks, z):
    """z [P, blocks, ROWS, M, 2]: products of the queries with the key rows of `tiles` tiles."""
    length, pairs = turns(turn.half, form.dim), (tiles + U(1)) // U(2)
    for tile in range(U(2) * pairs):
        entry = order[first + min(tile, tiles - U(1))]
        room.key_base[tile], room.value_base[tile] = entry * keys.size, entry * values.size
        features(turn, entry, length, room.features, tile * length)
    # Words are laid out for all tiles; what stands in the place of one that is not there is not read.
    for tile in range(U(2) * pairs, U(TILES)):
        room.key_base[tile], room.value_base[tile] = room.key_base[U(0)], room.value_base[U(0)]
    lay(keys.packed, room.key_base, keys.stretches, set_, room.key_words, room.rest)
    columns = room.beyond - U(16)
    many = columns * U(2)
    groups, row = form.key_rows // U(8), form.key_rows * U(2)
    both = (groups + U(1)) // U(2)
    beyond = blocks * U(ROWS) * row
    for block in range(blocks):
        turn_tiles(
            room.features, U(0), length, pairs, room.maps, block * length * room.beyond, room.beyond, columns,
            room.queries, block * many, blocks * many,
        )  # fmt: skip
        for pair in range(both):
            # The next tiles' cells, a few at a time: what is asked for at once has to be waited for.
            if not block:
                soon(keys, order, first + tiles, stop, set_, pair, both)
            run, o = (set_ * both + pair) * _BOUNDS, block * U(ROWS) * row + pair * U(32)
            next_ = U(16) if pair * U(2) + U(1) < groups else U(0)
            for p in range(pairs):
                key_cells(
                    keys.packed, room.key_base, p * U(2), keys.bounds, run, keys.line, room.key_step, room.key_words,
                    room.shift, room.queries, (p * blocks + block) * many, z, o + p * beyond, next_, row, ROWS,
                )  # fmt: skip


def add(form, room, values, entries, order, first, stop, tiles, set_, blocks, length, width, cap, weights, sums):
    """sums [blocks, C', 8] += the value rows of `tiles` tiles with weights [P, blocks, M' / 8, ROWS, 8, 2]."""
    pairs, size = (tiles + U(1)) // U(2), width * U(2 * ROWS)
    at, one = U(0), each(np.float32(1))
    while at < blocks * size:
        found = load(room.weights, at)
        for pair in range(pairs):
            found = plus(found, load(weights, pair * blocks * size + at), one)
        store(room.weights, at, found)
        at += U(16)
    both = (form.value_channels + U(1)) // U(2)
    lay(values.packed, room.value_base, values.stretches, set_, room.value_words, room.rest)
    for block in range(blocks):
        for pair in range(both):
            if not block:
                soon(values, order, first + tiles, stop, set_, pair, both)
            run, o = (set_ * both + pair) * _BOUNDS, (block * form.value_channels + pair * U(2)) * U(8)
            next_ = U(8) if pair * U(2) + U(1) < form.value_channels else U(0)
            value_cells(
                values.packed, room.value_base, U(0), values.bounds, run, values.line, room.value_step, room.value_words,
                weights, block * size, blocks * size, pairs, sums, o, next_, ROWS,
            )  # fmt: skip


def lower(form, room, sums, factors, rows, width):
    """What has been added up, times a factor for each row."""
    for row in range(rows):
        if factors[row] != np.float32(1):
            block, r = row // U(ROWS), row % U(ROWS) * U(16)
            for channel in range(form.value_channels):
                sums[(block * form.value_channels + channel) * U(8) + row % U(ROWS)] *= factors[row]
            fall(room.weights, factors[row], block * width * U(2 * ROWS) + r, width // U(8), U(16 * ROWS))


def end(form, room, after, set_, sums, mass, width, out):
    """The sums with the offset, mapped: [rows, D]."""
    C, columns, dim = form.value_channels, filled(form.value_channels), filled(form.dim)
    apart = columns + width
    for row in range(form.heads * form.each):
        block, r = row // U(ROWS), row % U(ROWS) * U(16)
        x, o = row * apart, row * dim
        for c in range(C):
            room.found[x + c] = sums[(block * C + c) * U(8) + row % U(ROWS)]
        room.found[x + C : x + columns] = np.float32(0)
        for m in range(form.value_rows):
            at = (block * width // U(8) + m // U(8)) * U(16 * ROWS) + r + m % U(8) * U(2)
            room.found[x + columns + m] = room.weights[at] + room.weights[at + U(1)]
        for c in range(U(0), columns, U(16)):
            rows_by_map(
                room.found, x + columns, U(0), U(0), U(1), room.offset, c, columns, form.value_rows,
                room.found, x + c, U(0), U(0), 1, 1, 1, 1,
            )  # fmt: skip
        head = row // form.each * C * dim
        for d in range(U(0), dim, U(16)):
            rows_by_map(room.found, x, U(0), U(0), U(1), room.maps_out, head + d, dim, C, out, o + d, U(0), U(0), 1, 1, 1, 0)
    return out
