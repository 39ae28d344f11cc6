"""Arithmetic of scalars and vectors, conversions, masks and shuffles, all in registers."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jax_nano._core.spec import DTYPES

from . import constants
from .constants import constant
from .sizes import Size, Value, as_value, minimum
from .types import elem_bytes, operation, type_of, vec


def _number(x: float | int, ty: ir.Type) -> ir.Attribute:
    return ir.IntegerAttr.get(ty, int(x)) if isinstance(ty, ir.IntegerType) else ir.FloatAttr.get(ty, float(x))


def scalar_constant(x: float | int, elem: str) -> Value:
    ty = type_of(elem)
    return constant(ty, _number(x, ty))


def constant_vector(x: float | int, lanes: int, elem: str) -> Value:
    ty = vec(lanes, type_of(elem))
    return constant(ty, ir.DenseElementsAttr.get_splat(ty, _number(x, type_of(elem))))


def _constant_like(x: float | int, v: Value) -> Value:
    """A constant of v's type: a scalar or a splat."""
    if isinstance(v.type, ir.VectorType):
        attr = ir.DenseElementsAttr.get_splat(v.type, _number(x, v.type.element_type))
        return constant(v.type, attr)
    return constant(v.type, _number(x, v.type))


def _with_element(v: Value, elem: ir.Type) -> ir.Type:
    """v's type with another element type."""
    return vec(v.type.shape[0], elem) if isinstance(v.type, ir.VectorType) else elem


def zeros(lanes: int, elem: str) -> Value:
    return constant_vector(0, lanes, elem)


def zeros_like(v: Value) -> Value:
    """Zero of v's type."""
    return _constant_like(0, v)


def zero_of(elem: str) -> Value:
    """A scalar zero."""
    return scalar_constant(0, elem)


def lanes_of(v: Value) -> int:
    return int(ir.VectorType(v.type).shape[0])


def splat(scalar: Value, lanes: int) -> Value:
    return vector.broadcast(vec(lanes, scalar.type), scalar)


def fma(a: Value, b: Value, c: Value) -> Value:
    """a * b + c, rounded once."""
    return llvm.FMAOp(a, b, c).results[0]


def multiply_add(a: Value, b: Value, c: Value) -> Value:
    """a * b + c; floats are rounded once, integers wrap."""
    elem = a.type.element_type if isinstance(a.type, ir.VectorType) else a.type
    return arith.addi(arith.muli(a, b), c) if isinstance(elem, ir.IntegerType) else fma(a, b, c)


def tree_sum(v: Value) -> Value:
    """The sum of a vector's lanes as a scalar: halves are added until one lane is left."""
    n = lanes_of(v)
    while n > 1:
        n //= 2
        v = add_vectors(shuffle(v, v, range(n)), shuffle(v, v, range(n, 2 * n)))
    return extract(v, 0)


def add_vectors(a: Value, b: Value) -> Value:
    elem = ir.VectorType(a.type).element_type if isinstance(a.type, ir.VectorType) else a.type
    return arith.addi(a, b) if isinstance(elem, ir.IntegerType) else arith.addf(a, b)


def shuffle(a: Value, b: Value, lanes: Sequence[int]) -> Value:
    return vector.shuffle(a, b, list(lanes))


def extract(v: Value, lane: int) -> Value:
    return vector.extract(v, [], [lane])


def bitcast(v: Value, lanes: int, elem: str | ir.Type) -> Value:
    """The same register seen as ``lanes`` elements of another type."""
    ty = vec(lanes, type_of(elem) if isinstance(elem, str) else elem)
    return v if v.type == ty else vector.bitcast(ty, v)


def convert(v: Value, source: str, target: str) -> Value:
    """Value conversion of a scalar or vector between dtypes; narrowing floats rounds to nearest even."""
    if source == target:
        return v
    if source == "bfloat16" and target == "float32":
        wide = arith.extui(_with_element(v, type_of("int32")), v)
        return bits_as(arith.shli(wide, _constant_like(16, wide)), "float32")
    if source == "float32" and target == "bfloat16":
        return _round_to_bf16(v)
    ty = _with_element(v, type_of(target))
    if _has_arithmetic(source) and _has_arithmetic(target):
        return arith.extf(ty, v) if elem_bytes(target) > elem_bytes(source) else arith.truncf(ty, v)
    if _is_integer(source) and _is_integer(target):
        if elem_bytes(target) < elem_bytes(source):
            return arith.trunci(ty, v)
        if elem_bytes(target) == elem_bytes(source):
            return v
        return arith.extui(ty, v) if DTYPES[source].kind == "uint" else arith.extsi(ty, v)
    raise ValueError(f"no conversion from {source} to {target}")


def _has_arithmetic(dtype: str) -> bool:
    """Whether LLVM converts this dtype of real numbers, which it does not where we move it as bits."""
    return DTYPES[dtype].kind == "float" and DTYPES[dtype].mlir.startswith("f")


def _is_integer(dtype: str) -> bool:
    return DTYPES[dtype].kind != "float"


def _round_to_bf16(v: Value) -> Value:
    """f32 to bf16 bits, to nearest even; a NaN stays one. In integer arithmetic, the same on every target."""
    bits = bits_as(v, "int32")
    high = arith.shrui(bits, _constant_like(16, bits))
    odd = arith.andi(high, _constant_like(1, bits))
    rounded = arith.shrui(arith.addi(bits, arith.addi(odd, _constant_like(0x7FFF, bits))), _constant_like(16, bits))
    quiet = arith.ori(high, _constant_like(0x40, bits))
    is_nan = arith.cmpf(arith.CmpFPredicate.UNO, v, v)
    return arith.trunci(_with_element(v, type_of("bfloat16")), arith.select(is_nan, quiet, rounded))


def exactly_bfloat16(lower: Value, higher: Value) -> Value:
    """Two vectors of float32 that bfloat16 holds exactly as one of bfloat16: the upper halves of their words."""
    lanes = lanes_of(lower)
    first, second = (bitcast(v, 2 * lanes, "int16") for v in (lower, higher))
    return bits_as(shuffle(first, second, range(1, 4 * lanes, 2)), "bfloat16")


def bits_as(v: Value, elem: str) -> Value:
    """The same bits as elements of another type of the same size, scalar or vector."""
    return arith.bitcast(_with_element(v, type_of(elem)), v)


def pair(low: Value, high: Value) -> Value:
    """Two scalars of 16 bits as the 32 bits that they are side by side in memory."""
    low, high = (arith.extui(type_of("int32"), x) for x in (low, high))
    return arith.ori(low, arith.shli(high, _constant_like(16, high)))


def widened_bits(scalar: Value, elem: str) -> Value:
    """The bits of an integer as the lowest ones of a wider one, above which are zeros."""
    return arith.extui(type_of(elem), scalar)


def subtract(a: Value, b: Value) -> Value:
    """Element-wise a - b."""
    elem = a.type.element_type if isinstance(a.type, ir.VectorType) else a.type
    return arith.subi(a, b) if isinstance(elem, ir.IntegerType) else arith.subf(a, b)


def zero_unless_finite(v: Value, witness: Value) -> Value:
    """Floats ``v`` where ``witness`` is finite, else zero."""
    bits = bits_as(witness, "int32")
    exponent = arith.andi(bits, _constant_like(0x7F800000, bits))
    finite = arith.cmpi(arith.CmpIPredicate.ne, exponent, _constant_like(0x7F800000, bits))
    return arith.select(finite, v, _constant_like(0, v))


def xor_constant(v: Value, x: int) -> Value:
    """Each integer element xor x."""
    return arith.xori(v, _constant_like(x, v))


def xor(a: Value, b: Value) -> Value:
    """Integers a xor b, bit by bit."""
    return arith.xori(a, b)


def or_(a: Value, b: Value) -> Value:
    """Integers a or b, bit by bit."""
    return arith.ori(a, b)


def and_constant(v: Value, x: int) -> Value:
    """Each integer element and x, bit by bit."""
    return arith.andi(v, _constant_like(x, v))


def shift_left(v: Value, bits: int) -> Value:
    """Each integer element moved up by so many bits."""
    return arith.shli(v, _constant_like(bits, v)) if bits else v


def shift_right(v: Value, bits: int) -> Value:
    """Each integer element moved down by so many bits; zeros come in from above."""
    return arith.shrui(v, _constant_like(bits, v)) if bits else v


def shift_right_signed(v: Value, bits: int) -> Value:
    """Each integer element moved down by so many bits; its sign comes in from above."""
    return arith.shrsi(v, _constant_like(bits, v)) if bits else v


def constant_bytes(values: Sequence[int]) -> Value:
    """A vector of unsigned bytes."""
    ty = type_of("uint8")
    elements = [ir.IntegerAttr.get(ty, x - 256 if x > 127 else x) for x in values]
    return constant(vec(len(values), ty), ir.DenseElementsAttr.get(elements, type=vec(len(values), ty)))


def constant_elements(values: Sequence[float], elem: str) -> Value:
    """A vector of these numbers."""
    ty = type_of(elem)
    return constant(
        vec(len(values), ty), ir.DenseElementsAttr.get([_number(x, ty) for x in values], type=vec(len(values), ty))
    )


def splat_bool(condition: Value | bool, lanes: int) -> Value:
    """A mask of equal lanes."""
    bit = ir.IntegerType.get_signless(1)
    one = constants.bit(condition) if isinstance(condition, bool) else condition
    return vector.broadcast(vec(lanes, bit), one)


def equal_to(v: Value, x: int) -> Value:
    """A mask of the integer elements that are x."""
    return arith.cmpi(arith.CmpIPredicate.eq, v, _constant_like(x, v))


def int32_to_float32(v: Value) -> Value:
    """float32 of int32, scalar or vector."""
    return arith.sitofp(_with_element(v, type_of("float32")), v)


def as_int32(x: Size) -> Value:
    """The low half of a size as an int32."""
    return arith.trunci(type_of("int32"), as_value(x))


def select(mask: Value, a: Value, b: Value) -> Value:
    return arith.select(mask, a, b)


def compare(a: Value, sign: str, b: Value) -> Value:
    """Floats compared element by element, by "<", "<=" or ">"; false where one is NaN."""
    predicates = {"<": arith.CmpFPredicate.OLT, "<=": arith.CmpFPredicate.OLE, ">": arith.CmpFPredicate.OGT}
    return arith.cmpf(predicates[sign], a, b)


def like(v: Value, x: float | int) -> Value:
    """The constant x as a value of v's type."""
    return _constant_like(x, v)


def multiply(a: Value, b: Value) -> Value:
    """Floats a * b, rounded by itself: no sum is fused to it."""
    return arith.mulf(a, b)


def divide(a: Value, b: Value) -> Value:
    """Floats a / b."""
    return arith.divf(a, b)


def minus(v: Value) -> Value:
    """Floats -v."""
    return arith.negf(v)


def absolute(v: Value) -> Value:
    """float32 |v|."""
    bits = bits_as(v, "int32")
    return bits_as(arith.andi(bits, _constant_like(0x7FFFFFFF, bits)), "float32")


def with_sign_of(v: Value, x: Value) -> Value:
    """float32 v >= 0 with the sign of x."""
    bits = bits_as(x, "int32")
    sign = arith.andi(bits, _constant_like(-(2**31), bits))
    return bits_as(arith.ori(bits_as(v, "int32"), sign), "float32")


def halves_of_power_of_two(shifted: Value, origin: float) -> tuple[Value, Value]:
    """Two float32 factors of 2**n, where ``shifted - origin`` = n is an integer of -254..254, by exponent fields.

    A factor whose field would be below that of 2**-126 is zero.
    """
    bits = bits_as(shifted, "int32")
    start = struct.unpack("<i", struct.pack("<f", origin))[0]
    n = arith.subi(bits, _constant_like(start, bits))
    half = arith.shrsi(n, _constant_like(1, n))

    def power(n: Value) -> Value:
        biased = arith.addi(n, _constant_like(127, n))
        return bits_as(arith.shli(biased, _constant_like(23, n)), "float32")

    return power(half), power(arith.subi(n, half))


def exponent_of_low_bits(v: Value) -> Value:
    """The float32 number whose exponent field are the low bits of float32 v's fraction, and all else zero."""
    bits = bits_as(v, "int32")
    return bits_as(arith.shli(bits, _constant_like(23, bits)), "float32")


def nonzero(v: Value) -> Value:
    """A mask of the integers that are not zero."""
    return arith.cmpi(arith.CmpIPredicate.ne, v, _constant_like(0, v))


def except_lanes(mask: Value, others: Value) -> Value:
    """The lanes of ``mask`` that are not among the ``others``."""
    return arith.andi(mask, arith.xori(others, _constant_like(1, others)))


def add_products_of_pairs(a: Value, b: Value, acc: Value) -> Value:
    """acc + a[1] * b[1] + a[0] * b[0] in each lane, by ``vdpbf16ps``: a and b are registers of pairs of bfloat16."""
    bits = 32 * lanes_of(acc)
    pairs = [bitcast(x, bits // 16, ir.BF16Type.get()) for x in (a, b)]
    return call_intrinsic(f"llvm.x86.avx512bf16.dpbf16ps.{bits}", acc.type, [acc, *pairs])


def rounded_to_float32(x: float) -> float:
    """The float32 number nearest to x."""
    (y,) = struct.unpack("<f", struct.pack("<f", x))
    return float(y)


def lane_mask(active: Size, lanes: int, elem: str = "int32") -> Value:
    """A mask whose first ``active`` lanes are set; ``active`` may be anything, also negative or beyond ``lanes``.

    Lanes are compared as integers of type ``elem``: that of the elements to mask, where the mask is a vector.
    """
    clipped = minimum(active, lanes)
    ty = type_of(elem)
    count = splat(arith.trunci(ty, as_value(clipped)), lanes)
    steps = ir.DenseElementsAttr.get([ir.IntegerAttr.get(ty, i) for i in range(lanes)], type=vec(lanes, ty))
    return arith.cmpi(2, constant(vec(lanes, ty), steps), count)


def call_intrinsic(name: str, result: ir.Type, args: Sequence[Value]) -> Value:
    """Calls the LLVM intrinsic of this full name."""
    return _intrinsic(name, [result], args).result


def run_intrinsic(name: str, args: Sequence[Value]) -> None:
    """The same for an intrinsic that gives nothing back."""
    _intrinsic(name, [], args)


def _intrinsic(name: str, results: Sequence[ir.Type], args: Sequence[Value]) -> ir.Operation:
    return operation(
        "llvm.call_intrinsic",
        results,
        args,
        intrin=ir.StringAttr.get(name),
        op_bundle_sizes=ir.DenseI32ArrayAttr.get([]),
        operandSegmentSizes=ir.DenseI32ArrayAttr.get([len(args), 0]),
    )
