"""The part of a kernel over mapped tiles that reads coded cells. `ROWS` is put in by `tiles.kernel`; see there for the buffers."""

from typing import NamedTuple

import numpy as np

from ...codec.cells import TOGETHER
from .blocks import rows_by_map
from .coded import RUNS, key_cells, value_cells
from .forms import TILES, Array, Size, buffer
from .jit import U, jit
from .products import turn_tiles
from .softmax import fall
from .turned import features, in_lanes, row_map, turns
from .wide import each, fetch, load, plus, store, total

ROWS = 8
_BOUNDS = U(len(RUNS) + 1)


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
        for p in range(pairs):
            found = plus(found, load(weights, p * blocks * size + at), one)
        store(room.weights, at, found)
        at += U(16)
    parts = (form.value_channels + U(TOGETHER) - U(1)) // U(TOGETHER)
    for block in range(blocks):
        for part in range(parts):
            run, o = (set_ * parts + part) * _BOUNDS, block * form.value_channels * U(16 * ROWS)
            p = U(0)
            while p + U(4) <= pairs:
                value_cells(
                    values.packed, room.value_base, p * U(2), values.bounds, run, values.byte, values.group, values.channel, room.value_step,
                    weights, (p * blocks + block) * size, blocks * size, sums, o, ROWS, 4,
                )  # fmt: skip
                p += U(4)
            while p < pairs:
                value_cells(
                    values.packed, room.value_base, p * U(2), values.bounds, run, values.byte, values.group, values.channel, room.value_step,
                    weights, (p * blocks + block) * size, blocks * size, sums, o, ROWS, 1,
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
                room.found, x + columns, U(0), U(0), U(1), room.offset, c, columns, form.value_rows, room.found, x + c, U(0), U(0), 1, 1, 1, 1
            )  # fmt: skip
        head = row // form.each * C * dim
        for d in range(U(0), dim, U(16)):
            rows_by_map(room.found, x, U(0), U(0), U(1), room.maps_out, head + d, dim, C, room.out, o + d, U(0), U(0), 1, 1, 1, 0)
    return room.out
