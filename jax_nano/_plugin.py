"""What JAX calls when it starts its backends, in every process of an environment where jax_nano is installed.

This is how `JAX_NANO_ACCELERATE=1` reaches programs that never import jax_nano.
"""

from __future__ import annotations

import importlib
import os
import warnings


def initialize() -> None:
    """Accelerates the process if the environment says so, and else does nothing."""
    if os.environ.get("JAX_NANO_ACCELERATE"):
        try:
            importlib.import_module("jax_nano._programs.accelerate")  # which reads what the variable says
        except (ImportError, ValueError) as error:  # JAX would print where it was raised, and go on
            text = f"JAX_NANO_ACCELERATE has no effect: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
