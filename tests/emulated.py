"""Kernels of targets that this CPU lacks, emulated (jax_nano/codegen/emulate.py), with the surface of native ones.

The library of emulated kernels is built once and kept in build/ until a source of the generator changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from guarded import Region
from kernel_abi import FIELDS, PACK_SLACK_BYTES, packed_a_row, reads_a

import jax_nano.codegen
from jax_nano._core import spec
from jax_nano.codegen import emulate, manifest
from jax_nano.codegen.catalog import AttentionKernel
from jax_nano.codegen.catalog import Kernel as CatalogKernel
from jax_nano.codegen.quantized.kernel import QuantizedKernel

_AnyKernel: TypeAlias = CatalogKernel | AttentionKernel | QuantizedKernel


@dataclass(frozen=True)
class Kernel:
    """One emulated kernel: what the manifest says of it, and a way to call it."""

    info: dict[str, Any]
    function: Any  # a ctypes function

    def __getattr__(self, name: str) -> Any:
        return self.info[name]

    def call(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, **fields: int) -> None:
        """C (+)= A @ B, as tests/kernels' native Kernel.call; blocks are as large as the product unless given.

        The workspace is exactly as large as kernel_abi.h says, between pages that may not be touched, and full of NaN.
        """
        (m, k), n = a.shape[-2:], b.shape[-1]
        blocks = {
            "mc": _round_up(m, self.mr),
            "nc": _round_up(n, self.nr),
            "kc": _round_up(k, self.kr),
            "tile_rows": self.mr,
        }
        x = dict.fromkeys(FIELDS, 0) | {"a": a.ctypes.data, "b": b.ctypes.data, "c": c.ctypes.data}
        x |= {"m": m, "n": n, "k": k, "batch": 1, "rs_partial": _round_up(n, self.nr), **blocks, **_strides(a, b, c)}
        x |= {"pack_a": 0, "pack_b": int(not self.direct_b), **fields}
        x["pack_a"] = int(x["pack_a"] or not (x["inner"] or x["sweep"] or reads_a(self.info, x)))
        assert len(x) == len(FIELDS), "unknown field among the arguments"
        assert x["csb"] == 1 or x["pack_b"] or x["inner"]
        sizes = {
            "a_pack": x["pack_a"] and x["mc"] * packed_a_row(x["kc"] * self.a_panel_bytes),
            "b_pack": x["pack_b"] and x["nc"] * (x["kc"] * self.b_panel_bytes + self.b_header_bytes),
        }
        sizes = {name: _round_up(size, 64) + PACK_SLACK_BYTES for name, size in sizes.items() if size}
        if x["inner"]:
            sizes = {"a_pack": x["pack_a"] and a.nbytes, "b_pack": x["pack_b"] and b.nbytes}
            sizes = {name: size for name, size in sizes.items() if size}
        if self.narrow_out:
            sizes["partial"] = _round_up(m * x["rs_partial"] * np.dtype(self.acc).itemsize, 64)
        with contextlib.ExitStack() as regions:
            for name, size in sizes.items():
                if not x[name]:
                    x[name] = regions.enter_context(Region(size)).end - size
                    ctypes.memset(x[name], 0xFF, size)  # NaN, so that nothing may count on zeros
            self.function((ctypes.c_int64 * len(FIELDS))(*(x[name] for name in FIELDS)))


def _round_up(x: int, unit: int) -> int:
    """The smallest multiple of ``unit``, zero excepted, that is not below x."""
    return max(-(-x // unit), 1) * unit


def _strides(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> dict[str, int]:
    """The stride fields of arrays (m, k), (k, n), (m, n), or of such with a batch dimension in front."""
    strides = {}
    for x, names in ((a, ("bsa", "rsa", "csa")), (b, ("bsb", "rsb", "csb")), (c, ("bsc", "rsc", "csc"))):
        for name, stride in zip(names[3 - x.ndim :], x.strides, strict=True):
            strides[name] = stride // x.itemsize
    assert strides.pop("csc") == 1 or c.shape[-1] <= 1 or c.size == 0
    if b.shape[-1] <= 1 or b.size == 0:  # NumPy's strides mean nothing then
        strides["csb"] = 1
    if c.ndim == 3:
        strides["batch"] = c.shape[0]
    return strides


_FOLDER = Path(__file__).parent.parent / "build" / "emulated-kernels"


def load(kernels: list[CatalogKernel]) -> dict[str, Kernel]:
    """These kernels by name, from an earlier run or built anew.

    Raises:
      ToolchainError: there is no LLVM 22 or C compiler to build them with.
    """
    functions = library("products", kernels)
    return {k.name: Kernel(manifest.entry(k), _function(functions, k.symbol)) for k in kernels}


def load_attentions(kernels: list[AttentionKernel], suffix: str = "") -> dict[str, tuple[dict[str, Any], Any]]:
    """The facts and the function of each of these attentions, by name; raises what `load` does.

    With the suffix "_gradients" the functions are those of their gradients.
    """
    functions = library("attentions", kernels)
    return {k.name: (manifest.entry(k), _function(functions, k.symbol + suffix)) for k in kernels}


def library(kind: str, kernels: Sequence[_AnyKernel]) -> ctypes.CDLL:
    """These kernels, from an earlier run or built anew; raises what `load` does."""
    _FOLDER.mkdir(parents=True, exist_ok=True)
    path = _FOLDER / f"{kind}-{_key(kernels)}.so"
    with (_FOLDER / "lock").open("w") as lock:  # other test runs share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for old in _FOLDER.glob(f"{kind}-*.so"):
                old.unlink()
            unfinished = path.with_suffix(".unfinished")
            emulate.build(kernels, unfinished, os.cpu_count() or 1)
            unfinished.rename(path)
        return ctypes.CDLL(str(path))


def _function(library: ctypes.CDLL, symbol: str) -> Any:
    function = getattr(library, symbol)
    function.restype = None
    return function


def _key(kernels: Sequence[_AnyKernel]) -> str:
    """Stands for everything that the library is made of."""
    folder = Path(jax_nano.codegen.__file__).parent
    digest = hashlib.sha256(Path(spec.__file__).read_bytes())
    for source in sorted(p for p in folder.rglob("*") if p.suffix in {".py", ".c"}):
        digest.update(source.read_bytes())
    for kernel in kernels:
        digest.update(kernel.name.encode())
    return digest.hexdigest()[:16]
