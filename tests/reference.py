"""Oracles: what a product must be, and how far off it may be.

Values come from NumPy in float64 (longdouble for float64 products), so a result is judged by standard rounding
analysis alone: |error| <= c * K * eps * (|A| @ |B|), element by element, plus one rounding to the result's dtype.
That bound is the worst case; for long sums it would let a wrong operand pass. Roundings are as good as
independent, so errors grow like sqrt(K) (Higham and Mary, 2019), and the smaller of the two bounds is used.
Integer products are exact: they wrap around as JAX's do.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

C = 1.0
"""The c of the worst case. eps is twice the unit roundoff, so 1 leaves a factor of two."""

C_SQRT = 4.0
"""The same for sqrt(K): eight standard deviations of K independent roundings."""


@dataclass(frozen=True)
class Expected:
    """What a product must be: ``value`` within ``bound``, element by element, in a wide dtype."""

    value: NDArray[np.number]
    bound: NDArray[np.number]

    def __getitem__(self, index: object) -> Expected:
        return Expected(self.value[index], self.bound[index])

    def matches(self, got: NDArray[np.generic]) -> bool:
        """Whether ``got`` is right: same shape, Inf and NaN at the same places, the rest within the bound."""
        return got.shape == self.value.shape and not self._wrong(got).any()

    def _wrong(self, got: NDArray[np.generic]) -> NDArray[np.bool_]:
        got = got.astype(self.value.dtype)
        if is_integer(self.value.dtype):
            return got != self.value
        with np.errstate(invalid="ignore"):
            near = np.abs(got - self.value) <= self.bound
        same = (got == self.value) | (np.isnan(got) & np.isnan(self.value))
        return ~np.where(np.isfinite(self.value), near, same)

    def check(self, got: ArrayLike, context: object = "") -> None:
        """Raises AssertionError that names the first wrong element."""
        got = np.asarray(got)
        assert got.shape == self.value.shape, f"{context}: shape {got.shape}, expected {self.value.shape}"
        wrong = np.argwhere(self._wrong(got))
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            raise AssertionError(
                f"{context}: {len(wrong)} of {got.size} elements are wrong; the first, {at}, is {got[at]}, "
                f"expected {self.value[at]} +- {self.bound[at]}"
            )


def expected(
    subscripts: str,
    lhs: NDArray[np.generic],
    rhs: NDArray[np.generic],
    *,
    out: DTypeLike | None = None,
    acc: DTypeLike = np.float32,
    initial: NDArray[np.generic] | None = None,
) -> Expected:
    """What ``einsum(subscripts, lhs, rhs)`` must be.

    Args:
      subscripts: einsum's, with two operands and an explicit result, e.g. ``"mk,kn->mn"``.
      out: dtype of the result; default: that of the accumulator.
      acc: dtype in which the sum is taken.
      initial: added to the product (what C holds when a kernel accumulates).
    """
    acc = np.dtype(acc)
    out = acc if out is None else np.dtype(out)
    if is_integer(acc):
        return _exact(subscripts, lhs, rhs, out, initial)
    wide = np.longdouble if acc == np.float64 else np.float64
    a, b = lhs.astype(wide), rhs.astype(wide)
    terms = _contracted(subscripts, lhs) + (initial is not None)
    with np.errstate(invalid="ignore"):
        value = np.einsum(subscripts, a, b, optimize=wide is np.float64)
        magnitude = np.einsum(subscripts, np.abs(a), np.abs(b), optimize=wide is np.float64)
        if initial is not None:
            value = value + initial.astype(wide)
            magnitude = magnitude + np.abs(initial.astype(wide))
        bound = relative_error(terms, acc) * magnitude
        if out != acc:
            info = ml_dtypes.finfo(out)
            bound = bound + np.maximum(float(info.eps) * np.abs(value), float(info.smallest_subnormal))
    return Expected(value, bound)


def relative_error(terms: int, acc: DTypeLike) -> float:
    """What a sum of so many terms may be off by, relative to the sum of their magnitudes."""
    return min(C * terms, C_SQRT * terms**0.5) * float(ml_dtypes.finfo(acc).eps)


_PARTS = {
    "default": (),
    "BF16_BF16_F32": ((0, 0),),
    "BF16_BF16_F32_X3": ((0, 0), (0, 1), (1, 0)),
    "BF16_BF16_F32_X6": ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)),
}
"""Which bf16 parts of the operands each DotAlgorithm multiplies (XLA's documentation)."""


def algorithm_operands(
    algorithm: str, a: NDArray[np.generic], b: NDArray[np.generic]
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Operands (..., m, k) and (..., k, n) whose plain product is what a DotAlgorithm computes of these f32 ones.

    Inf and NaN take part in the product of the largest parts alone, so that Inf * 1.0 is Inf: 1.0 has no rest, and
    Inf * 0 would add a NaN. (XLA has another way to the same end, and replaces what is NaN before that product.)
    """
    pairs = _PARTS[algorithm]
    if not pairs:
        return a, b

    def parts(x: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        found = []
        for _ in range(3):
            found.append(x.astype(ml_dtypes.bfloat16).astype(np.float32))
            x = np.where(np.isfinite(found[-1]), x - found[-1], 0).astype(np.float32)
        return found

    def finite(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.where(np.isfinite(x), x, 0).astype(np.float32)

    with np.errstate(invalid="ignore", over="ignore"):
        of_a, of_b = parts(a), parts(b)
    first, *others = pairs
    assert first == (0, 0)
    terms = [(of_a[0], of_b[0]), *((finite(of_a[i]), finite(of_b[j])) for i, j in others)]
    return np.concatenate([x for x, _ in terms], -1), np.concatenate([x for _, x in terms], -2)


def _exact(
    subscripts: str,
    lhs: NDArray[np.generic],
    rhs: NDArray[np.generic],
    out: np.dtype,
    initial: NDArray[np.generic] | None,
) -> Expected:
    value = np.einsum(subscripts, lhs.astype(np.int64), rhs.astype(np.int64), optimize=True)
    if initial is not None:
        value = value + initial.astype(np.int64)
    value = value.astype(out).astype(np.int64)
    return Expected(value, np.zeros_like(value))


def finfo(dtype: DTypeLike) -> ml_dtypes.finfo:
    """Limits of any floating-point dtype."""
    return ml_dtypes.finfo(dtype)


def is_integer(dtype: DTypeLike) -> bool:
    """Whether the dtype holds integers, bfloat16 and its like being none."""
    return np.issubdtype(np.dtype(dtype), np.integer)


def _contracted(subscripts: str, lhs: NDArray[np.generic]) -> int:
    """How many products each element of the result is the sum of."""
    operands, result = subscripts.split("->")
    sizes = dict(zip(operands.split(",")[0], lhs.shape, strict=True))
    return int(np.prod([size for label, size in sizes.items() if label not in result], dtype=np.int64))


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[np.generic]:
    """Distinct values of both signs, without structure that a wrong permutation would keep.

    Normal numbers, or integers of the dtype's whole range.
    """
    if is_integer(dtype):
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, np.dtype(dtype), endpoint=True)
    return rng.standard_normal(shape).astype(dtype)


def small_integers(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike = np.float32
) -> NDArray[np.generic]:
    """Integers of at most 8: sums of up to 2**17 of their products are exact in float32, in whatever order."""
    least = 0 if np.dtype(dtype).kind == "u" else -8
    return rng.integers(least, 9, shape).astype(dtype)


def poison(dtype: DTypeLike) -> float | int:
    """What no right result holds where it was not written: NaN, or an integer that is unlikely enough."""
    return np.iinfo(dtype).max - 37 if is_integer(dtype) else np.nan


def poisoned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[np.generic]:
    """An array full of poison."""
    return np.full(shape, poison(dtype), dtype)
