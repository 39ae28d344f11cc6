"""Kernels for given products, composed for tests: what `python -m jax_nano specialize` measures."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax_nano import _runtime
from jax_nano._tools import recipes
from jax_nano._tools.asked import Asked, Epilogue
from jax_nano._tools.composer import Composer
from jax_nano.codegen.toolchain import Toolchain, ToolchainError

MANY_THREADS = 64


def why_not() -> str | None:
    """Why kernels cannot be composed here; None if they can."""
    try:
        Toolchain.find()
        with Composer() as composer:
            list(composer.compose([{"id": 0, "kernel": "none", "fields": {}, "m": 1, "n": 1, "small": False}]))
            list(made(composer, asked("mk,kn->mn", ("float16",) * 3, m=9, n=17, k=20), most=1))
    except (ToolchainError, ValueError) as error:
        return str(error)
    return None


def asked(
    subscripts: str, dtypes: tuple[str, str, str] = ("float32",) * 3, epilogue: Epilogue | None = None, **sizes: int
) -> Asked:
    """A product by einsum's letters."""
    operands, out = subscripts.split("->")
    lhs, rhs = operands.split(",")
    shapes = tuple(sizes[x] for x in lhs), tuple(sizes[x] for x in rhs)
    labels = (tuple(map(ord, lhs)), tuple(map(ord, rhs)), tuple(map(ord, out)))
    return Asked(shapes, labels, dtypes, epilogue=epilogue)


@dataclass(frozen=True)
class Made:
    """A composed kernel.

    Attributes:
      recipe: what it was made of.
      entry: what the runtime is told of it, with its symbol.
      object: its object file.
      table: a `_runtime.specialized.Kernels` with it alone.
    """

    recipe: recipes.Recipe
    entry: dict[str, Any]
    object: str
    table: Any


def made(composer: Composer, product: Asked, most: int) -> Iterator[Made]:
    """Some of the kernels that are worth measuring for a product: other tiles, and other blocks."""
    finish = {"epilogue": product.epilogue is not None, "bias": product.epilogue is not None and product.epilogue.bias}
    plan = _runtime.plan(*product.arguments, 1, **finish, specialized=False)
    many = _runtime.plan(*product.arguments, MANY_THREADS, **finish, specialized=False)
    if recipes.why_not(plan) is not None:
        return
    kernel = next(x for x in _runtime.kernels() if x["name"] == plan["kernel"])
    parts = any(x > 1 for x in (*plan["split"][1:], *many["split"][1:]))
    tiles = recipes.of(plan, kernel, parts=parts, epilogue=finish["epilogue"])
    wanted = [*tiles[:most], *list(recipes.blocked_otherwise(tiles[-1], plan, kernel))[-most:]]
    done = [x for x in composer.compose([{**x, "id": i} for i, x in enumerate(wanted)]) if "error" not in x]
    assert done, product
    library = ctypes.CDLL(str(composer.link(list(dict.fromkeys(x["object"] for x in done)), f"{hash(product)}.so")))
    for x in done:
        entry = {**recipes.entry(wanted[x["id"]], plan), "symbol": x["symbol"]}
        table = _runtime.specialized.Kernels()
        table.add(entry, ctypes.cast(getattr(library, x["symbol"]), ctypes.c_void_p).value, "test")
        yield Made(wanted[x["id"]], entry, x["object"], table)
