"""What XLA makes of a product's surroundings faster than a call beside them would be.

Whether a kernel computes a product by itself is decided by predicted times (decision.py, xla_times.py). These rules are
about what a call does not see: what reads its result, the loop around it, the softmax between two of them. They look
only at static sizes, so that a program always makes the same choice.
"""

from __future__ import annotations

from typing import Final

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
