"""Cells of 1 to 4 bits as numbers, by the same instructions whatever their width: what differs are constants that are looked up.

Of a word of 32 bits in all lanes each lane takes its bits: the word moved by as many as its kind says (laid.py). The lowest four bits are
then looked up in a register of levels, whose sixteen entries repeat those of a narrower code: what stands above its bits does not matter.
Without AVX-512 there is no such look-up, and the bits are cut off and made numbers.
"""

from llvmlite import ir
from numba.core import cgutils

from ...segments.bit_packing import GROUP
from ...segments.coefficient_rows import FIRST_KIND, TOGETHER
from .emit import FLOAT, FLOATS, INT, INTS, LONG, WIDE, ints, splat, whole

_LOOKED_UP = "llvm.x86.avx512.permvar.sf.512"
_KINDS = sorted((FIRST_KIND[width] + place, width, place) for width, many in TOGETHER.items() for place in range(many))
_LANE = [i // 2 for i in range(WIDE)]
"""The code of each lane: two tiles side by side."""
_BITS = {1: 1, 2: 2, 3: 4, 4: 4}
"""From one code of a word to the next."""
_TABLES = {
    "moved": (INT, [[_BITS[width] * i + GROUP * width * place for i in _LANE] for _, width, place in _KINDS]),
    "levels": (FLOAT, [[i % 2**width - (2**width - 1) / 2 for i in range(WIDE)] for _, width, _ in _KINDS]),
    "codes": (INT, [[2**width - 1] * WIDE for _, width, _ in _KINDS]),
}
"""A line for each kind of cells."""


class Decoder:
    """A cell's constants; `numbers` gives its codes of two tiles as step (code - middle)."""

    def __init__(self, context, builder, kind, step):
        self.builder, self.step = builder, step
        self.moved, levels = self._of("moved", kind), self._of("levels", kind)
        self.look_up = "+avx512f" in context.codegen().magic_tuple()[2]
        if self.look_up:
            self.levels = builder.fmul(levels, step)
        else:
            # The first level is as far below 0 as the middle is above.
            self.codes, self.less = self._of("codes", kind), builder.shuffle_vector(levels, levels, ints([0] * WIDE))

    def _of(self, table, kind):
        element, lines = _TABLES[table]
        name, line, module = f"kvcapsule.fewbits.{table}", ir.VectorType(element, WIDE), self.builder.module
        if name not in module.globals:
            rows = [ir.Constant(line, [ir.Constant(element, n) for n in numbers]) for numbers in lines]
            made = cgutils.global_constant(module, name, ir.Constant(ir.ArrayType(line, len(rows)), rows))
            made.align, made.linkage = 64, "internal"
        return self.builder.load(self.builder.gep(module.globals[name], [whole(0), kind]), align=64)

    def numbers(self, words, at):
        """The codes of the cells of two tiles whose words lie side by side."""
        builder = self.builder
        both = builder.load(words.place(at, LONG), align=8)
        code = builder.lshr(builder.bitcast(splat(builder, both, ir.VectorType(LONG, GROUP)), INTS), self.moved)
        if self.look_up:
            kind = ir.FunctionType(FLOATS, [FLOATS, INTS])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, _LOOKED_UP), [self.levels, code])
        centred = builder.fadd(builder.sitofp(builder.and_(code, self.codes), FLOATS), self.less)
        return builder.fmul(centred, self.step)
