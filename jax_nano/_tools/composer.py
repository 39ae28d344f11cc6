"""Composes kernels for given products: the generator in a process of its own, and the system's linker.

The generator wants the MLIR bindings of one version of jaxlib, which need not be that of the process that asks, and
LLVM's tools. What it makes needs neither.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

PACKAGE: Final = Path(__file__).parents[1]
_LINKERS: Final = ("ld", "ld.lld-22", "ld.lld")


class Composer:
    """The generator's process and a folder for what it makes, while a block lasts.

    Args:
      python: with the version of jaxlib that the generator wants; None: this one.
      jobs: how many kernels are compiled side by side.
    """

    def __init__(self, python: str | None = None, jobs: int = 1) -> None:
        self._path = [] if python else [os.environ.get("PYTHONPATH", "")]
        self._command = [python or sys.executable, "-P", "-m", "jax_nano.codegen", "compose", "--jobs", str(jobs)]
        self._linker = next(filter(None, map(shutil.which, _LINKERS)), None)
        if self._linker is None:
            raise ValueError("specializing needs a linker: install the Debian package binutils, or lld")

    def __enter__(self) -> Composer:
        self._temporary = tempfile.TemporaryDirectory(prefix="jax_nano-")
        self.folder = Path(self._temporary.name)
        # Not the folder that it is installed in, where another Python would find this one's jaxlib.
        alone = self.folder / "path"
        alone.mkdir()
        (alone / PACKAGE.name).symlink_to(PACKAGE)
        path = os.pathsep.join(filter(None, (str(alone), *self._path)))
        self._process = subprocess.Popen(
            [*self._command, "--out", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "JAX_NANO_PACKS": "off"},
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._temporary.cleanup()

    def compose(self, recipes: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """What became of each recipe, in any order: with its `id`, and an `object` or an `error`.

        Raises:
          ValueError: the generator does not run here; with its reason.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            for recipe in recipes:
                self._process.stdin.write(json.dumps(recipe) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._stopped()
        for _ in recipes:
            line = self._process.stdout.readline()
            if not line:
                self._stopped()
            yield json.loads(line)

    def _stopped(self) -> None:
        _, why = self._process.communicate()
        raise ValueError(why.strip().splitlines()[-1] if why.strip() else "the generator stopped")

    def link(self, objects: Sequence[str], name: str) -> Path:
        """A shared object of some objects, in the folder."""
        assert self._linker is not None
        out = self.folder / name
        flags = ["-shared", "-z", "noexecstack", "-z", "relro", "-z", "now", "--build-id=none", "-o", str(out)]
        done = subprocess.run([self._linker, *flags, *objects], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{self._linker} failed: {done.stderr[-1000:]}")
        return out
