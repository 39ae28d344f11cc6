"""Costs fitted to the times of candidate plans.

A plan's predicted time is a sum of counts times costs (csrc/plan/cost.h), so that costs follow from times by least
squares with no cost below zero. Errors are relative to the time. Those of slow plans count less, and large ones no
more than medium ones: a sample may be slow because another machine has the core. A cost never falls from one cache
level to the next. What the data of a kernel leave open comes from other costs, if there are some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from jax_nano._core import spec
from jax_nano._tools.timing import Product, tuning

Floats = NDArray[np.float64]
Row = Mapping[str, Any]
"""Of a product: microseconds `us` of each candidate, and of how many `samples` that is the least."""

NAMES: Final = spec.cost_names()
_AT: Final = {name: i for i, name in enumerate(NAMES)}
_LEVELS: Final = len(spec.CACHE_LEVELS)
_NEAR_BEST, _LEAST_WEIGHT = 1.3, 0.2  # plans within this factor of the best count fully; none less than this
_FEW, _MANY = 4, 20  # samples: fewer are doubted, more trusted
_TOO_FAST, _TOO_SLOW = 0.2, 0.12  # errors beyond which a prediction's error counts linearly; slow samples are likelier
_TRUSTED = 0.25  # the same for what was sampled often
_PRIOR = 0.004  # weight of the first kernel's costs, of a point of the data
_ROUNDS = 8
_MEMORY = 0.8  # lines from memory, prefetched and not, at most


def counts(product: Product, choices: Sequence[dict[str, Any]], core: Sequence[int]) -> Floats:
    """What the model counts for each candidate of a product: a line for each, a column for each of NAMES.

    Args:
      product: what they compute.
      choices: the candidates, by CHOICE.
      core: the fields of CoreModel (csrc/machine/costs.h).
    """
    table = np.zeros((len(choices), len(NAMES)))
    counted = tuning().counts
    for line, choice in zip(table, choices, strict=True):
        for name, count in counted(*product.arguments, choice, core).items():
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
    """Nanoseconds of each of NAMES for the kernel that all candidates have used.

    Args:
      rows: a product each.
      tables: `counts` of each.
      prior: costs that stand where the rows say nothing.
    """
    steps = _steps()
    times = np.concatenate([np.array(row["us"]) for row in rows]) * 1e3
    given = np.concatenate([_weights(row) for row in rows])
    trusted = np.concatenate([np.array(row["samples"]) > _MANY for row in rows])
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
        most = np.where(trusted, _TRUSTED, np.where(error < 0, _TOO_SLOW, _TOO_FAST))
        weights = given * np.sqrt(np.minimum(1, most / np.maximum(np.abs(error), 1e-9)))
    return np.asarray(_sensible(steps @ found))


def _sensible(costs: Floats) -> Floats:
    """Few plans of the data read from memory without prefetching: it is dearer."""
    for path in ("inner", "sweep"):
        plain, prefetched = (_AT[f"{path}{x}_line.memory"] for x in ("", "_prefetched"))
        costs[plain] = max(costs[plain], costs[prefetched] / _MEMORY)
    return costs


def chosen(row: Row, table: Floats, costs: Floats, among: Sequence[int] | None = None) -> float:
    """The time of the candidate of least predicted time by that of the fastest that was timed about as often.

    Args:
      row: the times.
      table: `counts` of the candidates.
      costs: nanoseconds of each of NAMES.
      among: which candidates may be chosen, by number; all if None. The fastest is one of them too.
    """
    which = np.arange(len(table)) if among is None else np.array(among)
    us, samples = np.array(row["us"])[which], np.array(row["samples"])[which]
    best = us[samples >= min(samples.max(), 2 * _FEW)].min()
    picked = us[int(np.argmin(table[which] @ costs))]
    return float(picked / min(best, picked))
