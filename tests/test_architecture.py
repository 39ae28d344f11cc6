"""Dependencies run one way: what each part of the package may import of the others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import jax_nano

PACKAGE: Final = Path(jax_nano.__file__).parent

# What a part may import besides itself, by the part's name; the modules at the top belong to the part "".
ALLOWED: Final = {
    "codegen": {"_core.spec"},
    "_core": {"_runtime"},
    "_dispatch": {"_core"},
    "_ops": {"_dispatch", "_core"},
    "_programs": {"_ops", "_dispatch", "_core"},
    "_tools": {"_dispatch", "_core"},
    "": {"_programs", "_ops", "_tools", "_dispatch", "_core", "codegen"},
}


def imports(file: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere, by their names in it."""
    here = file.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [x.name for x in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ["jax_nano", *here[: -node.level], *(node.module or "").split(".")]
            names = [".".join(filter(None, (*base, x.name))) for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{x.name}" for x in node.names]
        else:
            continue
        yield from (x.removeprefix("jax_nano.") for x in names if x.startswith("jax_nano."))


def part_of(name: str) -> str:
    first = name.partition(".")[0]
    return first if first in ALLOWED or first == "_runtime" else ""


FILES: Final = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda x: str(x.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    part = part_of(".".join(file.relative_to(PACKAGE).with_suffix("").parts))
    for name in imports(file):
        allowed = part_of(name) == part or any(name == x or name.startswith(f"{x}.") for x in ALLOWED[part])
        assert allowed, f"{file.relative_to(PACKAGE)} imports {name}"


def test_there_is_something_to_see() -> None:
    found = {part_of(x) for file in FILES for x in imports(file)}
    assert found >= {"_core", "_dispatch", "_ops", "_programs", "_tools"}
