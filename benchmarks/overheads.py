"""What a product costs apart from its arithmetic: calls, tracing and compilation, import."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_nano
from benchmarks.cases import matmul
from benchmarks.pairs import HEADER, Timed, compare, interleave, row
from benchmarks.peers.in_jax import JaxRunner
from benchmarks.report import Section

# What happens to a program before it can run: each stage is a row, and so is their sum.
_STAGES = ("trace", "lower", "compile")

_MICRO, _MILLI = 1e-6, 1e-3


def report(*, quick: bool) -> Section:
    """All of it, as a table."""
    rounds = 3 if quick else 15
    calls = 50 if quick else 2000
    ours, theirs = jax_nano.matmul, jnp.matmul
    rows = [
        compare("jitted call from Python, 8x8, µs", _jitted(ours, 8, calls), _jitted(theirs, 8, calls), rounds, _MICRO),
        compare(
            "jitted call from Python, 32x32, µs", _jitted(ours, 32, calls), _jitted(theirs, 32, calls), rounds, _MICRO
        ),
        compare("eager call, 8x8, µs", _eager(ours, calls), _eager(theirs, calls), rounds, _MICRO),
        *(
            compare(
                f"in a fori_loop, {n}x{n}, µs", _looped(True, n, calls), _looped(False, n, calls), rounds, _MICRO, 3
            )
            for n in (8, 16, 32)
        ),
    ]
    few, products = (2, 2) if quick else (9, 60)
    rows += [line for one_shape in (True, False) for line in _building(one_shape, products, few)]
    rows.append(_import_row(2 if quick else 5))
    return Section("Overheads", "Float32; everything but the arithmetic.", HEADER, tuple(rows))


def _square(n: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((n, n), np.float32))


def _jitted(matmul_of: Callable[..., Any], n: int, calls: int) -> Timed:
    return _repeated(jax.jit(lambda a, b: matmul_of(a, b)), n, calls)


def _eager(matmul_of: Callable[..., Any], calls: int) -> Timed:
    return _repeated(matmul_of, 8, calls)


def _repeated(call: Callable[..., Any], n: int, calls: int) -> Timed:
    a, b = _square(n), _square(n)

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call(a, b).block_until_ready()
        return (time.perf_counter() - start) / calls

    return timed


def _looped(ours: bool, n: int, calls: int) -> Timed:
    case = matmul(n, n, n)
    runner = JaxRunner(1, ours=ours)
    runner.prepare(case, 1)
    runner.load([case.random_operands()])
    trips = 20 * calls
    return lambda: runner.run(trips) / trips


def _building(one_shape: bool, products: int, rounds: int) -> list[tuple[str, ...]]:
    """Rows for what it takes to make a program of many products ready to run."""
    samples = interleave(
        {who: _stages(each, one_shape, products) for who, each in (("ours", jax_nano.matmul), ("theirs", jnp.matmul))},
        rounds,
    )
    what = f"{products} products of {'one shape' if one_shape else 'as many shapes'}, ms"
    rows = []
    for name, stages in (
        *((stage, slice(i, i + 1)) for i, stage in enumerate(_STAGES)),
        (", ".join(_STAGES), slice(len(_STAGES))),
    ):
        ours, theirs = ([sum(sample[stages]) for sample in samples[who]] for who in ("ours", "theirs"))
        rows.append(row(f"{name} {what}", ours, theirs, _MILLI, 1))
    return rows


def _stages(matmul_of: Callable[..., Any], one_shape: bool, products: int) -> Callable[[], tuple[float, ...]]:
    """Times each of _STAGES, from nothing in any cache."""

    def program(x: jax.Array) -> jax.Array:
        for i in range(products):
            x = jnp.tanh(matmul_of(x, jnp.ones((16, 16) if one_shape else (16 + i, 17 + i))))
        return x

    argument = jax.ShapeDtypeStruct((32, 16), np.float32)

    def timed() -> tuple[float, ...]:
        jax.clear_caches()
        times = [time.perf_counter()]
        traced = jax.jit(program).trace(argument)
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        lowered.compile()
        times.append(time.perf_counter())
        return tuple(end - start for start, end in itertools.pairwise(times))

    return timed


def _import_row(rounds: int) -> tuple[str, ...]:
    """`import jax` and the first use of the package after it, against `import jax` and of jnp."""
    ours = _in_new_process("import jax, jax.numpy, jax_nano; jax_nano.matmul")
    theirs = _in_new_process("import jax, jax.numpy; jax.numpy.matmul")
    return compare("import, ms", ours, theirs, rounds, _MILLI, 0)


def _in_new_process(code: str) -> Timed:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def timed() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True)
        return time.perf_counter() - start

    return timed
