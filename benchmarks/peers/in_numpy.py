"""numpy.matmul, called from Python as its users call it."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.cases import DTYPES, Array, Case
from benchmarks.peers import Operands, Unavailable


class NumpyRunner:
    """Goes through the operand pairs in a Python loop; the loop and the call are part of the time."""

    def __init__(self, threads: int) -> None:
        pass  # OPENBLAS_NUM_THREADS and the affinity are the worker's

    def version(self) -> str:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{np.__version__} ({blas['name']} {blas['version']})"

    def prepare(self, case: Case, pairs: int) -> None:
        if case.dtype not in ("f32", "f64"):
            raise Unavailable(f"NumPy has no BLAS for {case.dtype}")
        self._case = case

    def load(self, operands: Operands) -> None:
        case = self._case
        out = DTYPES[case.dtype].out_dtype
        lhs_axes, rhs_axes, out_axes = case.matrix_axes
        self._out = [np.zeros(case.shapes[2], out) for _ in operands]
        self._calls = [
            (a.copy().transpose(lhs_axes), b.copy().transpose(rhs_axes), c.transpose(out_axes))
            for (a, b), c in zip(operands, self._out, strict=True)
        ]

    def run(self, trips: int) -> float:
        matmul, calls = np.matmul, self._calls
        start = time.perf_counter()
        for _ in range(trips):
            for a, b, c in calls:
                matmul(a, b, out=c)
        return time.perf_counter() - start

    def results(self) -> list[Array]:
        return self._out

    def close(self) -> None:
        self._calls, self._out = [], []
