"""Generated functions for products with quantised weights, ``void symbol(const QuantizedArgs*)``, and the list of them.

One for each format of weights on a target: the product of few rows, in either order of storage, and a block of weights
as float32. And one for each target that finishes sums. What is done is the argument's ``task``
(``jax_nano._core.spec.QUANTIZED_TASKS``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax_nano._core import spec
from jax_nano._core.spec import names

from .. import ir
from ..arguments import Arguments, Given
from ..generated import Generated
from ..ir import I64, Ptr
from ..target import TARGETS, Target
from ..toolchain import LLC_FLAGS
from . import finish
from .columns import Columns
from .dequantize import Dequantize
from .formats import (
    CHUNK,
    BytePairs,
    Bytes,
    FloatPairs,
    Floats,
    Format,
    NibblePairs,
    Nibbles,
    NibbleTable,
    block,
)
from .inner import Inner
from .inner_products import InnerProducts, inner_products
from .rows import Rows
from .sweep import Sweep, sweeps

_POINTERS = {"q": "int8"} | dict.fromkeys(("x_pack", "sums", "y", "zeros", "scales"), "float32")
_FIELDS = names(spec.QUANTIZED_ARGS)


@dataclass(frozen=True)
class QuantizedKernel(Generated):
    """A format on a target; without a format what finishes sums.

    Attributes:
      flags: llc's. Its scheduler moves loads and what unpacks them before the products, as far as it can, and so needs
        more registers than there are: the sweep of int4 with four rows touched the stack 218 times in 916 instructions.
    """

    target: Target
    form: Format | None
    flags: tuple[str, ...] = (*LLC_FLAGS, "-enable-misched=false")

    @property
    def form_name(self) -> str:
        return "finish" if self.form is None else self.form.name

    @property
    def name(self) -> str:
        return f"quantized_{self.form_name}_{self.target.name}"

    INFO = spec.QUANTIZED_INFO

    @property
    def why(self) -> str:
        """What it is, for people."""
        return "sums of the others as results" if self.form is None else f"weights of {self.form.bits} bits"

    @property
    def signature(self) -> str:
        return "quantised weights"

    def sweeps(self) -> list[Sweep]:
        """Its loops over columns."""
        return [] if self.form is None else sweeps(self.form, self.target)

    def inner_products(self) -> list[InnerProducts]:
        """Its loops along K."""
        return [] if self.form is None else inner_products(self.form, self.target)

    def facts(self) -> dict[str, Any]:
        bits, weights = (self.form.bits, block(self.form)) if self.form else (0, 0)
        pairs = int(self.form is not None and self.form.step == 2)
        return {"form": self.form_name, "bits": bits, "block": weights, "pairs": pairs}

    def mlir(self) -> str:
        with ir.new_module() as module:
            self.emit(module)
            return module.text()

    def emit(self, module: ir.Module) -> None:
        """Adds the function and all that it calls."""
        tasks: dict[str, Callable[[Given], None]] = {}
        if self.form is None:
            finish.emit(module, self.symbol, self.target)
            tasks["finish"] = partial(finish.finish, module, self.symbol, self.target)
            if self.target.lanes(4) == CHUNK:
                tasks["add_scaled"] = partial(finish.add_scaled, module, self.symbol, self.target)
        else:
            rows = Rows(module, self.symbol, self.form.lanes)
            rows.emit_load()
            columns = Columns(module, self.symbol, self.form, self.target, rows)
            columns.emit()
            inner = Inner(module, self.symbol, self.form, self.target, rows)
            inner.emit()
            tasks["columns"] = columns.nest
            tasks["inner"] = inner.nest
            if self.form.step == 1:
                dequantize = Dequantize(module, self.symbol, self.form, rows)
                tasks["dequantize_columns"] = dequantize.by_columns
                tasks["dequantize_along_k"] = dequantize.along_k
                if self.form.lanes == CHUNK:
                    tasks["bfloat16_columns"] = dequantize.bfloat16_columns
                    tasks["bfloat16_along_k"] = dequantize.bfloat16_along_k
        for task, emit in tasks.items():
            module.function(f"{self.symbol}_{task}", ["int64"], partial(self._task, emit), internal=True)

        def body(given: Ptr) -> None:
            task = I64(given.at(_FIELDS.index("task")).load())
            calls = [partial(module.call, f"{self.symbol}_{name}", [given]) for name in tasks]
            ir.switch(task, calls, first=spec.QUANTIZED_TASKS.index(next(iter(tasks))))

        module.function(self.symbol, ["int64"], body, internal=False)

    @staticmethod
    def _task(emit: Callable[[Given], None], given: Ptr) -> None:
        emit(Arguments(given, _FIELDS, _POINTERS).loaded())


def kernels() -> Iterator[QuantizedKernel]:
    """Every one, in a fixed order: for the targets whose float32 products are of vectors, or that have products of
    bfloat16 pairs.
    """
    for target in TARGETS.values():
        lanes = target.lanes(4)
        forms: list[Format | None] = []
        if "fma" in target.nanokernels:
            nibbles = NibbleTable if lanes == CHUNK else Nibbles
            forms += [kind(lanes, signed) for kind in (Bytes, nibbles) for signed in (True, False)]
            forms += [Floats(4, lanes), Floats(5, lanes), None]
        if "bf16_dot" in target.nanokernels:
            forms += [kind(lanes, signed) for kind in (BytePairs, NibblePairs) for signed in (True, False)]
            forms += [FloatPairs(4, lanes), FloatPairs(5, lanes)]
        for form in forms:
            yield QuantizedKernel(target, form)
