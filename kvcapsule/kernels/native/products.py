"""Products of the queries' rows with the maps of a set, for rows in blocks of a literal size: what is left out of a block is padding.

`ROWS` (of a block), `PART` and `VECTORS` (rows and vectors of sums that are in registers at once) are put in by `tiles.kernel`.
"""

from .blocks import pairs_by_map, rows_by_map
from .jit import U, lent

ROWS, PART, VECTORS = 8, 4, 2


def score(z, z0, tile, step, length, map_, room, out, o0):
    """A pair of tiles: out [R, 2, room] = z [R, ...] map [length, room]; a row's products are `step` apart, those of the tiles `tile`."""
    row = U(2) * length
    for a in range(U(0), U(ROWS), U(PART)):
        x, o = z0 + a * row, o0 + a * U(2) * room
        n = U(0)
        while n + U(16 * VECTORS) <= room:
            rows_by_map(z, x, row, tile, step, map_, n, room, length, out, o + n, U(2) * room, room, PART, 2, VECTORS, 0)
            n += U(16 * VECTORS)
        while n < room:
            rows_by_map(z, x, row, tile, step, map_, n, room, length, out, o + n, U(2) * room, room, PART, 2, 1, 0)
            n += U(16)


def weigh(p, p0, room, length, map_, width, out, o0):
    """A pair of tiles: out [R, 2, width] = p [R, 2, room] map [length, width]."""
    row = U(2) * room
    for a in range(U(0), U(ROWS), U(PART)):
        x, o = p0 + a * row, o0 + a * U(2) * width
        n = U(0)
        while n + U(16 * VECTORS) <= width:
            rows_by_map(p, x, row, room, U(1), map_, n, width, length, out, o + n, U(2) * width, width, PART, 2, VECTORS, 0)
            n += U(16 * VECTORS)
        while n < width:
            rows_by_map(p, x, row, room, U(1), map_, n, width, length, out, o + n, U(2) * width, width, PART, 2, 1, 0)
            n += U(16)


def weigh_pairs(p, p0, room, length, map_, width, out, o0):
    """The same with the tiles side by side and groups of eight outside: out [width / 8, R, 8, 2]."""
    row, group = U(2) * room, U(16 * ROWS)
    for a in range(U(0), U(ROWS), U(PART)):
        x, o = p0 + a * row, o0 + a * U(16)
        n = U(0)
        while n + U(16 * VECTORS) <= width:
            pairs_by_map(p, x, row, room, U(1), map_, n, width, length, out, o + n // U(8) * group, U(16), group, PART, VECTORS)
            n += U(16 * VECTORS)
        while n < width:
            pairs_by_map(p, x, row, room, U(1), map_, n, width, length, out, o + n // U(8) * group, U(16), group, PART, 1)
            n += U(16)


@lent
def turn_tiles(x, x0, length, pairs, map_, m0, apart, width, out, o0, beyond):
    """`pairs` pairs of tiles, x [2 pairs, length] with a row's map [length, width]: out [pairs, width, 2], pairs `beyond` apart."""
    p = U(0)
    while p < pairs:
        first, o = x0 + p * U(2) * length, o0 + p * beyond
        n = U(0)
        if p + U(4) <= pairs:
            while n + U(48) <= width:
                pairs_by_map(
                    x, first, U(2) * length, length, U(1), map_, m0 + n, apart, length, out, o + n * U(2), beyond, U(16), 4, 3
                )  # fmt: skip
                n += U(48)
            if n + U(32) <= width:
                pairs_by_map(
                    x, first, U(2) * length, length, U(1), map_, m0 + n, apart, length, out, o + n * U(2), beyond, U(16), 4, 2
                )  # fmt: skip
                n += U(32)
            while n < width:
                pairs_by_map(
                    x, first, U(2) * length, length, U(1), map_, m0 + n, apart, length, out, o + n * U(2), beyond, U(16), 4, 1
                )  # fmt: skip
                n += U(16)
            p += U(4)
        else:
            while n < width:
                pairs_by_map(
                    x, first, U(2) * length, length, U(1), map_, m0 + n, apart, length, out, o + n * U(2), beyond, U(16), 1, 1
                )  # fmt: skip
                n += U(16)
            p += U(1)
