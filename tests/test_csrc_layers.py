"""The folders of csrc/ depend on each other in one direction only, as their #include lines show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"

USES: dict[str, set[str]] = {
    "machine": set(),
    "plan": {"machine"},
    "run": {"plan", "machine"},
    "xla": {"run", "plan", "machine"},
    "python": {"xla", "run", "plan", "machine"},
}
"""By folder: those whose headers it may include beside its own. `python` registers the handlers of `xla`."""

GENERATED = {"spec.h", "generator.h", "profiles.h", "manifest.inc", "attention.inc", "quantized.inc"}  # by the build

SOURCES = sorted(x for x in CSRC.rglob("*") if x.suffix in (".h", ".cc"))


def headers(path: Path) -> list[str]:
    return re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)


def test_every_source_is_in_a_folder() -> None:
    assert {x.relative_to(CSRC).parts[0] for x in SOURCES} == set(USES)
    assert all(len(x.relative_to(CSRC).parts) == 2 for x in SOURCES)


def test_folders_use_only_folders_above_them() -> None:
    """No circle is possible among folders that are listed in an order in which each uses earlier ones only."""
    seen: set[str] = set()
    for folder, uses in USES.items():
        assert uses <= seen
        seen.add(folder)


@pytest.mark.parametrize("path", SOURCES, ids=lambda x: str(x.relative_to(CSRC)))
def test_includes(path: Path) -> None:
    folder = path.relative_to(CSRC).parts[0]
    for header in headers(path):
        if header in GENERATED or (folder == "xla" and header.startswith("xla/ffi/api/")):  # XLA's own
            continue
        assert (CSRC / header).is_file(), f"{header}: names a header by its path from csrc/"
        assert header.split("/")[0] in {folder, *USES[folder]}, f"{folder} must not include {header}"


@pytest.mark.parametrize("path", [x for x in SOURCES if x.suffix == ".h"], ids=lambda x: str(x.relative_to(CSRC)))
def test_include_guards_name_the_file(path: Path) -> None:
    guard = "JAX_NANO_" + re.sub(r"[/.]", "_", str(path.relative_to(CSRC))).upper() + "_"
    assert f"#ifndef {guard}\n#define {guard}\n" in path.read_text()
