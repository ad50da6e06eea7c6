"""Coded cells (kvcapsule.codec.cells) of two tiles at once: a cell's eight numbers of both lie side by side in one vector register.

Every entry of a capsule has the same layout, so the cells of two tiles always pair up. A table says where a cell's word is, how its codes
lie in it, and which channel or group of rows it meets (`line`, see Runs). Cells of 1 to 4 bits are read alike (fewbits.py), in one loop
that never branches on a width: their sums stay in registers.
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ...packing import GROUP
from .emit import BYTE, FLOAT, FLOATS, INTS, LONG, NONE, Array, Sums, along, constant, ints, literal, splat, totals, whole
from .fewbits import Decoder
from .forms import TILES

_U = types.uint64


class _Cells:
    """The arguments that both intrinsics have first: packed, base, base0, bounds, bounds0, line, step and words."""

    def __init__(self, context, builder, signature, arguments, tiles):
        self.builder, self.context, self.tile = builder, context, arguments[2]
        packed, base, bounds, line, step, words = (Array(context, builder, signature.args[i], arguments[i]) for i in (0, 1, 3, 5, 6, 7))
        self.packed, self.line, self.step, self.words = packed, line, step, words
        self.bases = [base.load(builder.add(arguments[2], whole(i)), LONG) for i in range(tiles)]
        self.few, self.eight, self.none, self.end = (bounds.index(builder.add(arguments[4], whole(i))) for i in range(4))

    def runs(self):
        """Loops over the cells of few bits, of 8 and of none: position, what a cell meets, and a function that gives a pair's numbers."""
        builder = self.builder
        runs = ((self.few, self.eight, self._few), (self.eight, self.none, self._eight), (self.none, self.end, None))
        for begin, end, reader in runs:
            with along(builder, begin, end) as loop:
                line = self.line.load(loop.index, LONG)
                low = builder.and_(line, whole(2**32 - 1))
                yield loop.index, builder.lshr(line, whole(32)), reader and reader(low, splat(builder, self.step.load(loop.index, FLOAT)))

    def _few(self, line, step):
        builder = self.builder
        decoder = Decoder(self.context, builder, builder.lshr(line, whole(24)), step)
        first = builder.add(builder.mul(builder.and_(line, whole(2**24 - 1)), whole(TILES)), self.tile)
        return lambda pair: decoder.numbers(self.words, builder.add(first, whole(2 * pair)))

    def _eight(self, at, step):
        builder, order = self.builder, [i + GROUP * j for i in range(GROUP) for j in (0, 1)]

        def numbers(pair):
            low, high = (self.packed.load(builder.add(b, at), ir.VectorType(BYTE, GROUP)) for b in self.bases[2 * pair : 2 * pair + 2])
            codes = builder.zext(builder.shuffle_vector(low, high, ints(order)), INTS)
            return builder.fmul(builder.fsub(builder.sitofp(codes, FLOATS), constant((2**8 - 1) / 2)), step)

        return numbers


@intrinsic
def key_cells(typing_context, packed, base, base0, bounds, bounds0, line, step, words, shift, q, q0, qp, out, o0, op, os, R, P):
    """The products of one group of rows with the queries of P pairs of tiles: out[o0 + pair op + r os : ... + 16].

    base[base0 ...]: where the bytes of each tile begin. bounds[bounds0 ...]: where the runs of the group begin, and the last one's end.
    words: of the set (laid.py).
    shift[16 i ...]: what is added to the numbers of cell i; q[q0 + pair qp + 2 (channel R + r) + tile].
    """
    if not literal(R, P):
        return None
    rows, many = R.literal_value, P.literal_value

    def generate(context, builder, signature, arguments):
        cells = _Cells(context, builder, signature, arguments, 2 * many)
        shift, q, out = (Array(context, builder, signature.args[i], arguments[i]) for i in (8, 9, 12))
        q0, qp, o0, op, os = (arguments[i] for i in (10, 11, 13, 14, 15))
        total = Sums(builder, [constant(0.0)] * (rows * many))
        two = ir.VectorType(FLOAT, 2)

        for i, met, numbers in cells.runs():
            moved, channel = shift.load(builder.mul(i, whole(16))), builder.mul(met, whole(2 * rows))
            found = [builder.fadd(numbers(pair), moved) if numbers else moved for pair in range(many)]
            for r in range(rows):
                for pair in range(many):
                    here = builder.add(builder.add(q0, builder.mul(qp, whole(pair))), channel)
                    pair_q = q.load(builder.add(here, whole(2 * r)), two)
                    total.add(pair * rows + r, found[pair], builder.shuffle_vector(pair_q, pair_q, ints([0, 1] * GROUP)))
        for pair in range(many):
            for r in range(rows):
                row = builder.add(builder.mul(op, whole(pair)), builder.mul(os, whole(r)))
                out.store(builder.add(o0, row), total[pair * rows + r])
        return context.get_dummy_value()

    tables = (packed, base, _U, bounds, _U, line, step, words)
    return types.void(*tables, shift, q, _U, _U, out, _U, _U, _U, R, P), generate


@intrinsic
def value_cells(typing_context, packed, base, base0, bounds, bounds0, line, step, words, w, w0, wp, out, o0, R, P):
    """out[o0 : o0 + 8], of which R count, += the cells of a channel with the weights of P pairs, w[w0 + pair wp + 16 (group R + r) : ...].

    What is added to all numbers of a channel is left to the end.
    """
    if not literal(R, P):
        return None
    rows, many = R.literal_value, P.literal_value

    def generate(context, builder, signature, arguments):
        cells = _Cells(context, builder, signature, arguments, 2 * many)
        w, out = (Array(context, builder, signature.args[i], arguments[i]) for i in (8, 11))
        w0, wp, o0 = (arguments[i] for i in (9, 10, 12))
        # Sums of the first and of the second half of the tiles: one would have to wait for the other.
        halves = min(2, many)
        total = Sums(builder, [NONE] * (rows * halves))
        for _, met, numbers in cells.runs():
            if numbers:
                weights = builder.add(w0, builder.mul(met, whole(16 * rows)))
                for pair in range(many):
                    found, here = numbers(pair), builder.add(weights, builder.mul(wp, whole(pair)))
                    for r in range(rows):
                        total.add(pair * halves // many * rows + r, found, w.load(builder.add(here, whole(16 * r))))
        both = [builder.fadd(total[r], total[rows + r]) if halves == 2 else total[r] for r in range(rows)]
        added = totals(builder, both + [NONE] * (GROUP - rows))
        out.store(o0, builder.fadd(out.load(o0, added.type), added))
        return context.get_dummy_value()

    tables = (packed, base, _U, bounds, _U, line, step, words)
    return types.void(*tables, w, _U, _U, out, _U, R, P), generate
