"""What accelerated programs compute, and that no product that a kernel could compute is left in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs import copies, ops

import jax_nano
from jax_nano._core import jax_compat as compat
from jax_nano._dispatch import decision

F32 = np.float32


def arrays(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(reference.random(rng, shape)) for shape in shapes]


def same(fun: Callable[..., Any], *args: Any, calls: int | None = None, rtol: float = 2e-5) -> Any:
    """Checks a program against itself without acceleration; its operations.

    calls: how many products it has, all of which must be calls.
    """
    want = jax.jit(fun)(*args)
    with jax_nano.accelerate():
        got = jax.jit(fun)(*args)
        found = ops(fun, *args)
    assert not found["dot"], found
    found["product"] += found["linear"]  # products with an epilogue
    assert found["product"] == calls if calls is not None else found["product"] > 0, found
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        scale = float(np.max(np.abs(np.asarray(y, np.float64)), initial=1e-30))
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=rtol * scale)
    return found


def layers(x: jax.Array, *weights: jax.Array) -> jax.Array:
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


def loss(x: jax.Array, *weights: jax.Array) -> jax.Array:
    return (layers(x, *weights) ** 2).sum()


@jax.custom_vjp
def scaled(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


scaled.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (2 * g @ kept[1].T, 3 * kept[0].T @ g))

# Programs, and how many products they have where XLA does not merge or drop any.
TRANSFORMED: dict[str, tuple[Callable[..., Any], int | None]] = {
    "jit": (layers, 2),
    "grad": (jax.grad(loss, (0, 1, 2)), 6),
    "grad of one": (jax.grad(loss, 1), None),
    "jvp": (lambda *args: jax.jvp(loss, args, args)[1], None),
    "remat": (jax.grad(jax.checkpoint(loss), (1, 2)), None),
    "vmap": (jax.vmap(layers, (0, None, None)), None),
    "vmap of weights": (lambda x, *w: jax.vmap(layers, (None, 0, 0))(x, *(jnp.stack([v, v + 1, -v]) for v in w)), 2),
    "custom_vjp": (lambda x, w, _: jax.grad(lambda *a: jnp.sin(scaled(*a)).sum(), (0, 1))(x, w), 3),
    "hessian": (lambda x, w, v: jax.hessian(lambda b: loss(x[:3], w, jnp.diag(b)))(v[0]), None),
    "scan": (lambda x, w, _: jax.lax.scan(lambda c, _: (layers(c, w), c), x, None, length=4), 1),
    "grad of scan": (
        lambda x, w, _: jax.grad(lambda w: jax.lax.scan(lambda c, _: (layers(c, w), None), x, None, 4)[0].sum())(w),
        3,
    ),
    "scan over weights": (lambda x, w, v: jax.lax.scan(lambda c, w: (layers(c, w), None), x, jnp.stack([w, v]))[0], 1),
    "while": (lambda x, w, _: jax.lax.while_loop(lambda c: abs(c).max() > 1e-3, lambda c: layers(c, 0.1 * w), x), 1),
    "fori_loop in place": (
        lambda x, w, _: jax.lax.fori_loop(0, 9, lambda i, c: c.at[i].set((c @ w)[i]).at[i + 1].add(c[i]), x),
        1,
    ),
    "cond": (lambda x, w, v: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.sin(x) @ v), 2),
    "inner jit": (lambda x, w, v: jax.jit(layers)(jax.jit(layers)(x, w), v), 2),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed(name: str, rng: np.random.Generator) -> None:
    fun, calls = TRANSFORMED[name]
    x, w, v = arrays(rng, (24, 16), (16, 16), (16, 16))
    same(fun, x, w, v, calls=calls)


LAYOUTS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "a @ b": (jnp.matmul, [(9, 17), (17, 25)]),
    "a.T @ b": (lambda a, b: a.T @ b, [(17, 9), (17, 25)]),
    "a @ b.T": (lambda a, b: a @ b.T, [(9, 17), (25, 17)]),
    "(a @ b).T": (lambda a, b: (a @ b).T, [(9, 17), (17, 25)]),
    "vector": (jnp.matmul, [(9, 17), (17,)]),
    "batched": (jnp.matmul, [(3, 9, 17), (3, 17, 25)]),
    "broadcast": (jnp.matmul, [(3, 9, 17), (17, 25)]),
    "scores": (partial(jnp.einsum, "bqhd,bkhd->bhqk"), [(2, 9, 3, 17), (2, 7, 3, 17)]),
    "values": (partial(jnp.einsum, "bhqk,bkhd->bqhd"), [(2, 3, 9, 7), (2, 7, 3, 17)]),
    "contracted twice": (partial(jnp.einsum, "abc,cbd->da"), [(5, 6, 7), (7, 6, 9)]),
    # XLA merges dimensions that belong together, and leaves those of size 1, around its transposes.
    "scores of one": (partial(jnp.einsum, "bqhd,bkhd->bhqk"), [(1, 9, 3, 17), (1, 7, 3, 17)]),
    "values of one": (partial(jnp.einsum, "bhqk,bkhd->bqhd"), [(1, 3, 9, 7), (1, 7, 3, 17)]),
    "gradient of weights": (partial(jnp.einsum, "btf,btg->fg"), [(1, 40, 24), (1, 40, 32)]),
    "gradient of weights, a batch": (partial(jnp.einsum, "btf,btg->fg"), [(2, 20, 24), (2, 20, 32)]),
    "into heads": (partial(jnp.einsum, "btf,fhd->bthd"), [(2, 9, 24), (24, 3, 8)]),
    "gradient of weights into heads": (partial(jnp.einsum, "bthd,btf->fhd"), [(2, 9, 3, 8), (2, 9, 24)]),
    "gradient out of heads": (partial(jnp.einsum, "btf,hdf->bthd"), [(2, 9, 24), (3, 8, 24)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_without_copies(name: str, rng: np.random.Generator) -> None:
    fun, shapes = LAYOUTS[name]
    a, b = arrays(rng, *shapes)
    found = same(fun, a, b, calls=1)
    if name != "contracted twice":  # which XLA transposes first, and reshapes
        assert not copies(found)


@st.composite
def dot_generals(draw: st.DrawFn) -> tuple[Any, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Dimension numbers, shapes, and an order for the result's dimensions."""
    groups = [draw(st.lists(st.integers(1, 6), max_size=2)) for _ in range(4)]
    batch, contracting, m, n = groups
    hypothesis.assume(len(contracting) > 0)
    sizes = dict(enumerate(batch + contracting + m + n))
    ends = np.cumsum([len(x) for x in groups])
    b, k, i, j = (list(range(end - len(x), end)) for x, end in zip(groups, ends, strict=True))
    lhs, rhs = draw(st.permutations(b + k + i)), draw(st.permutations(b + k + j))
    numbers = (
        (tuple(lhs.index(x) for x in k), tuple(rhs.index(x) for x in k)),
        (tuple(lhs.index(x) for x in b), tuple(rhs.index(x) for x in b)),
    )
    order = draw(st.permutations(range(len(batch + m + n))))
    return numbers, tuple(sizes[x] for x in lhs), tuple(sizes[x] for x in rhs), tuple(order)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(dot_generals(), st.sampled_from(["float32", "bfloat16", "int8"]))
def test_any_dimension_numbers(product: Any, dtype: str) -> None:
    """Exact, as sums of products of small integers are, in whatever order."""
    numbers, lhs_shape, rhs_shape, order = product
    rng = np.random.default_rng(len(lhs_shape))
    a, b = (reference.small_integers(rng, shape) for shape in (lhs_shape, rhs_shape))
    element = jnp.dtype(dtype)
    result = jnp.int32 if dtype == "int8" else F32

    def fun(a: jax.Array, b: jax.Array) -> jax.Array:
        out = jax.lax.dot_general(
            a.astype(element),
            b.astype(element),
            numbers,
            preferred_element_type=result,
        )
        return jax.lax.transpose(out, order)

    want = jax.jit(fun)(a, b)
    with jax_nano.accelerate():
        np.testing.assert_array_equal(jax.jit(fun)(a, b), want)


@pytest.mark.parametrize(
    ("lhs", "rhs", "out"),
    [
        ("float32", "float32", None),
        ("float64", "float64", None),
        ("bfloat16", "bfloat16", None),
        ("bfloat16", "bfloat16", "float32"),
        ("float16", "float16", None),
        ("bfloat16", "float32", None),
        ("int8", "int8", "int32"),
        ("int8", "int8", None),
        ("uint8", "uint8", "int32"),
    ],
)
def test_dtypes(lhs: str, rhs: str, out: str | None, rng: np.random.Generator) -> None:
    with jax.enable_x64(True):
        a = jnp.asarray(reference.random(rng, (24, 40), jnp.dtype(lhs)))
        b = jnp.asarray(reference.random(rng, (40, 32), jnp.dtype(rhs)))
        narrow = jnp.dtype(out or lhs).itemsize == 2
        found = same(partial(jnp.matmul, preferred_element_type=out), a, b, calls=1, rtol=1e-2 if narrow else 2e-5)
        assert not found["convert"]


def test_a_bfloat16_product_is_rounded_once(rng: np.random.Generator) -> None:
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in arrays(rng, (24, 64), (64, 32)))
    with jax_nano.accelerate():
        got = jax.jit(jnp.matmul)(a, b)
    reference.expected("mk,kn->mn", np.asarray(a), np.asarray(b), out=jnp.bfloat16).check(got)


VECTORS = {
    "tokens by vocabulary": lambda x, w: jnp.einsum("btd,vd->btv", x, w),
    "a row by a transpose": lambda x, w: x.reshape(1, 64) @ w.T,
    "a row by a matrix": lambda x, w: x.reshape(1, 64) @ w.reshape(64, 4099),
    "a vector by a matrix": lambda x, w: x.reshape(64) @ w.reshape(64, 4099),
    "a matrix by a vector": lambda x, w: w @ x.reshape(64),
    "a matrix by a column": lambda x, w: w @ x.reshape(64, 1),
}


@pytest.mark.parametrize("name", VECTORS)
def test_decoding_converts_no_weights(name: str, rng: np.random.Generator) -> None:
    """XLA converts all of a bfloat16 matrix before it multiplies it by a vector, in a loop of its own or the same."""
    x, w = (jnp.asarray(v, jnp.bfloat16) for v in arrays(rng, (1, 1, 64), (4099, 64)))
    found = same(VECTORS[name], x, w, calls=1, rtol=1e-2)
    assert not found["convert"]
    assert not found["fusion"]


@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool"])
def test_what_has_no_kernel_is_left_alone(dtype: str, rng: np.random.Generator) -> None:
    a = jnp.asarray(reference.small_integers(rng, (16, 16))).astype(dtype)
    want = jax.jit(jnp.matmul)(a, a)
    with jax_nano.accelerate():
        assert not ops(jnp.matmul, a, a)["product"]
        np.testing.assert_array_equal(jax.jit(jnp.matmul)(a, a), want)


def test_what_the_gate_declines_is_left_alone(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))
    small, large = arrays(rng, (3, 3), (32, 32))
    with jax_nano.accelerate():
        found = ops(lambda a, b: (a @ a, b @ b), small, large)
    assert (found["product"], found["dot"]) == (1, 1)


def test_an_operand_that_is_written_in_place_is_read_before(rng: np.random.Generator) -> None:
    """The product reads a transposed copy of what the loop then overwrites."""

    def body(i: Any, c: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, total = c
        product = jnp.einsum("abc,abd->acd", x.transpose(1, 0, 2), x.transpose(1, 0, 2))
        return x.at[i % 5].multiply(0.5), total + product

    (x,) = arrays(rng, (5, 6, 16))
    same(lambda x: jax.lax.fori_loop(0, 7, body, (x, jnp.zeros((6, 16, 16)))), x)


def test_donated_operands(rng: np.random.Generator) -> None:
    """Results are right; XLA's hook drops the module's aliasing, so the donated memory may not be used again."""
    a, b = arrays(rng, (16, 16), (16, 16))
    with jax_nano.accelerate():
        step = jax.jit(lambda a, b: (a.T @ b, a + 1), donate_argnums=0)
        product, other = step(jnp.array(a), b)
    reference.expected("km,kn->mn", np.asarray(a), np.asarray(b)).check(product)
    np.testing.assert_array_equal(other, a + 1)


def test_a_large_donated_state() -> None:
    """Where a changed module forgets donation, a program that donates much stays as it is; elsewhere both are kept."""
    jax_nano.clear_report()
    state, x = jnp.ones((2049, 2048)), jnp.ones((64, 2048))
    with jax_nano.accelerate():
        step = jax.jit(lambda state, x: (state * 0.5, x @ state.T), donate_argnums=0)
        halved, product = step(state, x)
    assert state.is_deleted()
    assert halved[0, 0] == 0.5
    np.testing.assert_array_equal(product, np.full((64, 2049), 2048, np.float32))
    text = str(jax_nano.report())
    kept = compat.KEEPS_DONATION
    assert f"1 products compiled, {int(kept)} run on kernels" in text
    assert ("left to XLA: this jaxlib would not reuse the 16 MiB that the program donates" in text) != kept


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize(("lhs", "rhs"), [(P("x"), P()), (P(None, "x"), P("x")), (P(), P(None, "x"))], ids=str)
def test_partitioned(lhs: P, rhs: P, rng: np.random.Generator) -> None:
    a, b = arrays(rng, (16, 32), (32, 24))
    x = jax.device_put(a, NamedSharding(mesh(), lhs))
    y = jax.device_put(b, NamedSharding(mesh(), rhs))
    found = same(lambda x, y: jnp.sin(x @ y), x, y, calls=1)
    assert not found["all-gather"]
    assert found["all-reduce"] == (lhs == P(None, "x"))


def test_data_parallel_gradients(rng: np.random.Generator) -> None:
    x, w, v = arrays(rng, (16, 32), (32, 32), (32, 8))
    batch = jax.device_put(x, NamedSharding(mesh(), P("x")))
    w, v = (jax.device_put(a, NamedSharding(mesh(), P())) for a in (w, v))
    same(jax.grad(loss, (1, 2)), batch, w, v)


def test_shard_map(rng: np.random.Generator) -> None:
    x, w = arrays(rng, (16, 32), (32, 8))
    fun = jax.shard_map(
        lambda a, b: jax.lax.psum(a @ b, "x"), mesh=mesh(), in_specs=(P(None, "x"), P("x")), out_specs=P()
    )
    same(fun, x, w, calls=1)


def test_pmap(rng: np.random.Generator) -> None:
    x, w = arrays(rng, (4, 16, 32), (32, 8))
    want = jax.pmap(lambda a, b: a @ b, in_axes=(0, None))(x, w)
    with jax_nano.accelerate():
        np.testing.assert_allclose(jax.pmap(lambda a, b: a @ b, in_axes=(0, None))(x, w), want, rtol=1e-4, atol=1e-4)


def test_jax_nanos_own_products_stay(rng: np.random.Generator) -> None:
    a, b = arrays(rng, (9, 17), (17, 25))
    found = same(lambda a, b: jax_nano.matmul(a, b) + jnp.matmul(jnp.sin(a), b), a, b, calls=2)
    assert not copies(found)
