"""Products inside jax.jit: ours and XLA's, as one while loop with the product in its body."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.cases import DTYPES, Array, Case
from benchmarks.peers import Operands, Unavailable

Arrays = tuple[jax.Array, ...]


def product(case: Case, *, ours: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The call that a user would write for this case."""
    library = importlib.import_module("jax_nano") if ours else jnp
    name = "einsum" if case.is_einsum else "matmul"
    if not hasattr(library, name):
        raise Unavailable(f"{library.__name__} has no {name}")
    call = getattr(library, name)

    dtype = DTYPES[case.dtype]
    wide = {} if dtype.out == dtype.operand else {"preferred_element_type": dtype.out_dtype}
    if case.is_einsum:
        return lambda lhs, rhs: call(case.spec, lhs, rhs, **wide)
    transpose_lhs, transpose_rhs = (letter == "T" for letter in case.layout)
    return lambda lhs, rhs: call(lhs.mT if transpose_lhs else lhs, rhs.mT if transpose_rhs else rhs, **wide)


def _with_first(x: jax.Array, value: jax.Array) -> jax.Array:
    """The array with another first element; not by `x.at`, which has XLA check the index and copy arrays of rank 3."""
    return lax.dynamic_update_slice(x, value.reshape((1,) * x.ndim), (0,) * x.ndim)


def loop_of(op: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., Any]:
    """A program that goes through all operand pairs `trips` times, each product after the last.

    Before each product the first element of either operand is overwritten, in place, with the last
    result's first element clamped between `low` and `high`. Both are that element's own value, which
    XLA cannot know: so it can neither hoist nor drop nor overlap a product, nor what it does to an
    operand first, and yet operands and results stay what they are. Operands of bfloat16 stay untouched,
    because XLA converts all of an array to write one element of it: a barrier between the last result and
    the operands stands in for that. Only the left one of several pairs is written to all the same, as the
    barrier is gone when XLA decides what may run at once.
    """

    def program(
        trips: jax.Array, low: Arrays, high: Arrays, lhs: Arrays, rhs: Arrays, out: Arrays
    ) -> tuple[Arrays, Arrays, Arrays]:
        def trip(_: jax.Array, state: tuple[jax.Array, Arrays, Arrays, Arrays]) -> Any:
            last, *operands, _out = state
            new: list[Arrays] = []
            for pair in zip(*operands, strict=True):
                a, b = (
                    x
                    if x.dtype == jnp.bfloat16 and (i or len(lhs) == 1)
                    else _with_first(x, jnp.clip(last.astype(x.dtype), low[i], high[i]))
                    for i, x in enumerate(pair)
                )
                a, b, last = lax.optimization_barrier((a, b, last))
                new.append((a, b, op(a, b)))
                last = new[-1][2][(0,) * new[-1][2].ndim]
            return last, *zip(*new, strict=True)

        start = out[0][(0,) * out[0].ndim]
        return lax.fori_loop(0, trips, trip, (start, lhs, rhs, out))[1:]

    return program


class JaxRunner:
    """Runs `loop_of` the product, compiled once for a case."""

    def __init__(self, threads: int, *, ours: bool = False) -> None:
        jax.config.update("jax_enable_x64", True)
        self._ours = ours  # the number of threads is the worker's affinity and NPROC
        self._program: Any = None
        self._state: tuple[Arrays, Arrays, Arrays] = ((), (), ())  # left operands, right operands, results
        if ours:
            try:
                import jax_nano  # noqa: F401
            except ImportError as error:
                raise Unavailable(f"cannot import jax_nano: {error}") from error

    def version(self) -> str:
        from importlib import metadata

        if not self._ours:
            return f"jax {jax.__version__}, jaxlib {metadata.version('jaxlib')}"
        from jax_nano import _runtime

        return f"{metadata.version('jax_nano')} ({_runtime.selected_target()})"

    def prepare(self, case: Case, pairs: int) -> None:
        self._case, self._pairs = case, pairs
        dtype = DTYPES[case.dtype]
        lhs, rhs, out = (
            tuple(jax.ShapeDtypeStruct(shape, element) for _ in range(pairs))
            for shape, element in zip(
                case.shapes, (dtype.operand_dtype, dtype.operand_dtype, dtype.out_dtype), strict=True
            )
        )
        first = (jax.ShapeDtypeStruct((), dtype.operand_dtype),) * 2
        trips = jax.ShapeDtypeStruct((), np.int32)
        program = jax.jit(loop_of(product(case, ours=self._ours)), donate_argnums=(3, 4, 5))
        self._program = program.lower(trips, first, first, lhs, rhs, out).compile()

    def load(self, operands: Operands) -> None:
        out = DTYPES[self._case.dtype].out_dtype
        # Copies: a buffer that is donated must not be NumPy's own memory.
        lhs, rhs = (tuple(jnp.array(x, copy=True) for x in side) for side in zip(*operands, strict=True))
        self._first = tuple(np.asarray(x[(0,) * x.ndim]) for x in operands[0])
        self._state = (lhs, rhs, tuple(jnp.zeros(self._case.shapes[2], out) for _ in operands))
        jax.block_until_ready(self._state)

    def run(self, trips: int) -> float:
        start = time.perf_counter()
        self._state = self._program(np.int32(trips), self._first, self._first, *self._state)
        jax.block_until_ready(self._state)
        return time.perf_counter() - start

    def results(self) -> list[Array]:
        return [np.asarray(out) for out in self._state[2]]

    def close(self) -> None:
        self._program, self._state = None, ((), (), ())
        jax.clear_caches()
