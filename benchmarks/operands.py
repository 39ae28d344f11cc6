"""A case's operands and exact result in files: made once, read by every worker.

There are two pairs of operands: `EXACT`, small integers whose product is known to the last bit, and `RANDOM`,
what is timed.
"""

from __future__ import annotations

import pathlib

import numpy as np

from benchmarks.cases import DTYPES, Array, Case

EXACT, RANDOM = "exact", "random"
_RESULT = "result.npy"


def write(case: Case, folder: pathlib.Path) -> None:
    """Writes both pairs and the exact result."""
    for name, pair in ((EXACT, case.exact_operands()), (RANDOM, case.random_operands())):
        for side, operand in enumerate(pair):
            np.save(folder / f"{name}-{side}.npy", _as_integers(operand))
    np.save(folder / _RESULT, _as_integers(case.exact_result()))


def read(case: Case, folder: pathlib.Path, name: str) -> tuple[Array, Array]:
    """One of the two pairs."""
    dtype = DTYPES[case.dtype].operand_dtype
    lhs, rhs = (np.load(folder / f"{name}-{side}.npy").view(dtype) for side in range(2))
    return lhs, rhs


def read_result(case: Case, folder: pathlib.Path) -> Array:
    """The product of the exact pair."""
    result: Array = np.load(folder / _RESULT, mmap_mode="r").view(DTYPES[case.dtype].out_dtype)
    return result


def _as_integers(array: Array) -> Array:
    """The same bits in a dtype that .npy files know."""
    return array.view(f"i{array.dtype.itemsize}")
