"""The costs of a CPU family's profile (jax_nano/profiles), fitted to the times that `regret` kept.

What the data of a kernel leave open comes from the kernel that was fitted first.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.regret import product_of
from jax_nano._core import spec
from jax_nano._tools import fitting
from jax_nano._tools.fitting import NAMES, Floats, chosen, fit
from jax_nano._tools.timing import CHOICE
from jax_nano.codegen import profiles

Row = dict[str, Any]
_FEWEST = 3  # candidates


def counts(row: Row, core: Sequence[int]) -> Floats:
    """What the model counts for each candidate of a product: a line for each, a column for each of NAMES."""
    # Old records lack what there was nothing to choose of.
    choices = [dict(zip(CHOICE, values, strict=False)) for values in row["choices"]]
    l1d, l2, near, far, *rest = core
    if row.get("cold"):  # no cache beyond L2 has the operands: as the planner sees weights (search.cc, Met)
        near = far = 0
    return fitting.counts(product_of(row), choices, [l1d, l2, near, far, *rest])


def profile(path: pathlib.Path, rows: Sequence[Row]) -> str:
    """Writes the fitted costs into a profile, and returns the regret of them and of the planner that was measured."""
    text = json.loads(path.read_text())
    core = profiles.core(text)
    by_kernel: dict[str, list[Row]] = {}
    for row in rows:
        if row["threads"] == 1:
            for kernel, part in of_each_kernel(row).items():
                by_kernel.setdefault(kernel, []).append(part)
    prior: Floats | None = None
    lines = []
    for kernel, mine in by_kernel.items():
        tables = [counts(row, core) for row in mine]
        costs = fit(mine, tables, prior)
        if prior is None:
            prior = costs.copy()
            first, like = (
                NAMES.index("partial_line.l1"),
                NAMES.index("c_line.l1"),
            )  # a kernel that has none is no prior for them
            prior[first : first + len(spec.CACHE_LEVELS)] = prior[like : like + len(spec.CACHE_LEVELS)]
        text["kernels"][kernel] = {name: float(f"{cost:.4g}") for name, cost in zip(NAMES, costs, strict=True)}
        regret = [chosen(row, table, costs) for row, table in zip(mine, tables, strict=True)]
        before = [row["us"][row["planned"]] / min(row["us"]) for row in mine if row["planned"] is not None]
        lines.append(f"{kernel}: {len(mine)} products, planned {_summary(before)}, by these costs {_summary(regret)}")
    path.write_text(json.dumps(text, indent=1) + "\n")
    return "\n".join(lines)


def of_each_kernel(row: Row) -> dict[str, Row]:
    """A product's candidates by their kernel. What the planner chose is `planned` in its kernel's, None in others.

    A kernel with one candidate or two is left out: they say little, and there is nothing to choose. So are candidates
    that compute the result's transpose: whether it is computed is decided before costs are asked.
    """
    at = CHOICE.index("transposed")
    kernels = [None if any(choice[at:]) else choice[0] for choice in row["choices"]]
    out = {}
    for kernel in dict.fromkeys(x for x in kernels if x is not None):
        which = [i for i, x in enumerate(kernels) if x == kernel]
        if len(which) < _FEWEST:
            continue
        mine = {name: [row[name][i] for i in which] for name in ("choices", "us", "samples")}
        planned = which.index(row["planned"]) if row["planned"] in which else None
        out[kernel] = {**row, **mine, "planned": planned}
    return out


def _summary(ratios: Sequence[float]) -> str:
    if not ratios:
        return "nothing"
    mean, most = statistics.geometric_mean(ratios), np.quantile(ratios, 0.95)
    return f"{mean:.3f} of the best in geometric mean, {most:.2f} in 95 %"
