"""Which kernel computes a product of given dtypes, and what to convert around it: pure logic on dtypes.

lax says what a product means: operands of different dtypes are first converted to that of the result, and a
DotAlgorithm names the dtypes that operands are rounded to and summed in. A kernel that reads an operand as it is
does the same wherever that conversion changes no value, or, for integers, none of the bits that the result keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.lax import DotAlgorithm, DotAlgorithmPreset

from jax_nano._core import jax_compat as compat
from jax_nano._core import spec

Precision: TypeAlias = Any
"""What canonicalize_precision returns: None, a pair of lax.Precision, or a DotAlgorithm(Preset)."""

Supports: TypeAlias = Callable[[str, str, str, str], bool]
"""Whether there is a kernel for names of dtypes (lhs, rhs, out) and an algorithm."""

DEFAULT: Final = spec.DEFAULT_ALGORITHM
_BFLOAT16: Final = np.dtype(jnp.bfloat16)
_FLOAT32: Final = np.dtype(np.float32)
_INT32: Final = np.dtype(np.int32)

# The presets that kernels compute, of those that lax accepts on CPUs, by the kernels' names for them.
_ALGORITHMS: Final = {
    DotAlgorithmPreset.F32_F32_F32: DEFAULT,
    DotAlgorithmPreset.F64_F64_F64: DEFAULT,
    **{DotAlgorithmPreset[name]: name for name in spec.ALGORITHMS},
}

# The most products of bytes whose sum int32 holds: 255 * 255 * 2**15 < 2**31.
_MOST_BYTES_IN_INT32: Final = 2**15


class Signature(NamedTuple):
    """The dtypes of a call. Where they differ from those of the product, it is converted before or after."""

    lhs: np.dtype
    rhs: np.dtype
    out: np.dtype
    algorithm: str


class _Meaning(NamedTuple):
    """The dtypes that lax converts operands to, and that of its product before it is converted to the result's."""

    lhs: np.dtype
    rhs: np.dtype
    out: np.dtype
    algorithm: str


def find(
    lhs: np.dtype, rhs: np.dtype, out: np.dtype, precision: Precision, terms: Any, supports: Supports
) -> Signature | None:
    """The call for a product, None if no kernel gives what lax means.

    Args:
      lhs, rhs, out: dtypes of the product.
      precision: canonical.
      terms: how many products each element is the sum of; anything but an int if unknown.
      supports: which kernels there are.
    """
    meaning = _meaning(lhs, rhs, out, precision)
    if meaning is None:
        return None
    for a in _operand(lhs, meaning.lhs, meaning):
        for b in _operand(rhs, meaning.rhs, meaning):
            # bfloat16 operands need no rounding to bfloat16, and have no further parts.
            algorithm = DEFAULT if a == b == _BFLOAT16 else meaning.algorithm
            for c in _results(a, b, out, meaning, terms):
                if supports(a.name, b.name, c.name, algorithm):
                    return Signature(a, b, c, algorithm)
    return None


def _meaning(lhs: np.dtype, rhs: np.dtype, out: np.dtype, precision: Precision) -> _Meaning | None:
    if any(jnp.issubdtype(x, np.complexfloating) for x in (lhs, rhs, out)) or out == np.bool_:
        return None
    if not isinstance(precision, (DotAlgorithm, DotAlgorithmPreset)):
        return _Meaning(lhs, rhs, out, DEFAULT) if lhs == rhs else _Meaning(out, out, out, DEFAULT)
    if precision is DotAlgorithmPreset.DEFAULT:
        # lax leaves the conversion of different dtypes to XLA.
        return _Meaning(lhs, rhs, out, DEFAULT) if lhs == rhs or (_fits(lhs, out) and _fits(rhs, out)) else None
    if precision not in _ALGORITHMS:
        return None
    types = compat.get_algorithm_compute_types(precision, lhs, rhs, out)
    a, b, c = (np.dtype(x) for x in types)
    return _Meaning(a, b, c, _ALGORITHMS[precision])


def _operand(dtype: np.dtype, meant: np.dtype, meaning: _Meaning) -> Iterator[np.dtype]:
    """What an operand may be converted to, the best first."""
    integers = all(_is_integer(x) for x in (dtype, meant, meaning.out))
    if dtype != meant and (_fits(dtype, meant) or (integers and meant.itemsize >= meaning.out.itemsize)):
        yield dtype
    yield meant
    if dtype == meant == _BFLOAT16 and meaning.algorithm != DEFAULT:
        yield _FLOAT32  # beside a float32 operand


def _results(a: np.dtype, b: np.dtype, out: np.dtype, meaning: _Meaning, terms: Any) -> Iterator[np.dtype]:
    """What a call may give for the result to be converted from, the best first."""
    bytes_only = _is_integer(a) and _is_integer(b) and a.itemsize == b.itemsize == 1
    if out == meaning.out or (meaning.out == _FLOAT32 and _fits(out, _FLOAT32) and not _is_integer(out)):
        yield out  # if narrower, from a sum in float32, rounded once
    if out != meaning.out:
        yield meaning.out
    if bytes_only and (
        (_is_integer(meaning.out) and meaning.out.itemsize < _INT32.itemsize)
        or (meaning.out == _FLOAT32 and isinstance(terms, int) and terms <= _MOST_BYTES_IN_INT32)
    ):
        yield _INT32


def _is_integer(dtype: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, np.integer))


def _fits(dtype: np.dtype, wider: np.dtype) -> bool:
    """Whether every value of `dtype` is one of `wider`."""
    return bool(np.can_cast(dtype, wider, "safe"))
