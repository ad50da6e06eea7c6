"""Coded cells (kvcapsule.codec.cells) of two tiles at once: a cell's eight numbers of both lie side by side in one vector register.

Every entry of a capsule has the same layout, so the cells of two tiles always pair up. Cells of a set are gone through in runs of one
width, 8, 4, 3, 2, 1 and 0, that add to the same sums; tables of 32 bits say where a cell's bytes begin (`byte`) and which channel or group
of rows it meets (`place`).
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ...packing import GROUP, WIDTHS
from .emit import BYTE, FLOAT, FLOATS, HALF, INT, INTS, LONG, Array, Sums, along, constant, fma, ints, literal, splat, whole

_U = types.uint64
RUNS = (*sorted(WIDTHS, reverse=True), 0)
"""Widths in the order of their runs."""


def _each(numbers):
    """A number for each of eight codes, in both tiles' lanes."""
    return ints([n for n in numbers for _ in (0, 1)])


def _codes(builder, packed, at, width):
    """The codes of two cells that begin at two bytes, as integers."""
    first, second = at
    if width == 8:
        eight = ir.VectorType(BYTE, GROUP)
        low, high = (packed.load(begin, eight) for begin in (first, second))
        order = [i + GROUP * j for i in range(GROUP) for j in (0, 1)]
        return builder.zext(builder.shuffle_vector(low, high, ints(order)), INTS)
    words = []
    for begin in (first, second):
        word = packed.load(begin, {1: BYTE, 2: HALF, 3: HALF, 4: INT}[width])
        word = word if width == 4 else builder.zext(word, INT)
        if width == 3:
            beyond = builder.zext(packed.load(builder.add(begin, whole(2)), BYTE), INT)
            word = builder.or_(word, builder.shl(beyond, ir.Constant(INT, 16)))
        words.append(word)
    # Both words as one number of 64 bits are sent to all lanes at once.
    both = builder.or_(builder.zext(words[0], LONG), builder.shl(builder.zext(words[1], LONG), whole(32)))
    lanes = builder.bitcast(splat(builder, both, ir.VectorType(LONG, GROUP)), INTS)
    field = 2 if width == 3 else width
    codes = builder.and_(builder.lshr(lanes, _each(field * i for i in range(GROUP))), ints([2**field - 1] * 16))
    if width < 3 or width == 4:
        return codes
    high = builder.and_(builder.lshr(lanes, _each(14 + i for i in range(GROUP))), ints([4] * 16))
    return builder.or_(codes, high)


def _opened(context, builder, signature, arguments, tiles):
    """Where the bytes of so many tiles begin, and the arrays that both intrinsics are given at the same places."""
    packed, base, *others = (Array(context, builder, signature.args[i], arguments[i]) for i in (0, 1, 3, 5, 6, 7, 8, 9, 12))
    return [base.load(builder.add(arguments[2], whole(i)), LONG) for i in range(tiles)], (packed, *others)


@intrinsic
def key_cells(typing_context, packed, base, base0, runs, runs0, byte, place, step, shift, q, q0, qp, out, o0, op, os, R, P):
    """The products of one group of rows with the queries of P pairs of tiles: out[o0 + pair op + r os : ... + 16].

    base[base0 ...]: where the bytes of each tile begin. runs[runs0 ...]: where the run of each width begins, and the last one's end.
    A number is step[cell] * code + shift[16 cell ...]; q[q0 + pair qp + 2 (channel R + r) + tile].
    """
    if not literal(R, P):
        return None
    rows, many = R.literal_value, P.literal_value

    def generate(context, builder, signature, arguments):
        bases, (packed, runs, byte, place, step, shift, q, out) = _opened(context, builder, signature, arguments, 2 * many)
        runs0, q0, qp, o0, op, os = (arguments[i] for i in (4, 10, 11, 13, 14, 15))
        total = Sums(builder, [constant(0.0)] * (rows * many))
        ends = [runs.index(builder.add(runs0, whole(i))) for i in range(len(RUNS) + 1)]
        two = ir.VectorType(FLOAT, 2)
        for width, begin, end in zip(RUNS, ends[:-1], ends[1:], strict=True):
            with along(builder, begin, end) as loop:
                moved = shift.load(builder.mul(loop.index, whole(16)))
                channel = builder.mul(place.index(loop.index), whole(2 * rows))
                if width:
                    at, scale = byte.index(loop.index), splat(builder, step.load(loop.index, FLOAT))
                for pair in range(many):
                    numbers = moved
                    if width:
                        codes = _codes(builder, packed, [builder.add(b, at) for b in bases[2 * pair : 2 * pair + 2]], width)
                        codes = builder.sitofp(codes, FLOATS)
                        numbers = builder.fadd(builder.fmul(codes, scale, flags=("contract",)), moved, flags=("contract",))
                    here = builder.add(builder.add(q0, builder.mul(qp, whole(pair))), channel)
                    for r in range(rows):
                        pair_q = q.load(builder.add(here, whole(2 * r)), two)
                        total.add(pair * rows + r, numbers, builder.shuffle_vector(pair_q, pair_q, ints([0, 1] * GROUP)))
        for pair in range(many):
            for r in range(rows):
                row = builder.add(builder.mul(op, whole(pair)), builder.mul(os, whole(r)))
                out.store(builder.add(o0, row), total[pair * rows + r])
        return context.get_dummy_value()

    tables = (packed, base, _U, runs, _U, byte, place, step, shift)
    return types.void(*tables, q, _U, _U, out, _U, _U, _U, R, P), generate


@intrinsic
def value_cells(typing_context, packed, base, base0, runs, runs0, byte, group, channel, step, w, w0, wp, out, o0, R, P):
    """out[o0 + 16 (channel R + r) : ... + 16] += all cells of a set with the weights of P pairs, w[w0 + pair wp + 16 (group R + r) : ...].

    A number is step[cell] * (code - middle); sums of the lanes are left to the end.
    """
    if not literal(R, P):
        return None
    rows, many = R.literal_value, P.literal_value

    def generate(context, builder, signature, arguments):
        bases, (packed, runs, byte, group, channel, step, w, out) = _opened(context, builder, signature, arguments, 2 * many)
        runs0, w0, wp, o0 = (arguments[i] for i in (4, 10, 11, 13))
        ends = [runs.index(builder.add(runs0, whole(i))) for i in range(len(RUNS))]
        for width, begin, end in zip(RUNS[:-1], ends[:-1], ends[1:], strict=True):
            with along(builder, begin, end) as loop:
                at, scale = byte.index(loop.index), splat(builder, step.load(loop.index, FLOAT))
                weights = builder.add(w0, builder.mul(group.index(loop.index), whole(16 * rows)))
                spot = builder.add(o0, builder.mul(channel.index(loop.index), whole(16 * rows)))
                spots = [builder.add(spot, whole(16 * r)) for r in range(rows)]
                total = [out.load(here) for here in spots]
                for pair in range(many):
                    codes = _codes(builder, packed, [builder.add(b, at) for b in bases[2 * pair : 2 * pair + 2]], width)
                    codes = builder.fsub(builder.sitofp(codes, FLOATS), constant((2**width - 1) / 2))
                    numbers = builder.fmul(codes, scale)
                    here = builder.add(weights, builder.mul(wp, whole(pair)))
                    for r in range(rows):
                        total[r] = fma(builder, numbers, w.load(builder.add(here, whole(16 * r))), total[r])
                for here, lanes in zip(spots, total, strict=True):
                    out.store(here, lanes)
        return context.get_dummy_value()

    tables = (packed, base, _U, runs, _U, byte, group, channel, step)
    return types.void(*tables, w, _U, _U, out, _U, R, P), generate
