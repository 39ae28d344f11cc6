"""The planner's regret: how much slower its plans are than the best of all that it could have chosen.

Every candidate plan of a product (``_runtime.testing.candidates``) is checked, then timed on operands in cache, in
turn with all others. The times are kept as data, from which the regret of any planner can be computed later without a
clock: a planner's choice is looked up among the candidates.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from benchmarks import machine
from benchmarks.cases import DTYPES, Array, Case, matmul

CHOICE: Final = (
    *("kernel", "inner", "sweep", "pack_a", "pack_b", "prefetch", "mc", "kc", "nc", "tile_rows", "split", "split_k"),
)
"""What is kept of a candidate, beside its time."""

_CLOSE = 1.25  # candidates within this factor of the best are timed again,
_MOST_AGAIN = 16  # but no more than so many of them
_QUICK_ROUNDS = 3  # by which that is judged


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a product is measured.

    Attributes:
      threads: how many compute it.
      rounds: samples of each candidate that comes close to the best.
      sample_seconds: how long one sample lasts, at least.
      most: at most so many candidates, the planner's among them; the others are drawn at random. 0: all.
    """

    threads: int
    rounds: int
    sample_seconds: float
    most: int


def random_cases(count: int, dtype: str, most_flops: float, seed: int = 0) -> Iterator[Case]:
    """Products of log-uniform sizes up to 4096; a quarter of the sizes are powers of two, a quarter are odd."""
    rng = random.Random(f"{dtype} {seed}")

    def size() -> int:
        x = 2 ** rng.uniform(0, 12)
        kind = rng.random()
        return 1 << round(math.log2(x)) if kind < 0.25 else int(x) | 1 if kind < 0.5 else max(1, round(x))

    while count > 0:
        m, n, k = size(), size(), size()
        if 2 * m * n * k <= most_flops:
            count -= 1
            yield matmul(m, n, k, dtype, layout=rng.choice(("NN", "NN", "NT", "TN", "TT")))


def measure(cases: Sequence[Case], settings: Sequence[Settings]) -> Iterator[dict[str, Any]]:
    """The times of each case's candidates, with each of the settings."""
    todo = [(case, how) for case in cases for how in settings]
    for case, how in tqdm(todo, unit="product", disable=None):
        yield _measured(case, how)


def _measured(case: Case, how: Settings) -> dict[str, Any]:
    from jax_nano import _runtime

    dtype = DTYPES[case.dtype]
    lhs, rhs, out = case.labels
    labels = [[ord(x) for x in term] for term in (lhs, rhs, out)]
    product: tuple[Any, ...] = (*case.shapes[:2], *labels, dtype.operand, dtype.operand, dtype.out, how.threads)
    plans = list(_runtime.testing.candidates(*product))
    if 0 < how.most < len(plans):
        plans = [plans[0], *random.Random(case.key).sample(plans[1:], how.most - 1)]
    choices = [{name: plan[name] for name in CHOICE} for plan in plans]

    time_dot: Any = _runtime.testing.time_dot

    def run(buffers: Array, trips: int, choice: dict[str, Any]) -> float:
        return float(time_dot(buffers, trips, *product, choice=choice))

    result = np.empty(case.shapes[2], dtype.out_dtype)
    exact, want = case.exact_operands(), case.exact_result()
    for choice in choices:
        result.fill(0)
        run(_addresses(*exact, result), 1, choice)
        if not np.array_equal(result, want):
            raise AssertionError(f"{case.key}: a wrong result by {choice}")

    pair = case.random_operands()
    buffers = _addresses(*pair, result)
    once = max(min(run(buffers, 1, choices[0]) for _ in range(3)), 1e-9)
    trips = max(1, round(how.sample_seconds / once))
    samples: list[list[float]] = [[] for _ in choices]

    def sample(which: Sequence[int], rounds: int) -> None:
        order = list(which)
        for turn in range(rounds):
            random.Random(turn).shuffle(order)
            for i in order:
                samples[i].append(run(buffers, trips, choices[i]) / trips)

    sample(range(len(choices)), _QUICK_ROUNDS)
    medians = [statistics.median(x) for x in samples]
    best = min(medians)
    close = sorted((i for i, x in enumerate(medians) if x <= _CLOSE * best), key=lambda i: medians[i])[:_MOST_AGAIN]
    sample(sorted({0, *close}), how.rounds)
    return {
        "product": case.key,
        "spec": case.spec,
        "dims": dict(case.dims),
        "dtype": case.dtype,
        "threads": how.threads,
        "planned": 0,  # the planner's choice when this was measured, among the candidates
        "samples": [len(x) for x in samples],
        "us": [round(statistics.median(x) * 1e6, 3) for x in samples],
        "choices": [[choice[name] for name in CHOICE] for choice in choices],
    }


def _addresses(*arrays: Array) -> Array:
    return np.array([[array.ctypes.data for array in arrays]], np.uintp)


def ratios(rows: Sequence[dict[str, Any]]) -> list[float]:
    """For each product the planned time by that of the fastest candidate that was timed as often."""
    out = []
    for row in rows:
        planned, most = row["us"][row["planned"]], max(row["samples"])
        out.append(planned / min(us for us, count in zip(row["us"], row["samples"], strict=True) if count == most))
    return out


@dataclasses.dataclass(frozen=True)
class Summary:
    """Regret of some products: ratios of times, at least 1."""

    products: int
    mean: float  # geometric
    quantile_95: float
    worst: list[tuple[float, str]]

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Summary:
        found = ratios(rows)
        named = sorted(zip(found, (f"{x['product']}, {x['threads']} threads" for x in rows), strict=True), reverse=True)
        return cls(len(found), statistics.geometric_mean(found), float(np.quantile(found, 0.95)), named[:10])

    def __str__(self) -> str:
        mean, quantile = f"{self.mean:.3f} in geometric mean", f"{self.quantile_95:.3f} in 95 % of cases"
        first = f"{self.products} products: planned / fastest candidate {mean}, {quantile}; the worst:"
        return "\n".join([first, *(f"  {ratio:.2f}  {name}" for ratio, name in self.worst)])


def save(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Keeps the rows as JSON, a line for each."""
    head = {"machine": machine.describe(), "when": time.strftime("%Y-%m-%d"), "choice": CHOICE}
    body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{body}\n]}}\n')


def load(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file that `save` wrote."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows
