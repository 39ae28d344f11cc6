"""Kernels for quantised weights on targets that this CPU lacks, run by emulation (jax_nano/codegen/emulate.py).

JAX_NANO_REQUIRE_TARGET=emulated turns the skipping of these tests (for want of LLVM 22) into a failure.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from typing import Any

import emulated
import ml_dtypes
import numpy as np
import pytest
import quantized
from quantized import Case

from jax_nano import _runtime
from jax_nano._core import spec
from jax_nano.codegen import emulate
from jax_nano.codegen.quantized.formats import CHUNK, block
from jax_nano.codegen.quantized.inner_products import least_group
from jax_nano.codegen.quantized.kernel import QuantizedKernel, kernels
from jax_nano.codegen.toolchain import ToolchainError

FLOATS = ("float32", "bfloat16", "float16")
SUPPORTED = {t["name"] for t in _runtime.targets() if t["supported"]}
KERNELS = [k for k in kernels() if k.target.name not in SUPPORTED]
BY_FORMAT = [k for k in KERNELS if k.form is not None]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if emulate.BASELINE.name not in SUPPORTED:
        pytest.skip(f"this CPU is no {emulate.BASELINE.name}")
    try:
        return emulated.library("quantized", KERNELS)
    except ToolchainError as error:
        if "emulated" in os.environ.get("JAX_NANO_REQUIRE_TARGET", "").split(","):
            pytest.fail(str(error))
        pytest.skip(str(error))


def has_lanes_for(kernel: QuantizedKernel, group: int, k: int) -> bool:
    """Whether inner products take groups of this size."""
    form = kernel.form
    assert form is not None
    parts = form.holds_groups and block(form) % group == 0 and group >= least_group(form)
    return group == k or group % block(form) == 0 or parts


@pytest.mark.parametrize("of_target", BY_FORMAT, ids=[k.name for k in BY_FORMAT])
def test_emulated(of_target: QuantizedKernel, library: ctypes.CDLL, rng: np.random.Generator) -> None:
    function: Any = getattr(library, of_target.symbol)
    function.restype = None
    assert of_target.form is not None
    weights = [name for name, facts in spec.WEIGHTS.items() if facts.form == of_target.form.name]
    few = (
        (1, 256, 128, 128),
        (2, 144, 64, 32),
        (3, 48, 256, 64),
        (4, 272, 96, 16),
        (1, 128, 512, 256),
        (1, 16, 48, 48),
    )
    for name, (m, n, k, group), along_k in itertools.product(weights, few, (False, True)):
        for zero in (None, "int8") if of_target.form.is_integer else (None,):
            case = Case.random(rng, m, n, k, group, name, "bfloat16", "float16", zero, "float32", along_k)
            if not along_k or has_lanes_for(of_target, group, k):
                case.check(
                    quantized.call_kernel(function, block(of_target.form), case, "inner" if along_k else "columns")
                )
        if of_target.form.step == 2:
            continue  # it dequantises nothing
        odd = Case.random(rng, m, n - 14, k, group, name, "float32", "bfloat16", zero, "float32", along_k)
        task = "dequantize_along_k" if along_k else "dequantize_columns"
        got = quantized.call_kernel(function, block(of_target.form), odd, task)
        np.testing.assert_allclose(got, odd.weights_in_float64(), rtol=3e-7)
        if of_target.form.lanes == CHUNK:
            got = quantized.call_kernel(function, block(of_target.form), odd, task.replace("dequantize", "bfloat16"))
            np.testing.assert_array_equal(got, odd.with_scale(np.ones_like(odd.given_scale)).weights_in_float64())


@pytest.mark.parametrize("of_target", [k for k in KERNELS if k.form is None], ids=lambda k: k.name)
def test_emulated_finish(of_target: QuantizedKernel, library: ctypes.CDLL, rng: np.random.Generator) -> None:
    function: Any = getattr(library, of_target.symbol)
    function.restype = None
    for (m, n), out, given in itertools.product(((1, 16), (3, 37), (2, 130)), FLOATS, (False, True)):
        sums = rng.standard_normal((m, n + 3)).astype(np.float32)
        bias, residual = (rng.standard_normal(shape).astype(quantized.dtype(out)) for shape in ((n,), (m, n)))
        got = quantized.finish(function, sums, n, out, *((bias, residual, 0.5) if given else (None, None, 1.0)))
        want = sums[:, :n].astype(np.float64)
        if given:
            want = np.maximum(0.5 * want + bias.astype(np.float64), 0) + residual.astype(np.float64)
        eps = float(ml_dtypes.finfo(quantized.dtype(out)).eps)
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=eps, atol=2 * eps)


SCALING = [k for k in KERNELS if k.form is None and k.target.lanes(4) == CHUNK]


@pytest.mark.parametrize("of_target", SCALING, ids=[k.name for k in SCALING])
def test_emulated_add_scaled(of_target: QuantizedKernel, library: ctypes.CDLL, rng: np.random.Generator) -> None:
    function: Any = getattr(library, of_target.symbol)
    function.restype = None
    for (m, n), name, adds in itertools.product(((1, 16), (3, 37), (2, 130)), FLOATS, (False, True)):
        sums = rng.standard_normal((m, n + 3)).astype(np.float32)
        scale = rng.random(2 * n).astype(quantized.dtype(name))
        y = rng.standard_normal((m, n)).astype(np.float32) if adds else None
        got = quantized.add_scaled(function, sums, n, scale, y)
        want = sums[:, :n].astype(np.float64) * scale[::2].astype(np.float64) + (0 if y is None else y)
        np.testing.assert_array_equal(got, want.astype(np.float32))
