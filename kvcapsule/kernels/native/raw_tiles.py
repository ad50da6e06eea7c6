"""The part of a kernel over tiles that reads raw rows; `ROWS`, `PART` and `MAPPED` are put in by `tiles.kernel`. See coded_tiles.py."""

from typing import NamedTuple

import numpy as np

from .blocks import rows_by_map, rows_by_rows
from .entries import part
from .forms import TILES, Array, Size, buffer
from .jit import U
from .softmax import fall
from .turned import turned_back

ROWS, PART, MAPPED = 8, 4, True


class Room(NamedTuple):
    """Buffers."""

    query: Array
    """[rows, D]: of a batch row and a set, scaled."""
    queries: Array
    """[TILES, rows, D]: turned."""
    values: Array
    """[M', D]: a tile's, with zeros where no query sees a token."""
    step: Size
    """From the product with a key row to that with the next, and from those of a tile to those of its neighbour."""
    apart: Size


def make(form, keys, values, turn, blocks, length, width):
    rows = blocks * U(ROWS)
    return Room(
        buffer(rows * form.dim), buffer(U(TILES) * rows * form.dim), buffer(form.value_rows * form.dim),
        U(1), form.key_rows if MAPPED else length,
    )  # fmt: skip


def open_set(form, room, values, after, set_, width):
    pass


def begin(form, room, query, scale, turn, set_, row, blocks):
    mine = form.each * form.dim
    first = (row * form.sets + set_) * mine
    for i in range(blocks * U(ROWS) * form.dim):
        room.query[i] = query[first + i] * scale if i < mine else np.float32(0)


def meet(form, room, turn, keys, values, entries, order, first, stop, tiles, set_, blocks, z):
    """z [P, blocks, ROWS, 2, apart]: products of the queries with the key rows of `tiles` tiles."""
    rows, dim = blocks * U(ROWS), form.dim
    for tile in range(tiles):
        entry, at, length = part(entries, order, first + tile, form.key_rows, MAPPED)
        x, x0 = room.query, U(0)
        if turn.half:
            x, x0 = room.queries, tile * rows * dim
            turned_back(turn, entry, room.query, rows, dim, x, x0)
        y = entry * keys.entry + set_ * keys.head + at * keys.row
        for row in range(U(0), rows, U(PART)):
            o = ((tile // U(2) * rows + row) * U(2) + tile % U(2)) * room.apart
            n = U(0)
            while n + U(4) <= length:
                rows_by_rows(x, x0 + row * dim, dim, keys.rows, y + n * keys.row, keys.row, dim, z, o + n, U(2) * room.apart, PART, 4)
                n += U(4)
            while n < length:
                rows_by_rows(x, x0 + row * dim, dim, keys.rows, y + n * keys.row, keys.row, dim, z, o + n, U(2) * room.apart, PART, 1)
                n += U(1)


def add(form, room, values, entries, order, first, stop, tiles, set_, blocks, length, width, cap, weights, sums):
    """sums [blocks, ROWS, D] += the value rows of `tiles` tiles with weights [P, blocks, ROWS, 2, width]."""
    rows, dim = blocks * U(ROWS), form.dim
    for tile in range(tiles):
        entry, at, many = part(entries, order, first + tile, form.value_rows, MAPPED)
        x, x0, apart = values.rows, entry * values.entry + set_ * values.head + at * values.row, values.row
        if not MAPPED:
            seen = True
            for n in range(many):
                seen = seen and cap[tile * length + n] > 0
            if not seen:
                for n in range(many):
                    there = cap[tile * length + n] > 0
                    for i in range(dim):
                        room.values[n * dim + i] = x[x0 + n * apart + i] if there else np.float32(0)
                x, x0, apart = room.values, U(0), dim
        for row in range(U(0), rows, U(PART)):
            w0 = ((tile // U(2) * rows + row) * U(2) + tile % U(2)) * width
            d = U(0)
            while d + U(32) <= dim:
                rows_by_map(
                    weights, w0, U(2) * width, U(0), U(1), x, x0 + d, apart, many, sums, row * dim + d, dim, U(0), PART, 1, 2, 1
                )  # fmt: skip
                d += U(32)
            if d < dim:
                rows_by_map(
                    weights, w0, U(2) * width, U(0), U(1), x, x0 + d, apart, many, sums, row * dim + d, dim, U(0), PART, 1, 1, 1
                )  # fmt: skip


def lower(form, room, sums, factors, rows, width):
    for row in range(rows):
        if factors[row] != np.float32(1):
            fall(sums, factors[row], row * form.dim, form.dim // U(16), U(16))


def end(form, room, after, set_, sums, mass, width, out):
    """The sums [rows, D] as they are, but for what all values have in common."""
    if len(after.mean) > 1:
        for row in range(form.each):
            for d in range(form.dim):
                sums[row * form.dim + d] += mass[row] * after.mean[set_ * form.dim + d]
    return sums
