"""Products with coded cells (kvcapsule.codec.cells): a cell's eight numbers meet every query row while they are in registers.

Flat arrays; E entries, S sets, RS rows of a set (queries times heads), M = 8 G token components, C channels. Cells come as they are stored,
a width at a time and a set at a time: first, count and start [5, S] say which, and where their bytes begin, for the widths 8, 4, 3, 2, 1.
"""

import numpy as np

from .jit import U, jit
from .lanes import add_product, add_scaled, unpack


def _scores(width):
    """The kernel for the cells of one width in one set of one entry."""
    bytes_ = U(width)

    @jit
    def add(packed, at, first, count, group, channel, step, q, q0, rows, M, C, out, o0, x):
        for i in range(first, first + count):
            unpack(packed, at, width, step[i], x, U(0))
            a, o = q0 + U(channel[i]), o0 + U(8) * U(group[i])
            for _ in range(rows):
                add_scaled(out, o, x, U(0), q[a])
                a += C
                o += M
            at += bytes_

    return add


_score_8, _score_4, _score_3, _score_2, _score_1 = map(_scores, (8, 4, 3, 2, 1))


@jit
def products(packed, size, start, first, count, group, channel, step, q, rows, M, C, out, begin, end):
    """out [E, S, RS, M] += q [E, S, RS, C] times the cells, without the offset; units (entry and set) begin to end."""
    sets = U(first.shape[1])
    x = np.empty(8, np.float32)
    for unit in range(begin, end):
        base, s, a, o = (unit // sets) * size, unit % sets, unit * rows * C, unit * rows * M
        _score_8(packed, base + start[0, s], first[0, s], count[0, s], group, channel, step, q, a, rows, M, C, out, o, x)
        _score_4(packed, base + start[1, s], first[1, s], count[1, s], group, channel, step, q, a, rows, M, C, out, o, x)
        _score_3(packed, base + start[2, s], first[2, s], count[2, s], group, channel, step, q, a, rows, M, C, out, o, x)
        _score_2(packed, base + start[3, s], first[3, s], count[3, s], group, channel, step, q, a, rows, M, C, out, o, x)
        _score_1(packed, base + start[4, s], first[4, s], count[4, s], group, channel, step, q, a, rows, M, C, out, o, x)


def _weights(width):
    """The kernel for the cells of one width in one set of one entry."""
    bytes_ = U(width)

    @jit
    def add(packed, at, first, count, group, channel, step, w, w0, rows, M, lanes, x):
        for i in range(first, first + count):
            unpack(packed, at, width, step[i], x, U(0))
            a, o = w0 + U(8) * U(group[i]), U(8) * rows * U(channel[i])
            for _ in range(rows):
                add_product(lanes, o, x, U(0), w, a)
                a += M
                o += U(8)
            at += bytes_

    return add


_weigh_8, _weigh_4, _weigh_3, _weigh_2, _weigh_1 = map(_weights, (8, 4, 3, 2, 1))


@jit
def totals(packed, size, start, first, count, group, channel, step, owner, w, rows, M, C, out, begin, end, since, until):
    """out [B, S, RS, C] += the sums over each owner's entries of w [E, S, RS, M] times the cells, without the offset.

    Of the sets begin to end, and the entries since to until. Lanes are added up where the owner changes, best seldom.
    """
    sets = U(first.shape[1])
    x = np.empty(8, np.float32)
    lanes = np.zeros(rows * C * U(8), np.float32)
    for s in range(begin, end):
        for entry in range(since, until):
            base, a = entry * size, (entry * sets + s) * rows * M
            _weigh_8(packed, base + start[0, s], first[0, s], count[0, s], group, channel, step, w, a, rows, M, lanes, x)
            _weigh_4(packed, base + start[1, s], first[1, s], count[1, s], group, channel, step, w, a, rows, M, lanes, x)
            _weigh_3(packed, base + start[2, s], first[2, s], count[2, s], group, channel, step, w, a, rows, M, lanes, x)
            _weigh_2(packed, base + start[3, s], first[3, s], count[3, s], group, channel, step, w, a, rows, M, lanes, x)
            _weigh_1(packed, base + start[4, s], first[4, s], count[4, s], group, channel, step, w, a, rows, M, lanes, x)
            if entry + U(1) == until or owner[entry + U(1)] != owner[entry]:
                _add_up(lanes, rows, C, out, (U(owner[entry]) * sets + s) * rows * C)


@jit
def _add_up(lanes, rows, C, out, o0):
    for c in range(C):
        for r in range(rows):
            a = (c * rows + r) * U(8)
            total = np.float32(0)
            for lane in range(U(8)):
                total += lanes[a + lane]
                lanes[a + lane] = np.float32(0)
            out[o0 + r * C + c] += total
