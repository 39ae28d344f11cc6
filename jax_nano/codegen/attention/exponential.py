"""Powers of two of vectors, and maxima."""

from __future__ import annotations

from .. import ir
from ..ir import Value

LOG2_E = 1.4426950408889634

SLACK = 8.0
"""Exponents are at most this: weights are below 2**SLACK."""

LEAST_EXPONENT = -127.0  # whose exponent field is zero: that of the number 0
EXPONENT_BIAS = 127  # of a float32's exponent
ROUND_TO_INTEGER = 1.5 * 2**23  # added to a float32, it leaves the nearest integer in the low bits

# 2^r for |r| <= 1/2: 0.95 units in the last place with the roundings of Horner's rule.
EXP2 = (
    *(1.0, 0.6931471824645996, 0.24022644758224487, 0.05550329014658928),
    *(0.009618661366403103, 0.0013399951858446002, 0.00015309931768570095),
)


def exp2(x: Value) -> Value:
    """2**x for float32 x <= SLACK, within two ulp of the exact; 0 from -126.5 downwards; a NaN stays one."""
    x = maximum(ir.like(x, LEAST_EXPONENT), x)
    magic = ir.like(x, ROUND_TO_INTEGER + EXPONENT_BIAS)
    shifted = ir.add_vectors(x, magic)
    r = ir.subtract(x, ir.subtract(shifted, magic))
    # In pairs of terms, a third shorter than Horner's rule: what limits a core here is how many it has under way.
    square = ir.multiply(r, r)
    y = ir.like(x, EXP2[6])
    for low, high in ((4, 5), (2, 3), (0, 1)):
        y = ir.fma(y, square, ir.fma(r, ir.like(x, EXP2[high]), ir.like(x, EXP2[low])))
    return ir.multiply(y, ir.exponent_of_low_bits(shifted))


def maximum(a: Value, b: Value) -> Value:
    """The greater one; b if one is NaN."""
    return ir.select(ir.compare(a, ">", b), a, b)


def greatest(v: Value) -> Value:
    """The greatest of a vector's lanes as a scalar: halves are compared until one lane is left."""
    n = ir.lanes_of(v)
    while n > 1:
        n //= 2
        v = maximum(ir.shuffle(v, v, range(n)), ir.shuffle(v, v, range(n, 2 * n)))
    return ir.extract(v, 0)
