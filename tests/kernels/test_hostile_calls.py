"""Calls with attributes, operands and results that nobody would write: an error, or a result, but never a crash.

Programs come from files too (exported ones, compilation caches), and whoever edits one must not make XLA read or write
memory that is not its own. JAX_NANO_HOSTILE_CALLS says how many are tried of each kind (`make soak`).
"""

from __future__ import annotations

import os
import random
from typing import Any

import jax
import numpy as np
import pytest
from hostile_calls import CALLS, DTYPES, F32, I64, NUMBERS, TEXTS, Call, changed_array, changed_numbers

from jax_nano import _runtime

if not _runtime.supports("float32", "float32", "float32"):
    pytest.skip("no float32 kernel runs on this CPU", allow_module_level=True)

TRIES = int(os.environ.get("JAX_NANO_HOSTILE_CALLS", "120"))
BEGIN = int(os.environ.get("JAX_NANO_HOSTILE_SEED", "0"))

for _name, _stages in _runtime.registrations().items():
    jax.ffi.register_ffi_target(_name, _stages, platform="cpu")


def run(call: Call) -> Any:
    """The call's results, with operands of ones."""
    attributes = {"abi": I64(_runtime.ABI_VERSION), **call.attributes}
    outs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in call.results]

    def program(*operands: jax.Array) -> Any:
        return jax.ffi.ffi_call(call.target, outs)(*operands, **attributes)

    operands = [np.ones(shape, dtype) for shape, dtype in call.operands]
    options = {"xla_backend_optimization_level": 0}
    return jax.block_until_ready(jax.jit(program, compiler_options=options)(*operands))


def changed_value(value: Any, rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return rng.choice([I64(1), np.int32(1), F32(1), "text", np.array([1, 2], I64)])  # of another type
    if isinstance(value, str):
        return rng.choice(TEXTS)
    if isinstance(value, np.ndarray):
        return np.array(changed_numbers(value, rng), I64)
    if isinstance(value, I64):
        return I64(rng.choice(NUMBERS))
    return type(value)(rng.choice([0.0, -1.0, np.nan, np.inf, -np.inf, 1e30, 1e-30]))


def changed(call: Call, rng: random.Random) -> Call:
    """The call with one to three changes."""
    operands, results, attributes = list(call.operands), list(call.results), dict(call.attributes)
    for _ in range(rng.randint(1, 3)):
        match rng.randrange(8):
            case 0 | 1 | 2:
                name = rng.choice(list(attributes))
                attributes[name] = changed_value(attributes[name], rng)
            case 3 | 4 if operands:
                i = rng.randrange(len(operands))
                operands[i] = changed_array(operands[i], DTYPES, rng)
            case 5 if results:
                i = rng.randrange(len(results))
                results[i] = changed_array(results[i], DTYPES, rng)
            case 6 if operands:
                if rng.random() < 0.5:
                    del operands[rng.randrange(len(operands))]
                else:
                    operands.insert(rng.randint(0, len(operands)), rng.choice(operands))
            case _:
                if rng.random() < 0.3:
                    attributes.pop(rng.choice(list(attributes)))
                else:
                    rng.shuffle(operands)
    return Call(call.target, tuple(operands), tuple(results), attributes)


@pytest.mark.parametrize("kind", CALLS)
def test_hostile_calls(kind: str) -> None:
    call = CALLS[kind]
    right = run(call)
    refused, unclear = 0, list[Any]()
    for seed in range(BEGIN, BEGIN + TRIES):
        hostile = changed(call, random.Random(f"{kind} {seed}"))
        try:
            run(hostile)
        except jax.errors.JaxRuntimeError as error:  # which names us, or XLA's own check of attributes
            refused += 1
            if not any(code in str(error) for code in ("INVALID_ARGUMENT", "UNIMPLEMENTED")):
                unclear.append((seed, hostile, error))
        except (ValueError, TypeError, OverflowError, NotImplementedError):  # of JAX, when it is traced
            refused += 1
    assert unclear == []
    assert refused > TRIES / 2
    for got, want in zip(run(call), right, strict=True):  # and the process computes as before
        assert np.array_equal(np.asarray(got), np.asarray(want), equal_nan=True)
