"""What the vectors of sixteen numbers are made of in LLVM's language: types, addresses, loops, and sums that stay in registers.

Numba's own loops over sixteen numbers do not become vector instructions, and its tuples of vectors cannot be counted through: a kernel
that holds a block of sums in registers is therefore written out here, for literal sizes. A CPU whose registers hold fewer numbers gets
two or four instructions in place of one.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

WIDE = 16
BYTE, HALF, INT, LONG, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
INTS, FLOATS = ir.VectorType(INT, WIDE), ir.VectorType(FLOAT, WIDE)
NONE = ir.Constant(FLOATS, [ir.Constant(FLOAT, 0.0)] * WIDE)


class Array:
    """A flat array of a kernel's, as its intrinsic sees it."""

    def __init__(self, context: Any, builder: Any, array_type: Any, array: Any) -> None:
        self.builder, self.data = builder, context.make_array(array_type)(context, builder, array).data

    def place(self, position: Any, element: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.data, [position]), element.as_pointer())

    def load(self, position: Any, element: Any = FLOATS) -> Any:
        # Bytes of cells begin anywhere, and so do rows.
        small = element in (BYTE, HALF) or self.data.type.pointee == BYTE
        return self.builder.load(self.place(position, element), align=1 if small else None if element == LONG else 4)

    def store(self, position: Any, lanes: Any) -> None:
        self.builder.store(lanes, self.place(position, lanes.type), align=4)

    def index(self, position: Any) -> Any:
        """A number of a table of 32 bits."""
        return self.builder.zext(self.load(position, INT), LONG)


def whole(number: int) -> Any:
    return ir.Constant(LONG, number)


def ints(numbers: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(INT, len(numbers)), [ir.Constant(INT, n) for n in numbers])


def splat(builder: Any, number: Any, vector_type: Any = FLOATS) -> Any:
    """A number in all lanes."""
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), number, ir.Constant(INT, 0))
    return builder.shuffle_vector(one, one, ints([0] * vector_type.count))


def constant(number: float) -> Any:
    return ir.Constant(FLOATS, [ir.Constant(FLOAT, number)] * WIDE)


def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once where the CPU does."""
    return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def pairs(builder: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """Two vectors as one run of pairs: the lower and the upper half of it."""
    order = [i + WIDE * j for i in range(WIDE) for j in (0, 1)]
    low, high = (builder.shuffle_vector(first, second, ints(part)) for part in (order[:WIDE], order[WIDE:]))
    return low, high


def along(builder: Any, begin: Any, end: Any) -> Any:
    """A loop over the positions begin .. end: a context manager whose `index` they are."""
    return cgutils.for_range(builder, end, start=begin)


def totals(builder: Any, lanes: Sequence[Any]) -> Any:
    """The sums of eight vectors' lanes, as one vector of eight."""

    def picked(x: Any, y: Any, order: Sequence[int], size: int) -> Any:
        """Parts of so many numbers, those of y counted on from x's."""
        return builder.shuffle_vector(x, y, ints([size * part + i for part in order for i in range(size)]))

    # Quarters of the registers first: these are moved by one instruction.
    for low, high in (((0, 1, 4, 5), (2, 3, 6, 7)), ((0, 2, 4, 6), (1, 3, 5, 7))):
        both = zip(lanes[::2], lanes[1::2], strict=True)
        lanes = [builder.fadd(picked(x, y, low, 4), picked(x, y, high, 4)) for x, y in both]
    first, second = ([2 * q + part + place for q in range(4) for place in (0, 8)] for part in (0, 1))
    found = builder.fadd(picked(lanes[0], lanes[1], first, 2), picked(lanes[0], lanes[1], second, 2))
    even, odd = (builder.shuffle_vector(found, found, ints([4 * (i % 4) + 2 * (i // 4) + place for i in range(8)])) for place in (0, 1))
    return builder.fadd(even, odd)


class Sums:
    """Vectors that a loop adds to; LLVM keeps them in registers."""

    def __init__(self, builder: Any, values: Sequence[Any]) -> None:
        self.builder, self.cells = builder, [cgutils.alloca_once(builder, FLOATS) for _ in values]
        for cell, value in zip(self.cells, values, strict=True):
            builder.store(value, cell)

    def add(self, i: int, x: Any, y: Any) -> None:
        self.builder.store(fma(self.builder, x, y, self[i]), self.cells[i])

    def __getitem__(self, i: int) -> Any:
        return self.builder.load(self.cells[i])


def literal(*sizes: Any) -> bool:
    """Whether sizes are known when the kernel is compiled: Numba asks again where they are not given as such."""
    return all(isinstance(size, types.IntegerLiteral) for size in sizes)
