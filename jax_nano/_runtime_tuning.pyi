"""`jax_nano._runtime.tuning`: measuring candidate plans without XLA. No file of this name exists at run time.

Sizes, strides, labels and dtypes are given as in `_runtime`.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from jax_nano._runtime import _Plan
from jax_nano._runtime_specialized import Kernels

class Choice(TypedDict):
    """What is free to decide for a product, named as in a plan, which is one itself. Not a class at run time."""

    kernel: str
    inner: bool
    sweep: bool
    pack_a: bool
    pack_b: bool
    prefetch: bool  # of inner products and sweeps
    mc: int  # mc, kc, nc, tile_rows: of the blocked path
    kc: int
    nc: int
    tile_rows: int
    split: tuple[int, int, int]  # parts of products, m, n
    split_k: int

def candidates(
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    lhs_labels: Sequence[int],
    rhs_labels: Sequence[int],
    out_labels: Sequence[int],
    lhs_dtype: str,
    rhs_dtype: str,
    out_dtype: str,
    threads: int,
    algorithm: str = "default",
    target: str | None = None,
) -> list[_Plan]:
    """All plans of a product worth measuring (csrc/plan/candidates.h), each also a choice; the planner's first.

    Raises:
      ValueError: as `_runtime.plan`.
    """

def counts(
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    lhs_labels: Sequence[int],
    rhs_labels: Sequence[int],
    out_labels: Sequence[int],
    lhs_dtype: str,
    rhs_dtype: str,
    out_dtype: str,
    choice: Choice,
    core: Sequence[int],
    algorithm: str = "default",
) -> dict[str, float]:
    """How often each cost of `spec.cost_names` arises in a plan; those that do.

    Args:
      choice: the plan.
      core: as `profile_core` gives it.

    Raises:
      ValueError: as `testing.plan_by`.
    """

def time_dot(
    buffers: NDArray[np.uintp],
    trips: int,
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    lhs_labels: Sequence[int],
    rhs_labels: Sequence[int],
    out_labels: Sequence[int],
    lhs_dtype: str,
    rhs_dtype: str,
    out_dtype: str,
    threads: int,
    algorithm: str = "default",
    choice: Choice | None = None,
    specialized: Kernels | None = None,
    activation: str | None = None,
    scale: float = 1.0,
    bias: int = 0,
    residual: int = 0,
) -> float:
    """Run one plan on each of several sets of dense arrays in turn, `trips` times. Releases the GIL.

    Args:
      buffers: a row for each set, the addresses of lhs, rhs and out.
      choice, specialized: as in `dot`.
      activation: of the epilogue, "none" for one without; None: there is no epilogue.
      scale, bias, residual: of the epilogue; addresses, 0 for what there is not. For one set of buffers.

    Returns:
      The seconds it took, without planning and without starting threads.

    Raises:
      ValueError: as `dot`.
    """

def profile_core(cpu: str) -> list[int] | None:
    """The fields of CoreModel (csrc/machine/costs.h) in the built-in profile of this name; None if there is none."""

def profile_costs(cpu: str) -> dict[str, list[float]]:
    """By kernel, nanoseconds of each of `spec.cost_names` in the built-in profile of this name; {} if there is none."""

def use_costs(core: Sequence[int], kernels: Mapping[str, Sequence[float]]) -> None:
    """From now on, what only moves data is decided by these costs.

    Args:
      core: as `profile_core` gives it.
      kernels: nanoseconds of each of `spec.cost_names`, by kernel.

    Raises:
      ValueError: another number of costs.
    """
