"""Every kernel of the build, where this CPU can run it.

JAX_NANO_REQUIRE_TARGET=x86-64-v4 (names separated by commas) turns the skipping of a target into a failure.

Kernels run here without XLA, so with the floating-point environment of Python: XLA's threads flush subnormals to
zero, these do not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference
from kernel_abi import FIELDS, reads_a
from numpy.typing import NDArray

from jax_nano import _runtime

REQUIRED = {name for name in os.environ.get("JAX_NANO_REQUIRE_TARGET", "").split(",") if name}


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel under test."""

    info: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.info[name]

    @property
    def integer(self) -> bool:
        return bool(self.acc == "int32")

    def packs(self, *, transposed_b: bool = False) -> list[tuple[int, int]]:
        """(pack_a, pack_b) that this kernel permits for some operands, the fewest copies first."""
        return [
            (a, b)
            for a in (0, 1)
            for b in (0, 1)
            if (a or self.direct_a) and (b or (self.direct_b and not transposed_b))
        ]

    def ways(self, *, order_a: str = "C", order_b: str = "C", n: int = 2) -> list[dict[str, int]]:
        """Fields for every way to the whole product of operands stored by rows (C) or columns (F)."""
        ways = [{"pack_a": a, "pack_b": b} for a, b in self.packs(transposed_b=order_b == "F" and n > 1)]
        if self.has_inner:  # an operand that does not lie along K is copied
            copies = {"pack_a": int(order_a == "F"), "pack_b": int(order_b == "C")}
            ways += [{"inner": 1, "prefetch": prefetch, **copies} for prefetch in (0, 1)]
        if self.has_sweep and (order_b == "C" or n <= 1):
            ways += [{"sweep": 1, "prefetch": prefetch, "pack_a": 0, "pack_b": 0} for prefetch in (0, 1)]
        return ways

    @property
    def has_inner(self) -> bool:
        """Whether there is a path of its own for operands that are contiguous along K."""
        return bool(self.info["inner"])

    @property
    def has_sweep(self) -> bool:
        """Whether there is a path of its own for few rows of A and a row-major B."""
        return bool(self.info["sweep"])

    def call(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, **fields: int) -> None:
        """C (+)= A @ B by this kernel, with the strides that the arrays have; further fields of GemmArgs as named.

        Shapes are (m, k), (k, n), (m, n), or the same with a batch dimension in front of all three. An operand that
        the kernel cannot read where it lies is packed, asked for or not.
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
        blocked = not (fields.get("inner") or fields.get("sweep"))
        packs = {
            "pack_a": int(fields.pop("pack_a", 0) or (blocked and not reads_a(self.info, {"k": k, **strides}))),
            "pack_b": int(fields.pop("pack_b", 0) or (blocked and not self.direct_b)),
        }
        if fields.get("inner"):  # also where NumPy's strides mean nothing
            strides |= {} if packs["pack_a"] else {"csa": 1}
            strides |= {} if packs["pack_b"] else {"rsb": 1}
        _runtime.testing.call(self.name, {**addresses, "m": m, "n": n, "k": k, **strides, **packs, **fields})

    def call_many(self, **fields: int | NDArray[np.int64]) -> None:
        """One call for each element of the fields that are arrays; a field that is not given is 0.

        An A that the kernel cannot read where it lies is packed, asked for or not.
        """
        shape = np.broadcast_shapes(*(np.shape(x) for x in fields.values()))
        rows = np.zeros((*shape, len(FIELDS)), np.int64)
        for name, value in fields.items():
            rows[..., FIELDS.index(name)] = value
        x = {name: rows[..., i] for i, name in enumerate(FIELDS)}
        x["pack_a"] |= (x["inner"] == 0) & (x["sweep"] == 0) & ~reads_a(self.info, x)
        _runtime.testing.call_many(self.name, rows.reshape(-1, len(FIELDS)))

    def product(self, a: np.ndarray, b: np.ndarray, **fields: int) -> np.ndarray:
        """A @ B, in memory full of poison beforehand."""
        c = reference.poisoned((*a.shape[:-1], b.shape[-1]), self.out)
        self.call(a, b, c, **fields)
        return c

    def expected(self, a: np.ndarray, b: np.ndarray, *, initial: np.ndarray | None = None) -> reference.Expected:
        """What A @ B must be, summed in this kernel's accumulators over the operands that its algorithm names."""
        a, b = reference.algorithm_operands(self.algorithm, a, b)
        subscripts = "mk,kn->mn" if a.ndim == 2 else "bmk,bkn->bmn"
        return reference.expected(subscripts, a, b, out=self.out, acc=self.acc, initial=initial)

    def check(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, context: object = "", **initial: np.ndarray) -> None:
        """Raises AssertionError if C is not A @ B (plus ``initial``)."""
        self.expected(a, b, **initial).check(c, context)

    @property
    def wide(self) -> Kernel | None:
        """The kernel that differs from this narrow one only in that C has the accumulator's type."""
        same = ("target", "lhs", "rhs", "acc", "algorithm")
        for info in _runtime.kernels():
            if all(info[x] == self.info[x] for x in same) and info["out"] == self.acc:
                return Kernel(info)
        return None


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
