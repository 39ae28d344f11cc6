"""Unmodified models on our kernels: the results of plain XLA, and no product left to it that is worth a call."""

from __future__ import annotations

from typing import Any

import jax
import pytest
import rounding
from programs import Dot, dots, products
from zoo import MODELS, Workload

import jax_nano
from jax_nano import _gate, _shapes


def compiled(workload: Workload) -> tuple[str, Any]:
    program = jax.jit(workload.step).lower(workload.state, workload.inputs).compile()
    return program.as_text(), program(workload.state, workload.inputs)


def is_declined(dot: Dot, itemsize: int) -> bool:
    labels = _shapes.labels_of(dot.dimension_numbers, None, len(dot.lhs), len(dot.rhs))
    return _gate.declines(labels, dot.lhs, dot.rhs, element_bytes=(itemsize, itemsize)) is not None


# One test for each model, because compiling it twice takes most of the time.
@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_of_plain_xla_and_every_product_worth_a_call_is_ours(name: str) -> None:
    model = MODELS[name]
    for library in model.needs:
        pytest.importorskip(library)
    if jax.device_count() < model.devices:
        pytest.skip("a backend with fewer devices was started before these tests")
    workload = model.build(model.tiny)
    plain, want = compiled(workload)
    with jax_nano.accelerate():
        accelerated, got = compiled(workload)

    assert products(plain) == 0
    before, left = dots(plain), dots(accelerated)
    itemsize = 2 if "bf16" in name else 4  # XLA's dots of bfloat16 are of float32
    assert not [dot for dot in left if not is_declined(dot, itemsize)]
    assert products(accelerated) + len(left) == len(before)
    assert products(accelerated) > 0 or name == "kalman filter"

    allowed = rounding.deviations(workload.step, want, workload.state, workload.inputs)
    rounding.check(got, want, allowed)
