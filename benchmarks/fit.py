"""The costs of a CPU family's profile (jax_nano/profiles), fitted to the times of candidate plans that `regret` kept.

A plan's predicted time is a sum of counts times costs (csrc/plan/cost.h), so that costs follow from times by least
squares with no cost below zero. Errors are relative to the time. Those of slow plans count less, and large ones no
more than medium ones: a sample may be slow because another machine has the core. A cost never falls from one cache
level to the next. What the data of a kernel leave open comes from the kernel that was fitted first.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from benchmarks.cases import DTYPES
from benchmarks.regret import CHOICE
from jax_nano import _runtime
from jax_nano._core import spec

Floats = NDArray[np.float64]
Row = dict[str, Any]

NAMES: Final = spec.cost_names()
_AT: Final = {name: i for i, name in enumerate(NAMES)}
_LEVELS: Final = len(spec.CACHE_LEVELS)
_NEAR_BEST, _LEAST_WEIGHT = 1.3, 0.2  # plans within this factor of the best count fully; none less than this
_FEW, _MANY = 4, 20  # samples: fewer are doubted, more trusted
_TOO_FAST, _TOO_SLOW = 0.2, 0.12  # errors beyond which a prediction's error counts linearly; slow samples are likelier
_PRIOR = 0.004  # weight of the first kernel's costs, of a point of the data
_ROUNDS = 8
_MEMORY = 0.8  # lines from memory, prefetched and not


def counts(row: Row, cpu: str) -> Floats:
    """What the model counts for each candidate of a product: a line for each, a column for each of NAMES."""
    dtype, dims = DTYPES[row["dtype"]], row["dims"]
    operands, out = row["spec"].split("->")
    terms = (*operands.split(","), out)
    shapes = [[dims[x] for x in term] for term in terms[:2]]
    labels = [[ord(x) for x in term] for term in terms]
    table = np.zeros((len(row["choices"]), len(NAMES)))
    for line, values in zip(table, row["choices"], strict=True):
        choice: Any = dict(zip(CHOICE, values, strict=True))
        product: tuple[Any, ...] = (*shapes, *labels, dtype.operand, dtype.operand, dtype.out)
        counted: Any = _runtime.testing.counts
        for name, count in counted(*product, choice, cpu).items():
            line[_AT[name]] = count
    return table


def _steps() -> Floats:
    """Costs from what is fitted: of each cache level what it costs more than the one before."""
    steps, at = np.eye(len(NAMES)), 0
    for _, count in spec.COST_TERMS.values():
        if count == _LEVELS:
            steps[at : at + count, at : at + count] = np.tri(count)
        at += count
    return steps


def _weights(row: Row) -> Floats:
    us, samples = np.array(row["us"]), np.array(row["samples"])
    near = np.clip(_NEAR_BEST * us.min() / us, _LEAST_WEIGHT, 1)
    return np.asarray(near * np.where(samples > _MANY, 2, np.where(samples > _FEW, 1, 0.6)))


def fit(rows: Sequence[Row], tables: Sequence[Floats], prior: Floats | None = None) -> Floats:
    """Nanoseconds of each of NAMES for the kernel that all rows have used.

    Args:
      rows: of `regret.load`.
      tables: `counts` of each.
      prior: costs that stand where the rows say nothing.
    """
    steps = _steps()
    times = np.concatenate([np.array(row["us"]) for row in rows]) * 1e3
    given = np.concatenate([_weights(row) for row in rows])
    relative = (np.vstack(tables) @ steps) / times[:, None]
    if prior is None:
        scale = 1 / (np.linalg.norm(relative, axis=0) + 1e-30)
        pull, weight = np.zeros(len(NAMES)), 3e-4
    else:
        scale = np.maximum(np.linalg.solve(steps, prior), 1e-4)
        pull, weight = np.ones(len(NAMES)), _PRIOR
    pulls = weight * np.sqrt(len(times)) * np.eye(len(NAMES))
    weights, found = given, np.zeros(len(NAMES))
    for _ in range(_ROUNDS):
        system = np.vstack([relative * weights[:, None] * scale, pulls])
        found = nnls(system, np.concatenate([weights, pulls @ pull]), maxiter=30_000)[0] * scale
        error = relative @ found - 1
        most = np.where(error < 0, _TOO_SLOW, _TOO_FAST)
        weights = given * np.sqrt(np.minimum(1, most / np.maximum(np.abs(error), 1e-9)))
    return np.asarray(_sensible(steps @ found))


def _sensible(costs: Floats) -> Floats:
    """Few plans of the data read from memory without prefetching: it is dearer."""
    for path in ("inner", "sweep"):
        plain, prefetched = (_AT[f"{path}{x}_line.memory"] for x in ("", "_prefetched"))
        costs[prefetched] = min(costs[prefetched], _MEMORY * costs[plain])
    return costs


def chosen(row: Row, table: Floats, costs: Floats) -> float:
    """The time of the candidate of least predicted time by that of the fastest that was timed about as often."""
    us, samples = np.array(row["us"]), np.array(row["samples"])
    best = us[samples >= min(samples.max(), 2 * _FEW)].min()
    picked = us[int(np.argmin(table @ costs))]
    return float(picked / min(best, picked))


def profile(path: pathlib.Path, rows: Sequence[Row]) -> str:
    """Writes the fitted costs into a profile, and returns the regret of them and of the planner that was measured."""
    text = json.loads(path.read_text())
    by_kernel: dict[str, list[Row]] = {}
    for row in rows:
        if row["threads"] == 1:
            by_kernel.setdefault(row["choices"][0][0], []).append(row)
    prior: Floats | None = None
    lines = []
    for kernel, mine in by_kernel.items():
        tables = [counts(row, text["name"]) for row in mine]
        costs = fit(mine, tables, prior)
        if prior is None:
            prior = costs.copy()
            first, like = _AT["partial_line.l1"], _AT["c_line.l1"]  # a kernel that has none is no prior for them
            prior[first : first + _LEVELS] = prior[like : like + _LEVELS]
        text["kernels"][kernel] = {name: float(f"{cost:.4g}") for name, cost in zip(NAMES, costs, strict=True)}
        regret = [chosen(row, table, costs) for row, table in zip(mine, tables, strict=True)]
        before = [row["us"][row["planned"]] / min(row["us"]) for row in mine]
        lines.append(f"{kernel}: {len(mine)} products, planned {_summary(before)}, by these costs {_summary(regret)}")
    path.write_text(json.dumps(text, indent=1) + "\n")
    return "\n".join(lines)


def _summary(ratios: Sequence[float]) -> str:
    mean, most = statistics.geometric_mean(ratios), np.quantile(ratios, 0.95)
    return f"{mean:.3f} of the best in geometric mean, {most:.2f} in 95 %"
