"""Epilogues for tests of kernels: the struct that GemmArgs points to, and what must come out."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import reference
import scipy.special
from numpy.typing import NDArray

from jax_nano._core import spec

NAMES = spec.ACTIVATIONS

_KINDS = {"Activation": ctypes.c_int64, "double": ctypes.c_double, "int64_t": ctypes.c_int64}
TINY = 2.0**-126  # the smallest normal float32


class Struct(ctypes.Structure):
    """The spec's Epilogue."""

    _fields_ = [(x.name, _KINDS.get(x.c_type, ctypes.c_void_p)) for x in spec.EPILOGUE]


@dataclass(frozen=True)
class Epilogue:
    """activation(scale * sum + bias) + residual. A residual has C's shape and strides."""

    activation: str = "none"
    scale: float = 1.0
    bias: NDArray[Any] | None = None
    residual: NDArray[Any] | None = None

    def struct(self, c: NDArray[Any]) -> Struct:
        """For a kernel call that writes ``c``. Must live as long as the call."""
        has = self.residual is not None
        assert not has or (self.residual.shape == c.shape and self.residual.strides == c.strides)
        return Struct(
            activation=spec.activation_code(self.activation),
            scale=self.scale,
            bias=None if self.bias is None else self.bias.ctypes.data,
            has_residual=has,
            residual_offset=self.residual.ctypes.data - c.ctypes.data if has else 0,
        )

    def expected(self, product: reference.Expected, out: str) -> reference.Expected:
        """What C must be, given what the unrounded sums must be."""
        eps = 2.0**-23
        scale = float(np.float32(self.scale))
        before, bound = product.value * scale, np.abs(scale) * product.bound
        if self.bias is not None:
            before = before + self.bias.astype(np.float64)
        bound = bound + eps * np.abs(before)
        value = exact(self.activation, before).astype(np.float64)
        bound = 1.2 * bound + 2 * eps * np.abs(value) + TINY  # no slope is steeper than 1.13
        if self.residual is not None:
            value = value + self.residual.astype(np.float64)
            bound = bound + eps * np.abs(value)
        if out != "float32":
            bound = bound + np.maximum(float(ml_dtypes.finfo(out).eps) * (np.abs(value) + bound), 2.0**-24)
        return reference.Expected(value, bound)


def exact(activation: str, x: NDArray[Any]) -> NDArray[np.longdouble]:
    """The function itself, to 60 bits or so (gelu_erf to 50)."""
    x = x.astype(np.longdouble)
    with np.errstate(all="ignore"):
        match activation:
            case "none":
                return x
            case "relu":
                return np.where(x > 0, x, np.where(np.isnan(x), x, 0))
            case "tanh":
                return np.tanh(x)
            case "sigmoid":
                return _logistic(x)
            case "silu":
                return x * _logistic(x)
            case "gelu_tanh":
                root = np.sqrt(2 / (4 * np.arctan(np.longdouble(1))))
                return x * _logistic(2 * root * (x + np.longdouble("0.044715") * x**3))
            case "gelu_erf":
                size = np.abs(x).astype(np.float64)
                tail = np.exp(-(x**2) / 2) / 2 * scipy.special.erfcx(size / math.sqrt(2))
                return x * np.where(x < 0, tail, 1 - tail)
    raise ValueError(activation)


def _logistic(x: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e) + 0 * x  # a NaN stays one


def ulps(got: NDArray[np.float32], want: NDArray[np.longdouble]) -> NDArray[np.float64]:
    """How far off float32 numbers are, in units in the last place of the right result; subnormal ones count as zero."""
    size = np.maximum(np.abs(want), np.longdouble(TINY))
    ulp = np.ldexp(np.longdouble(1), np.frexp(size)[1] - 24)
    error = np.abs(got.astype(np.longdouble) - want)
    flushed = (np.abs(want) < TINY) & (np.abs(got) <= TINY)
    return np.where(flushed, 0, error / ulp).astype(np.float64)


def address(struct: Struct) -> int:
    """What GemmArgs::epilogue holds."""
    return ctypes.addressof(struct)
