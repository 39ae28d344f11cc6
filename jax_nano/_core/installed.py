"""The extension of an installed jax_nano, for the sources in a clone that stand before it on the path and have none.

In a clone's folder, `python -c "import jax_nano"` imports the sources there. They use the extension that is installed
if it was built from the same C++ and the same generator; the other Python files may differ.
"""

from __future__ import annotations

import hashlib
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Final

PACKAGE: Final = Path(__file__).parents[1]

DIGEST_FILE: Final = "_built_from.txt"
"""Beside an installed extension; CMakeLists.txt writes `digest` of the sources into it."""

# What the extension is made from, below the folder of the sources.
_PATTERNS: Final = (
    "CMakeLists.txt",
    "csrc/*/*",
    "jax_nano/_core/spec.py",
    "jax_nano/codegen/**/*.py",
    "jax_nano/profiles/*.json",
)


def digest(root: Path) -> str:
    """Of the sources that an extension is built from: CMakeLists.txt computes the same."""
    files = sorted({x.relative_to(root).as_posix() for pattern in _PATTERNS for x in root.glob(pattern) if x.is_file()})
    lines = (f"{hashlib.sha256((root / x).read_bytes()).hexdigest()} {x}\n" for x in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def folder() -> Path | None:
    """Where else jax_nano is installed with an extension for this Python; None if nowhere."""
    try:
        found = Path(str(metadata.distribution("jax-nano").locate_file("jax_nano"))).resolve()
    except metadata.PackageNotFoundError:
        return None
    if found == PACKAGE.resolve() or not any((found / f"_runtime{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return None
    return found


def share() -> str | None:
    """Lets `import jax_nano._runtime` find the installed extension too; why it does not fit these sources, or None."""
    found = folder()
    if found is None:
        return "and none is installed elsewhere"
    told = found / DIGEST_FILE
    if not told.exists() or told.read_text().strip() != digest(PACKAGE.parent):
        return f"and the one installed in {found} was built from other sources than those in {PACKAGE.parent}"
    sys.modules["jax_nano"].__path__.append(str(found))
    return None
