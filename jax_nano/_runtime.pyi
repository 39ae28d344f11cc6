"""The compiled half of jax_nano: generated kernels, planning, and the handler that XLA calls.

Sizes and strides are in elements. Labels are einsum's letters as integers: in lhs, rhs and out they mean batch;
in lhs and rhs only, contracting; in lhs and out, M; in rhs and out, N. dtypes go by their NumPy / ml_dtypes names.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from typing_extensions import CapsuleType  # types.CapsuleType is new in Python 3.13; stubs may always use this one

ABI_VERSION: int
"""Version of the custom call's attributes, part of every exported program."""

FFI_API_VERSION: tuple[int, int]
"""Of XLA's headers that this was compiled with. A jaxlib whose own is older refuses it, and its CPU backend with it."""

class _Target(TypedDict):
    name: str
    compiled: bool  # this build has kernels for it
    supported: bool  # this CPU and operating system can run it
    why: str  # why it is not usable; empty if it is

class _Kernel(TypedDict):
    name: str
    target: str
    lhs: str
    rhs: str
    acc: str
    out: str
    mr: int
    nr: int
    kr: int
    a_panel_bytes: int
    b_panel_bytes: int
    b_header_bytes: int
    algorithm: str
    direct_a: bool
    direct_b: bool
    inner: bool
    sweep: bool
    narrow: bool
    epilogue: bool  # whether it can finish its sums with scale, bias, activation and residual

class _Caches(TypedDict):
    l1d: int
    l2: int
    l3: int

_Loop = tuple[int, int, int, int]  # size, and strides in A, B, C

class _Plan(TypedDict):
    kernel: str
    target: str
    swapped: bool  # A is rhs and B is lhs
    empty: bool  # the result has no elements; the rest is zero
    m: int
    n: int
    k: int
    rsa: int
    csa: int
    rsb: int
    csb: int
    rsc: int
    batch: int
    bsa: int
    bsb: int
    bsc: int
    pack_a: bool
    pack_b: bool
    inner: bool
    sweep: bool
    ahead: bool  # these two fetch what they read next
    mc: int
    kc: int
    nc: int
    panel: int  # rows of A that are multiplied at once
    rs_partial: int  # row stride of unfinished sums; 0: no element of the result has any
    outer: list[_Loop]  # independent loops around the kernel's own batch loop, outermost first
    k_outer: list[_Loop]  # accumulating passes, outermost first
    products: int  # outer sizes times batch
    split: tuple[int, int, int]  # pieces of products, m, n
    k_pieces: int  # pieces of k, whose sums are taken apart and then added
    workspace_bytes: int  # of one thread
    shared_bytes: int  # of all threads of a call: the sums of the pieces

def registrations() -> dict[str, dict[Literal["instantiate", "execute"], CapsuleType]]:
    """FFI targets by name, for `jax.ffi.register_ffi_target(..., platform="cpu")`."""

def targets(features: Sequence[str] | None = None) -> list[_Target]:
    """Every target, best first, as on this CPU or on one with the given features."""

def selected_target() -> str:
    """The target whose kernels run: the best usable one, or the one that JAX_NANO_TARGET names; "" if none is usable.

    Raises:
      ValueError: JAX_NANO_TARGET names no target, or one that cannot be used here.
    """

def select_target(features: Sequence[str], forced: str = "") -> str:
    """What `selected_target` would say on a CPU with these features and with JAX_NANO_TARGET=forced.

    Raises:
      ValueError: as `selected_target`; or a feature is unknown.
    """

def supports(lhs: str, rhs: str, out: str, algorithm: str = "default") -> bool:
    """Whether there is a kernel for these dtypes, in either order of the operands.

    Raises:
      ValueError: as `selected_target`.
    """

def kernels() -> list[_Kernel]:
    """Every kernel in this build, runnable on this CPU or not."""

def features() -> list[str]:
    """The CPU features found, among those that some target needs."""

def caches() -> _Caches:
    """Data cache sizes of one core in bytes; L3 is the whole shared cache."""

def decode_features(
    cpuid: Mapping[tuple[int, int], tuple[int, int, int, int]], xcr0: int, amx_permission: bool
) -> list[str]:
    """What detection finds where CPUID (leaf, subleaf) answers (eax, ebx, ecx, edx), zeros if not listed."""

def plan(
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
    caches: tuple[int, int, int] | None = None,
) -> _Plan:
    """How a product would be computed: by the selected targets, or by one that may not even run here.

    Args:
      target: plan for this target only.
      caches: L1d, L2, L3 in bytes instead of this machine's.

    Raises:
      ValueError: labels, sizes or dtypes do not fit together, or no kernel takes them.
    """

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
) -> None:
    """Run a plan on dense arrays at these addresses with a thread pool of its own, without XLA. Releases the GIL.

    Raises:
      ValueError: as `plan`.
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
) -> float:
    """Run one plan on each of several sets of dense arrays in turn, `trips` times. Releases the GIL.

    Args:
      buffers: a row for each set, the addresses of lhs, rhs and out.

    Returns:
      The seconds it took, without planning and without starting threads.

    Raises:
      ValueError: as `plan`.
    """

def call(kernel_name: str, args: Mapping[str, int]) -> None:
    """Call one kernel. Releases the GIL.

    Args:
      args: fields of GemmArgs (csrc/kernel_abi.h), pointers as addresses. By default operands are dense and
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
    """How many shares of calls went to threads that stood by, since the process began (csrc/standby.h)."""

class Pace:
    """How long the calls of one plan take one thread, in ns (csrc/sharing.h). For tests."""

    def __init__(self, guess: int) -> None: ...
    @property
    def alone(self) -> int: ...
    def saw(self, alone: int) -> None: ...

class Ledger:
    """Whether short calls share their work, by what helpers met lately (csrc/sharing.h). Times in ns. For tests."""

    def __init__(self) -> None: ...
    @property
    def losses(self) -> int: ...
    def may_wake(self, wanted: int, alone: int, now: int) -> int: ...
    def is_open(self, now: int) -> bool: ...
    def paid(self) -> None: ...
    def lost(self, now: int) -> None: ...

def share_every_call(on: bool) -> None:
    """For tests, whose machine may be busy: all calls wake all helpers, which stand by for as long as they ever may."""

class _QuantizedPlan(TypedDict):
    kernel: str
    gemm: str  # the kernel that multiplies with float32 weights; "" where they are read where they lie
    few: bool
    m_pieces: int
    n_pieces: int

def quantized(
    addresses: tuple[int, int, int, int, int],
    m: int,
    n: int,
    k: int,
    group: int,
    along_k: bool,
    x: str,
    q: str,
    scale: str,
    zero: str,
    out: str,
    threads: int,
) -> None:
    """Run a product with quantised weights (csrc/quantized.h) with a thread pool of its own, without XLA.

    Args:
      addresses: of x, q, scale, zero points (0: none) and out.
      x, q, scale, zero, out: dtypes by name; "" for zero points that there are none of.

    Raises:
      ValueError: sizes or dtypes are none that kernels take.
    """

def quantized_plan(
    m: int,
    n: int,
    k: int,
    group: int,
    along_k: bool,
    x: str,
    q: str,
    scale: str,
    zero: str,
    out: str,
    threads: int,
) -> _QuantizedPlan:
    """How such a product would be computed.

    Raises:
      ValueError: as `quantized`.
    """

def call_quantized(kernel_name: str, args: Mapping[str, int]) -> None:
    """Call one kernel for quantised weights with these fields of QuantizedArgs, the others zero.

    Raises:
      ValueError: no such kernel, or an unknown field.
    """

def workspace_bytes() -> int:
    """The largest workspace that any thread of this process has held."""
