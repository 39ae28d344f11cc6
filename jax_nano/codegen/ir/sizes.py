"""Sizes, strides and offsets: numbers known while a kernel is generated, or its 64-bit integers at run time."""

from __future__ import annotations

from collections.abc import Callable

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from . import constants

Value = ir.Value


def _binary(op: Callable[..., Value], a: Size, b: Size) -> I64:
    return I64(op(as_value(a), as_value(b)))


class I64:
    """A 64-bit integer SSA value with folding arithmetic."""

    __slots__ = ("value",)

    def __init__(self, value: Value):
        self.value = value

    def __add__(self, other: Size) -> Size:
        return self if is_constant(other, 0) else _binary(arith.addi, self, other)

    __radd__ = __add__

    def __sub__(self, other: Size) -> Size:
        if other is self:
            return 0
        return self if is_constant(other, 0) else _binary(arith.subi, self, other)

    def __rsub__(self, other: Size) -> Size:
        return _binary(arith.subi, other, self)

    def __mul__(self, other: Size) -> Size:
        if is_constant(other, 0):
            return 0
        return self if is_constant(other, 1) else _binary(arith.muli, self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Size:
        """Division of non-negative numbers, rounded down."""
        return self if is_constant(other, 1) else _binary(arith.divui, self, other)

    def __rfloordiv__(self, other: Size) -> Size:
        return _binary(arith.divui, other, self)

    def __mod__(self, other: Size) -> Size:
        """Remainder of non-negative numbers."""
        return 0 if is_constant(other, 1) else _binary(arith.remui, self, other)

    def __or__(self, other: Size) -> Size:
        return self if is_constant(other, 0) else _binary(arith.ori, self, other)

    __ror__ = __or__

    def _compare(self, predicate: int, other: Size) -> Value:
        return arith.cmpi(predicate, self.value, as_value(other))

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


def is_constant(x: Size, constant: int) -> bool:
    return isinstance(x, int) and x == constant


def as_value(x: Size) -> Value:
    """A size as an SSA value."""
    if isinstance(x, I64):
        return x.value
    return constants.size(x)


def minimum(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return I64(arith.minsi(as_value(a), as_value(b)))


def maximum(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return I64(arith.maxsi(as_value(a), as_value(b)))


def equal(a: Size, b: Size) -> Value | bool:
    if isinstance(a, I64):
        return a.eq(b)
    return b.eq(a) if isinstance(b, I64) else a == b


def less(a: Size, b: Size) -> Value | bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return arith.cmpi(arith.CmpIPredicate.slt, as_value(a), as_value(b))


def both(a: Value | bool, b: Value | bool) -> Value | bool:
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return arith.andi(a, b)


def negate(a: Value | bool) -> Value | bool:
    if isinstance(a, bool):
        return not a
    return arith.xori(a, constants.bit(True))


def select_size(condition: Value | bool, a: Size, b: Size) -> Size:
    if isinstance(condition, bool):
        return a if condition else b
    return I64(arith.select(condition, as_value(a), as_value(b)))


def at_least(a: Size, b: Size) -> Value | bool:
    return negate(less(a, b))


def is_set(flag: Size) -> Value | bool:
    """Whether it is not zero."""
    return negate(equal(flag, 0))


def ceil_div(a: Size, b: Size) -> Size:
    """a / b of non-negative numbers, rounded up."""
    return (a + (b - 1)) // b


def round_up(a: Size, multiple: Size) -> Size:
    """The next multiple from a >= 0 on."""
    return ceil_div(a, multiple) * multiple
