"""What may go wrong around accelerated programs, and must not change what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from programs import ops, run_python

import jax_nano


def arrays(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(reference.random(rng, shape)) for shape in shapes]


WITH_OTHER_CALLS: dict[str, Callable[[Any], Any]] = {
    "callback": lambda a: jax.pure_callback(lambda v: np.asarray(v) + 1, a, a @ a) @ a,
    "print": lambda a: (jax.debug.callback(lambda v: None, a @ a), a @ a @ a)[1],
    "decomposition": lambda a: jnp.linalg.qr(a @ a.T)[1] @ a,
    "solve": lambda a: jnp.linalg.solve(a @ a.T + 16 * jnp.eye(16), a) @ a,
    "sort": lambda a: jnp.sort(a @ a) @ a,
    "random numbers": lambda a: a @ jax.random.normal(jax.random.key(0), (16, 16)),
    "convolution": lambda a: jnp.convolve((a @ a)[0], a[1]) + (a @ a).sum(),
    "loop with a branch": lambda a: jax.lax.fori_loop(
        0, 5, lambda i, c: jax.lax.cond(i % 2 == 0, lambda c: jnp.tanh(c @ a), lambda c: jnp.sin(a.T @ c), c), a
    ),
    "loop in a loop": lambda a: jax.lax.scan(
        lambda c, _: (jax.lax.fori_loop(0, 2, lambda _, d: jnp.tanh(d @ a), c), c.sum()), a, None, length=3
    ),
    "while over its own product": lambda a: jax.lax.while_loop(
        lambda c: jnp.abs(c[0]).max() > 1e-2, lambda c: ((c[0] @ c[1]) * 0.1, jnp.tanh(c[1])), (a, a)
    )[1],
}


@pytest.mark.parametrize("name", WITH_OTHER_CALLS)
def test_products_beside_other_calls(name: str, rng: np.random.Generator) -> None:
    (a,) = arrays(rng, (16, 16))
    fun = WITH_OTHER_CALLS[name]
    want = jax.jit(fun)(a)
    with jax_nano.accelerate():
        assert ops(fun, a)["product"] + ops(fun, a)["linear"] > 0
        got = jax.jit(fun)(a)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * float(jnp.abs(y).max()))


def test_an_exported_program_of_any_size(rng: np.random.Generator) -> None:
    """Exported without acceleration, run with it."""
    a, b = arrays(rng, (16, 24), (24, 8))
    rows = jax.export.symbolic_shape("m")
    shapes = (jax.ShapeDtypeStruct((*rows, 24), a.dtype), jax.ShapeDtypeStruct(b.shape, b.dtype))
    exported = jax.export.deserialize(jax.export.export(jax.jit(lambda a, b: jnp.tanh(a @ b)))(*shapes).serialize())
    want = exported.call(a, b)
    with jax_nano.accelerate():
        assert ops(exported.call, a, b)["linear"] == 1
        np.testing.assert_allclose(exported.call(a, b), want, rtol=2e-5, atol=2e-5)


def test_donated_state_of_a_training_loop(rng: np.random.Generator) -> None:
    """The memory of a state that is donated step by step is never read after it was overwritten."""
    x, w = arrays(rng, (32, 16), (16, 16))

    def step(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        gradient = jax.grad(lambda w: (jnp.tanh(x @ w.T) ** 2).sum())(state["w"])
        momentum = 0.9 * state["m"] + gradient
        return {"w": state["w"] - 0.01 * momentum, "m": momentum}

    results = []
    for on in (False, True):
        with jax_nano.accelerate(on):
            program = jax.jit(step, donate_argnums=0)
            state = {"w": jnp.array(w), "m": jnp.zeros_like(w)}
            for _ in range(20):
                state = program(state)
            results.append(state)
    for name in ("w", "m"):
        np.testing.assert_allclose(results[1][name], results[0][name], rtol=1e-3, atol=1e-3)


def test_an_exception_in_a_traced_function_leaves_nothing_behind(rng: np.random.Generator) -> None:
    (a,) = arrays(rng, (16, 16))
    broken = True

    @jax.jit
    def fun(a: jax.Array) -> jax.Array:
        product = a @ a
        if broken:
            raise ArithmeticError("on purpose")
        return product

    for on in (True, False):
        with jax_nano.accelerate(on), pytest.raises(ArithmeticError):
            fun(a)
    assert not jax_nano.accelerate.enabled
    broken = False
    with jax_nano.accelerate():
        assert ops(fun, a)["product"] == 1
    assert ops(fun, a)["dot"] == 1


# A hook that fails, where warnings are errors: in the compiling thread nothing may be raised.
FAILING = """
import logging, sys, threading
import jax, numpy as np, jax_nano
from jax_nano._core import hlo

class Broken(hlo.Module):
    def __init__(self, serialized):
        raise {error}
hlo.Module = Broken
records = []
class Handler(logging.Handler):
    def emit(self, record):
        records.append(record)
logging.getLogger("jax_nano").addHandler(Handler(logging.ERROR))
a = np.ones((32, 32), np.float32)
jax_nano.accelerate.enable()
def work(i):
    np.testing.assert_array_equal(jax.jit(lambda a: a @ a + i)(a), a @ a + i)
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for t in threads: t.start()
for t in threads: t.join()
work(9)
assert len(records) == 1, records
assert "failed, and the program runs without it" in records[0].getMessage()
assert str(jax_nano.report()) == "jax_nano: no product was compiled"
"""


@pytest.mark.parametrize(
    "error", ["MemoryError()", "RecursionError('deep')", "UnicodeDecodeError('utf-8', b'', 0, 1, '')"]
)
def test_a_failing_hook_where_warnings_are_errors(error: str) -> None:
    run_python(FAILING.format(error=error))


def test_a_module_that_is_no_module() -> None:
    """Bytes that protobuf cannot read are left alone."""
    run_python(
        """
        import warnings
        import jax_nano
        from jax_nano._programs import accelerate
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for junk in (b"", b"jax_nano.accelerate dot \\xff\\xff\\xff", b"\\x0a\\xff jax_nano.accelerate dot"):
                assert accelerate._hook._transform(junk) is None
        assert len(caught) == 1
        """
    )


def test_a_jax_without_the_hook() -> None:
    """A clear sentence; everything else works."""
    run_python(
        """
        import sys
        import jax, jax.extend.core, numpy as np, jax_nano
        sys.modules["jax.extend.xla"] = None  # as if there were none
        a = np.ones((64, 64), np.float32)
        for switch in (jax_nano.accelerate.enable, jax_nano.accelerate().__enter__):
            try:
                switch()
            except RuntimeError as error:
                assert "needs JAX and jaxlib 0.10.2 or newer: this is JAX" in str(error)
            else:
                raise AssertionError
        assert not jax_nano.accelerate.enabled
        jax_nano.accelerate.disable()
        with jax_nano.accelerate(False):
            pass
        text = jax.jit(lambda a: jax_nano.matmul(a, a) + a @ a).lower(a).compile().as_text()
        assert text.count('custom_call_target="jax_nano') == 1
        """
    )


def test_the_environment_with_a_jax_without_the_hook() -> None:
    run_python(
        """
        import sys, warnings
        import jax, jax.extend.core, numpy as np
        sys.modules["jax.extend.xla"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import jax_nano
            jax_nano.accelerate
        assert "JAX_NANO_ACCELERATE=1 has no effect" in str(caught[0].message)
        a = np.ones((64, 64), np.float32)
        assert "jax_nano" not in jax.jit(lambda a: a @ a).lower(a).compile().as_text()
        """,
        env={"JAX_NANO_ACCELERATE": "1"},
    )
