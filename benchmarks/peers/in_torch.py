"""torch.matmul, called from Python as its users call it."""

from __future__ import annotations

import importlib
import time
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.cases import DTYPES, Array, Case
from benchmarks.peers import Operands, Unavailable


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


torch = _optional("torch")


class TorchRunner:
    """Goes through the operand pairs in a Python loop; the loop and the call are part of the time.

    `compiled`: the product is compiled for its shapes, with every candidate that torch.compile has for it timed.
    """

    def __init__(self, threads: int, *, compiled: bool = False) -> None:
        if torch is None:
            raise Unavailable("not installed: pip install torch")
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._compiles = compiled

    def version(self) -> str:
        return torch.__version__

    def prepare(self, case: Case, pairs: int) -> None:
        dtype = DTYPES[case.dtype]
        if case.dtype == "i8":
            if case.gemm.batch or case.layout[0] != "N":
                raise Unavailable("torch._int_mm takes two row-major matrices")
            self._matmul = torch._int_mm
        elif dtype.operand != dtype.out or dtype.operand_dtype.kind == "i":
            raise Unavailable(f"torch.matmul has no {case.dtype}")
        else:
            self._matmul = torch.matmul
        self._case = case

    def load(self, operands: Operands) -> None:
        case = self._case
        self._out = [torch.zeros(case.shapes[2], dtype=_dtype(DTYPES[case.dtype].out)) for _ in operands]
        lhs_axes, rhs_axes, out_axes = case.matrix_axes
        self._calls = [
            (_tensor(a).permute(lhs_axes), _tensor(b).permute(rhs_axes), c.permute(out_axes))
            for (a, b), c in zip(operands, self._out, strict=True)
        ]

        self._compiled: Any = None
        if self._compiles:
            torch.compiler.reset()  # what was compiled for another product
            # Without `out`, for which it would add a copy.
            self._compiled = torch.compile(self._matmul, mode="max-autotune-no-cudagraphs", dynamic=False)

    def run(self, trips: int) -> float:
        if self._compiled is not None:
            return self._run_compiled(trips)
        matmul, calls = self._matmul, self._calls
        start = time.perf_counter()
        for _ in range(trips):
            for a, b, c in calls:
                matmul(a, b, out=c)
        return time.perf_counter() - start

    def _run_compiled(self, trips: int) -> float:
        compiled, calls = self._compiled, self._calls
        latest = []
        start = time.perf_counter()
        for _ in range(trips):
            latest = [compiled(a, b) for a, b, _ in calls]
        seconds = time.perf_counter() - start
        for (_, _, c), result in zip(calls, latest, strict=True):
            c.copy_(result)
        return seconds

    def results(self) -> list[Array]:
        return [_array(out) for out in self._out]

    def close(self) -> None:
        self._calls, self._out = [], []


def _dtype(name: str) -> Any:
    return getattr(torch, name)


def _tensor(array: Array) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _array(tensor: Any) -> Array:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
