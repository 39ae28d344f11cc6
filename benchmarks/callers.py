"""Several Python threads, each calling its own jitted product: how much more they get done together."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import jax

from benchmarks import machine
from benchmarks.cases import Case, matmul
from benchmarks.peers.in_jax import product
from benchmarks.report import Section

_CALLERS = 2


def report(*, quick: bool) -> Section:
    """Products a second of all callers together, over those of a single one."""
    rounds, seconds = (2, 0.01) if quick else (9, 0.2)
    sizes = (16,) if quick else (32, 64, 128, 256, 512, 1024)
    cases = [matmul(n, n, n) for n in sizes]
    rows = tuple((case.key, *(_gain(case, ours, rounds, seconds) for ours in (True, False))) for case in cases)
    note = (
        f"{_CALLERS} Python threads, each in its own jit, over one of them; {len(machine.cpus())} CPUs, of which each "
        "product may use all."
    )
    return Section(f"{_CALLERS} callers over one", note, ("product", "jax_nano", "jnp"), rows)


def _gain(case: Case, ours: bool, rounds: int, seconds: float) -> str:
    op = product(case, ours=ours)
    calls = [_compiled(op, case) for _ in range(_CALLERS)]
    gains = []
    for _ in range(rounds):
        single = _rate(calls[:1], seconds)
        together = _rate(calls, seconds)
        gains.append(together / single)
    return f"{statistics.median(gains):.2f}"


def _compiled(op: Callable[[jax.Array, jax.Array], jax.Array], case: Case) -> Callable[[], object]:
    lhs, rhs = map(jax.device_put, case.random_operands())
    call = jax.jit(lambda a, b: op(a, b)).lower(lhs, rhs).compile()
    call(lhs, rhs).block_until_ready()
    return lambda: call(lhs, rhs).block_until_ready()


def _rate(calls: list[Callable[[], object]], seconds: float) -> float:
    """Calls a second of all of them, each in a thread of its own."""
    counts = [0] * len(calls)
    start = threading.Barrier(len(calls))

    def work(index: int) -> None:
        start.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            calls[index]()
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begin)
