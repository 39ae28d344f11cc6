"""C sources of the timing loops, compiled on the spot with the system's compiler.

A source may be compiled several times, each against another copy of the library that it calls: one of Debian's
packages, or one that `make bench-peers` installed from PyPI into the Python environment.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

from benchmarks import ROOT

_HERE = pathlib.Path(__file__).parent
_CACHE = ROOT / "build" / "benchmarks"

PREFIX = pathlib.Path(sys.prefix)
"""Where packages of PyPI put C headers and libraries: the Python environment."""


@dataclasses.dataclass(frozen=True)
class _Build:
    """A source, and the library that it is linked to."""

    source: str
    link: tuple[str, ...] = ()
    install: str = ""  # the command that installs the library
    prefix: pathlib.Path | None = None  # of the library, where it is none of the system's

    @property
    def arguments(self) -> list[str]:
        if self.prefix is None:
            return list(self.link)
        folder = self.prefix / "lib"
        # The libraries that it needs in turn lie beside it, where only the worker's environment finds them.
        own = [f"-I{self.prefix / 'include'}", f"-L{folder}", f"-Wl,-rpath,{folder}", "-Wl,--allow-shlib-undefined"]
        return [*own, *self.link]


_PEERS = "make bench-peers"
_BUILDS = {
    "machine": _Build("machine", ("-lpthread",)),
    "cblas": _Build("cblas"),
    "mkl": _Build("mkl"),
    "onednn": _Build("onednn", ("-ldnnl",), "apt-get install libdnnl-dev"),
    "onednn-omp": _Build("onednn", ("-l:libdnnl.so.3",), _PEERS, PREFIX / "onednn-omp"),
    "onednn-sycl": _Build("onednn", ("-l:libdnnl.so.3",), _PEERS, PREFIX),
    "xsmm": _Build(
        "xsmm",
        ("-lxsmm", "-lxsmmnoblas", "-lpthread", "-ldl", "-lm", "-lrt"),
        "apt-get install libxsmm-dev",
    ),
}


def build(name: str) -> str:
    """Compiles a source if it has changed; returns why that failed, or an empty string."""
    compiler = shutil.which("cc")
    if compiler is None:
        return "needs a C compiler (cc)"
    made = _BUILDS[name]
    # Without this, a package that is missing here would be replaced by the system's of the same name.
    if made.prefix is not None and not (made.prefix / "include" / "dnnl.h").exists():
        return f"not installed: {made.install}"
    library = _library(name)
    if library.exists():
        return ""
    library.parent.mkdir(parents=True, exist_ok=True)
    # Several runs may compile it at once, each to a file of its own; the last to finish wins.
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, "-O3", "-shared", "-fPIC", "-o", str(unfinished), str(_HERE / f"{made.source}.c")]
    result = subprocess.run([*command, *made.arguments], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        unfinished.replace(library)
        return ""
    return why_not(name, result.stderr)


def why_not(name: str, stderr: str) -> str:
    """One line from what the compiler said about the source of a build."""
    made = _BUILDS[name]
    if demand := re.search(r"#error \"?([^\"\n]+)", stderr):
        return f"the installed version does not fit: {demand[1]}"
    if made.install and re.search(r"No such file or directory|cannot find -l", stderr):
        return f"not installed: {made.install}"
    return f"native/{made.source}.c does not compile: {stderr.strip()}"


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The compiled library; `build` made it, in the parent process."""
    return ctypes.CDLL(str(_library(name)))


def _library(name: str) -> pathlib.Path:
    made = _BUILDS[name]
    parts = [(_HERE / file).read_bytes() for file in (f"{made.source}.c", "job.h")]
    parts.append("\n".join(made.arguments).encode())
    return _CACHE / f"{name}-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
