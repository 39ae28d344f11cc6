"""Several Python threads, each with its own jitted product: how much more they get done together than one alone.

A caller that may use every core leaves none to the others: together they can then gain only what one leaves idle.
So both are measured, products that keep to their caller's thread and products that may spread over all cores.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import jax

from benchmarks import ROOT, machine
from benchmarks.cases import Case, matmul
from benchmarks.peers.in_jax import JaxRunner, product
from benchmarks.report import Section

_CALLERS = 2
_LOOP_SECONDS = 5e-3

# The size of XLA's pool belongs to the process: one for each.
_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from benchmarks import callers
print(json.dumps(callers.gains(quick=sys.argv[2] == "quick")))
"""


def report(*, quick: bool) -> Section:
    """All of it, as a table."""
    rows: list[tuple[str, ...]] = []
    for threads in dict.fromkeys((1, len(machine.cpus()))):
        for name, *gains in _in_a_process(threads, quick=quick):
            rows.append((name, str(threads), *gains))
    note = (
        f"Products a second of {_CALLERS} Python threads, each in its own jit, over those of one; "
        f"{len(machine.cpus())} CPUs. Inside jit a call is a loop of some milliseconds; from Python it is one product."
    )
    header = ("product", "threads of a product", "in jit: jax_nano", "jnp", "from Python: jax_nano", "jnp")
    return Section(f"{_CALLERS} callers over one", note, header, tuple(rows))


def _in_a_process(threads: int, *, quick: bool) -> list[list[str]]:
    command = [sys.executable, "-P", "-c", _PROGRAM, str(ROOT), "quick" if quick else "whole"]
    environment = os.environ | {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[list[str]] = json.loads(done.stdout)
    return rows


def gains(*, quick: bool) -> list[list[str]]:
    """For each product its name and what several callers gain in this process: in loops and in single calls."""
    rounds, seconds = (2, 0.01) if quick else (7, 0.1)
    cases = [matmul(n, n, n) for n in ((16,) if quick else (32, 64, 128, 256, 512, 1024))]
    columns = [(way, ours) for way in (_loop, _single) for ours in (True, False)]
    return [
        [case.key, *(_gain(functools.partial(way, case, ours), rounds, seconds) for way, ours in columns)]
        for case in cases
    ]


Call = Callable[[], int]
"""Computes some products and says how many."""


def _gain(compiled: Callable[[], Call], rounds: int, seconds: float) -> str:
    calls = [compiled() for _ in range(_CALLERS)]
    ratios = []
    for _ in range(rounds):
        alone = _rate(calls[:1], seconds)
        ratios.append(_rate(calls, seconds) / alone)
    return f"{statistics.median(ratios):.2f}"


def _single(case: Case, ours: bool) -> Call:
    lhs, rhs = map(jax.device_put, case.random_operands())
    op = product(case, ours=ours)
    call = jax.jit(lambda a, b: op(a, b)).lower(lhs, rhs).compile()

    def run() -> int:
        call(lhs, rhs).block_until_ready()
        return 1

    run()
    return run


def _loop(case: Case, ours: bool) -> Call:
    runner = JaxRunner(1, ours=ours)
    runner.prepare(case, 1)
    runner.load([case.random_operands()])
    trips = max(1, int(_LOOP_SECONDS / runner.run(1)))
    trips = max(1, int(_LOOP_SECONDS * trips / runner.run(trips)))  # the first run is slower than the rest

    def run() -> int:
        runner.run(trips)
        return trips

    return run


def _rate(calls: list[Call], seconds: float) -> float:
    """Products a second of all of them, each in a thread of its own."""
    counts = [0] * len(calls)
    start = threading.Barrier(len(calls) + 1)

    def work(index: int) -> None:
        start.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            counts[index] += calls[index]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begin)
