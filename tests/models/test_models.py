"""Unmodified models on our kernels: the results of plain XLA, and no product left to it that is worth a call."""

from __future__ import annotations

from typing import Any

import jax
import pytest
import rounding
from zoo import MODELS, Workload
from zoo.compiled import dots, products, worth_a_call

import jax_nano
from jax_nano._core import record


def compiled(workload: Workload) -> tuple[str, Any]:
    program = jax.jit(workload.step).lower(workload.state, workload.inputs).compile()
    return program.as_text(), program(workload.state, workload.inputs)


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
    jax_nano.clear_report()
    with jax_nano.accelerate():
        accelerated, got = compiled(workload)

    assert products(plain) == 0
    assert worth_a_call(plain, model.element_bytes)
    assert not worth_a_call(accelerated, model.element_bytes)
    told = [product.declined for product, count in record.products() for _ in range(count)]
    attentions = [x for x, count in record.attentions() if x.declined is None for _ in range(count)]
    of_attentions, calls = sum(x.products for x in attentions), sum(x.calls for x in attentions)
    assert len(told) + of_attentions == len(dots(plain)), jax_nano.report()
    assert products(accelerated) - calls + of_attentions + len(dots(accelerated)) == len(dots(plain))
    assert sum(why is not None for why in told) == len(dots(accelerated)), jax_nano.report()
    assert products(accelerated) > 0 or name == "kalman filter"

    allowed = rounding.deviations(workload.step, want, workload.state, workload.inputs)
    rounding.check(got, want, allowed)
