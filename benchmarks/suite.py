"""The programs of benchmarks/programs, accelerated and not, on one core and on all, alone and with a busy process.

The same functions run both ways in one process, in turn, inside `jax_nano.accelerate()` and outside of it, as a user
would call them: what is timed has the program's own Python in it. Each number of cores has a process of its own, which
may use no other CPUs. The busy process counts in pure Python, and may use the same CPUs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

import jax_nano
from benchmarks import machine
from benchmarks.accelerated import Row, check, rows_of
from benchmarks.pairs import interleave
from benchmarks.programs import PROGRAMS, Run
from benchmarks.report import table
from jax_nano._core import record

GOAL, MEAN_GOAL = 0.98, 1.1
"""Of plain XLA's speed: each program's, and the geometric mean."""

_SAMPLE_SECONDS = 0.15
_TRUST = 512
"""Units in the last place, relative to the whole result, by which two runs may differ: after dozens of steps."""


class Setting(NamedTuple):
    """What the machine does while a program runs."""

    cores: int
    busy: bool  # while another process computes

    def __str__(self) -> str:
        return f"{self.cores} core{'s' * (self.cores > 1)}" + ", busy" * self.busy


def run(only: Sequence[str], settings: Sequence[Setting], *, rounds: int, quick: bool) -> Iterator[Row]:
    """Measures the programs whose name has a text of `only`; one that fails raises RuntimeError."""
    names = [name for name in PROGRAMS if not only or any(text in name for text in only)]
    with tqdm(total=len(names) * len(settings), unit="program", smoothing=0) as progress:
        for cores in dict.fromkeys(x.cores for x in settings):
            busy = [x.busy for x in settings if x.cores == cores]
            cpus = machine.cpus()[:cores]
            order = {"programs": names, "cpus": cpus, "busy": busy, "rounds": rounds, "quick": quick}
            for row in rows_of("benchmarks.suite", [json.dumps(order)], {}):
                progress.set_description(row.name[:24].ljust(24))
                progress.update(len(busy) if row.skipped else 1)
                yield row


def markdown(rows: Sequence[Row]) -> str:
    """A line for each program, and the lowest and the mean of each setting."""
    measured = {(row.name, row.setting): row for row in rows if not row.skipped}
    settings = list(dict.fromkeys(setting for _, setting in measured))
    body: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for name, _ in measured):
        found = {setting: measured[name, setting] for setting in settings if (name, setting) in measured}
        first = next(iter(found.values()))
        products = f"{first.products} of {first.products + first.left}"
        times = (f"{found[x].times_faster:.2f}" if x in found else "-" for x in settings)
        body.append((name, f"{1e3 * statistics.median(first.plain):.1f}", *times, products))
    ratios = [[row.times_faster for (_, x), row in measured.items() if x == setting] for setting in settings]
    for what, summary in (("lowest", min), ("geometric mean", statistics.geometric_mean)):
        body.append((what, "", *(f"{summary(each):.2f}" for each in ratios), ""))
    head = (
        f"{machine.describe()['cpu']}, JAX {jax.__version__}. Times faster than plain XLA; ms of plain XLA, on"
        f" {settings[0] if settings else 'nothing'}. The goals: {GOAL} each, {MEAN_GOAL} in the mean.\n\n"
    )
    text = head + table(("program", "plain ms", *settings, "products that are ours"), body)
    skipped = {row.name: row.skipped for row in rows if row.skipped}
    return text + "".join(f"\nLeft out: {name}: {why}\n" for name, why in skipped.items())


# --- the process that measures ------------------------------------------------------------------


def _measure(name: str, settings: Sequence[Setting], rounds: int, *, quick: bool) -> Iterator[Row]:
    program = PROGRAMS[name]
    try:
        once = program.build(program.tiny if quick else program.real)
    except ImportError as error:
        yield Row(name, str(settings[0]), skipped=f"needs {error.name}")
        return
    want, plain_seconds = _first(once)
    jax_nano.clear_report()
    with jax_nano.accelerate():
        got, seconds = _first(once)
    check(name, got, want, program.element_bytes, _TRUST)
    found = record.products()
    ours = sum(count for product, count in found if product.declined is None)
    left = sum(count for _, count in found) - ours
    times = 1 if quick else max(1, math.ceil(_SAMPLE_SECONDS / _seconds(once, 1, accelerated=False)))
    candidates = {
        kind: lambda on=on: _seconds(once, times, accelerated=on)
        for kind, on in (("plain", False), ("accelerated", True))
    }
    for setting in settings:
        with _busy() if setting.busy else contextlib.nullcontext():
            samples = interleave(candidates, rounds)
        both = tuple(samples["plain"]), tuple(samples["accelerated"])
        yield Row(name, str(setting), *both, (plain_seconds, seconds), ours, left)


def _first(once: Run) -> tuple[Any, float]:
    """What a run gives, and its seconds, compilation among them."""
    start = time.perf_counter()
    result = jax.block_until_ready(once())
    return result, time.perf_counter() - start


def _seconds(once: Run, times: int, *, accelerated: bool) -> float:
    """Of a run, the mean of several."""
    with jax_nano.accelerate(accelerated):
        start = time.perf_counter()
        for _ in range(times):
            jax.block_until_ready(once())
        return (time.perf_counter() - start) / times


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    """Another process computes in pure Python meanwhile."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def _child(order: str) -> None:
    options = json.loads(order)
    os.sched_setaffinity(0, options["cpus"])  # XLA's threads, which do not exist yet, inherit it
    settings = [Setting(len(options["cpus"]), busy) for busy in options["busy"]]
    for name in options["programs"]:
        for row in _measure(name, settings, options["rounds"], quick=options["quick"]):
            row.send()
        jax.clear_caches()


if __name__ == "__main__":
    _child(*sys.argv[1:])
