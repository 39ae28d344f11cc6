"""The decline gate: products that XLA computes at least as fast stay with XLA, which can also fuse them.

A call costs about 0.15 us through the typed FFI, less than half of that without, and one product of a batch about 25
ns; XLA emits tiny products inline, and fuses outer products into the operations that read them. The gate looks only at
static shapes, dtypes, the width of vectors and the version of XLA, so that a program always makes the same choice; a
symbolic size counts as large. `JAX_NANO_GATE=off` in the environment (read at import) sends every product to a kernel.
docs/planner.md has all rules in a table.

The constants were measured on one AMD EPYC (Zen 4) core unless they say otherwise, products in a fori_loop, November
2026: `python -m benchmarks gate` repeats it, and says what is still on the wrong side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from jax_nano._core.contraction import Labels
from jax_nano._core.cost import element_bytes

# Multiply-adds of one product. One after the other, XLA computes up to 3x3x3 as fast as a call does (0.8 to 1.0 of its
# time, bytes up to 5x5x5), and takes 2.1 to 4.4 times as long from 4x4x4 on; in a batch up to 3x3x3 (0.2 to 0.6), and 4
# to 30 times as long at 4x4x4 (Zen 3, one core, JAX 0.10.2 and 0.12, experiment 0088).
MIN_SINGLE: Final = 4**3
MIN_SINGLE_OF_BYTES: Final = 6**3
MIN_BATCHED: Final = 4**3
# In a loop that XLA compiles into one function it computes larger ones faster than a call: up to 6x6x6 (0.3 to 0.5 of
# its time; 7x7x7 takes 3.0 to 4.8 times as long), float64 up to 4x4x4 (0.25; 5x5x5 4.1).
MIN_IN_FUNCTION: Final = 7**3
MIN_IN_FUNCTION_FLOAT64: Final = 5**3

# XLA writes large results of sums this short at the speed of memory (512x512 of K = 2: 14 us against 41,
# 4: 30 against 50, 16: 55 against 76, 32: 119 against 126).
SHALLOW_K: Final = 16
SHALLOW_MIN_RESULT: Final = 2**16
# Not where the result's rows are short (4096x16 of K = 16: 56 us against 30, 16384x8 of K = 4: 94 against 55; but
# 32768x4 of K = 16: 129 against 201).
SHALLOW_SHORT_ROWS: Final = range(6, 33)

# Products with a vector, by the bytes of the matrix. XLA reads what lies in L3 as fast as we do, and small ones need no
# call (1x64x64: 0.23 us against 0.41). Ours are faster from memory (1x4096x4096 float32: 3.4 ms against 2.1, along K
# 41 against 2.8; float64 the same), and along K within L2 (512x512: 19 us against 13; float64 256x256: 12.8 against
# 7.5). Across K there is nothing to gain (1x1024x1024: 62 us against 59; float64: 155 against 157), in loops something
# to lose (four of 4 MB: 0.83 times XLA's speed on one core, 0.72 on two; AMD Zen 3, JAX 0.10.2). Of long sums in L3,
# two cores take 1.2 to 2.8 times less, one 0.94 to 1.5 times (64x8192: 32 us against 33, two cores 36 and 19).
VECTOR_FROM_MEMORY: Final = 16 << 20
VECTOR_ALONG_K: Final = (256 << 10, 1 << 20)
# AVX2 kernels are faster only for larger ones (Zen 3, float32: 500x200 13.4 us against 16.4, 512x256 20.6 against 23.7,
# 512x512 40.3 against 33.8).
VECTOR_ALONG_K_AVX2_FLOAT32: Final = 1 << 20
VECTOR_LONG_K: Final = 4096
# XLA converts elements of 8 and 16 bits first. Multiply-adds: along K from 256x256 on (bfloat16: 2.9 us against 1.9;
# 64x64: 0.24 against 0.42), across K from 128x128 (0.84 against 0.66), of bytes and float16 from 16x16 on (0.60 us
# against 0.25, 0.94 against 0.44; 64x64 of float16: 2.0 against 0.48).
VECTOR_NARROW_ALONG_K: Final = 2**16
VECTOR_NARROW_ACROSS_K: Final = 2**14
VECTOR_OTHERS_ACROSS_K: Final = 2**8
# XLA computes a batch one by one in a loop that it neither vectorizes nor splits well: decoding's attention, 32
# times 1x128x1024, 3.1 ms against 14.3, 12 times 1x64x128 23 us against 60, twice 1x16x16 1.5 against 2.5 (float32, one
# core; on two 1.6 to 5.9 times, bfloat16 1.1 to 16 times). Smaller ones have not been measured.
VECTOR_BATCHED: Final = 2**8
# A library computes a large result in parts, each of which is still in a cache when the next operation reads it. The
# result of a call goes through memory, so the call must save more than that costs. Speed with a call relative to XLA's
# fusion, one core (Zen 3, November 2026), softmax and a sum of squares on JAX 0.10.2, the same on 0.12: 2048x1024 of K
# = 64 0.73, 0.74, 0.74, 0.68, 2048x512 0.72, 0.93, 0.81, 0.91, 2048x1024 of K = 256 1.11, 1.32, 1.09, 1.17, of K = 512
# 1.20, 1.89, 1.41, 1.43; twelve times 128x128 of K = 64, as a part of attention, 1.07 and 1.00.
FUSED_LARGE_RESULT: Final = 1 << 20
FUSED_SHORT_SUMS: Final = 128

# Loops with vectors times matrices: bytes, as float32, of all arrays that a loop would carry in 16 bits. If they fit
# into a core's share of the caches, XLA is as fast with float32 (4 MB: 1.03 times the time of plain XLA, 16 MB: 0.45,
# 36 MB: 0.62; batches of 4 gain from 1 MB on, to 0.82 at 4 MB and 0.3 at 16 MB; one core, AMD Zen 3, AVX2, JAX 0.10.2,
# November 2026).
LOOP_VECTORS_FROM: Final = 8 << 20

# Multiply-adds in calls that pay for one task of a loop that XLA had compiled into one function: a task costs 0.2 us
# (12 of them, with four products of 1x64x256: 7.4 us against 5.3; the same machine, JAX 0.12).
LOOP_WORK_OF_A_TASK: Final = 2**16


# Attention in one pass, by the scores of all heads: from 768 on one call is 1.06 to 2.6 times as fast, with 256 it is
# 0.90 to 1.9 times as fast (two cores, Zen 3, both JAX versions; docs/experiments/0083).
ATTENTION_SCORES: Final = 2**9


def keeps_attention(scores: int) -> bool:
    """Whether XLA's two products and softmax are as fast as one call, for so many scores."""
    return scores < ATTENTION_SCORES


# The fewest quantised weights of a call, by the number of rows up to which that holds. XLA makes floats of weights
# in a loop of its own, which counts for few rows and not beside the products of many. With float32 x it
# then multiplies as fast as a kernel; 16-bit x it widens as well (two cores, Zen 3, both JAX versions;
# docs/experiments/0091).
QUANTIZED_WEIGHTS: Final = ((4, 2**6), (16, 2**8))
QUANTIZED_WEIGHTS_OF_MANY_ROWS: Final = {"float32": 2**14, "bfloat16": 2**12, "float16": 2**12}


def keeps_quantized(rows: int, weights: int, x: str) -> str | None:
    """Why a product of rows with so many quantised weights is better made of floats first, or None.

    Args:
      rows, weights: how many there are.
      x: the rows' dtype.
    """
    fewest = next((n for most, n in QUANTIZED_WEIGHTS if rows <= most), QUANTIZED_WEIGHTS_OF_MANY_ROWS[x])
    return f"{weights} weights of at least {fewest}" if weights < fewest else None


def is_faster(
    labels: Labels,
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    *,
    dtypes: tuple[str, str] = ("float32", "float32"),
    vector_bits: int = 512,
    in_function: bool = False,
) -> str | None:
    """Why XLA computes a product at least as fast as a kernel does, or None.

    Args:
      labels, lhs_shape, rhs_shape: the product.
      dtypes: of each operand's elements.
      vector_bits: of the kernels' vector registers.
      in_function: XLA may compile the product and a loop around it into one function.
    """
    sizes = labels.sizes(lhs_shape, rhs_shape)
    m, n, k, batch = (
        _count(sizes[x] for x in dims) for dims in (labels.lhs_free, labels.rhs_free, labels.contracting, labels.batch)
    )
    if 0 in (m, n, k, batch):
        return "empty"
    if k == 1:
        return "an outer product"
    work = m * n * k
    widths = [element_bytes(x) for x in dtypes]
    if 1 in (m, n):
        matrix, dtype = (labels.rhs, dtypes[1]) if m == 1 else (labels.lhs, dtypes[0])
        if m == n:
            dtype = max(dtypes, key=element_bytes)
        stored = [x for x in matrix if _count([sizes[x]]) != 1]
        along_k = stored[-1] in labels.contracting
        avx2 = vector_bits == 256
        serves = _vector_serves(work, k, dtype, along_k=along_k, alone=m == n, batched=batch > 1, avx2=avx2)
        return None if serves else "a product with a vector: XLA's loops are as fast"
    shallow = k <= SHALLOW_K and SHALLOW_MIN_RESULT <= m * n < math.inf and n not in SHALLOW_SHORT_ROWS
    if batch == 1 and shallow and min(widths) >= 4:
        return f"sums of {k} terms: XLA writes the result as fast"
    least = MIN_BATCHED if batch > 1 else _least_single(max(widths), in_function=in_function)
    return f"too small: {work} multiply-adds of at least {least}" if work < least else None


def _least_single(width: int, *, in_function: bool) -> int:
    """Multiply-adds from which on a call computes a product of elements of so many bytes faster."""
    if width == 1:
        return MIN_SINGLE_OF_BYTES
    if in_function:
        return MIN_IN_FUNCTION_FLOAT64 if width == 8 else MIN_IN_FUNCTION
    return MIN_SINGLE


def _vector_serves(
    elements: float, k: float, dtype: str, *, along_k: bool, alone: bool, batched: bool, avx2: bool
) -> bool:
    """Whether a kernel is faster for a vector and a matrix of so many elements of this dtype.

    Args:
      k: terms of each sum.
      along_k: the matrix is contiguous along the dimension that is summed over.
      alone: it is a vector itself.
      batched: there are several of them.
      avx2: kernels have vectors of 32 bytes.
    """
    if batched and not alone and elements >= VECTOR_BATCHED:
        return True
    width = element_bytes(dtype)
    if width <= 2:
        across = VECTOR_NARROW_ACROSS_K if dtype == "bfloat16" else VECTOR_OTHERS_ACROSS_K
        return elements >= (VECTOR_NARROW_ALONG_K if along_k else across)
    size = elements * width
    if alone or size >= VECTOR_FROM_MEMORY:
        return elements == math.inf or not alone
    least, most = VECTOR_ALONG_K
    if avx2 and dtype == "float32":
        least = VECTOR_ALONG_K_AVX2_FLOAT32
    return along_k and least <= size and (size <= most or k >= VECTOR_LONG_K)


def _count(sizes: Iterable[Any]) -> float:
    """The product of sizes; infinite if one is symbolic."""
    count: float = 1
    for size in sizes:
        count *= size if isinstance(size, int) else math.inf
    return count


def keeps_fused(result_bytes: int, terms: int) -> str | None:
    """Why a product is left in a library's fusion with what follows it, or None.

    Args:
      result_bytes: the size of the product's result.
      terms: how many products each of its elements is the sum of.
    """
    if result_bytes < FUSED_LARGE_RESULT or terms >= FUSED_SHORT_SUMS:
        return None
    return f"sums of {terms} terms: what follows reads the {result_bytes >> 20} MiB in a cache where XLA computes both"


def reads_wide_as_fast(wide_bytes: int) -> bool:
    """Whether a loop of products with vectors is as fast with matrices that were widened in front of it.

    `wide_bytes` is the size of all such matrices as float32.
    """
    return wide_bytes < LOOP_VECTORS_FROM


def keeps_loop_whole(work: int, tasks: int) -> bool:
    """Whether a loop is better left compiled into one function, in which no call can stand.

    Args:
      work: multiply-adds of the products that kernels would compute faster. A float32 vector and a matrix are none:
        they take one core in XLA's function 0.73 to 0.91 of the time of a call.
      tasks: operations that would each become a task of the runtime.
    """
    return work < LOOP_WORK_OF_A_TASK * tasks
