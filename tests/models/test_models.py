"""Unmodified models on our kernels: the results of plain XLA, and no product left to it that is worth a call."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest
import rounding
from programs import Dot, dots, products
from zoo import MODELS, Workload

import jax_nano
from jax_nano import _gate, _shapes


@dataclasses.dataclass(frozen=True)
class Run:
    """A model compiled twice, and what both programs give."""

    workload: Workload
    plain: str  # the compiled programs
    accelerated: str
    want: Any
    got: Any
    element_bytes: int  # of the model's weights


def compiled(workload: Workload) -> tuple[str, Any]:
    program = jax.jit(workload.step).lower(workload.state, workload.inputs).compile()
    return program.as_text(), program(workload.state, workload.inputs)


# What belongs to one model runs in one process, where its programs are compiled once.
@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(f"model {name}")) for name in MODELS]
)
def run(request: pytest.FixtureRequest) -> Run:
    model = MODELS[request.param]
    for library in model.needs:
        pytest.importorskip(library)
    if jax.device_count() < model.devices:
        pytest.skip("a backend with fewer devices was started before these tests")
    workload = model.build(model.tiny)
    plain, want = compiled(workload)
    with jax_nano.accelerate():
        accelerated, got = compiled(workload)
    return Run(workload, plain, accelerated, want, got, 2 if "bf16" in request.param else 4)


def is_declined(dot: Dot, element_bytes: int) -> bool:
    labels = _shapes.labels_of(dot.dimension_numbers, None, len(dot.lhs), len(dot.rhs))
    return _gate.declines(labels, dot.lhs, dot.rhs, element_bytes=element_bytes) is not None


def test_results_are_those_of_plain_xla(run: Run) -> None:
    workload = run.workload
    allowed = rounding.deviations(workload.step, run.want, workload.state, workload.inputs)
    rounding.check(run.got, run.want, allowed)


def test_every_product_worth_a_call_is_ours(run: Run) -> None:
    assert products(run.plain) == 0
    before, left = dots(run.plain), dots(run.accelerated)
    eligible = [dot for dot in left if not is_declined(dot, run.element_bytes)]
    assert not eligible
    assert products(run.accelerated) + len(left) == len(before)
