"""`jax_nano._runtime.specialized`: kernels for given products. No file of this name exists at run time."""

from collections.abc import Mapping
from typing import Any

class Kernels:
    """A table of them (csrc/plan/specialized.h). Its kernels live as long as the process."""

    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def add(self, kernel: Mapping[str, Any], function: int, pack: str) -> None:
        """Adds one; a later one for the same product takes the place of an earlier one.

        Args:
          kernel: `kernel`, that of the build whose place it takes; the tile, `mr` and `nr`; the product and schedule,
            m to bsc and the items of a choice as in a plan; `parts`, whether it takes parts of m and n; `epilogue`,
            whether it is for calls that have one.
          function: the address of its code.
          pack: where it comes from, for people.

        Raises:
          ValueError: such a kernel cannot compute the product, or does not run on this CPU.
        """

def use(kernels: Kernels | None) -> None:
    """From now on, plans of this process are made with these; None: with those of the build alone.

    No other thread may plan meanwhile.
    """
