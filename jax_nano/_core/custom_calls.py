"""Which kinds of custom calls this jaxlib takes: the one branch on a version that is not in `jax_compat`.

It is needed to register the calls when the package is imported, which must not import much of JAX.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from jaxlib.version import __version_info__ as _jaxlib_version

STATUS_RETURNING: Final = 3
"""CustomCallApiVersion's API_VERSION_STATUS_RETURNING_UNIFIED, in HLO as in StableHLO."""
TYPED_FFI: Final = 4
"""Its API_VERSION_TYPED_FFI."""

ENVIRONMENT: Final = "JAX_NANO_UNTYPED"

UNTYPED: Final[bool] = _jaxlib_version < (0, 13) and os.environ.get(ENVIRONMENT, "").strip().lower() != "off"
"""Whether it takes calls of API version 3, C functions that return a status, and the user does not forbid them.

The status must be the struct that csrc/xla/untyped.cc declares; tried with jaxlib 0.10.2 and 0.12.0. With any other,
every call goes through the typed FFI.
"""


def name_of(target: str, dtype: str, shapes: Sequence[Sequence[object]]) -> str:
    """What a profiler calls a call: "jax_nano_linear_float32_128x768_768x3072".

    Args:
      target: that of the custom call.
      dtype: of the first operand.
      shapes: those of the first two operands.
    """
    sizes = ("x".join(map(str, shape)) for shape in shapes)
    return "_".join([target, dtype, *sizes])
