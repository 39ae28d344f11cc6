"""One generated function for weights of a format on a target: ``void symbol(const QuantizedArgs*)``.

What it does is the argument's ``task`` (``jax_nano._core.spec.QUANTIZED_TASKS``): the product of few rows, in either
order of storage, a block of weights as float32, or a row of results rounded to their dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax_nano._core import spec
from jax_nano._core.spec import names

from .. import ir
from ..ir import I64, Ptr
from ..target import TARGETS, Target
from ..toolchain import LLC_FLAGS
from .columns import Columns, Sweep, bytes_of, sweeps
from .dequantize import Dequantize
from .formats import Floats, Format, Integers, block
from .inner import Inner
from .rows import Rows

_POINTERS = {"q": "int8", "x_pack": "float32"} | dict.fromkeys(("sums", "y", "zeros", "scales"), "float32")
_FIELDS = names(spec.QUANTIZED_ARGS)


@dataclass(frozen=True)
class QuantizedKernel:
    """A format on a target.

    Attributes:
      flags: llc's. Its scheduler moves loads and what unpacks them before the products, as far as it can, and so needs
        more registers than there are: the sweep of int4 with four rows touched the stack 218 times in 916 instructions.
    """

    target: Target
    form: Format
    flags: tuple[str, ...] = (*LLC_FLAGS, "-enable-misched=false")

    @property
    def name(self) -> str:
        return f"quantized_{self.form.name}_{self.target.name}"

    @property
    def symbol(self) -> str:
        """The C identifier of the generated function."""
        return "jax_nano_" + self.name.replace("-", "_")

    def sweeps(self) -> list[Sweep]:
        """Its loops over columns."""
        return sweeps(self.form, self.target)

    def mlir(self) -> str:
        """The kernel's verified MLIR module."""
        with ir.new_module() as module:
            self.emit(module)
            return module.text()

    def emit(self, module: ir.Module) -> None:
        """Adds the function and all that it calls."""
        rows = Rows(module, self.symbol, self.form.lanes)
        rows.emit()
        columns = Columns(module, self.symbol, self.form, self.target, rows)
        columns.emit()
        inner = Inner(module, self.symbol, self.form, self.target, rows)
        inner.emit()
        dequantize = Dequantize(module, self.symbol, self.form, rows)

        def round_rows(x: dict[str, Any]) -> None:
            def row(i: I64) -> None:
                to = x["out"] + i * x["rs_out"] * bytes_of(x["out_dtype"])
                rows.store(x["y"].at(i * x["nc"]), to, x["out_dtype"], x["n"])

            ir.loop(0, x["m"], 1, [], row)

        tasks = {
            "columns": columns.nest,
            "inner": inner.nest,
            "dequantize_columns": dequantize.by_columns,
            "dequantize_along_k": dequantize.along_k,
            "round": round_rows,
        }
        for task, emit in tasks.items():
            module.function(f"{self.symbol}_{task}", ["int64"], partial(self._task, emit), internal=True)

        def body(given: Ptr) -> None:
            task = I64(given.at(_FIELDS.index("task")).load())
            calls = [partial(module.call, f"{self.symbol}_{name}", [given]) for name in spec.QUANTIZED_TASKS]
            ir.switch(task, calls)

        module.function(self.symbol, ["int64"], body, internal=False)

    @staticmethod
    def _task(emit: Any, given: Ptr) -> None:
        fields: dict[str, Any] = {}
        for i, name in enumerate(_FIELDS):
            at = given.at(i)
            pointer = _POINTERS.get(name)
            fields[name] = Ptr(at.as_type("ptr").load(), pointer) if pointer else I64(at.load())
        emit(fields)


def kernels() -> Iterator[QuantizedKernel]:
    """Every one, in a fixed order: for the targets whose float32 products are of vectors."""
    for target in TARGETS.values():
        if "fma" in target.nanokernels:
            lanes = target.lanes(4)
            for form in (Integers(8, lanes), Integers(4, lanes), Floats(4, lanes), Floats(5, lanes)):
                yield QuantizedKernel(target, form)


def entry(kernel: QuantizedKernel) -> dict[str, Any]:
    """One kernel's facts for the manifest: its symbol, then the fields of QuantizedInfo in their order."""
    facts = {
        "name": kernel.name,
        "target": kernel.target.name,
        "form": kernel.form.name,
        "bits": kernel.form.bits,
        "block": block(kernel.form),
    }
    return {"symbol": kernel.symbol} | {x.name: facts[x.name] for x in spec.QUANTIZED_INFO if x.c_type != "QuantizedFn"}
