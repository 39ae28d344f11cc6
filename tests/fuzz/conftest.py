"""Settings for random programs, made before JAX starts its CPU backend: four devices, as in tests/accelerate."""

from __future__ import annotations

import jax

if jax.config.jax_num_cpu_devices != 4:
    jax.config.update("jax_num_cpu_devices", 4)
