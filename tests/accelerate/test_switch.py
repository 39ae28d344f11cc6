"""The switch: who is accelerated, from when to when, and that no cache mixes up what was compiled on either side."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import ops, run_python

import jax_nano

A = np.arange(64, dtype=np.float32).reshape(8, 8) % 7


def which(fun: object, *args: object) -> str:
    """What computes the one product of a program."""
    counted = ops(fun, *args)  # type: ignore[arg-type]
    return "".join(name for name in ("product", "dot") if counted[name])


def test_a_scope_accelerates_and_ends() -> None:
    fun = jax.jit(lambda a: jnp.sin(a @ a))
    want = fun(A)
    with jax_nano.accelerate():
        assert jax_nano.accelerate.enabled
        assert which(fun, A) == "product"
        np.testing.assert_allclose(fun(A), want, rtol=1e-5)
        with jax_nano.accelerate(False):
            assert which(fun, A) == "dot"
            with jax_nano.accelerate(), jax_nano.accelerate():
                assert which(fun, A) == "product"
            assert which(fun, A) == "dot"
        assert which(fun, A) == "product"
    assert not jax_nano.accelerate.enabled
    assert which(fun, A) == "dot"


def test_a_scope_ends_with_an_exception() -> None:
    def bad(a: jax.Array) -> jax.Array:
        raise ArithmeticError(a.shape)

    with pytest.raises(ArithmeticError), jax_nano.accelerate():
        jax.jit(bad)(A)
    assert not jax_nano.accelerate.enabled
    assert which(lambda a: a @ a, A) == "dot"


def test_a_decorator_scopes_every_call() -> None:
    @jax_nano.accelerate()
    def state(depth: int) -> list[bool]:
        return [jax_nano.accelerate.enabled, *(state(depth - 1) if depth else [])]

    assert state(2) == [True, True, True]
    assert not jax_nano.accelerate.enabled


def test_a_decorator_without_parentheses() -> None:
    @jax_nano.accelerate
    def state(depth: int, *, more: int = 0) -> list[bool]:
        """Says what it is."""
        return [jax_nano.accelerate.enabled, *(state(depth - 1, more=more) if depth else [more == 3])]

    assert state(1, more=3) == [True, True, True]
    assert (state.__name__, state.__doc__) == ("state", "Says what it is.")
    assert state.__wrapped__(0) == [False, False]  # type: ignore[attr-defined]
    fun = jax.jit(lambda a: jnp.sin(a @ a))
    np.testing.assert_allclose(jax_nano.accelerate(fun)(A), fun(A), rtol=1e-5)
    assert jax_nano.accelerate(lambda: which(fun, A))() == "product"
    assert not jax_nano.accelerate.enabled


@pytest.mark.parametrize("bad", ["off", "on", 1, 0, None, 2.5, [], int, {}, A], ids=lambda x: type(x).__name__)
def test_what_is_neither_a_switch_nor_a_function(bad: object) -> None:
    with pytest.raises(TypeError, match="takes True, False or a function"):
        jax_nano.accelerate(bad)  # type: ignore[call-overload]
    assert not jax_nano.accelerate.enabled


def test_functions_whose_body_runs_later() -> None:
    def generate() -> Iterator[int]:
        yield 1

    async def wait() -> None: ...

    for function in (generate, wait):
        for decorate in (jax_nano.accelerate, jax_nano.accelerate()):
            with pytest.raises(TypeError, match="runs after the call"):
                decorate(function)


def test_a_scope_is_entered_once() -> None:
    scope = jax_nano.accelerate()
    with scope, pytest.raises(RuntimeError, match="another one"), scope:
        pass
    assert not jax_nano.accelerate.enabled


def test_a_scope_is_its_threads_own() -> None:
    seen = []
    with jax_nano.accelerate():
        thread = threading.Thread(target=lambda: seen.append(which(lambda a: a @ a, A)))
        thread.start()
        thread.join()
        assert which(lambda a: a @ a, A) == "product"
    assert seen == ["dot"]


@pytest.mark.parametrize("switch", [True, False])
def test_no_switching_while_a_function_is_traced(switch: bool) -> None:
    def scoped(a: jax.Array) -> jax.Array:
        with jax_nano.accelerate(switch):
            return a @ a

    def turned(a: jax.Array) -> jax.Array:
        (jax_nano.accelerate.enable if switch else jax_nano.accelerate.disable)()
        return a @ a

    for fun in (scoped, turned):
        with jax_nano.accelerate(not switch):
            with pytest.raises(RuntimeError, match="traced"):
                jax.jit(fun)(A)
            assert jax_nano.accelerate.enabled is not switch
    with jax_nano.accelerate(switch):  # it is so already
        assert which(scoped, A) == ("product" if switch else "dot")
    # An eager gradient is traced too, but every product is a program of its own.
    with jax_nano.accelerate(not switch):
        jax.grad(lambda a: scoped(a).sum())(A)


def test_enable_and_disable_are_for_the_process() -> None:
    run_python(
        """
        import threading
        import jax, jax.numpy as jnp, numpy as np, jax_nano

        a = np.arange(256, dtype=np.float32).reshape(16, 16)
        fun = jax.jit(lambda a: a @ a)
        def accelerated():
            found = []
            look = lambda: found.append("jax_nano" in fun.lower(a).compile().as_text())
            thread = threading.Thread(target=look)
            thread.start(); thread.join(); look()
            assert found[0] == found[1]
            return found[0]

        assert not accelerated()
        for _ in range(2):
            for _ in range(2):
                jax_nano.accelerate.enable()
                assert accelerated()
            with jax_nano.accelerate(False):
                assert "jax_nano" not in fun.lower(a).compile().as_text()
            for _ in range(2):
                jax_nano.accelerate.disable()
                assert not accelerated()
        """
    )


@pytest.mark.parametrize("value", ["1", "True", "YES", "on", "0", "false", "No", "off", "", None])
def test_the_environment(value: str | None) -> None:
    on = value in ("1", "True", "YES", "on")
    run_python(
        f"""
        import jax, numpy as np, jax_nano
        a = np.ones((16, 16), np.float32)
        jax_nano.accelerate
        assert ("jax_nano" in jax.jit(lambda a: a @ a).lower(a).compile().as_text()) is {on}
        jax_nano.accelerate.disable()
        assert "jax_nano" not in jax.jit(lambda a: a @ a).lower(a).compile().as_text()
        """,
        env=None if value is None else {"JAX_NANO_ACCELERATE": value},
    )


@pytest.mark.parametrize(
    "env", [{"JAX_NANO_ACCELERATE": "maybe"}, {"JAX_NANO_ACCELERATE": "1", "JAX_NANO_GATE": "maybe"}], ids=str
)
def test_what_the_environment_says_wrong_is_a_warning(env: dict[str, str]) -> None:
    """In a program that knows nothing of jax_nano, whose plugin JAX calls: in words, and it runs."""
    said = run_python(
        """
        import warnings
        from jax_nano import _plugin
        import jax, jax.numpy as jnp
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _plugin.initialize()
        (warning,) = caught
        assert "=maybe" in str(warning.message) and "expected one of" in str(warning.message), warning
        x = jnp.ones((8, 8))
        assert (x @ x == 8).all()
        assert "jax_nano" not in jax.jit(lambda x: x @ x).lower(x).compile().as_text()
        print(warning.category.__name__)
        """,
        env=env,
    )
    assert said.strip() == "RuntimeWarning"
