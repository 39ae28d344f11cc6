"""Calls of each target with all of their operands, and values that nobody would write in them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jax_nano._core import spec

Array = tuple[tuple[int, ...], Any]
"""Shape and dtype."""


class Call(NamedTuple):
    """A custom call."""

    target: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    attributes: dict[str, Any]


F32, I64 = np.float32, np.int64
LABELS = {
    "lhs_labels": np.array([0, 1], I64),
    "rhs_labels": np.array([1, 2], I64),
    "out_labels": np.array([0, 2], I64),
    "algorithm": "default",
}
ATTENTION = {
    **{f"{x}_dims": np.arange(4, dtype=I64) for x in ("q", "k", "v", "out")},
    "scale": np.float64(0.25),
    "masked": np.float64(-1e30),
    "left": I64(1 << 30),
    "right": I64(0),
    **dict.fromkeys(("bias", "mask", "q_lengths", "kv_lengths"), I64(1)),
}
Q, K, ROWS = ((2, 9, 4, 16), F32), ((2, 11, 2, 16), F32), ((2, 9, 4), F32)
MORE = (((2, 4, 9, 11), F32), ((2, 1, 1, 11), np.bool_), ((2,), np.int32), ((2,), np.int32))

CALLS = {
    "dot_general": Call(spec.DOT_GENERAL_CALL, (((9, 33), F32), ((33, 21), F32)), (((9, 21), F32),), LABELS),
    "linear": Call(
        spec.LINEAR_CALL,
        (((9, 33), F32), ((33, 21), F32), ((21,), F32), ((9, 21), F32)),
        (((9, 21), F32),),
        {**LABELS, "activation": "gelu_erf", "scale": F32(0.5), "bias": I64(1), "residual": I64(1)},
    ),
    "attention": Call(spec.ATTENTION_CALL, (Q, K, K, *MORE), (Q, ROWS, ROWS), {**ATTENTION, "residual": I64(1)}),
    "gradients": Call(
        spec.ATTENTION_GRADIENTS_CALL,
        (Q, K, K, Q, ROWS, ROWS, ROWS, *MORE),
        (Q, K, K, MORE[0]),
        {**ATTENTION, "dbias": I64(1)},
    ),
    "quantised": Call(
        spec.QUANTIZED_CALL,
        (
            ((3, 64), F32),
            ((64, 40), ml_dtypes.int4),
            ((4, 40), F32),
            ((4, 40), np.int8),
            ((40,), F32),
            ((3, 40), F32),
        ),
        (((3, 40), F32),),
        {
            **dict.fromkeys(("zero", "bias", "residual"), I64(1)),
            **dict.fromkeys(("along_k", "layers"), I64(0)),
            "activation": "relu",
            "factor": F32(2),
        },
    ),
}

NUMBERS = (-(1 << 63), -(1 << 31), -7, -1, 0, 1, 2, 3, 4, 7, 1 << 20, (1 << 31) - 1, (1 << 63) - 1)
SIZES = (0, 1, 2, 3, 4, 9, 11, 16, 21, 33, 40, 64)
DTYPES = (F32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, ml_dtypes.int4, np.int32, np.bool_)
TEXTS = ("", "none", "relu", "magic", "BF16_BF16_F32", "a" * 5000, "\u20ac")


def changed_array(array: Array, dtypes: Sequence[Any], rng: random.Random) -> Array:
    """Another shape, or another one of these dtypes."""
    shape, dtype = list(array[0]), array[1]
    match rng.randrange(5):
        case 0:
            dtype = rng.choice(dtypes)
        case 1 if shape:
            shape[rng.randrange(len(shape))] = rng.choice(SIZES)
        case 2 if shape:
            del shape[rng.randrange(len(shape))]
        case 3:
            shape.insert(rng.randint(0, len(shape)), rng.choice(SIZES[:5]))
        case _:
            rng.shuffle(shape)
    return tuple(shape), dtype


def changed_numbers(numbers: Sequence[int], rng: random.Random) -> list[int]:
    """One of them another, one more, one less, or another order."""
    changed = list(numbers)
    match rng.randrange(4):
        case 0 if changed:
            changed[rng.randrange(len(changed))] = rng.choice(NUMBERS)
        case 1:
            del changed[-1:]
        case 2:
            changed.append(rng.choice(NUMBERS[3:9]))
        case _:
            rng.shuffle(changed)
    return changed
