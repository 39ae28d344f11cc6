"""The compiled half of jax_nano: generated kernels, planning, and the handler that XLA calls.

What only tests and benchmarks call is in its submodule `testing`, what measures plans in `tuning`, kernels for given
products in `specialized` (_runtime_testing.pyi, _runtime_tuning.pyi and _runtime_specialized.pyi describe them).

Sizes and strides are in elements. Labels are einsum's letters as integers: in lhs, rhs and out they mean batch;
in lhs and rhs only, contracting; in lhs and out, M; in rhs and out, N. dtypes go by their NumPy / ml_dtypes names.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

from typing_extensions import CapsuleType  # types.CapsuleType is new in Python 3.13; stubs may always use this one

from jax_nano import _runtime_specialized, _runtime_testing, _runtime_tuning

specialized = _runtime_specialized
testing = _runtime_testing
tuning = _runtime_tuning

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
    pairs_most: int
    inner: bool
    sweep: bool
    narrow_out: bool
    epilogue: bool  # whether it can finish its sums with scale, bias, activation and residual
    lanes: int
    direct_vectors: str

class _Attention(TypedDict):
    name: str
    target: str
    q: str  # dtype of queries and results
    kv: str  # of keys and values
    mr: int
    nr: int
    kr: int
    unit: int  # what blocks of keys are multiples of
    lanes: int  # elements of a vector of sums
    pack_bytes: int  # of a packed element
    few: bool  # whether few queries can read keys and values where they lie
    converts: bool  # whether weights are converted before they are multiplied

class _GradientPlan(TypedDict):
    block: int
    chunk: int
    pieces: int
    piece: int
    items: int
    workspace_bytes: int
    shared_bytes: int

class _AttentionPlan(TypedDict):
    few: bool  # keys and values are read where they lie
    block: int  # keys that are looked at at once
    pieces: int  # of the keys, merged in a fixed order
    piece: int  # keys in one
    heads_at_once: int
    positions: int
    items: int
    workspace_bytes: int
    shared_bytes: int

class _Caches(TypedDict):
    l1d: int
    l2: int
    l3: int

_Loop = tuple[int, int, int, int]  # size, and strides in A, B, C

class _Scored(TypedDict):
    inner: bool
    sweep: bool
    prefetch: bool
    pack_a: bool
    pack_b: bool
    mc: int
    kc: int
    nc: int
    tile_rows: int
    ns: float

class _Plan(TypedDict):
    kernel: str  # of the build, also where one that was composed for the product takes its place
    target: str
    pack: str  # where that one comes from; "": there is none
    mr: int  # mr x nr: the register tile
    nr: int
    swapped: bool  # A is rhs and B is lhs
    transposed: bool  # C^T is computed in workspace; m, n and the strides are those of that product
    out_rows_apart: int  # of a transposed plan: from a row of the result to the next one
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
    prefetch: bool  # these two fetch what they read next
    mc: int
    kc: int
    nc: int
    tile_rows: int  # rows of a register tile that are used
    rs_partial: int  # row stride of unfinished sums; 0: no element of the result has any
    outer: list[_Loop]  # independent loops around the kernel's own batch loop, outermost first
    k_outer: list[_Loop]  # accumulating passes, outermost first
    products: int  # outer sizes times batch
    split: tuple[int, int, int]  # pieces of products, m, n
    split_k: int  # slices of k, each summed separately, then reduced in pairs
    workspace_bytes: int  # of one thread
    shared_bytes: int  # of all threads of a call: the sums of the slices of k

def registrations() -> dict[str, dict[Literal["instantiate", "execute"], CapsuleType]]:
    """FFI targets by name, for `jax.ffi.register_ffi_target(..., platform="cpu")`."""

def untyped_registrations() -> dict[str, CapsuleType]:
    """C functions for calls of API version 3, for `jax.ffi.register_ffi_target(..., platform="cpu", api_version=0)`."""

def untyped_call(
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    out_shape: Sequence[int],
    lhs_labels: Sequence[int],
    rhs_labels: Sequence[int],
    out_labels: Sequence[int],
    lhs_dtype: str,
    rhs_dtype: str,
    out_dtype: str,
    algorithm: str = "default",
    activation: str | None = None,
    scale: int = 0x3F800000,
    bias: bool = False,
    residual: bool = False,
) -> str | None:
    """The string that such a call must carry; None: on this machine it is to be a typed one.

    Args:
      activation: of the call of `linear`; None: the call is one of `dot_general`.
      scale: the bits of a float32.
    """

def targets(features: Sequence[str] | None = None) -> list[_Target]:
    """Every target, best first, as on this CPU or on one with the given features."""

def selected_target() -> str:
    """The target whose kernels run: the best usable one, or the one that JAX_NANO_TARGET names; "" if none is usable.

    Raises:
      ValueError: JAX_NANO_TARGET names no target, or one that cannot be used here.
    """

def supports(lhs: str, rhs: str, out: str, algorithm: str = "default") -> bool:
    """Whether there is a kernel for these dtypes, in either order of the operands.

    Raises:
      ValueError: as `selected_target`.
    """

def kernels() -> list[_Kernel]:
    """Every kernel in this build, runnable on this CPU or not."""

def attentions() -> list[_Attention]:
    """Every attention in this build, runnable on this CPU or not."""

def supports_attention(q: str, kv: str) -> bool:
    """Whether there is an attention for these dtypes.

    Raises:
      ValueError: as `selected_target`.
    """

def plan_attention(name: str, sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> _AttentionPlan:
    """What `attention` would do, for tests."""

def attention(
    name: str,
    addresses: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    bias: Sequence[int],
    mask: Sequence[int],
    scale: float,
    masked: float,
    left: int,
    right: int,
    threads: int,
    trips: int = 1,
) -> float:
    """Run one attention on arrays, on threads of its own, without XLA. Releases the GIL.

    Args:
      name: of `attentions`.
      addresses: of q, k, v, the result, bias (float32), mask (bytes), lengths of queries and of keys (int32),
        maxima and logarithms (float32, dense); 0 for what there is not.
      sizes: batch, queries, keys, heads, heads of keys and values, elements of a key, elements of a value.
      strides: of q, k, v and the result, between batches, positions, heads and elements.
      bias, mask: strides between batches, heads and queries; keys are side by side.
      scale: of the scores.
      masked: the score of keys that are excluded.
      left, right: query t sees keys t - left <= s <= t + right.
      threads: the caller's and others.
      trips: how often.

    Returns:
      The seconds that all trips took.

    Raises:
      ValueError: no attention has the name, or sizes do not fit.
    """

def plan_attention_gradients(
    name: str, sizes: Sequence[int], strides: Sequence[Sequence[int]], dbias: Sequence[int] | None
) -> _GradientPlan:
    """What `attention_gradients` would do, for tests."""

def attention_gradients(
    name: str,
    addresses: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    bias: Sequence[int],
    mask: Sequence[int],
    dbias: Sequence[int] | None,
    scale: float,
    masked: float,
    left: int,
    right: int,
    threads: int,
    trips: int = 1,
) -> float:
    """Compute the gradients of one attention as `attention` computes its results.

    Args:
      addresses: of q, k, v, the cotangents of the result, bias, mask, lengths of queries and of keys, maxima,
        logarithms and deltas (float32, dense), then dq, dk, dv and dbias (dense, in jax.nn's order); 0 for what there
        is not.
      strides: of q, k, v and the cotangents of the result.
      dbias: batches, heads and queries of the bias, 1 where it is broadcast; None: its gradient is not wanted.

    Returns:
      The seconds that all trips took.

    Raises:
      ValueError: no attention has the name, or sizes do not fit.
    """

class _QuantizedPlan(TypedDict):
    kernel: str
    gemm: str  # the kernel that multiplies with float32 weights; "" where they are read where they lie
    few: bool  # they are
    m_parts: int
    n_parts: int
    k_parts: int

def plan_quantized(
    sizes: tuple[int, int, int, int], along_k: bool, dtypes: tuple[str, str, str, str, str], threads: int
) -> _QuantizedPlan:
    """How a product with quantised weights would be computed.

    Args:
      sizes: m, n, k, and how many values of k share a scale.
      along_k: weights are [n, k], else [k, n].
      dtypes: of x, weights, scales, zero points ("": there are none), and the result.

    Raises:
      ValueError: sizes or dtypes are none that kernels take.
    """

def generator() -> str:
    """A digest of the sources that composed the kernels of this build."""

def features() -> list[str]:
    """The CPU features found, among those that some target needs."""

def caches() -> _Caches:
    """Data cache sizes of one core in bytes; L3 is the whole shared cache."""

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
    cpu: str | None = None,
    epilogue: bool = False,
    bias: bool = False,
    specialized: bool = True,
) -> _Plan:
    """How a product would be computed: by the selected targets, or by one that may not even run here.

    Args:
      target: plan for this target only.
      caches: L1d, L2, L3 in bytes instead of this machine's.
      cpu: plan by the costs of this profile, "" as for a CPU that was never measured.
      epilogue: the call does something with finished sums.
      bias: it adds a bias.
      specialized: with the kernels for given products that this process uses; never with `caches` or `cpu`.

    Raises:
      ValueError: labels, sizes or dtypes do not fit together, or no kernel takes them.
    """

def considered(
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    lhs_labels: Sequence[int],
    rhs_labels: Sequence[int],
    out_labels: Sequence[int],
    lhs_dtype: str,
    rhs_dtype: str,
    out_dtype: str,
    algorithm: str = "default",
    target: str | None = None,
    cpu: str | None = None,
) -> list[_Scored]:
    """The schedules that the planner compares for a product, with their predicted times on one thread, fastest first.

    Empty if costs of the kernel on this CPU are not known: then thresholds decide.

    Raises:
      ValueError: as `plan`.
    """

def limit_threads(most: int | None) -> None:
    """How many threads of XLA's pool work for a call from now on; None: all.

    Raises:
      ValueError: it is below 1.
    """

def thread_limit() -> int | None:
    """What `limit_threads` set."""

def log_calls(on: bool) -> None:
    """Whether each call writes a line with its time to the standard error stream when it ends."""

def cpu_signature() -> str:
    """Vendor, family, model and stepping of this CPU, such as "AuthenticAMD-25-1-1"."""

def profiles() -> list[str]:
    """Names of the CPU families whose costs are built in."""

def profile_is_measured(name: str) -> bool:
    """Whether a profile's costs were measured; if not, they are another CPU's, multiplied by what is published."""

def profile() -> str:
    """That of the CPU that runs this process, or ""."""
