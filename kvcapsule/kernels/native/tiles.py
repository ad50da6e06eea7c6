"""Attention over mapped tiles in one pass: scores, softmax and values of some tiles while all of it is in a core's nearest caches.

For each set of KV heads and each batch row, its tiles go through eight at a time, two side by side in each vector: products of the queries
with the stored keys, `score_map`, softmax, `value_map`, sums of the stored values. Where a row's greatest score rises, what has been added
up falls. Rows are query rows of the set, in blocks of a literal size (`ROWS`) that are filled up.

`kernel` makes the kernel for a block size and a kind of stored rows; what reads these is in coded_tiles.py and raw_tiles.py.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from . import coded_tiles, products, raw_tiles
from .coded_tiles import add, begin, end, lower, make, meet, open_set
from .entries import part, sorted_entries
from .forms import TILES, Array, buffer, copied
from .jit import Kernel, U, lent, special, special_maker
from .joined import join
from .products import score
from .products import weigh_pairs as weigh
from .softmax import ceilings, corrected, soften

ROWS, MAPPED, SUM = 8, True, 8
"""Of coded rows, as are the functions that are imported; `kernel` puts others in their place. SUM: numbers that a sum is kept as."""

BLOCKS = {1: (1, 4), 2: (2, 4), 4: (4, 2), 7: (7, 2), 8: (4, 2)}
"""Rows of a block, and how many of them and of vectors behind them have their sums in registers at once (for pairs of tiles)."""


class _Tables(NamedTuple):
    """The order of the entries, and buffers."""

    order: Array
    p: Array
    """[P, rows, 2, N]: scores, then weights."""
    z: Array
    """Of `meet`."""
    w: Array
    """Weights of the value rows."""
    cap: Array
    there: Array
    sums: Array
    top: Array
    mass: Array
    factors: Array
    to_tokens: Array
    """The maps of a set."""
    to_rows: Array
    out: Array
    """[rows, D]: filled up to vectors."""


@lent
def _map(map_, set_, tokens, rows, width, turned, out):
    """out [N, width], or turned [M, width], of a set: filled up with zeros."""
    out[:] = np.float32(0)
    first = set_ * map_.set
    if turned:
        copied(map_.numbers, first, rows, map_.row, tokens, map_.token, out, width)
    else:
        copied(map_.numbers, first, tokens, map_.token, rows, map_.row, out, width)


def attend(form, entries, query, scale, turn, score_map, value_map, keys, values, after, found, piece, pieces):
    """One of some pieces of all tiles, counted through, a set after the other: adds to `found`."""
    blocks = (form.heads * form.each + U(ROWS) - U(1)) // U(ROWS)
    rows = blocks * U(ROWS)
    order = sorted_entries(entries, form.batch)
    count = U(len(order)) * (U(1) if MAPPED else (entries.tokens + form.tokens - U(1)) // form.tokens)
    length, width = (form.tokens + U(15)) // U(16) * U(16), (form.value_rows + U(15)) // U(16) * U(16)
    p = buffer(U(TILES) * rows * length)
    z, w = (buffer(U(TILES) * rows * form.key_rows), buffer(U(TILES) * rows * width)) if MAPPED else (p, p)
    tables = _Tables(
        order, p, z, w, buffer(U(TILES) * length), np.full(TILES, length + U(1), np.uint64),
        buffer(rows * form.value_channels * U(SUM)), buffer(rows), buffer(rows), buffer(rows),
        buffer(form.key_rows * length if MAPPED else U(0)), buffer(form.tokens * width if MAPPED else U(0)),
        buffer(rows * ((form.dim + U(15)) // U(16) * U(16))),
    )  # fmt: skip
    room = make(form, keys, values, turn, blocks, length, width)
    at, end_ = form.sets * count * piece // pieces, form.sets * count * (piece + U(1)) // pieces
    given = (form, entries, query, scale, turn, score_map, value_map, keys, values, after, found, tables, room)
    through(*given, blocks, length, width, count, at, end_)


def through(
    form,
    entries,
    query,
    scale,
    turn,
    score_map,
    value_map,
    keys,
    values,
    after,
    found,
    tables,
    room,
    blocks,
    length,
    width,
    count,
    at,
    end_,
):
    """Tiles `at` to `end_` of all, with buffers that are there."""
    row_size = U(ROWS)
    rows = blocks * row_size
    order, p, z, w, cap, there, sums, top, mass, factors, to_tokens, to_rows, out = tables
    known = form.sets
    while at < end_:
        set_, first = at // count, at % count
        if set_ != known:
            if MAPPED:
                _map(score_map, set_, form.tokens, form.key_rows, length, True, to_tokens)
                _map(value_map, set_, form.tokens, form.value_rows, width, False, to_rows)
            open_set(form, room, values, after, set_, width)
            known = set_
        owner = U(entries.owner[part(entries, order, first, form.tokens, MAPPED)[0]])
        begin(form, room, query, scale, turn, set_, owner, blocks)
        top[:], mass[:], sums[:] = np.float32(-np.inf), np.float32(0), np.float32(0)
        stop, last = first, min(count, first + end_ - at)
        while stop < last and U(entries.owner[part(entries, order, stop, form.tokens, MAPPED)[0]]) == owner:
            stop += U(1)
        at += stop - first
        while first < stop:
            tiles = min(U(TILES), stop - first)
            pairs = (tiles + U(1)) // U(2)
            for tile in range(U(2) * pairs):
                entry, token, many = part(entries, order, first + min(tile, tiles - U(1)), form.tokens, MAPPED)
                many = many if tile < tiles else U(0)
                # Asked here, for handing all of it over takes longer than most tiles need.
                if there[tile] != many or entries.masked or entries.hidden:
                    ceilings(cap, tile, length, many, entries, entry, token, there)
            meet(form, room, turn, keys, values, entries, order, first, stop, tiles, set_, blocks, z)
            if MAPPED:
                for i in range(pairs * blocks):
                    score(
                        z, i * U(2) * row_size * form.key_rows, room.apart, room.step, form.key_rows, to_tokens, length,
                        p, i * U(2) * row_size * length,
                    )  # fmt: skip
            else:
                for tile in range(tiles):
                    entry, token, many = part(entries, order, first + tile, form.tokens, MAPPED)
                    corrected(
                        p, (tile // U(2) * rows * U(2) + tile % U(2)) * length, U(2) * length, form.each, entries, entry, set_, token, many
                    )
            if soften(p, rows, U(2) * pairs, length, cap, top, mass, factors):
                lower(form, room, sums, factors, rows, width)
            if MAPPED:
                for i in range(pairs * blocks):
                    weigh(p, i * U(2) * row_size * length, length, form.tokens, to_rows, width, w, i * U(2) * row_size * width)
            add(form, room, values, entries, order, first, stop, tiles, set_, blocks, length, width, cap, w, sums)
            first += tiles
        done = end(form, room, after, set_, sums, mass, width, out)
        place, many = (owner * form.sets + set_) * form.heads * form.each, form.heads * form.each
        join(found, place, many, form.dim, done, len(done) // rows, top, mass)


KINDS = {"coded": (coded_tiles, True), "raw": (raw_tiles, True), "plain": (raw_tiles, False)}
"""Kinds of stored rows, and whether there are maps along the tokens."""


@cache
def kernel(block: int, kind: str) -> Kernel:
    """The kernel for a kind of KINDS, with query rows in blocks of a size of BLOCKS."""
    (reading, mapped), suffix = KINDS[kind], f"{kind}_{block}"
    part_, vectors = BLOCKS[block]
    sizes = {"ROWS": block, "PART": part_, "VECTORS": vectors, "MAPPED": mapped}
    names = ("open_set", "begin", "meet", "add", "lower", "end")
    go_through = special(
        through, suffix, **sizes,
        score=special(products.score, suffix, **sizes),
        weigh=special(products.weigh_pairs if kind == "coded" else products.weigh, suffix, **sizes),
        **{name: special(getattr(reading, name), suffix, **sizes) for name in names},
    )  # fmt: skip
    made = special_maker(reading.make, suffix, **sizes)
    return special_maker(attend, suffix, **sizes, SUM=8 if kind == "coded" else 1, make=made, through=go_through)
