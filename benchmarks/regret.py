"""The planner's regret: how much slower its plans are than the best of all that it could have chosen.

Every candidate plan of a product (``_runtime.tuning.candidates``) is checked, then timed on operands in cache, in
turn with all others. The times are kept as data, from which the regret of any planner can be computed later without a
clock: a planner's choice is looked up among the candidates.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import machine
from benchmarks.cases import DTYPES, Case, matmul
from jax_nano._tools.timing import CHOICE, Probe, Product, Settings, addresses, candidates, size, times


def random_cases(count: int, dtype: str, most_flops: float, seed: int = 0) -> Iterator[Case]:
    """Products of log-uniform sizes up to 4096; a quarter of the sizes are powers of two, a quarter are odd."""
    rng = random.Random(f"{dtype} {seed}")

    while count > 0:
        m, n, k = (size(rng, 4096) for _ in range(3))
        if 2 * m * n * k <= most_flops:
            count -= 1
            yield matmul(m, n, k, dtype, layout=rng.choice(("NN", "NN", "NT", "TN", "TT")))


def measure(cases: Sequence[Case], settings: Sequence[Settings]) -> Iterator[dict[str, Any]]:
    """The times of each case's candidates, with each of the settings."""
    todo = [(case, how) for case in cases for how in settings]
    probe = Probe()
    for case, how in tqdm(todo, unit="product", disable=None):
        yield _measured(case, how, probe)


def _measured(case: Case, how: Settings, probe: Probe) -> dict[str, Any]:
    from jax_nano import _runtime

    dtype = DTYPES[case.dtype]
    lhs, rhs, out = case.labels
    product = Product((case.shapes[0], case.shapes[1]), (lhs, rhs, out), (dtype.operand, dtype.operand, dtype.out))
    choices = candidates(product, how)

    result = np.empty(case.shapes[2], dtype.out_dtype)
    exact, want = case.exact_operands(), case.exact_result()
    time_dot: Any = _runtime.tuning.time_dot
    for choice in choices:
        result.fill(0)
        time_dot(addresses(*exact, result), 1, *product.arguments, how.threads, choice=choice)
        if not np.array_equal(result, want):
            raise AssertionError(f"{case.key}: a wrong result by {choice}")

    samples = times(product, choices, (*case.random_operands(), result), how, probe)
    return {
        "product": case.key,
        "spec": case.spec,
        "dims": dict(case.dims),
        "dtype": case.dtype,
        "threads": how.threads,
        "cold": how.cold_bytes > 0,
        "planned": 0,  # the planner's choice when this was measured, among the candidates
        "samples": [len(x) for x in samples],
        "us": [round(min(x) * 1e6, 3) for x in samples],
        "choices": [[choice[name] for name in CHOICE] for choice in choices],
    }


def product_of(row: Mapping[str, Any]) -> Product:
    """That of a row of times."""
    dtype, dims = DTYPES[row["dtype"]], row["dims"]
    operands, out = row["spec"].split("->")
    lhs, rhs = operands.split(",")
    shapes = tuple(dims[x] for x in lhs), tuple(dims[x] for x in rhs)
    return Product(shapes, (lhs, rhs, out), (dtype.operand, dtype.operand, dtype.out))


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
    """Keeps the rows as JSON, a line for each; compressed if the name ends with .gz."""
    head = {"machine": machine.describe(), "when": time.strftime("%Y-%m-%d"), "choice": CHOICE}
    body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    text = f'{json.dumps(head)[:-1]}, "rows": [\n{body}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


def load(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file that `save` wrote."""
    data = path.read_bytes()
    rows: list[dict[str, Any]] = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["rows"]
    return rows
