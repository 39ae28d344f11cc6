"""Object files of earlier builds, by what they were made from: kernels that did not change are not compiled again.

The package is built once for each Python, from the same kernels; this makes the second build a matter of seconds.
An object's name is a hash of its MLIR, its kernel's facts, the tools' versions and the sources that call the tools and
check the outcome, so it is either right or not found. Changes of the generator that leave the MLIR as it was, to the
byte, compile nothing.

Composing the MLIR takes a good part of a build. So a file beside the objects says which one each kernel had when it was
composed by the generator as it is now, to the byte, with the same jaxlib: there it is found without its MLIR.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Final

from jax_nano._core import spec

from .generated import Generated
from .quantized.kernel import QuantizedKernel
from .toolchain import Toolchain

_NAMES: Final = "names.json"


class Cache:
    """A folder of objects. What a build did not use is dropped at its end, so the folder holds one build's worth."""

    def __init__(self, folder: Path | None, tools: Toolchain):
        self._folder = folder
        self._used: set[str] = set()
        self._tools = b""
        self._known: dict[str, str] = {}
        self._found: dict[str, str] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._tools = _fingerprint(tools)
            self._generator = _generator()
            with contextlib.suppress(FileNotFoundError, ValueError):
                self._known = json.loads((folder / _NAMES).read_text())

    def name(self, kernel: Generated, mlir: str) -> str:
        """The object's file name."""
        parts = [self._tools, repr(kernel).encode(), mlir.encode()]
        if isinstance(kernel, QuantizedKernel):
            parts.append(Path(__file__).with_name("quantized").joinpath("checks.py").read_bytes())
        return hashlib.sha256(b"\0".join(hashlib.sha256(p).digest() for p in parts)).hexdigest() + ".o"

    def composed(self, kernel: Generated) -> str | None:
        """The object's file name, if this generator has composed the kernel before and the object is still there."""
        if self._folder is None:
            return None
        key = self._key(kernel)
        name = self._known.get(key)
        if name is None or not (self._folder / name).exists():
            return None
        self._found[key] = name
        return name

    def remember(self, kernel: Generated, name: str) -> None:
        """Notes the object's name for later builds by this generator."""
        if self._folder is not None:
            self._found[self._key(kernel)] = name

    def _key(self, kernel: Generated) -> str:
        return hashlib.sha256(self._tools + self._generator + repr(kernel).encode()).hexdigest()

    def fetch(self, name: str, path: Path) -> bool:
        """Copies an object to ``path``, if it is there."""
        if self._folder is None:
            return False
        self._used.add(name)
        try:
            shutil.copyfile(self._folder / name, path)
        except FileNotFoundError:
            return False
        return True

    def keep(self, name: str, path: Path) -> None:
        """Adds a finished and checked object."""
        if self._folder is not None:
            part = self._folder / f"{name}.part"
            shutil.copyfile(path, part)
            part.replace(self._folder / name)

    def drop_the_unused(self) -> None:
        """To be called when a whole build is done."""
        if self._folder is None:
            return
        if self._found:
            part = self._folder / f"{_NAMES}.part"
            part.write_text(json.dumps(self._found, indent=0))
            part.replace(self._folder / _NAMES)
        for path in self._folder.iterdir():
            if path.name not in {*self._used, _NAMES}:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()


def _fingerprint(tools: Toolchain) -> bytes:
    """Whatever decides what an object looks like, apart from its MLIR and target."""
    digest = hashlib.sha256()
    for path in tools.paths.values():
        digest.update(subprocess.run([path, "--version"], capture_output=True, check=True).stdout)
    for module in ("toolchain", "checks", "inspect_asm"):
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    return digest.digest()


def _generator() -> bytes:
    """Whatever decides what MLIR a kernel has, apart from its facts."""
    digest = hashlib.sha256(version("jaxlib").encode())
    for path in (Path(spec.__file__), *sorted(Path(__file__).parent.rglob("*.py"))):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()
