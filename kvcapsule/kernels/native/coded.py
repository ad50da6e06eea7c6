"""Coded cells (kvcapsule.segments.coefficient_rows) of two tiles at once: a cell's eight numbers of both lie side by side in one vector register.

Two groups of rows meet the same queries, and two channels the same weights: what is loaded once serves both, and loads are what
the loops wait for.

Every entry of a capsule has the same layout, so the cells of two tiles always pair up. A table says where a cell's word is, how its codes
lie in it, and which channel or group of rows it meets (`line`, see Runs). Cells of 1 to 4 bits are read alike (fewbits.py), in one loop
that never branches on a width: their sums stay in registers.
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ...segments.bit_packing import GROUP
from .emit import (
    BYTE,
    FLOAT,
    FLOATS,
    INTS,
    LONG,
    NONE,
    Array,
    Sums,
    along,
    constant,
    ints,
    literal,
    splat,
    totals,
    whole,
)
from .fewbits import Decoder
from .forms import TILES

_U = types.uint64


class _Cells:
    """The arguments that both intrinsics have first: packed, base, base0, bounds, bounds0, line, step and words."""

    def __init__(self, context, builder, signature, arguments):
        self.builder, self.context, self.tile = builder, context, arguments[2]
        packed, base, bounds, line, step, words = (Array(context, builder, signature.args[i], arguments[i]) for i in (0, 1, 3, 5, 6, 7))
        self.packed, self.base, self.line, self.step, self.words = packed, base, line, step, words
        self.few, self.eight, self.end = (bounds.index(builder.add(arguments[4], whole(i))) for i in range(3))

    def runs(self):
        """Loops over the lines of both runs: their cells' positions, what these meet, and two functions that give a pair's numbers."""
        builder = self.builder
        for begin, end, reader in ((self.few, self.eight, self._few), (self.eight, self.end, self._eight)):
            with along(builder, begin, end) as loop:
                places = [builder.add(builder.mul(loop.index, whole(2)), whole(half)) for half in (0, 1)]
                lines = [self.line.load(place, LONG) for place in places]
                steps = [splat(builder, self.step.load(place, FLOAT)) for place in places]
                low = [builder.and_(line, whole(2**32 - 1)) for line in lines]
                yield places, builder.lshr(lines[0], whole(32)), [reader(*both) for both in zip(low, steps, strict=True)]

    def _few(self, line, step):
        builder = self.builder
        decoder = Decoder(self.context, builder, builder.lshr(line, whole(24)), step)
        first = builder.add(builder.mul(builder.and_(line, whole(2**24 - 1)), whole(TILES)), self.tile)
        return lambda pair: decoder.numbers(self.words, builder.add(first, builder.mul(whole(2), pair)))

    def _eight(self, at, step):
        builder, order = self.builder, [i + GROUP * j for i in range(GROUP) for j in (0, 1)]

        def numbers(pair):
            tile = builder.add(self.tile, builder.mul(whole(2), pair))
            bases = [self.base.load(builder.add(tile, whole(i)), LONG) for i in (0, 1)]
            low, high = (self.packed.load(builder.add(base, at), ir.VectorType(BYTE, GROUP)) for base in bases)
            codes = builder.zext(builder.shuffle_vector(low, high, ints(order)), INTS)
            return builder.fmul(builder.fsub(builder.sitofp(codes, FLOATS), constant((2**8 - 1) / 2)), step)

        return numbers


@intrinsic
def key_cells(typing_context, packed, base, base0, bounds, bounds0, line, step, words, shift, q, q0, out, o0, next_, os, R):
    """The products of two groups of rows with the queries of a pair of tiles: out[o0 + r os : ... + 16].

    The second group's are `next_` from there; 0 where there is none, and the first group's are written over them.
    base[base0 ...]: where the bytes of each tile begin. bounds[bounds0 ...]: where the runs of the groups begin, and the last one's end.
    words: of the set (laid.py).
    shift[16 i ...]: what is added to the numbers of cell i; q[q0 + 2 (channel R + r) + tile].
    """
    if not literal(R):
        return None
    rows = R.literal_value

    def generate(context, builder, signature, arguments):
        cells = _Cells(context, builder, signature, arguments)
        shift, q, out = (Array(context, builder, signature.args[i], arguments[i]) for i in (8, 9, 11))
        q0, o0, next_, os = (arguments[i] for i in (10, 12, 13, 14))
        total = Sums(builder, [NONE] * (2 * rows))
        two = ir.VectorType(FLOAT, 2)
        for places, met, numbers in cells.runs():
            moved = [shift.load(builder.mul(place, whole(16))) for place in places]
            found = [builder.fadd(number(whole(0)), more) for number, more in zip(numbers, moved, strict=True)]
            here = builder.add(q0, builder.mul(met, whole(2 * rows)))
            for r in range(rows):
                pair_q = q.load(builder.add(here, whole(2 * r)), two)
                query = builder.shuffle_vector(pair_q, pair_q, ints([0, 1] * GROUP))
                for half in (0, 1):
                    total.add(half * rows + r, found[half], query)
        for half in (1, 0):
            first = builder.add(o0, next_) if half else o0
            for r in range(rows):
                out.store(builder.add(first, builder.mul(os, whole(r))), total[half * rows + r])
        return context.get_dummy_value()

    tables = (packed, base, _U, bounds, _U, line, step, words)
    return types.void(*tables, shift, q, _U, out, _U, _U, _U, R), generate


@intrinsic
def value_cells(typing_context, packed, base, base0, bounds, bounds0, line, step, words, w, w0, wp, pairs, out, o0, next_, R):
    """out[o0 : o0 + 8], of which R count, += the cells of a channel with the weights of so many pairs.

    w[w0 + pair wp + 16 (group R + r) : ...]. The same for the next channel, `next_` from there; 0 where there is none, which adds nothing.
    What is added to all numbers of a channel is left to the end.
    """
    if not literal(R):
        return None
    rows = R.literal_value

    def generate(context, builder, signature, arguments):
        cells = _Cells(context, builder, signature, arguments)
        w, out = (Array(context, builder, signature.args[i], arguments[i]) for i in (8, 12))
        w0, wp, pairs, o0, next_ = (arguments[i] for i in (9, 10, 11, 13, 14))
        total = Sums(builder, [NONE] * (2 * rows))
        for _, met, numbers in cells.runs():
            weights = builder.add(w0, builder.mul(met, whole(16 * rows)))
            # A loop, for of one long block LLVM would do all loads first, and put most of them aside in memory.
            with along(builder, whole(0), pairs) as loop:
                found, here = [number(loop.index) for number in numbers], builder.add(weights, builder.mul(wp, loop.index))
                for r in range(rows):
                    lanes = w.load(builder.add(here, whole(16 * r)))
                    for half in (0, 1):
                        total.add(half * rows + r, found[half], lanes)
        for half in (1, 0):
            place = builder.add(o0, next_) if half else o0
            added = totals(builder, [total[half * rows + r] for r in range(rows)] + [NONE] * (GROUP - rows))
            out.store(place, builder.fadd(out.load(place, added.type), added))
        return context.get_dummy_value()

    tables = (packed, base, _U, bounds, _U, line, step, words)
    return types.void(*tables, w, _U, _U, _U, out, _U, _U, R), generate
