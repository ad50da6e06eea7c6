"""Eight fp32 numbers in a vector register, as a type of Numba's: what its own loops over eight numbers do not become."""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from ...segments.bit_packing import GROUP

_BYTE, _INT, _FLOAT, _LONG = ir.IntType(8), ir.IntType(32), ir.FloatType(), ir.IntType(64)
_INTS, _FLOATS = ir.VectorType(_INT, GROUP), ir.VectorType(_FLOAT, GROUP)


class Lanes(types.Type):
    """The type of a vector."""

    def __init__(self) -> None:
        super().__init__("Lanes")


@register_model(Lanes)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, _FLOATS)


_LANES = Lanes()


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
def unpack(typing_context, packed, position, width, step):
    """step * (code - (2^width - 1) / 2) of the eight codes in packed[position : position + width] (kvcapsule.segments.bit_packing); a literal width."""
    if not isinstance(width, types.IntegerLiteral):
        return None
    bits = width.literal_value

    def generate(context, builder, signature, arguments):
        array, position, _, step = arguments

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
        return builder.fmul(builder.fsub(builder.sitofp(codes, _FLOATS), middle), _each(builder, step, _FLOATS))

    return _LANES(packed, types.uint64, width, types.float32), generate


@intrinsic
def zeros(typing_context):
    """Eight times 0."""
    return _LANES(), lambda context, builder, signature, arguments: ir.Constant(_FLOATS, [ir.Constant(_FLOAT, 0.0)] * GROUP)


@intrinsic
def load(typing_context, array, at):
    """array[at : at + 8]."""

    def generate(context, builder, signature, arguments):
        array, at = arguments
        return builder.load(_place(context, builder, signature.args[0], array, at, _FLOATS), align=4)

    return _LANES(array, types.uint64), generate


@intrinsic
def store(typing_context, array, at, lanes):
    """array[at : at + 8] = lanes."""

    def generate(context, builder, signature, arguments):
        array, at, lanes = arguments
        builder.store(lanes, _place(context, builder, signature.args[0], array, at, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(array, types.uint64, _LANES), generate


@intrinsic
def plus(typing_context, lanes, x, y):
    """lanes + x * y, for vectors x and y, or a vector x and a number y."""

    def generate(context, builder, signature, arguments):
        lanes, x, y = arguments
        factors = _each(builder, y, _FLOATS) if signature.args[2] == types.float32 else y
        return builder.fadd(lanes, builder.fmul(x, factors, flags=("contract",)), flags=("contract",))

    return _LANES(_LANES, _LANES, y), generate
