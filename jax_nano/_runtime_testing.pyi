"""`jax_nano._runtime.testing`: what only tests and benchmarks call. No file of this name exists at run time.

Products and single kernels without XLA, detection and selection for CPUs of the caller's choice, and the parts of what
decides whether threads share a call. Sizes, strides, labels and dtypes are given as in `_runtime`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from jax_nano._runtime import _Plan
from jax_nano._runtime_specialized import Kernels
from jax_nano._runtime_tuning import Choice

def select_target(features: Sequence[str], forced: str = "") -> str:
    """What `_runtime.selected_target` would say on a CPU with these features and with JAX_NANO_TARGET=forced.

    Raises:
      ValueError: as `_runtime.selected_target`; or a feature is unknown.
    """

def decode_features(
    cpuid: Mapping[tuple[int, int], tuple[int, int, int, int]], xcr0: int, amx_permission: bool
) -> list[str]:
    """What detection finds where CPUID (leaf, subleaf) answers (eax, ebx, ecx, edx), zeros if not listed."""

def dot(
    lhs: int,
    rhs: int,
    out: int,
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
) -> None:
    """Run a plan on dense arrays at these addresses with a thread pool of its own, without XLA. Releases the GIL.

    Args:
      choice: run this instead of what the planner would.
      specialized: plan with these kernels for given products; None: with those that the process uses.

    Raises:
      ValueError: as `_runtime.plan`; or as `plan_by`, or this CPU cannot run the choice's kernel.
    """

def plan_by(
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    lhs_labels: Sequence[int],
    rhs_labels: Sequence[int],
    out_labels: Sequence[int],
    lhs_dtype: str,
    rhs_dtype: str,
    out_dtype: str,
    choice: Choice,
    algorithm: str = "default",
) -> _Plan:
    """The plan of a choice, for any target; nothing runs.

    Raises:
      ValueError: as `_runtime.plan`; or why the kernel cannot compute the product so: another signature, what
        `why_illegal` says, a split into more parts than there are, or more workspace than a plan may take.
    """

def why_illegal(kernel_name: str, args: Mapping[str, int]) -> str:
    """Why `call` would refuse these arguments: what Validate (csrc/plan/schedule.h) says. "" if it would not.

    Raises:
      ValueError: no such kernel, or an unknown field.
    """

def call(kernel_name: str, args: Mapping[str, int]) -> None:
    """Call one kernel. Releases the GIL.

    Args:
      args: fields of GemmArgs (csrc/plan/kernel_abi.h), pointers as addresses. By default operands are dense and
        row-major, batch is 1 and nothing is packed that need not be. Where blocking and workspace are left out or 0,
        the planner chooses and memory is provided until the call returns.

    Raises:
      ValueError: no such kernel, an unknown field, or values that break the kernel's contract.
    """

def call_many(kernel_name: str, rows: NDArray[np.int64]) -> None:
    """Call one kernel once for each row, in order. Releases the GIL.

    Args:
      rows: every row has all fields of GemmArgs in their order, as in `call`; only blocking and workspace may be 0.

    Raises:
      ValueError: as `call`; the rows before the bad one have run.
    """

def handed_jobs() -> int:
    """How many shares of calls went to threads that stood by, since the process began (csrc/run/standby.h)."""

def wake_crew() -> tuple[int, int]:
    """The caller's CPU, and that of a helper of the library that was woken; -1 if none was (csrc/run/crew.h)."""

class Pace:
    """How long the calls of one plan take one thread, in ns (csrc/run/sharing.h)."""

    def __init__(self, guess: int) -> None: ...
    @property
    def alone(self) -> int: ...
    def saw(self, alone: int) -> None: ...

class Ledger:
    """Whether short calls share their work, by what helpers met lately (csrc/run/sharing.h). Times in ns."""

    def __init__(self) -> None: ...
    @property
    def losses(self) -> int: ...
    def may_wake(self, wanted: int, alone: int, now: int) -> int: ...
    def is_open(self, now: int) -> bool: ...
    def paid(self) -> None: ...
    def saved(self, time: int) -> None: ...
    def lost(self, now: int, cost: int = ...) -> None: ...

def share_every_call(on: bool) -> None:
    """For machines that may be busy: all calls wake all helpers, which stand by for as long as they ever may."""

def workspace_bytes() -> int:
    """The largest workspace that any thread of this process has held."""

def quantized(
    addresses: Sequence[int],
    sizes: tuple[int, int, int, int],
    along_k: bool,
    dtypes: tuple[str, str, str, str, str],
    threads: int,
    activation: str = "none",
    factor: float = 1.0,
    trips: int = 1,
) -> float:
    """Run a product with quantised weights with a thread pool of its own, without XLA. Releases the GIL.

    Args:
      addresses: of x, weights, scales, zero points, the result, bias and residual; 0 for what there is not.
      sizes, along_k, dtypes: as in `_runtime.plan_quantized`.
      activation, factor: of the epilogue.
      trips: how often.

    Returns:
      The seconds that all trips took.

    Raises:
      ValueError: sizes or dtypes are none that kernels take, or there is no such activation.
    """

def call_quantized(kernel_name: str, args: Mapping[str, int]) -> None:
    """Call one kernel for quantised weights with these fields of QuantizedArgs, the others zero.

    Raises:
      ValueError: no such kernel, or an unknown field.
    """

class PlanTable:
    """The plans that a call site keeps, with numbers in the place of shapes and plans."""

    def __init__(self) -> None: ...
    def find(self, shape: int) -> int:
        """The plan for a shape, which is its number. Releases the GIL."""

    @property
    def made(self) -> int:
        """How often a plan was made."""

    @property
    def alive(self) -> int:
        """How many are kept."""
