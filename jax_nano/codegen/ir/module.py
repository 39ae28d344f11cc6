"""Modules of functions, in a context of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir._mlir_libs import _jax_mlir_ext
from jaxlib.mlir.dialects import func

from . import constants
from .control import unwrap
from .memory import Ptr
from .sizes import I64, Size
from .types import type_of


class Module:
    """An MLIR module under construction."""

    def __init__(self) -> None:
        self.op = ir.Module.create()
        self._functions: dict[str, list[str]] = {}

    def function(
        self, name: str, params: Sequence[str] | Mapping[str, str], body: Callable[..., None], *, internal: bool
    ) -> None:
        """Adds ``void name(params...)``, once. A parameter is "i64" or a dtype name (a pointer to such elements).

        Parameters with names (a mapping from them) can be given by name, as ``call_by_name`` does.
        """
        if name in self._functions:
            return
        self._functions[name] = list(params)
        kinds = list(params.values()) if isinstance(params, Mapping) else list(params)
        types = [type_of("i64" if kind == "i64" else "ptr") for kind in kinds]
        with ir.InsertionPoint(self.op.body):
            op = func.FuncOp(name, (types, []))
            if internal:
                op.attributes["llvm.linkage"] = ir.Attribute.parse("#llvm.linkage<internal>")
                op.attributes["passthrough"] = ir.ArrayAttr.get([ir.StringAttr.get("noinline")])
            block = op.add_entry_block()
        with ir.InsertionPoint(block), constants.of_function(block):
            body(*[I64(v) if kind == "i64" else Ptr(v, kind) for kind, v in zip(kinds, block.arguments, strict=True)])
            func.return_([])

    def call(self, name: str, args: Sequence[Size | Ptr]) -> None:
        """Calls a function that was added before."""
        if len(args) != len(self._functions[name]):
            raise TypeError(f"{name} takes {len(self._functions[name])} arguments, got {len(args)}")
        func.call([], ir.FlatSymbolRefAttr.get(name), [unwrap(a) for a in args])

    def call_by_name(self, name: str, given: Mapping[str, Any]) -> None:
        """The same with what its parameters are called; what it has no parameter for is left out."""
        self.call(name, [given[p] for p in self._functions[name]])

    def text(self) -> str:
        """The verified module, printed."""
        self.op.operation.verify()
        return str(self.op.operation.get_asm(assume_verified=True))


@contextlib.contextmanager
def new_module() -> Iterator[Module]:
    """An empty module in a context of its own, with the dialects that kernels use."""
    registry = ir.DialectRegistry()
    _jax_mlir_ext.register_dialects(registry)
    context = ir.Context()
    context.append_dialect_registry(registry)
    context.load_all_available_dialects()
    context.allow_unregistered_dialects = True
    with context, ir.Location.unknown():
        yield Module()
