"""Settings for all tests of accelerated programs, made before JAX starts its CPU backend.

Four devices, so that partitioned programs are tested on any machine. The decline gate is off, so that small products
run on the kernels too.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

import jax_nano
from jax_nano._dispatch import decision
from jax_nano._programs import accelerate

jax.config.update("jax_num_cpu_devices", 4)
decision.policy = decision.Policy(declines=False)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on nothing but the test's name."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture
def accelerated() -> Iterator[None]:
    """The whole test in a scope of its own."""
    with jax_nano.accelerate():
        yield


@pytest.fixture(autouse=True)
def no_failures(request: pytest.FixtureRequest) -> Iterator[None]:
    """No program may silently run without acceleration, unless the test is about that."""
    failures = accelerate._hook.failures
    failures.clear()
    yield
    if "expects_failure" not in request.keywords:
        assert not failures
    failures.clear()
