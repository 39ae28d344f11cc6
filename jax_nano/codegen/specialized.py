"""Kernels for one product each: ``python -m jax_nano.codegen compose``, which `python -m jax_nano specialize` calls.

A recipe names a kernel of the catalog, another register tile, and what every call has alike: sizes, strides, path,
packing, blocking. The kernel that is composed of it computes that product only, as the catalog's would but for the
tile and for what only moves data; what is known while it is composed (tails, choices between paths) is no part of it.

Recipes come as lines of JSON, each with an `id` of the caller's; for each there is a line with what became of it:
the object's file and its symbol, or an error.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from jax_nano._core import spec

from .catalog import Kernel, find
from .composition import OneProduct
from .gemm import Gemm
from .nanokernel.amx import AmxDot
from .tile import Tile, check
from .toolchain import Toolchain, ToolchainError

FIELDS = (*(x.name for x in spec.GEMM_ARGS if x.c_type == "int64_t"), "epilogue")
"""What a recipe may fix: sizes, strides and the schedule; of the epilogue only that there is none."""

JAXLIB = "0.10"  # whose bindings of MLIR print what LLVM 22 reads

MOST_TILES = 8  # vectors in a row of a tile


@dataclass(frozen=True)
class SpecializedKernel(Kernel):
    """A kernel for one product.

    Attributes:
      one: the product.
    """

    one: OneProduct

    @property
    def name(self) -> str:
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        return f"{super().name}_{digest}"

    @property
    def gemm(self) -> Gemm:
        return replace(super().gemm, one=self.one)


def kernel_of(recipe: dict[str, Any]) -> SpecializedKernel:
    """The kernel that a recipe asks for.

    Raises:
      ValueError: there is none: the tile does not fit into the registers, or a field is none of FIELDS.
      KeyError: the recipe lacks something, or names no kernel of the catalog.
    """
    generic = find(recipe["kernel"])
    if not isinstance(generic, Kernel) or isinstance(generic.family, AmxDot):
        raise ValueError(f"{generic.name}: kernels of this kind are not made for given products")
    fields: dict[str, int] = recipe["fields"]
    if unknown := fields.keys() - set(FIELDS):
        raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}")
    lanes = generic.tile.lanes
    tile = Tile(recipe["mr"], recipe["nr"] // lanes, lanes)
    if tile.nr != recipe["nr"] or not 1 <= tile.nv <= MOST_TILES:
        raise ValueError(f"a tile of {recipe['nr']} columns: expected 1 to {MOST_TILES} vectors of {lanes}")
    check(tile, generic.target, generic.family.temporaries)
    one = OneProduct(recipe["m"], recipe["n"], tuple(sorted(fields.items())), recipe["small"])
    known = {x: getattr(generic, x) for x in ("target", "a", "b", "out", "family", "algorithm", "why")}
    return SpecializedKernel(**known, tile=tile, one=one)


def _composed(kernel: SpecializedKernel) -> str:
    try:
        return kernel.mlir()
    except Exception as error:  # the bindings raise errors of their own, of many kinds
        raise ToolchainError(
            f"The generator wants MLIR's Python bindings as jaxlib {JAXLIB} has them, and this is jaxlib"
            f" {version('jaxlib')}: name a Python with the other one (--generator PYTHON)."
            if not version("jaxlib").startswith(f"{JAXLIB}.")
            else f"{kernel.name} cannot be composed: {error}"
        ) from error


def compose(recipes: Iterable[str], out: Path, jobs: int, results: TextIO = sys.stdout) -> None:
    """Composes and compiles what is asked for, line by line."""
    tools = Toolchain.find()
    out.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()

    def tell(result: dict[str, Any]) -> None:
        with lock:
            print(json.dumps(result), file=results, flush=True)

    def compiled(number: Any, kernel: SpecializedKernel, mlir: str) -> None:
        path = out / f"{kernel.symbol}.o"
        try:
            tools.object_file(tools.optimized(tools.llvm_ir(mlir), kernel.target), kernel.target, path)
        except ToolchainError as error:
            tell({"id": number, "error": error.args[0]})
            return
        tell({"id": number, "object": str(path), "symbol": kernel.symbol})

    with ThreadPoolExecutor(jobs) as pool:
        # The bindings' contexts stay in this thread; the tools run side by side.
        for line in recipes:
            recipe = json.loads(line)
            try:
                kernel = kernel_of(recipe)
            except (ValueError, KeyError) as error:
                tell({"id": recipe["id"], "error": str(error)})
                continue
            pool.submit(compiled, recipe["id"], kernel, _composed(kernel))
