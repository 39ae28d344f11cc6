"""Every transformation of JAX, against the same program with lax."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads

import jax_nano

BATCHED = (((2,), (1,)), ((0,), (0,)))


def arrays(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(reference.random(rng, shape)) for shape in shapes]


def same(program: Callable[..., Any], *args: Any, rtol: float = 1e-5) -> None:
    """`program(matmul, *args)` is the same with ours and with jnp's."""
    got, want = program(jax_nano.matmul, *args), program(jnp.matmul, *args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.aval == y.aval
        scale = float(np.max(np.abs(y), initial=1e-30))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("shapes", [((3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4,)), ((4,), (4,))])
def test_derivatives_to_second_order(shapes: tuple, rng: np.random.Generator) -> None:
    check_grads(jax_nano.matmul, arrays(rng, *shapes), order=2, modes=["fwd", "rev"], atol=0.1, rtol=0.1)


DERIVATIVES: dict[str, Callable[..., Any]] = {
    "jvp": lambda mm, a, b: jax.jvp(mm, (a, b), (jnp.cos(a), jnp.sin(b))),
    "jvp of one": lambda mm, a, b: jax.jvp(lambda a: mm(a, b), (a,), (jnp.cos(a),)),
    "linearize": lambda mm, a, b: jax.linearize(mm, a, b)[1](jnp.cos(a), jnp.sin(b)),
    "vjp": lambda mm, a, b: jax.vjp(mm, a, b)[1](jnp.cos(mm(a, b))),
    "linear_transpose": lambda mm, a, b: jax.linear_transpose(lambda a: mm(a, b), a)(jnp.cos(mm(a, b))),
    "grad of one": lambda mm, a, b: jax.grad(lambda b: jnp.sin(mm(a, b)).sum())(b),
    "a used twice": lambda mm, a, b: jax.grad(lambda a: mm(a, a.T).sum() + mm(a.T, a).sum())(a),
    "jacfwd": lambda mm, a, b: jax.jacfwd(mm, (0, 1))(a, b),
    "jacrev": lambda mm, a, b: jax.jacrev(mm, (0, 1))(a, b),
    "hessian": lambda mm, a, b: jax.hessian(lambda a, b: jnp.sin(mm(a, b)).sum(), (0, 1))(a, b),
    "third": lambda mm, a, b: jax.jacfwd(jax.hessian(lambda a: (mm(a, b) ** 3).sum()))(a),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name: str, rng: np.random.Generator) -> None:
    same(DERIVATIVES[name], *arrays(rng, (3, 4), (4, 5)), rtol=2e-5)


def test_derivative_of_integers_is_float0() -> None:
    x = jnp.arange(6).reshape(2, 3)
    g = jax.grad(lambda x: jax_nano.matmul(x, x.T).sum().astype(jnp.float32), allow_int=True)(x)
    assert g.dtype == jax.dtypes.float0


@pytest.mark.parametrize("in_axes", list(itertools.product((None, 0, 1, 2, -1), repeat=2))[1:])
def test_vmap_over_any_axis(in_axes: tuple, rng: np.random.Generator) -> None:
    a, b = reference.random(rng, (3, 4)), reference.random(rng, (4, 5))
    batch = reference.random(rng, (6,))
    a, b = (
        jnp.asarray(x if axis is None else np.moveaxis(batch[:, None, None] * x, 0, axis))
        for x, axis in zip((a, b), in_axes, strict=True)
    )
    same(lambda mm, a, b: jax.vmap(mm, in_axes)(a, b), a, b)
    for out_axes in (1, 2):
        same(lambda mm, a, b, out=out_axes: jax.vmap(mm, in_axes, out)(a, b), a, b)


def test_vmap_of_batched_products(rng: np.random.Generator) -> None:
    a, b = arrays(rng, (2, 6, 3, 4), (4, 2, 6, 5))
    dot = partial(jax_nano.dot_general, dimension_numbers=(((2,), (0,)), ((0,), (1,))))
    theirs = partial(jax.lax.dot_general, dimension_numbers=(((2,), (0,)), ((0,), (1,))))
    for axes in ((1, 2), (1, None), (None, 2)):
        args = (a if axes[0] is not None else a[:, 0], b if axes[1] is not None else b[:, :, 0])
        np.testing.assert_allclose(jax.vmap(dot, axes)(*args), jax.vmap(theirs, axes)(*args), rtol=1e-5, atol=1e-5)


PROGRAMS: dict[str, Callable[..., Any]] = {
    "jit": lambda mm, a, b: jax.jit(mm)(a, b),
    "vmap grad": lambda mm, a, b: jax.vmap(jax.grad(lambda x: jnp.sin(mm(x, b)).sum()))(a),
    "grad vmap": lambda mm, a, b: jax.grad(lambda b: jnp.sin(jax.vmap(mm, (0, None))(a, b)).sum())(b),
    "scan": lambda mm, a, b: jax.lax.scan(lambda x, _: (jnp.tanh(mm(x, b)), x[0]), a, None, length=3),
    "grad scan": lambda mm, a, b: jax.grad(
        lambda b: jax.lax.scan(lambda x, _: (jnp.tanh(mm(x, b)), None), a, None, length=3)[0].sum()
    )(b),
    "while": lambda mm, a, b: jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(mm(c[1], b))), (0, a)
    ),
    "fori": lambda mm, a, b: jax.jit(lambda a: jax.lax.fori_loop(0, 3, lambda i, x: mm(x, b), a))(a),
    "cond": lambda mm, a, b: jax.lax.cond(a[0, 0] > 0, mm, lambda a, b: mm(a, b.T), a, b),
    "vmap cond": lambda mm, a, b: jax.vmap(lambda p: jax.lax.cond(p, mm, lambda a, b: mm(a, b.T), a, b))(
        jnp.array([True, False])
    ),
    "switch grad": lambda mm, a, b: jax.grad(lambda a: jax.lax.switch(1, [mm, lambda a, b: mm(a.T, b)], a, b).sum())(a),
    "checkpoint": lambda mm, a, b: jax.grad(lambda a: jax.checkpoint(mm)(jnp.sin(a), b).sum())(a),
    "custom_jvp": lambda mm, a, b: jax.grad(lambda a: jax.nn.relu(mm(a, b)).sum())(a),
    "named_call": lambda mm, a, b: jax.named_call(mm, name="product")(a, b),
    "map": lambda mm, a, b: jax.lax.map(lambda x: mm(x, b), a),
    "associative_scan": lambda mm, a, b: jax.lax.associative_scan(mm, jnp.stack([a, b, a, b])),
    "empty": lambda mm, a, b: jax.grad(lambda a: mm(a[:, :0], b[:0]).sum())(a),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, rng: np.random.Generator) -> None:
    same(PROGRAMS[name], *arrays(rng, (4, 4), (4, 4)))


def test_without_jit(rng: np.random.Generator) -> None:
    with jax.disable_jit():
        same(lambda mm, a, b: jax.grad(lambda a: mm(a, b).sum())(a), *arrays(rng, (3, 4), (4, 5)))


def test_debug_nans(rng: np.random.Generator) -> None:
    a, b = arrays(rng, (3, 4), (4, 5))
    with jax.debug_nans(True):
        jax_nano.matmul(a, b)
        with pytest.raises(FloatingPointError):
            jax_nano.matmul(a.at[0, 0].set(jnp.nan), b)


def test_strict_promotion_and_leak_checks(rng: np.random.Generator) -> None:
    a, b = arrays(rng, (3, 4), (4, 5))
    with jax.numpy_dtype_promotion("strict"), jax.checking_leaks():
        jax.jit(jax.grad(lambda a: jax_nano.matmul(a, b).sum()))(a)
        half = b.astype(jnp.bfloat16)
        for module in (jnp, jax_nano):
            with pytest.raises(ValueError, match="promotion"):
                module.matmul(a, half)


def test_one_equation(rng: np.random.Generator) -> None:
    """Calls leave their equations in the caller's program, where policies and rewriters see them."""
    a, b = arrays(rng, (3, 4), (4, 5))
    for fun in (jax_nano.matmul, jax_nano.dot, partial(jax_nano.einsum, "ij,jk->ki")):
        (eqn,) = jax.make_jaxpr(fun)(a, b).eqns
        assert eqn.primitive is jax_nano.dot_general_p
        assert eqn.params["dimension_numbers"] == (((1,), (0,)), ((), ()))


def test_programs_name_their_callers_lines(rng: np.random.Generator) -> None:
    """Not ours: profiles and errors show where the product was written."""
    lowered = jax.jit(lambda a, b: jax_nano.matmul(a, b)).lower(*arrays(rng, (9, 17), (17, 25)))
    text = lowered.as_text(debug_info=True)
    assert "test_transforms.py" in text
    assert "jax_nano/api.py" not in text


def count_products(name: str, matmul: Callable[..., Any], policy: Any, *args: jax.Array) -> int:
    """Products in the program that JAX makes of a checkpointed layer and its gradients."""
    fun = jax.checkpoint(lambda a, b: jnp.sin(matmul(a, b)), policy=policy)
    program = jax.make_jaxpr(jax.value_and_grad(lambda a, b: fun(a, b).sum(), (0, 1)))(*args)
    return str(program).count(f"= {name}[")


JAXS = jax.checkpoint_policies
POLICIES: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(JAXS, name)
        for name in (
            "nothing_saveable",
            "everything_saveable",
            "dots_saveable",
            "checkpoint_dots",
            "dots_with_no_batch_dims_saveable",
        )
    },
    "offload": JAXS.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "composed": JAXS.save_from_both_policies(JAXS.dots_saveable, JAXS.save_only_these_names("x")),
    "somebody's own": lambda primitive, *_, **__: primitive is jax.extend.core.primitives.dot_general_p,
    "of dimension numbers": lambda primitive, *_, **params: params.get("dimension_numbers") == (((1,), (0,)), ((), ())),
}


@pytest.fixture(params=[False, True], ids=["", "remat3"])
def remat3(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The flag that chooses between JAX's two checkpoints."""
    before = jax.config.jax_remat3
    jax.config.update("jax_remat3", request.param)
    yield request.param
    jax.config.update("jax_remat3", before)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_checkpoint_policies(policy: str, batch: tuple[int, ...], remat3: bool, rng: np.random.Generator) -> None:
    """JAX's own, and others that know lax.dot_general only, save of our products what they save of lax's."""
    args = arrays(rng, (*batch, 8, 8), (*batch, 8, 8))
    chosen = POLICIES[policy]
    saves = policy != "nothing_saveable" and not (batch and policy in NOT_BATCHED)
    assert count_products("jax_nano_dot_general", jax_nano.matmul, chosen, *args) == 3 + (not saves)
    want = count_products("dot_general", jnp.matmul, chosen, *args)
    # The newer checkpoint of 0.10 asks of lax's products only the policies that it knows.
    assert want == 3 + (not saves) or (remat3 and want == 4)
    fun = jax.checkpoint(lambda a, b: jnp.sin(jax_nano.matmul(a, b)), policy=chosen)
    got, exact = (
        jax.jit(jax.grad(lambda a, b, f=f: f(a, b).sum(), (0, 1)))(*args)
        for f in (fun, lambda a, b: jnp.sin(jnp.matmul(a, b)))
    )
    for x, y in zip(got, exact, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


NOT_BATCHED = {"dots_with_no_batch_dims_saveable", "offload", "of dimension numbers"}


def test_a_policy_that_names_our_primitives(remat3: bool, rng: np.random.Generator) -> None:
    args = arrays(rng, (8, 8), (8, 8))
    ours = {jax_nano.dot_general_p, jax_nano.linear_p}
    named = lambda primitive, *_, **__: primitive in ours  # noqa: E731
    assert count_products("jax_nano_dot_general", jax_nano.matmul, named, *args) == 3
    layer = partial(jax_nano.linear, activation="sigmoid")
    assert count_products("jax_nano_linear", layer, named, *args) == 1 + remat3


def test_policies_of_earlier_releases(rng: np.random.Generator) -> None:
    args = arrays(rng, (8, 8), (8, 8))
    ours = jax_nano.checkpoint_policies
    for policy in (ours.dots_saveable, ours.extend(JAXS.dots_saveable), ours.checkpoint_dots_with_no_batch_dims):
        assert count_products("jax_nano_dot_general", jax_nano.matmul, policy, *args) == 3
        assert count_products("dot_general", jnp.matmul, policy, *args) == 3
    assert callable(ours.offload_dot_with_no_batch_dims("device", "pinned_host"))


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint_policies_of_linear(policy: str, remat3: bool, rng: np.random.Generator) -> None:
    args = arrays(rng, (8, 16), (16, 24))
    layer = partial(jax_nano.linear, activation="sigmoid")
    # The newer checkpoint takes derivatives of what is computed again, and this one's slope is its result's.
    again = policy == "nothing_saveable"
    found = count_products("jax_nano_linear", layer, POLICIES[policy], *args)
    assert found == 1 + again or (remat3 and found == 2)
    plain = count_products("jax_nano_linear", jax_nano.linear, POLICIES[policy], *args)
    assert plain == 1 + (policy == "nothing_saveable")


def test_python_threads(rng: np.random.Generator) -> None:
    from concurrent.futures import ThreadPoolExecutor

    a, b = arrays(rng, (65, 33), (33, 47))
    fun = jax.jit(lambda a, b: jax_nano.matmul(jnp.sin(a), b))
    want = np.asarray(fun(a, b))
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: np.asarray(fun(a, b)), range(100)):
            np.testing.assert_array_equal(got, want)
