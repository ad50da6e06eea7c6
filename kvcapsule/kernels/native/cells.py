"""Products with coded cells (kvcapsule.codec.cells): a cell's eight numbers meet four query rows while they are in a register.

Flat arrays; E entries, S sets, RS rows of a set (queries times heads), M = 8 G token components, C channels. Cells of a width and a set are
taken in an order in which those that add to the same sums follow each other: `rank` says where a cell's bytes are, `group` and `channel`
what it is; first, count and start [5, S] say which cells and where their bytes begin, for the widths 8, 4, 3, 2, 1.
"""

from .dense import add
from .jit import U, jit
from .lanes import load, plus, total, unpack, zeros

_TOGETHER = U(8)
"""Entries whose weights are in a core's first cache while all their cells pass."""


def _scores(width):
    """The kernel for the cells of one width in one set of one entry, a group of rows after the other."""
    bytes_ = U(width)

    @jit
    def scores(packed, at, first, count, rank, group, channel, step, q, q0, rows, M, C, out, o0):
        last = rows - U(1)
        r = U(0)
        while r < rows:
            # Where there are no four rows, the last stands for those that are missing.
            r1, r2, r3 = min(r + U(1), last), min(r + U(2), last), min(r + U(3), last)
            q_0, q_1, q_2, q_3 = q0 + r * C, q0 + r1 * C, q0 + r2 * C, q0 + r3 * C
            i, end = first, first + count
            while i < end:
                here = group[i]
                z_0 = z_1 = z_2 = z_3 = zeros()
                while i < end and group[i] == here:
                    c = U(channel[i])
                    x = unpack(packed, at + U(rank[i]) * bytes_, width, step[i])
                    z_0, z_1, z_2, z_3 = (
                        plus(z_0, x, q[q_0 + c]),
                        plus(z_1, x, q[q_1 + c]),
                        plus(z_2, x, q[q_2 + c]),
                        plus(z_3, x, q[q_3 + c]),
                    )
                    i += U(1)
                o = o0 + U(8) * U(here)
                add(out, o + r * M, z_0)
                if r + U(1) < rows:
                    add(out, o + r1 * M, z_1)
                if r + U(2) < rows:
                    add(out, o + r2 * M, z_2)
                if r + U(3) < rows:
                    add(out, o + r3 * M, z_3)
            r += U(4)

    return scores


_score_8, _score_4, _score_3, _score_2, _score_1 = map(_scores, (8, 4, 3, 2, 1))


@jit
def products(packed, size, start, first, count, rank, group, channel, step, q, qe, qs, rows, M, C, out, begin, end):
    """out [E, S, RS, M] += q times the cells, without the offset, of the units (entry and set) begin to end; each one's q [RS, C] is qe and
    qs from the next one's.
    """
    sets = U(first.shape[1])
    for unit in range(begin, end):
        entry, s = unit // sets, unit % sets
        base, a, o = entry * size, entry * qe + s * qs, unit * rows * M
        _score_8(packed, base + start[0, s], first[0, s], count[0, s], rank, group, channel, step, q, a, rows, M, C, out, o)
        _score_4(packed, base + start[1, s], first[1, s], count[1, s], rank, group, channel, step, q, a, rows, M, C, out, o)
        _score_3(packed, base + start[2, s], first[2, s], count[2, s], rank, group, channel, step, q, a, rows, M, C, out, o)
        _score_2(packed, base + start[3, s], first[3, s], count[3, s], rank, group, channel, step, q, a, rows, M, C, out, o)
        _score_1(packed, base + start[4, s], first[4, s], count[4, s], rank, group, channel, step, q, a, rows, M, C, out, o)


def _weights(width):
    """The kernel for the cells of one width in one set of some entries, a channel after the other."""
    bytes_ = U(width)

    @jit
    def weigh(packed, size, at, first, count, rank, group, channel, step, w, we, w0, many, rows, M, C, out, o0):
        last, end = rows - U(1), first + count
        r = U(0)
        while r < rows:
            r1, r2, r3 = min(r + U(1), last), min(r + U(2), last), min(r + U(3), last)
            i = first
            while i < end:
                here, stop = channel[i], i + U(1)
                while stop < end and channel[stop] == here:
                    stop += U(1)
                s_0 = s_1 = s_2 = s_3 = zeros()
                for entry in range(many):
                    a, b = at + entry * size, w0 + entry * we
                    w_0, w_1, w_2, w_3 = b + r * M, b + r1 * M, b + r2 * M, b + r3 * M
                    for k in range(i, stop):
                        m = U(8) * U(group[k])
                        x = unpack(packed, a + U(rank[k]) * bytes_, width, step[k])
                        s_0, s_1 = plus(s_0, x, load(w, w_0 + m)), plus(s_1, x, load(w, w_1 + m))
                        s_2, s_3 = plus(s_2, x, load(w, w_2 + m)), plus(s_3, x, load(w, w_3 + m))
                o = o0 + U(here)
                out[o + r * C] += total(s_0)
                if r + U(1) < rows:
                    out[o + r1 * C] += total(s_1)
                if r + U(2) < rows:
                    out[o + r2 * C] += total(s_2)
                if r + U(3) < rows:
                    out[o + r3 * C] += total(s_3)
                i = stop
            r += U(4)

    return weigh


_weigh_8, _weigh_4, _weigh_3, _weigh_2, _weigh_1 = map(_weights, (8, 4, 3, 2, 1))


@jit
def totals(packed, size, start, first, count, rank, group, channel, step, owner, w, we, ws, rows, M, C, out, begin, end, since, until):
    """out [B, S, RS, C] += the sums over each owner's entries of w times the cells, without the offset; w [RS, M], we and ws apart.

    Of the sets begin to end, and the entries since to until; neighbours of one owner are added up before their lanes are.
    """
    sets = U(first.shape[1])
    for s in range(begin, end):
        entry = since
        while entry < until:
            many = U(1)
            while many < _TOGETHER and entry + many < until and owner[entry + many] == owner[entry]:
                many += U(1)
            b, a, o = entry * size, entry * we + s * ws, (U(owner[entry]) * sets + s) * rows * C
            _weigh_8(
                packed, size, b + start[0, s], first[0, s], count[0, s], rank, group, channel, step, w, we, a, many, rows, M, C, out, o
            )
            _weigh_4(
                packed, size, b + start[1, s], first[1, s], count[1, s], rank, group, channel, step, w, we, a, many, rows, M, C, out, o
            )
            _weigh_3(
                packed, size, b + start[2, s], first[2, s], count[2, s], rank, group, channel, step, w, we, a, many, rows, M, C, out, o
            )
            _weigh_2(
                packed, size, b + start[3, s], first[3, s], count[3, s], rank, group, channel, step, w, we, a, many, rows, M, C, out, o
            )
            _weigh_1(
                packed, size, b + start[4, s], first[4, s], count[4, s], rank, group, channel, step, w, we, a, many, rows, M, C, out, o
            )
            entry += many
