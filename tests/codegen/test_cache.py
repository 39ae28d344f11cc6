"""The cache of compiled kernels: an object is found again exactly if what it was made from is the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_nano.codegen import cache as cache_module
from jax_nano.codegen.cache import Cache
from jax_nano.codegen.catalog import Kernel, find
from jax_nano.codegen.toolchain import Toolchain

SOME = "gemm_f64_f64_f64_f64_6x8_x86-64-v3"
OTHER = "gemm_f32_f32_f32_f32_6x16_x86-64-v3"
OF_TWO_DTYPES = "attention_f32_bf16_6x16_x86-64-v3"


def tools(folder: Path, version: str) -> Toolchain:
    """A tool of some version."""
    path = folder / f"llc-{version}"
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return Toolchain({"llc": str(path)})


def kernel(name: str) -> Kernel:
    found = find(name)
    assert isinstance(found, Kernel)
    return found


class TestNames:
    def test_the_same_again(self, tmp_path: Path) -> None:
        """Another build of the same kernel by the same tools finds it, whatever else has changed in the generator."""
        names = {Cache(tmp_path / str(i), tools(tmp_path, "22")).name(kernel(SOME), "mlir") for i in range(2)}
        assert len(names) == 1

    def test_whatever_decides_the_machine_code(self, tmp_path: Path) -> None:
        old, new = (Cache(tmp_path, tools(tmp_path, x)) for x in ("22.1.8", "22.1.9"))
        names = {
            old.name(kernel(SOME), "mlir"),
            old.name(kernel(SOME), "other mlir"),
            old.name(kernel(OTHER), "mlir"),
            new.name(kernel(SOME), "mlir"),
        }
        assert len(names) == 4

    def test_mlir_is_the_same_in_every_process(self) -> None:
        """Nothing of it follows the order of a set of names, which is another one in each process."""
        command = [sys.executable, "-P", "-m", "jax_nano.codegen", "dump", OF_TWO_DTYPES]
        texts = {
            subprocess.run(
                command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
            ).stdout
            for seed in "0123"
        }
        assert len(texts) == 1
        assert "func.func @jax_nano_attention_f32_bf16" in texts.pop()


class TestObjects:
    def test_kept_and_fetched(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path / "cache", tools(tmp_path, "22"))
        made, fetched = tmp_path / "made.o", tmp_path / "fetched.o"
        made.write_bytes(b"object")
        assert not cache.fetch("a.o", fetched)
        cache.keep("a.o", made)
        assert cache.fetch("a.o", fetched)
        assert fetched.read_bytes() == b"object"

    def test_only_what_a_build_used_stays(self, tmp_path: Path) -> None:
        folder, made = tmp_path / "cache", tmp_path / "made.o"
        made.write_bytes(b"object")
        first = Cache(folder, tools(tmp_path, "22"))
        for name in ("a.o", "b.o"):
            first.keep(name, made)
        second = Cache(folder, tools(tmp_path, "22"))
        assert second.fetch("a.o", tmp_path / "fetched.o")
        second.drop_the_unused()
        assert [x.name for x in folder.iterdir()] == ["a.o"]

    def test_the_name_of_what_was_composed_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is known without the MLIR, to later builds by the same generator and tools, while the object is there."""
        folder, made = tmp_path / "cache", tmp_path / "made.o"
        made.write_bytes(b"object")
        first = Cache(folder, tools(tmp_path, "22"))
        assert first.composed(kernel(SOME)) is None
        first.keep("a.o", made)
        first.remember(kernel(SOME), "a.o")
        assert first.fetch("a.o", tmp_path / "fetched.o")
        first.drop_the_unused()
        assert Cache(folder, tools(tmp_path, "22")).composed(kernel(SOME)) == "a.o"
        assert Cache(folder, tools(tmp_path, "22")).composed(kernel(OTHER)) is None
        assert Cache(folder, tools(tmp_path, "23")).composed(kernel(SOME)) is None
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "_generator", lambda: b"another")
            assert Cache(folder, tools(tmp_path, "22")).composed(kernel(SOME)) is None
        (folder / "a.o").unlink()
        assert Cache(folder, tools(tmp_path, "22")).composed(kernel(SOME)) is None

    def test_without_a_folder_nothing_is_kept(self, tmp_path: Path) -> None:
        cache = Cache(None, tools(tmp_path, "22"))
        made = tmp_path / "made.o"
        made.write_bytes(b"object")
        cache.keep("a.o", made)
        assert not cache.fetch("a.o", tmp_path / "fetched.o")
        cache.remember(kernel(SOME), "a.o")
        assert cache.composed(kernel(SOME)) is None
        cache.drop_the_unused()
