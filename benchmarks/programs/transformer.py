"""The programs of examples/transformer.py: training, decoding, and decoding inside a scan."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from zoo import gpt

from benchmarks.programs import Run, steps


def training(*, count: int, **sizes: int) -> Run:
    """Steps of AdamW on one text; gives the losses."""
    return steps(gpt.training(batch=1, **sizes), count)


def decoding(*, count: int, tokens: int, **sizes: Any) -> Run:
    """One token after the other, each in a call of its own; gives the scores."""
    return steps(gpt.decoding(tokens=tokens, filled=tokens // 2, **sizes), count)


def decoding_in_scan(*, count: int, tokens: int, **sizes: Any) -> Run:
    """Several tokens in one call; gives the scores."""
    workload = gpt.decoding(tokens=tokens, filled=tokens // 2, **sizes)

    @jax.jit
    def decode(state: Any, weights: Any) -> Any:
        return lax.scan(lambda state, _: workload.step(state, weights), state, length=count)

    return lambda: decode(workload.state, workload.inputs)[1]
