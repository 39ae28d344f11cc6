"""A generated attention and its gradients: two functions, and the microkernels behind them."""

from __future__ import annotations

from collections.abc import Iterator

from .. import ir
from ..amx_microkernel import AmxMicrokernel
from ..inner_microkernel import InnerMicrokernel
from ..microkernel import Microkernel
from ..sweep_microkernel import SweepMicrokernel
from .composition import AttentionComposition
from .few import FewQueries
from .gradients import Gradients
from .loops import Loops
from .products import Products
from .softmax import Softmax


class Attention(AttentionComposition):
    """An attention for one pair of dtypes."""

    def microkernels(self) -> Iterator[Microkernel | AmxMicrokernel | InnerMicrokernel | SweepMicrokernel]:
        """Every microkernel of this attention."""
        for rows in self.amx_rows():
            yield from rows.microkernels()
        yield from self.tile_microkernels()
        # Those that prefetch are not called, and LLVM drops them.
        for path in (self.inner, self.sweep):
            if path is not None:
                yield from (m for m in path.microkernels() if not m.prefetches)

    def emit(self, module: ir.Module, symbol: str) -> None:
        """Adds ``void symbol(const AttentionArgs*)``, ``void symbol_gradients(const GradientArgs*)``, and all that is
        behind them.
        """
        softmax = Softmax(self, module, symbol)
        softmax.emit()
        few = FewQueries.emit(self, module, symbol, softmax)
        pack = self.packing.emit(module, symbol)
        products = Products(self, module, symbol)
        products.emit()
        loops = Loops(self, module, pack, softmax, products, few)
        module.function(symbol, ["int64"], loops.emit, internal=False)
        Gradients.emit(self, module, symbol)
