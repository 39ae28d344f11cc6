"""Every kernel of the build, where this CPU can run it.

JAX_NANO_REQUIRE_TARGET=x86-64-v4 (names separated by commas) turns the skipping of a target into a failure.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from jax_nano import _runtime

REQUIRED = {name for name in os.environ.get("JAX_NANO_REQUIRE_TARGET", "").split(",") if name}


@dataclass(frozen=True)
class Kernel:
    """One kernel under test."""

    info: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.info[name]

    def call(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, **fields: int) -> None:
        """C (+)= A @ B by this kernel, with the strides that the arrays have; further fields of GemmArgs as named.

        Shapes are (m, k), (k, n), (m, n), or the same with a batch dimension in front of all three.
        """
        strides = {}
        for x, names in ((a, ("bsa", "rsa", "csa")), (b, ("bsb", "rsb", "csb")), (c, ("bsc", "rsc", "csc"))):
            for name, stride in zip(names[3 - x.ndim :], x.strides, strict=True):
                strides[name] = stride // x.itemsize
        assert strides.pop("csc") == 1 or c.shape[-1] <= 1 or c.size == 0
        if b.shape[-1] <= 1 or b.size == 0:  # NumPy's strides mean nothing then
            strides["csb"] = 1
        if c.ndim == 3:
            strides["batch"] = c.shape[0]
        m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
        addresses = {"a": a.ctypes.data, "b": b.ctypes.data, "c": c.ctypes.data}
        _runtime.call(self.info["name"], {**addresses, "m": m, "n": n, "k": k, **strides, **fields})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        kernels = [Kernel(info) for info in _runtime.kernels()]
        metafunc.parametrize("kernel", kernels, ids=[k.name for k in kernels], indirect=True, scope="session")


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> Kernel:
    found: Kernel = request.param
    status = {t["name"]: t for t in _runtime.targets()}[found.target]
    if not status["supported"]:
        message = f"{found.target}: {status['why']}"
        if found.target in REQUIRED:
            pytest.fail(f"JAX_NANO_REQUIRE_TARGET: {message}")
        pytest.skip(message)
    return found


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's name: the same data in every run, other data in every test."""
    return np.random.default_rng(list(request.node.name.encode()))
