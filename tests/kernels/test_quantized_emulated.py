"""Kernels for quantised weights on targets that this CPU lacks, run by emulation (jax_nano/codegen/emulate.py).

JAX_NANO_REQUIRE_TARGET=emulated turns the skipping of these tests (for want of LLVM 22) into a failure.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized
from quantized import Case

from jax_nano import _runtime
from jax_nano._core import spec
from jax_nano.codegen import emulate
from jax_nano.codegen.quantized.formats import block
from jax_nano.codegen.quantized.kernel import QuantizedKernel, kernels
from jax_nano.codegen.toolchain import ToolchainError

SUPPORTED = {t["name"] for t in _runtime.targets() if t["supported"]}
KERNELS = [k for k in kernels() if k.target.name not in SUPPORTED]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if emulate.BASELINE.name not in SUPPORTED:
        pytest.skip(f"this CPU is no {emulate.BASELINE.name}")
    path: Path = tmp_path_factory.mktemp("emulated") / "quantized.so"
    try:
        emulate.build(KERNELS, path, os.cpu_count() or 1)
    except ToolchainError as error:
        if "emulated" in os.environ.get("JAX_NANO_REQUIRE_TARGET", "").split(","):
            pytest.fail(str(error))
        pytest.skip(str(error))
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("kernel", KERNELS, ids=[k.name for k in KERNELS])
def test_emulated(kernel: QuantizedKernel, library: ctypes.CDLL, rng: np.random.Generator) -> None:
    function: Any = getattr(library, kernel.symbol)
    function.restype = None
    weights = [name for name, facts in spec.WEIGHTS.items() if facts.form == kernel.form.name]
    few = (
        (1, 256, 128, 128),
        (2, 144, 64, 32),
        (3, 48, 256, 64),
        (4, 272, 96, 16),
        (1, 128, 512, 256),
        (1, 16, 48, 48),
    )
    for name, (m, n, k, group), along_k in itertools.product(weights, few, (False, True)):
        zero = "int8" if kernel.form.is_integer else None
        case = Case.random(rng, m, n, k, group, name, "bfloat16", "float16", zero, "float32", along_k)
        whole = group == k or group % block(kernel.form) == 0
        if not along_k or whole or (kernel.form.is_integer and block(kernel.form) % group == 0):
            case.check(quantized.call_kernel(function, block(kernel.form), case, "inner" if along_k else "columns"))
        odd = Case.random(rng, m, n - 14, k, group, name, "float32", "bfloat16", zero, "float32", along_k)
        task = "dequantize_along_k" if along_k else "dequantize_columns"
        got = quantized.call_kernel(function, block(kernel.form), odd, task)
        np.testing.assert_allclose(got, odd.weights_in_float64(), rtol=3e-7)
