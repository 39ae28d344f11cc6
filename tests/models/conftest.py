"""Settings for the tests of models, made before JAX starts its CPU backend: several devices, as in tests/api."""

from __future__ import annotations

import jax
import pytest

from jax_nano._dispatch import decision

if jax.config.jax_num_cpu_devices != 4:
    jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(autouse=True, scope="module")
def gate() -> None:
    """On, as for a user: other tests in this process may have switched it off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decision, "policy", decision.Policy(declines=True))
        yield
