"""Eight codes at a time, as vector instructions: what Numba's own loops over eight numbers do not become."""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ...packing import GROUP

_BYTE, _INT, _FLOAT, _LONG = ir.IntType(8), ir.IntType(32), ir.FloatType(), ir.IntType(64)
_INTS, _FLOATS = ir.VectorType(_INT, GROUP), ir.VectorType(_FLOAT, GROUP)


def _place(context, builder, array_type, array, position, element):
    """A pointer to what lies at a position of an array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [position]), element.as_pointer())


def _each(builder, number, vector_type):
    """A number in all lanes."""
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), number, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * GROUP))


def _ints(numbers):
    return ir.Constant(_INTS, [ir.Constant(_INT, n) for n in numbers])


def _fields(builder, word, width):
    """Codes of `width` bits, the first in the lowest bits of an integer."""
    if word.type.width < 32:
        word = builder.zext(word, _INT)
    shifted = builder.lshr(_each(builder, word, _INTS), _ints(width * lane for lane in range(GROUP)))
    return builder.and_(shifted, _ints([2**width - 1] * GROUP))


@intrinsic
def unpack(typing_context, packed, position, width, step, x, at):
    """x[at : at + 8] = step * (code - (2^width - 1) / 2) of the eight codes in packed[position : position + width] (kvcapsule.packing).

    `width` is a literal.
    """
    if not isinstance(width, types.IntegerLiteral):
        return None
    bits = width.literal_value
    signature = types.void(packed, types.uint64, width, types.float32, x, types.uint64)

    def generate(context, builder, signature, arguments):
        array, position, _, step, x, at = arguments

        def load(element, beyond=0):
            first = builder.add(position, ir.Constant(_LONG, beyond)) if beyond else position
            # Cells begin at any byte.
            return builder.load(_place(context, builder, signature.args[0], array, first, element), align=1)

        if bits == 8:
            codes = builder.zext(load(ir.VectorType(_BYTE, GROUP)), _INTS)
        elif bits == 3:
            high = builder.shl(_fields(builder, load(_BYTE, beyond=2), 1), _ints([2] * GROUP))
            codes = builder.or_(_fields(builder, load(ir.IntType(16)), 2), high)
        else:
            codes = _fields(builder, load(ir.IntType(8 * bits)), bits)
        middle = ir.Constant(_FLOATS, [ir.Constant(_FLOAT, (2**bits - 1) / 2)] * GROUP)
        numbers = builder.fmul(builder.fsub(builder.sitofp(codes, _FLOATS), middle), _each(builder, step, _FLOATS))
        builder.store(numbers, _place(context, builder, signature.args[4], x, at, _FLOATS), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add_scaled(typing_context, out, o, x, at, factor):
    """out[o : o + 8] += factor * x[at : at + 8]."""
    signature = types.void(out, types.uint64, x, types.uint64, types.float32)

    def generate(context, builder, signature, arguments):
        out, o, x, at, factor = arguments
        return _accumulate(context, builder, signature, out, o, x, at, _each(builder, factor, _FLOATS))

    return signature, generate


@intrinsic
def add_product(typing_context, out, o, x, at, y, where):
    """out[o : o + 8] += x[at : at + 8] * y[where : where + 8]."""
    signature = types.void(out, types.uint64, x, types.uint64, y, types.uint64)

    def generate(context, builder, signature, arguments):
        out, o, x, at, y, where = arguments
        factors = builder.load(_place(context, builder, signature.args[4], y, where, _FLOATS), align=4)
        return _accumulate(context, builder, signature, out, o, x, at, factors)

    return signature, generate


def _accumulate(context, builder, signature, out, o, x, at, factors):
    to = _place(context, builder, signature.args[0], out, o, _FLOATS)
    numbers = builder.load(_place(context, builder, signature.args[2], x, at, _FLOATS), align=4)
    product = builder.fmul(numbers, factors, flags=("contract",))
    builder.store(builder.fadd(builder.load(to, align=4), product, flags=("contract",)), to, align=4)
    return context.get_dummy_value()
