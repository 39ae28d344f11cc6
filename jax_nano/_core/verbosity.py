"""How much JAX_NANO_VERBOSE asks to be told: 1, each product that is compiled; 2, each call with its time as well."""

from __future__ import annotations

import os

ENVIRONMENT = "JAX_NANO_VERBOSE"


def verbosity() -> int:
    """0, 1 or 2. Any other text counts as 1, as it is set to see something."""
    value = os.environ.get(ENVIRONMENT, "").strip().lower()
    if value in ("", "0", "off"):
        return 0
    return 2 if value == "2" else 1
