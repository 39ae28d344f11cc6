"""Where the decline gate belongs: tiny products in a loop, ours with the gate open beside XLA's own."""

from __future__ import annotations

from benchmarks.cases import matmul
from benchmarks.pairs import HEADER, Timed, compare
from benchmarks.peers.in_jax import JaxRunner
from benchmarks.report import Section

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24)


def report(*, quick: bool) -> Section:
    """Microseconds of one product inside a fori_loop, by size."""
    import jax_nano._gate

    jax_nano._gate.enabled = False
    rounds, trips = (2, 100) if quick else (9, 50_000)
    sizes = _SIZES[:3] if quick else _SIZES
    rows = []
    for n in sizes:
        for m in (n, 1):
            what = f"{m}x{n}x{n}, {m * n * n} multiply-adds, µs"
            rows.append(compare(what, _loop(m, n, trips, True), _loop(m, n, trips, False), rounds, 1e-6, 3))
    return Section("Tiny products in a loop", "Ours with the gate open.", HEADER, tuple(dict.fromkeys(rows)))


def _loop(m: int, n: int, trips: int, ours: bool) -> Timed:
    case = matmul(m, n, n)
    runner = JaxRunner(1, ours=ours)
    runner.prepare(case, 1)
    runner.load([case.random_operands()])
    return lambda: runner.run(trips) / trips
