"""Small programs as their users write them, none of which knows of jax_nano: what `python -m benchmarks programs` runs.

A module's function makes data and compiled functions, and gives a `Run`: what a user's script would do from then on,
with its Python between the calls. Whoever calls it decides whether it is accelerated.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
from zoo import Workload

Run: TypeAlias = Callable[[], Any]
"""Runs the program once, always from the same beginning; gives the arrays that two runs are compared by."""


@dataclasses.dataclass(frozen=True)
class Program:
    """An entry of the catalogue: ``module.function(**sizes)`` gives what runs it."""

    module: str  # of this package
    function: str
    tiny: Mapping[str, Any]  # sizes of tests
    real: Mapping[str, Any]
    element_bytes: int = 4  # of its matrices

    def build(self, sizes: Mapping[str, Any]) -> Run:
        """Makes data and functions; ImportError if a library is missing."""
        module = importlib.import_module(f"{__name__}.{self.module}")
        return getattr(module, self.function)(**sizes)


def steps(workload: Workload, count: int) -> Run:
    """Runs a workload's step again and again; gives the results of all."""
    step = jax.jit(workload.step)

    def run() -> Any:
        state, results = workload.state, []
        for _ in range(count):
            state, result = step(state, workload.inputs)
            results.append(result)
        return results

    return run


_TINY_GPT = {"vocabulary": 61, "layers": 1, "heads": 2, "features": 32, "hidden": 96, "tokens": 16}
_TWO_BLOCKS = {"vocabulary": 8192, "layers": 2, "heads": 12, "features": 768, "hidden": 3072, "tokens": 128}

PROGRAMS: Mapping[str, Program] = MappingProxyType(
    {
        "digits": Program("digits", "epoch", {"hidden": [16], "batch": 256}, {"hidden": [256, 128], "batch": 64}),
        "transformer training": Program(
            "transformer", "training", {**_TINY_GPT, "count": 2}, {**_TWO_BLOCKS, "count": 2}
        ),
        "transformer decoding, bf16": Program(
            "transformer",
            "decoding",
            {**_TINY_GPT, "count": 2},
            {**_TWO_BLOCKS, "count": 8},
            element_bytes=2,
        ),
        "transformer decoding in scan, bf16": Program(
            "transformer",
            "decoding_in_scan",
            {**_TINY_GPT, "count": 2},
            {**_TWO_BLOCKS, "count": 8},
            element_bytes=2,
        ),
        "transformer decoding in scan": Program(
            "transformer",
            "decoding_in_scan",
            {**_TINY_GPT, "count": 2, "dtype": "float32"},
            {**_TWO_BLOCKS, "count": 8, "dtype": "float32"},
        ),
        "hmc": Program(
            "hmc",
            "sample",
            {"rows": 40, "features": 5, "chains": 2, "draws": 3, "leaps": 2},
            {"rows": 1000, "features": 25, "chains": 4, "draws": 20, "leaps": 10},
        ),
        "kalman filter": Program("kalman", "gradient", {"states": 4, "times": 10}, {"states": 4, "times": 500}),
        "rnn": Program(
            "rnn",
            "training",
            {"vocabulary": 13, "hidden": 16, "batch": 4, "times": 5, "count": 2},
            {"vocabulary": 64, "hidden": 128, "batch": 32, "times": 40, "count": 4},
        ),
        "cnn": Program("cnn", "training", {"batch": 3, "count": 2}, {"batch": 32, "count": 3}),
        "logistic regression, 10 classes": Program(
            "regression", "logistic", {"rows": 50, "count": 3}, {"rows": 1797, "count": 50}
        ),
        "nnls": Program(
            "nnls", "solve", {"rows": 30, "columns": 10, "count": 5}, {"rows": 500, "columns": 200, "count": 200}
        ),
        "mlp, batches from numpy": Program(
            "mlp",
            "training",
            {"images": 40, "sizes": [12, 16, 4], "batch": 8},
            {"images": 4096, "sizes": [64, 256, 10], "batch": 64},
        ),
        "einsum attention": Program(
            "attention",
            "attend",
            {"batch": 2, "tokens": 12, "heads": 2, "width": 8, "count": 1},
            {"batch": 2, "tokens": 256, "heads": 8, "width": 64, "count": 4},
        ),
        "softmax regression": Program("regression", "softmax", {"rows": 64, "batch": 16}, {"rows": 8192, "batch": 128}),
        "k-means": Program(
            "kmeans",
            "cluster",
            {"points": 60, "features": 4, "clusters": 3, "count": 2},
            {"points": 10000, "features": 32, "clusters": 64, "count": 10},
        ),
    }
)
"""All programs by name."""
