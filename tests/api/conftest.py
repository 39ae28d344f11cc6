"""Settings for all tests of the Python side, made before JAX starts its CPU backend.

Four devices, so that sharding is tested on any machine. The decline gate is off, so that small products
run on the kernels too; it has tests of its own.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jax_nano._dispatch import decision

jax.config.update("jax_num_cpu_devices", 4)
decision.policy = decision.Policy(declines=False)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on nothing but the test's name."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
