"""C sources of the timing loops, compiled on the spot with the system's compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess

from benchmarks import ROOT

_HERE = pathlib.Path(__file__).parent
_CACHE = ROOT / "build" / "benchmarks"

_LINK = {
    "machine": ["-lpthread"],
    "cblas": [],
    "onednn": ["-ldnnl"],
    "xsmm": ["-lxsmm", "-lxsmmnoblas", "-lpthread", "-ldl", "-lm", "-lrt"],
}
_PACKAGE = {"onednn": "libdnnl-dev", "xsmm": "libxsmm-dev"}


def build(name: str) -> str:
    """Compiles native/NAME.c if it has changed; returns why that failed, or an empty string."""
    compiler = shutil.which("cc")
    if compiler is None:
        return "needs a C compiler (cc)"
    library = _library(name)
    if library.exists():
        return ""
    library.parent.mkdir(parents=True, exist_ok=True)
    # Several runs may compile it at once, each to a file of its own; the last to finish wins.
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, "-O3", "-shared", "-fPIC", "-o", str(unfinished), str(_HERE / f"{name}.c")]
    result = subprocess.run([*command, *_LINK[name]], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        unfinished.replace(library)
        return ""
    return why_not(name, result.stderr)


def why_not(name: str, stderr: str) -> str:
    """One line from what the compiler said about native/NAME.c."""
    if demand := re.search(r"#error \"?([^\"\n]+)", stderr):
        return f"the installed version does not fit: {demand[1]}"
    if name in _PACKAGE and re.search(r"No such file or directory|cannot find -l", stderr):
        return f"not installed: apt-get install {_PACKAGE[name]}"
    return f"native/{name}.c does not compile: {stderr.strip()}"


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The compiled library; `build` made it, in the parent process."""
    return ctypes.CDLL(str(_library(name)))


def _library(name: str) -> pathlib.Path:
    sources = (_HERE / f"{name}.c").read_bytes() + (_HERE / "job.h").read_bytes()
    return _CACHE / f"{name}-{hashlib.sha256(sources).hexdigest()[:16]}.so"
