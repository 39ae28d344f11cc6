"""The built extension: what it exports, and what it asks of the system. Wheels depend on both."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jax_nano import _runtime

EXTENSION = Path(_runtime.__file__)
NEWEST_GLIBC = (2, 28)  # of manylinux_2_28

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")


def symbols(*options: str) -> list[str]:
    text = subprocess.run(["nm", "-D", *options, EXTENSION], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1] for line in text.splitlines()]


def test_exports_nothing_but_the_modules_entry() -> None:
    """Not its C++ library above all, which must not be taken for that of another library in the process."""
    assert symbols("--defined-only") == ["PyInit__runtime"]


def test_asks_for_no_newer_glibc_than_wheels_may() -> None:
    needed = {x: re.search(r"@GLIBC_(\d+)\.(\d+)", x) for x in symbols("--undefined-only")}
    versions = {x: (int(found[1]), int(found[2])) for x, found in needed.items() if found}
    assert versions
    assert [x for x, version in versions.items() if version > NEWEST_GLIBC] == []


def test_brings_its_own_libstdcxx() -> None:
    """That of the system may be older than the compiler; exceptions are unwound by the process's libgcc."""
    assert [x for x in symbols("--undefined-only") if "GLIBCXX" in x or "CXXABI" in x] == []
