"""Queries in the frames of their tiles.

With c and s the cosines and sines of a tile's frame, a turned query times its map is linear in them: for a pair of channels a, b that turn
together, c (q_a m_a + q_b m_b) + s (q_b m_a - q_a m_b). What stands in brackets is the same for all tiles of a batch row, so the queries of
many tiles are one matrix product of [c, s, 1] with it, 1 for what is not turned; without frames that is all.
"""

import numpy as np

from .jit import U, lent
from .wide import each, load, plus, store


@lent
def turns(half, dim):
    """Numbers of a tile's frame."""
    return U(2) * half + (U(1) if U(2) * half < dim else U(0))


@lent
def features(turn, entry, length, out, o0):
    half = turn.half
    for i in range(half):
        out[o0 + i], out[o0 + half + i] = turn.cos[entry * half + i], turn.sin[entry * half + i]
    if length > U(2) * half:
        out[o0 + U(2) * half] = np.float32(1)


@lent
def in_lanes(query, scale, q0, dim, heads, each_, first, rows, out):
    """out [heads, D, 16]: of `rows` rows from `first` on, a lane each; 0 in those of other heads and behind the last row."""
    for head in range(heads):
        for lane in range(U(16)):
            row = first + lane
            mine = lane < rows and row < heads * each_ and row // each_ == head
            for d in range(dim):
                out[(head * dim + d) * U(16) + lane] = query[q0 + row * dim + d] * scale if mine else np.float32(0)


@lent
def row_map(form, turn, m0, lanes, rows, out, o0, apart):
    """out [turns, C, rows]: what the features of a tile are multiplied with; writes up to fifteen numbers beyond the last row."""
    half, dim, C = turn.half, form.dim, form.key_channels
    for i in range(half):
        a, b = (U(2) * i, U(2) * i + U(1)) if turn.neighbours else (i, i + half)
        for c in range(C):
            cos = sin = each(np.float32(0))
            for head in range(form.heads):
                m, x = m0 + head * dim * C + c, head * dim * U(16)
                m_a, m_b = turn.q_map[m + a * C], turn.q_map[m + b * C]
                q_a, q_b = load(lanes, x + a * U(16)), load(lanes, x + b * U(16))
                cos = plus(plus(cos, q_a, each(m_a)), q_b, each(m_b))
                sin = plus(plus(sin, q_b, each(m_a)), q_a, each(-m_b))
            store(out, o0 + i * apart + c * rows, cos)
            store(out, o0 + (half + i) * apart + c * rows, sin)
    if U(2) * half < dim:
        for c in range(C):
            rest = each(np.float32(0))
            for head in range(form.heads):
                for d in range(U(2) * half, dim):
                    at = head * dim + d
                    rest = plus(rest, load(lanes, at * U(16)), each(turn.q_map[m0 + at * C + c]))
            store(out, o0 + U(2) * half * apart + c * rows, rest)


@lent
def turned_back(turn, entry, query, rows, dim, out, o0):
    """Rows of queries [rows, D] turned back by a tile's frame."""
    half = turn.half
    for row in range(rows):
        q, o = row * dim, o0 + row * dim
        for i in range(half):
            a, b = (U(2) * i, U(2) * i + U(1)) if turn.neighbours else (i, i + half)
            c, s = turn.cos[entry * half + i], turn.sin[entry * half + i]
            out[o + a] = query[q + a] * c + query[q + b] * s
            out[o + b] = query[q + b] * c - query[q + a] * s
        for d in range(U(2) * half, dim):
            out[o + d] = query[q + d]
