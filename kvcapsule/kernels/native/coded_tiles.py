"""The part of a kernel over mapped tiles that reads coded cells. `ROWS` is put in by `tiles.kernel`; see there for the buffers."""

import numpy as np

from ...codec.cells import TOGETHER
from .blocks import rows_by_map
from .coded import RUNS, key_cells, value_cells
from .coded_room import expect, filled, make, open_set
from .forms import TILES
from .jit import U
from .products import turn_tiles
from .softmax import fall
from .turned import features, in_lanes, row_map, turns
from .wide import each, load, plus, store, total

__all__ = ["add", "begin", "end", "lower", "make", "meet", "open_set"]

ROWS = 8
_BOUNDS = U(len(RUNS) + 1)


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
    for tile in range(first + tiles, min(first + tiles + U(TILES), stop)):
        expect(keys, room.key_bytes, set_, order[tile])
        expect(values, room.value_bytes, set_, order[tile])
    for tile in range(U(2) * pairs):
        entry = order[first + min(tile, tiles - U(1))]
        room.key_base[tile], room.value_base[tile] = entry * keys.size, entry * values.size
        features(turn, entry, length, room.features, tile * length)
    columns = room.beyond - U(16)
    many = columns * U(2)
    groups, row = form.key_rows // U(8), form.key_rows * U(2)
    beyond = blocks * U(ROWS) * row
    for block in range(blocks):
        turn_tiles(
            room.features, U(0), length, pairs, room.maps, block * length * room.beyond, room.beyond, columns,
            room.queries, block * many, blocks * many,
        )  # fmt: skip
        for group in range(groups):
            run, o = (set_ * groups + group) * _BOUNDS, block * U(ROWS) * row + group * U(16)
            p = U(0)
            while p + U(2) <= pairs:
                key_cells(
                    keys.packed, room.key_base, p * U(2), keys.bounds, run, keys.byte, keys.channel, room.key_step, room.shift,
                    room.queries, (p * blocks + block) * many, blocks * many, z, o + p * beyond, beyond, row, ROWS, 2,
                )  # fmt: skip
                p += U(2)
            if p < pairs:
                key_cells(
                    keys.packed, room.key_base, p * U(2), keys.bounds, run, keys.byte, keys.channel, room.key_step, room.shift,
                    room.queries, (p * blocks + block) * many, blocks * many, z, o + p * beyond, beyond, row, ROWS, 1,
                )  # fmt: skip


def add(form, room, values, entries, order, first, tiles, set_, blocks, length, width, cap, weights, sums):
    """sums [blocks, C', ROWS, 16] += the value rows of `tiles` tiles with weights [P, blocks, M' / 8, ROWS, 8, 2]."""
    pairs, size = (tiles + U(1)) // U(2), width * U(2 * ROWS)
    at, one = U(0), each(np.float32(1))
    while at < blocks * size:
        found = load(room.weights, at)
        for pair in range(pairs):
            found = plus(found, load(weights, pair * blocks * size + at), one)
        store(room.weights, at, found)
        at += U(16)
    parts = (form.value_channels + U(TOGETHER) - U(1)) // U(TOGETHER)
    for block in range(blocks):
        for part in range(parts):
            run, o = (set_ * parts + part) * _BOUNDS, block * form.value_channels * U(16 * ROWS)
            p = U(0)
            while p + U(4) <= pairs:
                value_cells(
                    values.packed, room.value_base, p * U(2), values.bounds, run, values.byte, values.group, values.channel,
                    room.value_step, weights, (p * blocks + block) * size, blocks * size, sums, o, ROWS, 4,
                )  # fmt: skip
                p += U(4)
            while p < pairs:
                value_cells(
                    values.packed, room.value_base, p * U(2), values.bounds, run, values.byte, values.group, values.channel,
                    room.value_step, weights, (p * blocks + block) * size, blocks * size, sums, o, ROWS, 1,
                )  # fmt: skip
                p += U(1)


def lower(form, room, sums, factors, rows, width):
    """What has been added up, times a factor for each row."""
    for row in range(rows):
        if factors[row] != np.float32(1):
            block, r = row // U(ROWS), row % U(ROWS) * U(16)
            fall(sums, factors[row], block * form.value_channels * U(16 * ROWS) + r, form.value_channels, U(16 * ROWS))
            fall(room.weights, factors[row], block * width * U(2 * ROWS) + r, width // U(8), U(16 * ROWS))


def end(form, room, after, set_, sums, mass, width):
    """The sums with the offset, mapped: [rows, D]."""
    C, columns, dim = form.value_channels, filled(form.value_channels), filled(form.dim)
    apart = columns + width
    for row in range(form.heads * form.each):
        block, r = row // U(ROWS), row % U(ROWS) * U(16)
        x, o = row * apart, row * dim
        for c in range(C):
            room.found[x + c] = total(load(sums, (block * C + c) * U(16 * ROWS) + r))
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
            rows_by_map(room.found, x, U(0), U(0), U(1), room.maps_out, head + d, dim, C, room.out, o + d, U(0), U(0), 1, 1, 1, 0)
    return room.out
