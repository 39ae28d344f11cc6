"""What accelerating a program adds to the time that XLA takes to compile it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from zoo.compiled import products

import jax_nano
from benchmarks.pairs import Timed, compare
from benchmarks.report import Section

GOAL = 1.10
"""Accelerated over plain, for 100 products."""

_HEADER = ("program", "accelerated ms", "plain ms", "accelerated / plain")
_MANY = 100
_ROWS = 24


class _Program(NamedTuple):
    what: str
    function: Callable[[jax.Array], jax.Array]
    products: int


def report(*, quick: bool) -> Section:
    """Milliseconds of `Lowered.compile`, with nothing in any cache."""
    rounds = 2 if quick else 9
    jax.config.update("jax_enable_compilation_cache", False)
    rows = tuple(
        compare(program.what, _compiling(program, True), _compiling(program, False), rounds, 1e-3, 1)
        for program in _programs(10 if quick else _MANY)
    )
    text = f"With jax_nano.accelerate and without. The goal for {_MANY} products is at most {GOAL:.2f}."
    return Section("Compilation", text, _HEADER, rows)


def _programs(many: int) -> Iterator[_Program]:
    def chain(count: int, after: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        def function(x: jax.Array) -> jax.Array:
            for i in range(count):
                n, k = 17 + i, x.shape[1]
                x = after(x @ jnp.ones((k, n)), jnp.arange(n, dtype=np.float32))
            return x

        return function

    def without(x: jax.Array) -> jax.Array:
        for i in range(many):
            x = jnp.sin(x).sum(axis=0) + x * i
        return x

    yield _Program(f"no product, {many} sums and loops", without, 0)
    yield _Program("1 product", chain(1, lambda y, _: jnp.sin(y)), 1)
    yield _Program(f"{many} products of as many shapes, each in a sine", chain(many, lambda y, _: jnp.sin(y)), many)
    yield _Program(
        f"{many} products of as many shapes, each in gelu with a bias",
        chain(many, lambda y, bias: jax.nn.gelu(y + bias)),
        many,
    )


def _compiling(program: _Program, accelerated: bool) -> Timed:
    argument = jax.ShapeDtypeStruct((_ROWS, 16), np.float32)

    def timed() -> float:
        jax.clear_caches()
        with jax_nano.accelerate(accelerated):
            lowered = jax.jit(program.function).lower(argument)
            start = time.perf_counter()
            compiled: Any = lowered.compile()
            seconds = time.perf_counter() - start
        found = products(compiled.as_text())
        if found != accelerated * program.products:
            raise RuntimeError(f"{program.what}: {found} are ours")
        return seconds

    return timed
