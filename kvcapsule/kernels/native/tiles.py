"""Attention over mapped tiles in one pass: scores, softmax and values of some tiles while all of it is in a core's nearest caches.

For each set of KV heads and each batch row, its tiles go through eight at a time, two side by side in each vector: products of the queries
with the stored keys, `score_map`, softmax, `value_map`, sums of the stored values. Where a row's greatest score rises, what has been added
up falls. Rows are query rows of the set, in blocks of a literal size (`ROWS`) that are filled up.

`kernel` makes the kernel for a block size and a kind of stored rows; what reads these is in coded_tiles.py and raw_tiles.py.
"""

from functools import lru_cache

import numpy as np

from . import coded_tiles, products
from .forms import TILES, buffer
from .jit import Kernel, U, jit, special
from .softmax import ceilings, soften

BLOCKS = {1: (1, 4), 2: (2, 4), 4: (4, 2), 7: (7, 2), 8: (4, 2)}
"""Rows of a block, and how many of them and of vectors behind them have their sums in registers at once (for pairs of tiles)."""


@jit
def _map(map_, set_, tokens, rows, width, turned, out):
    """out [N, width], or turned [M, width], of a set: filled up with zeros."""
    out[:] = np.float32(0)
    first = set_ * map_.set
    if turned:
        for m in range(rows):
            for n in range(tokens):
                out[m * width + n] = map_.numbers[first + n * map_.token + m * map_.row]
    else:
        for n in range(tokens):
            for m in range(rows):
                out[n * width + m] = map_.numbers[first + n * map_.token + m * map_.row]


def attend(form, entries, turn, score_map, value_map, keys, values, found, begin_, end_):
    """The tiles begin_ .. end_, counted through, a set after the other."""
    row_size = U(ROWS)
    blocks = (form.heads * form.each + row_size - U(1)) // row_size
    rows, count = blocks * row_size, U(len(entries.order))
    length, width = (form.tokens + U(15)) // U(16) * U(16), (form.value_rows + U(15)) // U(16) * U(16)
    z = buffer(U(TILES) * rows * form.key_rows)
    p = buffer(U(TILES) * rows * length)
    w = buffer(U(TILES) * rows * width)
    cap = buffer(U(TILES) * length)
    sums = buffer(rows * form.value_channels * U(SUM))
    top, mass, factors = buffer(rows), buffer(rows), buffer(rows)
    to_tokens, to_rows = buffer(form.key_rows * length), buffer(form.tokens * width)
    room = make(form, keys, values, turn, blocks, width)
    tile_step, row_step = (U(1), U(2)) if CODED else (form.key_rows, U(1))
    at, known = begin_, form.sets
    while at < end_:
        set_, first = at // count, at % count
        if set_ != known:
            _map(score_map, set_, form.tokens, form.key_rows, length, True, to_tokens)
            _map(value_map, set_, form.tokens, form.value_rows, width, False, to_rows)
            known = set_
        owner = entries.owner[entries.order[first]]
        begin(form, room, turn, set_, owner, blocks)
        top[:], mass[:], sums[:] = np.float32(-np.inf), np.float32(0), np.float32(0)
        stop, last = first, min(count, first + end_ - at)
        while stop < last and entries.owner[entries.order[stop]] == owner:
            stop += U(1)
        at += stop - first
        while first < stop:
            tiles = min(U(TILES), stop - first)
            pairs = (tiles + U(1)) // U(2)
            for tile in range(U(2) * pairs):
                entry = entries.order[first + min(tile, tiles - U(1))]
                ceilings(cap, tile, length, form.tokens, entries.mask, entries.masked, entry, tile < tiles)
            meet(form, room, turn, keys, values, entries.order, first, tiles, set_, blocks, z)
            for i in range(pairs * blocks):
                score(
                    z, i * U(2) * row_size * form.key_rows, tile_step, row_step, form.key_rows, to_tokens, length, p, i * U(2) * row_size * length
                )  # fmt: skip
            if soften(p, rows, U(2) * pairs, length, cap, top, mass, factors):
                lower(form, room, sums, factors, rows, width)
            for i in range(pairs * blocks):
                weigh(p, i * U(2) * row_size * length, length, form.tokens, to_rows, width, w, i * U(2) * row_size * width)
            add(form, room, values, entries.order, first, tiles, set_, blocks, width, w, sums)
            first += tiles
        place = (owner * form.sets + set_) * form.heads * form.each
        end(form, room, sums, width, found, place)
        for row in range(form.heads * form.each):
            found.top[place + row], found.mass[place + row] = top[row], mass[row]


@lru_cache(maxsize=None)
def kernel(block: int, coded: bool) -> Kernel:
    """The kernel for coded or for raw rows, with query rows in blocks of a size of BLOCKS."""
    kind, suffix = coded_tiles, f"{'coded' if coded else 'raw'}_{block}"
    part, vectors = BLOCKS[block]
    sizes = {"ROWS": block, "PART": part, "VECTORS": vectors}
    parts = {
        "score": special(products.score, suffix, **sizes),
        "weigh": special(products.weigh_pairs if coded else products.weigh, suffix, **sizes),
        **{
            name: special(getattr(kind, name), suffix, ROWS=block)
            for name in ("make", "begin", "meet", "add", "lower", "end")
        },
    }
    return special(attend, suffix, ROWS=block, CODED=coded, SUM=16 if coded else 1, **parts)
