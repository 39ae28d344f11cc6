"""What judges random programs lets rounding pass and nothing else; what shrinks them keeps what fails."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from fuzz import arbiter, check, generator, program, shrink
from fuzz.program import Argument, Program, Statement, Value


def chain(dtype: str) -> Program:
    """tanh(a @ b), an update of it, and a product with that."""
    a, b, h, d, y = (Value(name, (24, 24), dtype) for name in "abhdy")
    r, i = Value("r", (24,), dtype), Value("i", (), "int32")
    statements = (
        Statement((h,), "jnp.tanh({0} @ {1} * 0.2)", (a, b)),
        Statement((d,), "{0}.at[{1}].set({2})", (h, i, r)),
        Statement((y,), "{0} @ {1}", (d, b)),
    )
    arguments = (Argument(a, 0), Argument(b, 1), Argument(r, 2), Argument(i, 3, "index", 24))
    return Program(0, "chain", arguments, statements, (y, h))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_wrong_element_is_found(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = check._run
    assert not check.check(chain(dtype), plain=True).failure
    runs = 0

    def corrupted(ran: Program) -> Sequence[jax.Array]:
        nonlocal runs
        runs += 1
        y, h = run(ran)
        return [y.at[3, 5].add(1), h] if runs == 1 else [y, h]  # the accelerated run is the first

    monkeypatch.setattr(check, "_run", corrupted)
    outcome = check.check(chain(dtype))
    assert runs == 2
    assert outcome.sort == "values"
    assert "1 of 576" in outcome.failure
    assert "[3, 5]" in outcome.failure


def test_what_xla_computes_wrongly_too_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    run = check._run
    monkeypatch.setattr(check, "_run", lambda ran: [x.at[3, 5].add(1) for x in run(ran)])
    outcome = check.check(chain("float32"))
    assert not outcome.failure
    assert "1 of 576" in outcome.plain_wrong


def test_a_failure_of_the_compiler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_nano._programs import rewrite

    def fails(*_: Any) -> None:
        raise RuntimeError("by the test")

    monkeypatch.setattr(rewrite, "rewrite", fails)
    assert "by the test" in check.check(chain("float32")).failure


def test_exact_values_and_the_size_of_rounding() -> None:
    rng = np.random.default_rng(0)
    a, b = reference.random(rng, (24, 32)), reference.random(rng, (32, 16))
    (found,) = arbiter.evaluate(lambda a, b: [a @ b], [a, b], 0)
    want = reference.expected("mk,kn->mn", a, b)
    np.testing.assert_allclose(found.value, want.value, rtol=1e-12)
    assert 0.3 * want.bound.max() < found.spread.max() < 1.2 * want.bound.max()


def test_either_side_of_a_comparison_of_what_is_nearly_equal() -> None:
    x = np.float32([1, 2, 3])
    (found,) = arbiter.evaluate(lambda x: [jnp.where(jnp.exp(jnp.log(x)) > x, 7.0, x)], [x], 0)
    assert (found.spread >= 4 - 1e-4).all()
    (found,) = arbiter.evaluate(lambda x: [jnp.where(jnp.exp(jnp.log(x)) > x + 1, 7.0, x)], [x], 0)
    assert not found.spread.any()


def test_a_seed_is_a_program() -> None:
    found = [generator.generate(seed) for seed in range(300)]
    assert found == [generator.generate(seed) for seed in range(300)]
    assert {x.kind for x in found} == set(generator.KINDS)
    for x in found:
        compile(x.script(gate=False), "script", "exec")


# fmt: off
WANTED = (
    "@", ".at[", "lax.scan", "jax.grad(", "lax.cond(", "lax.while_loop(", "jax.vmap(", "jax.checkpoint(", "einsum",
    "dot_general", "dynamic_update_slice", "softmax", "int8", "float64", "donate", "pmap", "sharded(", "custom(",
    "bfloat16", "float16", "transpose", "reshape", "concatenate", "fori_loop", "lax.switch", "* inf", "pad(",
)
# fmt: on


def test_programs_hold_what_they_should() -> None:
    texts = [x.definition + str(x.options) + x.mode + str(x.arguments) for x in map(generator.generate, range(800))]
    seldom = {what for what in WANTED if sum(what in text for text in texts) < 5}
    assert not seldom


def test_shrunk_to_what_fails() -> None:
    def fails(x: program.Program) -> bool:
        """It has a tanh of an array, not inside a function of several arguments."""
        return re.search(r"^    \w+ = jnp\.tanh\(", x.definition, re.MULTILINE) is not None

    big = next(x for x in map(generator.generate, range(2000)) if len(x.statements) > 8 and fails(x))
    small = shrink.shrink(big, fails, tries=500)
    assert fails(small)
    assert len(small.statements) == 1
    assert len(small.results) == 1
    assert len(small.arguments) == 1
