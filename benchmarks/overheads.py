"""What a product costs beside its arithmetic: calls, tracing and compilation, import."""

from __future__ import annotations

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
from benchmarks import machine
from benchmarks.cases import matmul
from benchmarks.pairs import Timed, compare, pairs_table
from benchmarks.peers.in_jax import JaxRunner

# What happens to a program before it can run; each stage is timed for itself, and all together.
_STAGES = {
    "trace": slice(0, 1),
    "lower": slice(1, 2),
    "compile": slice(2, 3),
    "trace, lower and compile": slice(0, 3),
}

_MICRO, _MILLI = 1e-6, 1e-3


def report(*, quick: bool) -> str:
    """Markdown table of all of it."""
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
    few, products = (2, 2) if quick else (5, 60)
    for what, stages in _STAGES.items():
        our_build, their_build = (_build(each, stages, products) for each in (ours, theirs))
        rows.append(compare(f"{what} {products} products, ms", our_build, their_build, few, _MILLI, 1))
    rows.append(_import_row(few))
    return f"{machine.describe()['cpu']}, JAX {jax.__version__}\n\n{pairs_table(rows)}"


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


def _build(matmul_of: Callable[..., Any], stages: slice, products: int) -> Timed:
    """Times some of _STAGES for a program with products of many shapes."""

    def program(x: jax.Array) -> jax.Array:
        for i in range(products):
            x = jnp.tanh(matmul_of(x, jnp.ones((16 + i, 17 + i))))
        return x

    argument = jax.ShapeDtypeStruct((32, 16), np.float32)

    def timed() -> float:
        jax.clear_caches()
        times = [time.perf_counter()]
        traced = jax.jit(program).trace(argument)
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        if stages.stop == len(times):
            lowered.compile()
            times.append(time.perf_counter())
        return times[stages.stop] - times[stages.start]

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
