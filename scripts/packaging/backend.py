"""The build backend that pyproject.toml names: scikit-build-core's, which first says what is missing on this machine.

The build needs JAX, whose bindings of MLIR compose the kernels and whose headers the extension includes: hundreds of
megabytes. So pyproject.toml asks for small packages only, and JAX is asked for here, once it is known that the rest of
what a build needs is there.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403

_ROOT = Path(__file__).parents[2]

JAX = ("jax==0.10.0", "jaxlib==0.10.0")
"""The oldest that is supported: a jaxlib refuses extensions that were built against newer headers."""


def missing() -> str | None:
    """The sentence that says what a build lacks here; None if nothing."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"jax_nano's extension needs a C++20 compiler, and there is no {compiler}: install g++ 12, or set CXX."
    if os.environ.get("JAX_NANO_KERNEL_DIR"):
        return None
    sys.path.insert(0, str(_ROOT))
    try:
        from jax_nano.codegen.toolchain import Toolchain, ToolchainError
    finally:
        sys.path.remove(str(_ROOT))
    try:
        Toolchain.find()
    except ToolchainError as error:
        return str(error)
    return None


def _requirements() -> list[str]:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return []  # the Python files alone are installed
    sentence = missing()
    if sentence is not None:
        raise SystemExit(sentence)
    return list(JAX)


def get_requires_for_build_wheel(config_settings: dict[str, str | list[str]] | None = None) -> list[str]:
    """What building a wheel needs beside pyproject.toml's requirements; SystemExit if the machine lacks a tool."""
    return [*_requirements(), *_backend.get_requires_for_build_wheel(config_settings)]


def get_requires_for_build_editable(config_settings: dict[str, str | list[str]] | None = None) -> list[str]:
    """The same for an editable installation."""
    return [*_requirements(), *_backend.get_requires_for_build_editable(config_settings)]
