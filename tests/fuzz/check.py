"""One program, run plainly and accelerated, and judged by float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jax_nano
from jax_nano._core import record
from jax_nano._dispatch import decision
from jax_nano._programs import accelerate

from . import arbiter
from .program import DEVICES, Program

MARGIN: Final = 2.0
"""Of the largest deviation that noise made of an element."""
CHAOS: Final = 0.25
"""Elements that may be off by this part of the largest are not judged: a few draws do not say how far they may go.

A program chained thirty products of float16 through steep functions. Computed exactly but for one rounding after every
operation, 192 of its 2048 elements are off by more than the bound that the draws give, by up to 1.27 of at most 1.
"""
FLOOR: Final = 0.6
"""An element may be as lucky as to be moved by none of the draws: this part of what the worst one is moved by."""


@dataclass
class Outcome:
    """What became of a program."""

    failure: str = ""
    """What is wrong with the accelerated program; nothing if it is right."""
    sort: str = ""
    """By which a smaller program is known to fail in the same way."""
    skipped: str = ""
    """Why it says nothing, if it does not."""
    plain_wrong: str = ""
    """What is wrong with XLA's own result."""
    calls: int = 0
    attentions: int = 0
    declined: int = 0
    epilogues: int = 0
    unjudged: float = 0.0
    """The share of elements which rounding may make anything."""
    times: dict[str, float] = field(default_factory=dict)


@contextmanager
def gate(on: bool) -> Iterator[None]:
    """The decline gate set, as it is when choices are made."""
    before, decision.policy = decision.policy, decision.Policy(declines=on)
    try:
        yield
    finally:
        decision.policy = before


def check(program: Program, *, plain: bool | None = None) -> Outcome:
    """Runs a program accelerated and, with `plain`, without; in the gate's present setting.

    By default every fourth program runs plainly too, and those that float64 does not agree with: compiling takes nearly
    all of the time.
    """
    with jax.enable_x64(program.x64):
        return _accelerated(program, plain=program.seed % 4 == 0 if plain is None else plain)


def _accelerated(program: Program, *, plain: bool) -> Outcome:
    outcome = Outcome()
    record.clear()
    failures: list[str] = getattr(accelerate._hook, "failures", [])
    failures.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with jax_nano.accelerate():
                got = _run(program)
        except Exception as error:
            outcome.failure, outcome.sort = f"{type(error).__name__}: {error}"[:2000], "error"
            try:
                _run(program)
            except Exception as other:
                outcome.failure = outcome.sort = ""
                outcome.skipped = f"{type(other).__name__}: {other}"
            return outcome
    outcome.attentions = sum(count for x, count in record.attentions() if x.declined is None)
    outcome.calls = outcome.attentions
    for product, count in record.products():
        outcome.calls += count * (product.declined is None)
        outcome.declined += count * (product.declined is not None)
        outcome.epilogues += count * bool(product.epilogue)
    said = [*failures, *(str(x.message) for x in caught if "jax_nano" in str(x.message))]
    failures.clear()
    if said:
        outcome.failure, outcome.sort = said[0][:2000], f"warning: {said[0][:90]}"
        return outcome
    judgements = _judge(program)
    unjudged = sum(int(np.isinf(x.spread).sum()) for x in judgements)
    outcome.unjudged = unjudged / max(sum(x.spread.size for x in judgements), 1)
    if not plain and not any(_wrong(np.asarray(x), None, y) for x, y in zip(got, judgements, strict=True)):
        return outcome
    for i, (x, y, judgement) in enumerate(zip(_run(program), got, judgements, strict=True)):
        name = program.results[i].name
        if (x.shape, x.dtype, x.weak_type) != (y.shape, y.dtype, y.weak_type):
            outcome.failure, outcome.sort = f"{name}: {y.dtype}{y.shape} instead of {x.dtype}{x.shape}", "type"
        elif not y.sharding.is_equivalent_to(x.sharding, x.ndim):
            outcome.failure, outcome.sort = f"{name}: {y.sharding} instead of {x.sharding}", "sharding"
        elif text := _wrong(np.asarray(y), np.asarray(x), judgement):
            outcome.failure, outcome.sort = f"{name}: {text}", "values"
        if outcome.failure:
            return outcome
        if text := _wrong(np.asarray(x), None, judgement):
            outcome.plain_wrong = f"{name}: {text}"
    return outcome


def _run(program: Program) -> Sequence[jax.Array]:
    fun = program.function()
    # LLVM's optimisations take most of the time, and change nothing of which operation writes where.
    options = {"xla_backend_optimization_level": 0}
    if program.mode == "pmap":
        run = jax.pmap(fun, **program.options)
    else:
        run = jax.jit(fun, compiler_options=options, **program.options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        results = run(*program.values())
    return jax.block_until_ready(results)


def _judge(program: Program) -> list[arbiter.Judgement]:
    """By a program without devices: what each of them does is one element of a batch."""
    fun: Callable[..., Any] = program.function(sharded=_batched)
    if program.mode == "pmap":
        fun = jax.vmap(fun, program.options["in_axes"], axis_name="d")
    plain = program if program.mode != "sharded" else _on_one_device(program)
    return arbiter.evaluate(fun, plain.values(), program.seed)


def _on_one_device(program: Program) -> Program:
    from dataclasses import replace

    return replace(program, mode="jit")


def _batched(fun: Callable[..., Any], specs: Sequence[Any], out: Any) -> Callable[..., Any]:
    """What shard_map over the first dimension computes."""

    def run(*args: Any) -> Any:
        parts = [x.reshape(DEVICES, -1, *x.shape[1:]) if tuple(s) else x for x, s in zip(args, specs, strict=True)]
        axes = tuple(0 if tuple(s) else None for s in specs)
        result = jax.vmap(fun, axes, axis_name="d")(*parts)
        return result.reshape(-1, *result.shape[2:]) if tuple(out) else result[0]

    return run


def _wrong(got: np.ndarray, plain: np.ndarray | None, judgement: arbiter.Judgement) -> str:
    """What is wrong with an array, if anything, in elements that XLA itself gets right.

    Without `plain`, in any. XLA has faults of its own, and may overflow on the way to what is finite.
    """
    allowed = _allowed(got.dtype, judgement)
    wrong = _wrong_elements(got, judgement, allowed)
    if plain is not None and wrong.any():
        wrong &= ~_wrong_elements(plain, judgement, allowed)
        with np.errstate(invalid="ignore"):
            # The plain one may be off by as much as the bound.
            wrong &= ~(np.abs(got.astype(np.float64) - plain.astype(np.float64)) <= 0.5 * allowed)
    if not wrong.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    text = f"{int(wrong.sum())} of {wrong.size} elements of {got.dtype}{list(got.shape)} are wrong"
    text += f"; {list(at)} is {got[at]}, exactly {judgement.value[at]} +- {allowed[at]:.3g}"
    return text + (f", {plain[at]} without acceleration" if plain is not None else "")


def _allowed(dtype: np.dtype, judgement: arbiter.Judgement) -> np.ndarray:
    """How far off each element may be."""
    value, spread = judgement
    if not jnp.issubdtype(dtype, jnp.floating):
        return MARGIN * spread
    info = ml_dtypes.finfo(dtype)
    largest = spread[np.isfinite(spread)].max(initial=0)
    allowed = MARGIN * spread + FLOOR * largest + float(info.eps) * np.abs(value) + float(info.tiny)
    size = np.abs(value[np.isfinite(value)]).max(initial=0)
    if size > 0:  # products chained through steep functions are chaotic
        allowed = np.where(allowed > CHAOS * size, np.inf, allowed)
    return np.where(np.isnan(allowed), np.inf, allowed)


def _wrong_elements(got: np.ndarray, judgement: arbiter.Judgement, allowed: np.ndarray) -> np.ndarray:
    """Which elements are too far from the exact ones."""
    value, spread = (x.astype(np.float64) for x in judgement)
    wide = got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        right = (np.abs(wide - value) <= allowed) | (wide == value) | (np.isnan(wide) & np.isnan(value))
        right |= np.isinf(spread)
        if jnp.issubdtype(got.dtype, jnp.floating):
            most = float(ml_dtypes.finfo(got.dtype).max) * (1 - float(ml_dtypes.finfo(got.dtype).eps))
            right |= np.isinf(wide) & (np.abs(value) + allowed >= most) & (np.sign(wide) == np.sign(value))
    return ~right
