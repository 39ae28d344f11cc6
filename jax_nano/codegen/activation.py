"""Activations as straight-line vector arithmetic in float32: what an epilogue applies to finished sums.

All of them but relu come down to one exponential and one division. With ``r(t) = t * exp(-z) / (1 + exp(-z))`` for
``t = |x|``,

    silu, gelu_tanh    x < 0: -r      x >= 0: x - r         z = |x|, or gelu's 2 sqrt(2/pi) (|x| + 0.044715 |x|^3)
    gelu_erf           the same with  r(t) = t * Phi(-t) = t * exp(-t^2 / 2) * R(t)
    sigmoid            x < 0: r, x >= 0: 1 - r, with 1 for t       tanh = 1 - 2 r with 1 for t and z = 2 |x|

so nothing cancels: the tails keep their relative accuracy until the result leaves float32's normal numbers, where XLA
gives 1 + tanh = 0. Exponents that large amplify the rounding of z, so z has a second part wherever it is computed, as
has the exponential; quotients are corrected by their remainder. The largest errors, in units in the last place, are
stated and tested in tests/kernels/test_epilogue.py. Inf and NaN give what jax.nn's functions give, -0 too.

The polynomials are minimax fits (linear programming on Chebyshev nodes, weighted by the relative error).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from . import ir
from .ir import Value

FAR = 128.0  # beyond it r is zero in float32: exp(-128) * 128 < 2**-149
LEAST_EXPONENT = -176.0  # where the two factors of a scale become zero: 2**-254

LOG2_E = 1.4426950408889634
LN2_HIGH = 0.693359375  # few bits: its product with any exponent is exact
LN2_LOW = -2.12194440054690583e-4
ROUND_TO_INTEGER = 1.5 * 2**23  # added to a float32, it leaves the nearest integer in the low bits

# (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2: 0.05 * 2**-24
EXP = (0.4999999337280463, 0.16666519526927667, 0.0416684012946339, 0.008368850795518154, 0.0013814303169700764)
# (tanh(x) / x - 1) / x^2 in x^2 for |x| <= 5 / 8: 0.07 * 2**-24
TANH = (-0.33333281942122595, 0.13331442201399643, -0.05373971536676238, 0.020639088186485313, -0.005704988064635751)
TANH_SMALL = 0.625
# exp(t^2 / 2) * Phi(-t) * (t + 4) in (t - 4) / (t + 4) for t <= 14.2: 0.3 * 2**-24 with coefficients of float32
MILLS_CENTRE = 4.0
MILLS = (
    *(0.7552851438522339, -0.6078966856002808, 0.38713645935058594, -0.18652109801769257, 0.06040807068347931),
    *(-0.007537076249718666, -0.0035309549421072006, 0.0015837016981095076, 0.0002089037443511188),
    -0.00012125546345487237,
)
GELU_LINEAR = 1.5957691216057307  # 2 sqrt(2 / pi)
GELU_CUBIC = 0.07135481627260026  # and 0.044715 times that


class Sum(NamedTuple):
    """A number as an unevaluated sum of two: ``low`` is what ``high`` was rounded by."""

    high: Value
    low: Value


class Exp(NamedTuple):
    """``(high + low) * scale[0] * scale[1]`` with 0.7 < high < 1.5; the scales are powers of two, or zero."""

    high: Value
    low: Value
    scale: tuple[Value, Value]

    def scaled(self, v: Value) -> Value:
        """v times both scales: in two steps, so that only what is too small for the result is lost."""
        return ir.multiply(ir.multiply(v, self.scale[0]), self.scale[1])


def identity(x: Value) -> Value:
    """x itself."""
    return x


def relu(x: Value) -> Value:
    """max(x, 0); a NaN stays one."""
    return ir.select(ir.compare(x, "<=", ir.like(x, 0)), ir.like(x, 0), x)


def silu(x: Value) -> Value:
    """x * sigmoid(x)."""
    return _gated(x, lambda t: _logistic_part(t, Sum(t, ir.like(t, 0))))


def gelu_tanh(x: Value) -> Value:
    """x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)): gelu's usual approximation."""

    def part(t: Value) -> Value:
        square = _product(t, t)
        cubic = _product(ir.like(t, GELU_CUBIC), square.high)
        factor = _sum(ir.like(t, GELU_LINEAR), cubic.high)
        rest = ir.add_vectors(factor.low, cubic.low)
        rest = ir.fma(_rest_of(t, GELU_CUBIC), square.high, rest)
        rest = ir.fma(ir.like(t, GELU_CUBIC), square.low, rest)
        rest = ir.add_vectors(rest, _rest_of(t, GELU_LINEAR))
        z = _product(t, factor.high)
        return _logistic_part(t, Sum(z.high, ir.fma(t, rest, z.low)))

    return _gated(x, part)


def gelu_erf(x: Value) -> Value:
    """x * Phi(x): gelu itself."""

    def part(t: Value) -> Value:
        half_square = _product(ir.multiply(t, ir.like(t, 0.5)), t)
        e = _exp_of_minus(half_square)
        centre = ir.like(t, MILLS_CENTRE)
        divisor = _sum(t, centre)
        inverse = ir.divide(ir.like(t, 1), divisor.high)
        s = ir.multiply(ir.subtract(t, centre), inverse)
        missing = ir.fma(ir.add_vectors(s, ir.like(t, 1)), ir.like(t, -MILLS_CENTRE), t)
        s = ir.fma(inverse, ir.fma(s, ir.minus(t), missing), s)
        # The last step of Horner's rule exactly: its rounding would be the largest of all.
        last = _product(s, _polynomial(s, MILLS[1:]))
        mills = _sum(ir.like(t, MILLS[0]), last.high)
        high, low = _times(t, e)
        product = _product(high, mills.high)
        rest = ir.fma(high, ir.add_vectors(mills.low, last.low), ir.fma(low, mills.high, product.low))
        return e.scaled(_quotient(Sum(product.high, rest), divisor, inverse))

    return _gated(x, part)


def sigmoid(x: Value) -> Value:
    """1 / (1 + exp(-x))."""
    one = ir.like(x, 1)
    t = _clamped(ir.absolute(x))
    r = _logistic_part(one, Sum(t, ir.like(t, 0)))
    return ir.select(ir.compare(x, "<", ir.like(x, 0)), r, ir.subtract(one, r))


def tanh(x: Value) -> Value:
    """The hyperbolic tangent."""
    one, size = ir.like(x, 1), ir.absolute(x)
    twice = ir.multiply(_clamped(size), ir.like(x, 2))
    large = ir.fma(ir.like(x, -2), _logistic_part(one, Sum(twice, ir.like(x, 0))), one)
    square = ir.multiply(size, size)
    small = ir.fma(ir.multiply(size, square), _polynomial(square, TANH), size)
    return ir.with_sign_of(ir.select(ir.compare(size, "<", ir.like(x, TANH_SMALL)), small, large), x)


FUNCTIONS: Final[dict[str, Callable[[Value], Value]]] = {
    "none": identity,
    "relu": relu,
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
    "silu": silu,
    "tanh": tanh,
    "sigmoid": sigmoid,
}
"""By the spec's names."""


def _gated(x: Value, part: Callable[[Value], Value]) -> Value:
    """The function that is ``-part(|x|)`` for negative x and ``x - part(|x|)`` for others."""
    size = ir.absolute(x)
    r = part(_clamped(size))
    # x - x: nothing, but NaN for -Inf, where jax.nn multiplies it by zero.
    negative = ir.add_vectors(r, ir.subtract(x, x))
    y = ir.select(ir.compare(x, "<", ir.like(x, 0)), negative, ir.subtract(size, r))
    return ir.with_sign_of(y, x)


def _clamped(t: Value) -> Value:
    """At most FAR; a NaN stays one."""
    return ir.select(ir.compare(t, ">", ir.like(t, FAR)), ir.like(t, FAR), t)


def _logistic_part(t: Value, z: Sum) -> Value:
    """t * exp(-z) / (1 + exp(-z)) for t, z >= 0."""
    e = _exp_of_minus(z)
    one = ir.like(t, 1)
    exp = e.scaled(e.high)
    divisor = ir.add_vectors(one, exp)
    low = ir.add_vectors(ir.subtract(exp, ir.subtract(divisor, one)), e.scaled(e.low))
    return e.scaled(_quotient(_times(t, e), Sum(divisor, low), ir.divide(one, divisor)))


def _times(t: Value, e: Exp) -> Sum:
    high, low = _product(t, e.high)
    return Sum(high, ir.fma(t, e.low, low))


def _quotient(a: Sum, b: Sum, inverse: Value) -> Value:
    """a / b, given 1 / b.high: a first quotient, and what its remainder adds."""
    q = ir.multiply(a.high, inverse)
    remainder = ir.add_vectors(ir.fma(ir.minus(q), b.high, a.high), a.low)
    return ir.fma(ir.fma(ir.minus(q), b.low, remainder), inverse, q)


def _exp_of_minus(z: Sum) -> Exp:
    """exp(-z) for z >= 0."""
    x = ir.minus(z.high)
    x = ir.select(ir.compare(x, "<", ir.like(x, LEAST_EXPONENT)), ir.like(x, LEAST_EXPONENT), x)
    magic = ir.like(x, ROUND_TO_INTEGER)
    shifted = ir.fma(x, ir.like(x, LOG2_E), magic)
    n = ir.subtract(shifted, magic)
    r = ir.fma(n, ir.like(x, -LN2_HIGH), x)
    r = ir.subtract(ir.fma(n, ir.like(x, -LN2_LOW), r), z.low)
    t = ir.fma(ir.multiply(r, r), _polynomial(r, EXP), r)
    one = ir.like(x, 1)
    high = ir.add_vectors(one, t)
    low = ir.subtract(t, ir.subtract(high, one))
    return Exp(high, low, ir.halves_of_power_of_two(shifted, ROUND_TO_INTEGER))


def _polynomial(x: Value, coefficients: Sequence[float]) -> Value:
    """The sum of coefficients[i] * x**i, by Horner's rule."""
    y = ir.like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        y = ir.fma(y, x, ir.like(x, c))
    return y


def _product(a: Value, b: Value) -> Sum:
    """a * b exactly."""
    high = ir.multiply(a, b)
    return Sum(high, ir.fma(a, b, ir.minus(high)))


def _sum(a: Value, b: Value) -> Sum:
    """a + b exactly, whichever is larger."""
    high = ir.add_vectors(a, b)
    of_b = ir.subtract(high, a)
    of_a = ir.subtract(high, of_b)
    return Sum(high, ir.add_vectors(ir.subtract(a, of_a), ir.subtract(b, of_b)))


def _rest_of(v: Value, x: float) -> Value:
    """What a constant loses when it is rounded to float32, as a constant like v."""
    return ir.like(v, x - ir.rounded_to_float32(x))
