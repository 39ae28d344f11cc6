"""Typed helpers over the MLIR bindings: the few words in which kernels are written.

A size, stride or offset is either a Python ``int`` (a constant of the kernel) or an :class:`I64` (an SSA
value, usually an argument). Arithmetic folds constants, so the same generator code yields a kernel that takes
a size as an argument or one that is specialised to it. Memory is reached through :class:`Ptr`, whose offsets
are in elements. Nothing here knows what a matrix product is.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir._mlir_libs import _jax_mlir_ext
from jaxlib.mlir.dialects import arith, func, llvm, scf, vector

from jax_nano._core.spec import DTYPES

__all__ = [
    "I64",
    "Module",
    "Ptr",
    "Size",
    "Value",
    "add_vectors",
    "alloca",
    "bitcast",
    "bits_as",
    "both",
    "call_intrinsic",
    "constant_vector",
    "convert",
    "elem_bytes",
    "equal",
    "extract",
    "fma",
    "if_",
    "keep_order",
    "lane_mask",
    "loop",
    "maximum",
    "minimum",
    "multiply_add",
    "negate",
    "new_module",
    "pair",
    "select",
    "select_size",
    "shuffle",
    "splat",
    "subtract",
    "switch",
    "tree_sum",
    "type_of",
    "vec",
    "xor_constant",
    "zero_unless_finite",
    "zeros",
]

Value = ir.Value


def _binary(op: Callable[..., Value], a: Size, b: Size) -> I64:
    return I64(op(_i64(a), _i64(b)))


class I64:
    """A 64-bit integer SSA value with folding arithmetic."""

    __slots__ = ("value",)

    def __init__(self, value: Value):
        self.value = value

    def __add__(self, other: Size) -> Size:
        return self if _is(other, 0) else _binary(arith.addi, self, other)

    __radd__ = __add__

    def __sub__(self, other: Size) -> Size:
        if other is self:
            return 0
        return self if _is(other, 0) else _binary(arith.subi, self, other)

    def __rsub__(self, other: Size) -> Size:
        return _binary(arith.subi, other, self)

    def __mul__(self, other: Size) -> Size:
        if _is(other, 0):
            return 0
        return self if _is(other, 1) else _binary(arith.muli, self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Size:
        """Division of non-negative numbers, rounded down."""
        return self if _is(other, 1) else _binary(arith.divui, self, other)

    def __rfloordiv__(self, other: Size) -> Size:
        return _binary(arith.divui, other, self)

    def __mod__(self, other: Size) -> Size:
        """Remainder of non-negative numbers."""
        return 0 if _is(other, 1) else _binary(arith.remui, self, other)

    def __or__(self, other: Size) -> Size:
        return self if _is(other, 0) else _binary(arith.ori, self, other)

    __ror__ = __or__

    def _compare(self, predicate: int, other: Size) -> Value:
        return arith.cmpi(predicate, self.value, _i64(other))

    def eq(self, other: Size) -> Value:
        return self._compare(0, other)

    def ne(self, other: Size) -> Value:
        return self._compare(1, other)

    def lt(self, other: Size) -> Value:
        return self._compare(2, other)

    def ge(self, other: Size) -> Value:
        return self._compare(5, other)


Size = int | I64
"""A number known when the kernel is generated, or one of its run-time values."""


def _is(x: Size, constant: int) -> bool:
    return isinstance(x, int) and x == constant


def _i64(x: Size) -> Value:
    if isinstance(x, I64):
        return x.value
    return arith.constant(ir.IntegerType.get_signless(64), x)


def minimum(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return I64(arith.minsi(_i64(a), _i64(b)))


def maximum(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return I64(arith.maxsi(_i64(a), _i64(b)))


def equal(a: Size, b: Size) -> Value | bool:
    if isinstance(a, I64):
        return a.eq(b)
    return b.eq(a) if isinstance(b, I64) else a == b


def less(a: Size, b: Size) -> Value | bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return arith.cmpi(arith.CmpIPredicate.slt, _i64(a), _i64(b))


def both(a: Value | bool, b: Value | bool) -> Value | bool:
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return arith.andi(a, b)


def negate(a: Value | bool) -> Value | bool:
    if isinstance(a, bool):
        return not a
    return arith.xori(a, arith.constant(ir.IntegerType.get_signless(1), 1))


def select_size(condition: Value | bool, a: Size, b: Size) -> Size:
    if isinstance(condition, bool):
        return a if condition else b
    return I64(arith.select(condition, _i64(a), _i64(b)))


def _op(
    name: str, results: Sequence[ir.Type], operands: Sequence[Value], *, regions: int = 0, **attributes: ir.Attribute
) -> ir.Operation:
    """An op in generic form: the Python classes of these ops take other arguments in other jaxlib versions."""
    return ir.Operation.create(name, list(results), list(operands), attributes, regions=regions)


def _i32_attr(x: int) -> ir.Attribute:
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(32), x)


# --- types ----------------------------------------------------------------------------------------------------


_WORDS = {"ptr": "!llvm.ptr", "i64": "i64", "int64": "i64"}
"""MLIR types of what is no dtype of a kernel; each has 8 bytes."""


def type_of(name: str) -> ir.Type:
    """The MLIR type in memory of a dtype of the spec, or "ptr", "i64", "int64"."""
    return ir.Type.parse(_WORDS.get(name) or DTYPES[name].mlir)


def elem_bytes(name: str) -> int:
    """What an element takes in memory."""
    return 8 if name in _WORDS else DTYPES[name].bytes


def vec(n: int, elem: ir.Type) -> ir.VectorType:
    return ir.VectorType.get([n], elem)


# --- memory ---------------------------------------------------------------------------------------------------


class Ptr:
    """A typed address. Offsets are in elements of ``elem`` (a dtype name)."""

    __slots__ = ("elem", "value")

    def __init__(self, value: Value, elem: str):
        self.value = value
        self.elem = elem

    @property
    def type(self) -> ir.Type:
        return type_of(self.elem)

    def at(self, offset: Size) -> Ptr:
        """The address ``offset`` elements further on."""
        if _is(offset, 0):
            return self
        constant = offset if isinstance(offset, int) and -(2**31) < offset < 2**31 else None
        gep = _op(
            "llvm.getelementptr",
            [self.value.type],
            [self.value] if constant is not None else [self.value, _i64(offset)],
            elem_type=ir.TypeAttr.get(self.type),
            rawConstantIndices=ir.DenseI32ArrayAttr.get([_DYNAMIC if constant is None else constant]),
        )
        return Ptr(gep.result, self.elem)

    def at_scaled(self, index: Size, scale: int) -> Ptr:
        """The address ``index * scale`` BYTES further (scale 1, 2, 4 or 8): one x86 address ``p + index * scale``."""
        return Ptr(Ptr(self.value, {1: "int8", 2: "int16", 4: "int32", 8: "int64"}[scale]).at(index).value, self.elem)

    @staticmethod
    def of_address(address: I64, elem: str) -> Ptr:
        """What an integer points to."""
        return Ptr(_op("llvm.inttoptr", [type_of("ptr")], [address.value]).result, elem)

    @property
    def address(self) -> I64:
        """The address as an integer."""
        return I64(_op("llvm.ptrtoint", [type_of("i64")], [self.value]).result)

    def as_type(self, elem: str) -> Ptr:
        return Ptr(self.value, elem)

    def load(self, lanes: int | None = None, mask: Value | None = None, alignment: int | None = None) -> Value:
        """A scalar (no ``lanes``) or a vector; lanes that ``mask`` leaves out are not read and give zero.

        The address is a multiple of ``alignment`` bytes, unless given of an element's.
        """
        align = alignment or elem_bytes(self.elem)
        if lanes is None:
            return llvm.load(self.type, self.value, alignment=align)
        ty = vec(lanes, self.type)
        if mask is None:
            return llvm.load(ty, self.value, alignment=align)
        operands = [self.value, mask, zeros(lanes, self.elem)]
        return _op("llvm.intr.masked.load", [ty], operands, alignment=_i32_attr(align)).result

    def store(self, value: Value, mask: Value | None = None) -> None:
        align = elem_bytes(self.elem)
        if mask is None:
            llvm.store(value, self.value, alignment=align)
        else:
            _op("llvm.intr.masked.store", [], [value, self.value, mask], alignment=_i32_attr(align))

    def prefetch(self, *, write: bool = False, level: int = 1) -> None:
        """Fetches the line into the data cache of this level and all beyond it."""
        data_cache, keep = _i32_attr(1), _i32_attr(4 - level)
        _op("llvm.intr.prefetch", [], [self.value], rw=_i32_attr(int(write)), hint=keep, cache=data_cache)


_DYNAMIC = -(2**31)  # MLIR's mark for "this index is an operand"


def select_ptr(condition: Value | bool, a: Ptr, b: Ptr) -> Ptr:
    """One of two addresses of elements of the same type."""
    if isinstance(condition, bool):
        return a if condition else b
    return Ptr(arith.select(condition, a.value, b.value), a.elem)


# --- vectors --------------------------------------------------------------------------------------------------


def _number(x: float | int, ty: ir.Type) -> ir.Attribute:
    return ir.IntegerAttr.get(ty, int(x)) if isinstance(ty, ir.IntegerType) else ir.FloatAttr.get(ty, float(x))


def scalar_constant(x: float | int, elem: str) -> Value:
    ty = type_of(elem)
    return arith.constant(ty, _number(x, ty))


def constant_vector(x: float | int, lanes: int, elem: str) -> Value:
    ty = vec(lanes, type_of(elem))
    return arith.constant(ty, ir.DenseElementsAttr.get_splat(ty, _number(x, type_of(elem))))


def _constant_like(x: float | int, v: Value) -> Value:
    """A constant of v's type: a scalar or a splat."""
    if isinstance(v.type, ir.VectorType):
        attr = ir.DenseElementsAttr.get_splat(v.type, _number(x, v.type.element_type))
        return arith.constant(v.type, attr)
    return arith.constant(v.type, _number(x, v.type))


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


def bits_as(v: Value, elem: str) -> Value:
    """The same bits as elements of another type of the same size, scalar or vector."""
    return arith.bitcast(_with_element(v, type_of(elem)), v)


def pair(low: Value, high: Value) -> Value:
    """Two scalars of 16 bits as the 32 bits that they are side by side in memory."""
    low, high = (arith.extui(type_of("int32"), x) for x in (low, high))
    return arith.ori(low, arith.shli(high, _constant_like(16, high)))


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
    return arith.constant(vec(len(values), ty), ir.DenseElementsAttr.get(elements, type=vec(len(values), ty)))


def splat_bool(condition: Value | bool, lanes: int) -> Value:
    """A mask of equal lanes."""
    bit = ir.IntegerType.get_signless(1)
    one = arith.constant(bit, int(condition)) if isinstance(condition, bool) else condition
    return vector.broadcast(vec(lanes, bit), one)


def equal_to(v: Value, x: int) -> Value:
    """A mask of the integer elements that are x."""
    return arith.cmpi(arith.CmpIPredicate.eq, v, _constant_like(x, v))


def int32_to_float32(v: Value) -> Value:
    """float32 of int32, scalar or vector."""
    return arith.sitofp(_with_element(v, type_of("float32")), v)


def as_int32(x: Size) -> Value:
    """The low half of a size as an int32."""
    return arith.trunci(type_of("int32"), _i64(x))


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
    count = splat(arith.trunci(ty, _i64(clipped)), lanes)
    steps = ir.DenseElementsAttr.get([ir.IntegerAttr.get(ty, i) for i in range(lanes)], type=vec(lanes, ty))
    return arith.cmpi(2, arith.constant(vec(lanes, ty), steps), count)


def alloca(count: int, elem: str) -> Ptr:
    """Room for ``count`` elements on the stack, 64-byte aligned. Only at the top of a function."""
    op = _op(
        "llvm.alloca",
        [type_of("ptr")],
        [_i64(count)],
        elem_type=ir.TypeAttr.get(type_of(elem)),
        alignment=ir.IntegerAttr.get(type_of("int64"), 64),
    )
    return Ptr(op.result, elem)


def call_intrinsic(name: str, result: ir.Type, args: Sequence[Value]) -> Value:
    """Calls the LLVM intrinsic of this full name."""
    return _intrinsic(name, [result], args).result


def run_intrinsic(name: str, args: Sequence[Value]) -> None:
    """The same for an intrinsic that gives nothing back."""
    _intrinsic(name, [], args)


def keep_order() -> None:
    """No load or store moves past this point; no instruction is made of it."""
    acquire_release = ir.IntegerAttr.get(type_of("int64"), 6)
    _op("llvm.fence", [], [], ordering=acquire_release, syncscope=ir.StringAttr.get("singlethread"))


def as_value(x: Size) -> Value:
    """A size as the SSA value that an intrinsic takes."""
    return _i64(x)


def _intrinsic(name: str, results: Sequence[ir.Type], args: Sequence[Value]) -> ir.Operation:
    return _op(
        "llvm.call_intrinsic",
        results,
        args,
        intrin=ir.StringAttr.get(name),
        op_bundle_sizes=ir.DenseI32ArrayAttr.get([]),
        operandSegmentSizes=ir.DenseI32ArrayAttr.get([len(args), 0]),
    )


# --- control flow ---------------------------------------------------------------------------------------------


def _unwrap(x: Any) -> Value:
    if isinstance(x, int):
        return _i64(x)
    return x.value if isinstance(x, (I64, Ptr)) else x


def _rewrap(like: Any, value: Value) -> Any:
    if isinstance(like, Ptr):
        return Ptr(value, like.elem)
    return I64(value) if isinstance(like, (I64, int)) else value


def loop(lo: Size, hi: Size, step: Size, init: Sequence[Any], body: Callable[..., Sequence[Any] | None]) -> list[Any]:
    """``for iv in range(lo, hi, step): carried = body(iv, *carried)``; returns what is carried out."""
    op = scf.ForOp(_i64(lo), _i64(hi), _i64(step), [_unwrap(x) for x in init])
    with ir.InsertionPoint(op.body):
        carried = [_rewrap(like, v) for like, v in zip(init, op.inner_iter_args, strict=True)]
        out = body(I64(op.induction_variable), *carried) or []
        scf.yield_([_unwrap(x) for x in out])
    return [_rewrap(like, v) for like, v in zip(init, op.results, strict=True)]


def if_(
    condition: Value | bool,
    then: Callable[[], Sequence[Any] | None],
    otherwise: Callable[[], Sequence[Any] | None] | None = None,
    like: Sequence[Any] = (),
) -> list[Any]:
    """Runs one of two bodies, each returning values of the kinds of ``like``. A Python bool decides right here."""
    if isinstance(condition, bool):
        chosen = then if condition else otherwise
        return list((chosen() if chosen else None) or [])
    op = _op("scf.if", [_unwrap(x).type for x in like], [condition], regions=2)
    for region, body in zip(op.regions, (then, otherwise), strict=True):
        if body is not None:
            with ir.InsertionPoint(region.blocks.append()):
                scf.yield_([_unwrap(x) for x in (body() or [])])
    return [_rewrap(x, v) for x, v in zip(like, op.results, strict=True)]


def switch(
    value: Size, cases: Sequence[Callable[[], Sequence[Any] | None]], first: int = 0, like: Sequence[Any] = ()
) -> list[Any]:
    """Runs ``cases[value - first]``; a value outside the cases runs the last one. Results as in ``if_``."""
    index = arith.index_cast(ir.IndexType.get(), _i64(value))
    labels = [first + i for i in range(len(cases) - 1)]
    types = [_unwrap(x).type for x in like]
    op = _op("scf.index_switch", types, [index], regions=len(cases), cases=ir.DenseI64ArrayAttr.get(labels))
    for region, case in zip(op.regions, [cases[-1], *cases[:-1]], strict=True):
        with ir.InsertionPoint(region.blocks.append()):
            scf.yield_([_unwrap(x) for x in (case() or [])])
    return [_rewrap(x, v) for x, v in zip(like, op.results, strict=True)]


# --- functions and modules ------------------------------------------------------------------------------------


class Module:
    """An MLIR module under construction."""

    def __init__(self) -> None:
        self.op = ir.Module.create()
        self._functions: dict[str, list[str]] = {}

    def function(self, name: str, params: Sequence[str], body: Callable[..., None], *, internal: bool) -> None:
        """Adds ``void name(params...)``, once. A parameter is "i64" or a dtype name (a pointer to such elements)."""
        if name in self._functions:
            return
        self._functions[name] = list(params)
        types = [type_of("i64" if p == "i64" else "ptr") for p in params]
        with ir.InsertionPoint(self.op.body):
            op = func.FuncOp(name, (types, []))
            if internal:
                op.attributes["llvm.linkage"] = ir.Attribute.parse("#llvm.linkage<internal>")
                op.attributes["passthrough"] = ir.ArrayAttr.get([ir.StringAttr.get("noinline")])
            block = op.add_entry_block()
        with ir.InsertionPoint(block):
            body(*[I64(v) if p == "i64" else Ptr(v, p) for p, v in zip(params, block.arguments, strict=True)])
            func.return_([])

    def call(self, name: str, args: Sequence[Size | Ptr]) -> None:
        """Calls a function that was added before."""
        if len(args) != len(self._functions[name]):
            raise TypeError(f"{name} takes {len(self._functions[name])} arguments, got {len(args)}")
        func.call([], ir.FlatSymbolRefAttr.get(name), [_unwrap(a) for a in args])

    def text(self) -> str:
        """The verified module, printed."""
        self.op.operation.verify()
        return str(self.op)


@contextlib.contextmanager
def new_module() -> Iterator[Module]:
    """An empty module in a context of its own, with the dialects that kernels use."""
    registry = ir.DialectRegistry()
    _jax_mlir_ext.register_dialects(registry)
    context = ir.Context()
    context.append_dialect_registry(registry)
    context.load_all_available_dialects()
    context.allow_unregistered_dialects = True
    with context, ir.Location.unknown():
        yield Module()
