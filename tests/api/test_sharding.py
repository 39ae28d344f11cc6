"""Programs over four devices: the collectives that XLA's own product needs, and no others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import ops

import jax_nano

if jax.device_count("cpu") < 4:
    pytest.skip("a backend with fewer devices was started before these tests", allow_module_level=True)

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


def mesh(*sizes: int, axis_type: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh(sizes, ("x", "y")[: len(sizes)], (axis_type,) * len(sizes))


def collectives(counted: Counter[str]) -> dict[str, int]:
    return {name: counted[name] for name in COLLECTIVES if counted[name]}


def close(got: Any, want: Any) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, y.ndim), (x.sharding, y.sharding)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def gradients(matmul: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(lambda a, b: jnp.sin(matmul(a, b)).sum(), (0, 1))


MATRICES = ((16, 32), (32, 24))
STACKS = ((8, 16, 32), (8, 32, 24))
LINE, GRID = (4,), (2, 2)
# mesh, shapes, shardings of a and b
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple, P, P]] = {
    "rows": (LINE, MATRICES, P("x", None), P()),
    "columns": (LINE, MATRICES, P(), P(None, "x")),
    "K": (LINE, MATRICES, P(None, "x"), P("x", None)),
    "K of one": (LINE, MATRICES, P(None, "x"), P()),
    "rows and columns": (GRID, MATRICES, P("x", None), P(None, "y")),
    "rows and K": (GRID, MATRICES, P("x", "y"), P("y", None)),
    "rows and columns on one axis": (LINE, MATRICES, P("x", None), P(None, "x")),
    "two axes on rows": (GRID, MATRICES, P(("x", "y"), None), P()),
    "batch": (LINE, STACKS, P("x"), P("x")),
    "batch on two axes": (GRID, STACKS, P(("x", "y")), P(("x", "y"))),
    "batch and rows": (GRID, STACKS, P("x", "y"), P("x")),
    "stack and matrix": (LINE, (STACKS[0], MATRICES[1]), P("x"), P()),
    "vectors": (LINE, ((32,), (32,)), P("x"), P("x")),
    "replicated": (LINE, MATRICES, P(), P()),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("wrap", [lambda f: f, gradients], ids=["forward", "gradients"])
def test_jit_of_sharded_arrays(name: str, wrap: Callable, rng: np.random.Generator) -> None:
    sizes, shapes, *specs = LAYOUTS[name]
    args = [
        jax.device_put(reference.random(rng, shape), NamedSharding(mesh(*sizes), spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    ours, theirs = jax.jit(wrap(jax_nano.matmul)), jax.jit(wrap(jnp.matmul))
    close(ours(*args), theirs(*args))
    found, want = ops(ours, *args), ops(theirs, *args)
    assert collectives(found) == collectives(want)
    assert found["product"] == (3 if wrap is gradients else 1)
    assert not found["dot"]


def test_transposed_operands_of_sharded_products(rng: np.random.Generator) -> None:
    a, b = reference.random(rng, (32, 16)), reference.random(rng, (32, 24))
    a = jax.device_put(a, NamedSharding(mesh(4), P(None, "x")))
    fun = jax.jit(lambda a, b: jax_nano.matmul(a.T, b))
    close(fun(a, b), jax.jit(lambda a, b: a.T @ b)(a, b))
    assert not ops(fun, a, b)["transpose"]


def test_converted_operands_of_sharded_products(rng: np.random.Generator) -> None:
    a = jax.device_put(reference.random(rng, (16, 32)), NamedSharding(mesh(4), P("x")))
    b = jnp.asarray(reference.random(rng, (32, 24)), jnp.bfloat16)
    close(jax.jit(jax_nano.matmul)(a, b), jax.jit(jnp.matmul)(a, b))
    assert not collectives(ops(jax_nano.matmul, a, b))


def test_vmap_over_a_sharded_dimension(rng: np.random.Generator) -> None:
    a = jax.device_put(reference.random(rng, (8, 16, 32)), NamedSharding(mesh(4), P("x")))
    b = reference.random(rng, (32, 24))
    fun = jax.jit(jax.vmap(jax_nano.matmul, (0, None)))
    close(fun(a, b), jax.jit(jax.vmap(jnp.matmul, (0, None)))(a, b))
    assert not collectives(ops(fun, a, b))


def test_scan_over_sharded_carries(rng: np.random.Generator) -> None:
    x = jax.device_put(reference.random(rng, (16, 32)), NamedSharding(mesh(4), P("x")))
    w = reference.random(rng, (32, 32)) / 8

    def run(matmul: Callable[..., Any], x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.tanh(matmul(x, w)), None), x, None, length=3)[0]

    close(jax.jit(partial(run, jax_nano.matmul))(x), jax.jit(partial(run, jnp.matmul))(x))
    assert not collectives(ops(partial(run, jax_nano.matmul), x))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("layout", ["rows", "K"])
def test_shard_map(layout: str, check_vma: bool, rng: np.random.Generator) -> None:
    sizes, shapes, *specs = LAYOUTS[layout]
    args = [reference.random(rng, shape) for shape in shapes]

    def program(matmul: Callable[..., Any]) -> Callable[..., Any]:
        def body(a: jax.Array, b: jax.Array) -> jax.Array:
            out = matmul(a, b)
            return jax.lax.psum(out, "x") if layout == "K" else out

        out_specs = P() if layout == "K" else P("x")
        return jax.shard_map(body, mesh=mesh(*sizes), in_specs=tuple(specs), out_specs=out_specs, check_vma=check_vma)

    for wrap in (lambda f: f, gradients):
        ours, theirs = jax.jit(wrap(program(jax_nano.matmul))), jax.jit(wrap(program(jnp.matmul)))
        close(ours(*args), theirs(*args))
        assert collectives(ops(ours, *args)) == collectives(ops(theirs, *args))
        assert ops(ours, *args)["product"] == (3 if wrap is gradients else 1)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_a_part_of_the_mesh(check_vma: bool, rng: np.random.Generator) -> None:
    args = [reference.random(rng, shape) for shape in MATRICES]
    args[1] = jax.device_put(args[1], NamedSharding(mesh(*GRID), P(None, "y")))

    def program(matmul: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(
            jax.shard_map(
                matmul,
                mesh=mesh(*GRID),
                in_specs=(P("x"), P()),
                out_specs=P("x"),
                axis_names={"x"},
                check_vma=check_vma,
            )
        )

    ours, theirs = program(jax_nano.matmul), program(jnp.matmul)
    close(ours(*args), theirs(*args))
    assert collectives(ops(ours, *args)) == collectives(ops(theirs, *args))


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)])
def test_pmap(in_axes: tuple, rng: np.random.Generator) -> None:
    shapes = [((4, *shape) if axis == 0 else shape) for shape, axis in zip(MATRICES, in_axes, strict=True)]
    args = [reference.random(rng, shape) for shape in shapes]
    got, want = (jax.pmap(m.matmul, in_axes=in_axes)(*args) for m in (jax_nano, jnp))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def explicit() -> Iterator[Mesh]:
    line = mesh(4, axis_type=AxisType.Explicit)
    with jax.set_mesh(line):
        yield line


@pytest.mark.parametrize("name", ["rows", "columns", "K", "K of one", "batch", "stack and matrix", "replicated"])
def test_explicit_sharding(name: str, explicit: Mesh, rng: np.random.Generator) -> None:
    """Types with shardings: results, gradients and errors have lax's."""
    _, shapes, *specs = LAYOUTS[name]
    args = [
        jax.device_put(reference.random(rng, shape), NamedSharding(explicit, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    for jit in (lambda f: f, jax.jit):
        for wrap in (lambda f: f, gradients):
            ours, theirs = jit(wrap(jax_nano.matmul)), jit(wrap(jnp.matmul))
            try:
                want = theirs(*args)
            except Exception as error:
                with pytest.raises(type(error)):
                    ours(*args)
                continue
            got = ours(*args)
            assert [x.aval for x in jax.tree.leaves(got)] == [x.aval for x in jax.tree.leaves(want)]
            close(got, want)


def test_explicit_out_sharding(explicit: Mesh, rng: np.random.Generator) -> None:
    a, b = (
        jax.device_put(reference.random(rng, shape), NamedSharding(explicit, spec))
        for shape, spec in zip(MATRICES, (P(None, "x"), P("x")), strict=True)
    )
    numbers = (((1,), (0,)), ((), ()))
    for out in (P(), P("x"), P(None, "x"), NamedSharding(explicit, P("x", None))):
        for ours, theirs in (
            (jax_nano.matmul, jnp.matmul),
            (jax_nano.dot, jnp.dot),
            (
                partial(jax_nano.dot_general, dimension_numbers=numbers),
                partial(jax.lax.dot_general, dimension_numbers=numbers),
            ),
            (partial(jax_nano.einsum, "ij,jk->ki"), partial(jnp.einsum, "ij,jk->ki")),
        ):
            got, want = ours(a, b, out_sharding=out), theirs(a, b, out_sharding=out)
            assert got.aval == want.aval
            close(got, want)
    with pytest.raises(TypeError, match="out_sharding"):
        jax_nano.matmul(a, b, out_sharding="x")


def test_explicit_vmap(explicit: Mesh, rng: np.random.Generator) -> None:
    lhs, rhs = (reference.random(rng, shape) for shape in STACKS)
    a, b = (jax.device_put(x, NamedSharding(explicit, P("x"))) for x in (lhs, rhs))
    for axes, args in (((0, None), (a, rhs[0])), ((0, 0), (a, b)), ((None, 0), (lhs[0], b))):
        for options in ({}, {"out_sharding": P(None, None)}):
            ours, theirs = (jax.vmap(partial(m.matmul, **options), axes) for m in (jax_nano, jnp))
            got, want = ours(*args), theirs(*args)
            assert got.aval == want.aval
            close(got, want)


def test_unused_devices_do_not_matter(rng: np.random.Generator) -> None:
    a, b = (jnp.asarray(reference.random(rng, shape)) for shape in MATRICES)
    other = jax.devices()[2]
    got = jax.jit(jax_nano.matmul)(jax.device_put(a, other), jax.device_put(b, other))
    assert got.devices() == {other}
    reference.expected("mk,kn->mn", np.asarray(a), np.asarray(b)).check(got)
