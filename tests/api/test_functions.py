"""The public functions against those of jnp and lax: shapes, dtypes, weak types, values and errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import opt_einsum
import pytest
import reference
from programs import outcome

import jax_nano


def compare(ours: Callable[..., Any], theirs: Callable[..., Any], *args: Any) -> None:
    """Both give the same shape, dtype, weak type and values, or the same error."""
    (got, our_error), (want, error) = outcome(ours, *args), outcome(theirs, *args)
    assert our_error == error
    if error is None:
        assert got.aval == want.aval
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(reference.small_integers(rng, shape), dtype)


SHAPES = [(), (4,), (1,), (3, 4), (4, 5), (1, 4), (2, 3, 4), (2, 4, 5), (1, 4, 3), (6, 1, 4, 3), (0, 4), (4, 0)]


@pytest.mark.parametrize("name", ["matmul", "dot", "inner", "vdot", "matvec", "vecmat"])
def test_every_pair_of_ranks(name: str, rng: np.random.Generator) -> None:
    ours, theirs = getattr(jax_nano, name), getattr(jnp, name)
    for lhs, rhs in itertools.product(SHAPES, SHAPES):
        a, b = integers(rng, lhs), integers(rng, rhs)
        try:
            want = jax.eval_shape(theirs, a, b)
        except Exception:
            compare(ours, theirs, a, b)
        else:
            assert jax.eval_shape(ours, a, b) == want
            if name in ("matmul", "dot"):
                np.testing.assert_array_equal(ours(a, b), getattr(np, name)(a, b))


@pytest.mark.parametrize("name", ["matmul", "dot", "inner", "vdot", "matvec", "vecmat"])
def test_under_jit(name: str, rng: np.random.Generator) -> None:
    a, b = integers(rng, (4,)), integers(rng, (4, 4))
    args = {"matvec": (b, a), "vdot": (b, b)}.get(name, (a, b))
    compare(jax.jit(getattr(jax_nano, name)), jax.jit(getattr(jnp, name)), *args)


@pytest.mark.parametrize(
    "shapes",
    [((7, 1, 3, 4), (1, 5, 4, 2)), ((1, 1, 3, 4), (1, 1, 4, 2)), ((5, 3, 4), (7, 1, 4, 2)), ((3, 4), (2, 2, 4, 5))],
)
def test_matmul_broadcasts(shapes: tuple, rng: np.random.Generator) -> None:
    compare(jax_nano.matmul, jnp.matmul, *(integers(rng, shape) for shape in shapes))


@pytest.mark.parametrize(
    "axes", [0, 1, 2, 3, (0, 0), (1, -1), ([0, 1], [1, 0]), ((), ()), (5, 0), 1.5, ([0], 1), ([0], [0, 1])]
)
@pytest.mark.parametrize("shapes", [((3, 3), (3, 3)), ((3, 4), (4, 3)), ((2, 3, 4), (3, 4, 2))])
def test_tensordot(axes: Any, shapes: tuple, rng: np.random.Generator) -> None:
    args = [integers(rng, shape) for shape in shapes]
    compare(partial(jax_nano.tensordot, axes=axes), partial(jnp.tensordot, axes=axes), *args)


EINSUMS = [
    ("ij,jk", [(3, 4), (4, 5)]),
    ("ij,jk->ki", [(3, 4), (4, 5)]),
    ("bij,bjk->ikb", [(2, 3, 4), (2, 4, 5)]),
    ("bqhd,bkhd->bhqk", [(2, 3, 4, 5), (2, 6, 4, 5)]),
    ("bhqk,bkhd->bqhd", [(2, 4, 3, 6), (2, 6, 4, 5)]),
    ("...ij,...jk->...ik", [(2, 3, 4), (4, 5)]),
    ("...ij,...jk", [(2, 1, 3, 4), (7, 4, 5)]),
    ("i,j", [(3,), (4,)]),
    ("i,i", [(3,), (3,)]),
    ("i,i->i", [(3,), (3,)]),
    ("ij,ij->", [(3, 4), (3, 4)]),
    ("ii", [(3, 3)]),
    ("ij->ji", [(3, 4)]),
    ("ii,ij->j", [(3, 3), (3, 4)]),
    ("ij,kl->il", [(3, 4), (5, 6)]),
    ("ij,jk->ik", [(3, 1), (4, 5)]),
    ("ij,jk,kl", [(2, 3), (3, 4), (4, 5)]),
    ("ij,jk,kl->li", [(2, 3), (3, 4), (4, 5)]),
    ("bij,bjk,bkl,l->bi", [(2, 3, 4), (2, 4, 5), (2, 5, 6), (6,)]),
    ("a,b,c->abc", [(2,), (3,), (4,)]),
    ("ij,jk->il", [(3, 4), (4, 5)]),
    ("ij,jk", [(3, 4), (5, 6)]),
    ("ij,jk", [(3, 4)]),
    ("ijk,jk", [(3, 4), (4, 5)]),
    ("i$,jk", [(3, 4), (4, 5)]),
]


@pytest.mark.parametrize(("subscripts", "shapes"), EINSUMS)
@pytest.mark.parametrize("optimize", ["auto", False, True])
def test_einsum(subscripts: str, shapes: list, optimize: Any, rng: np.random.Generator) -> None:
    args = [integers(rng, shape) for shape in shapes]
    ours = partial(jax_nano.einsum, subscripts, optimize=optimize)
    compare(ours, partial(jnp.einsum, subscripts, optimize=optimize), *args)


def test_einsum_in_its_other_forms(rng: np.random.Generator) -> None:
    a, b, c = (integers(rng, shape) for shape in ((3, 4), (4, 5), (5, 2)))
    compare(jax_nano.einsum, jnp.einsum, a, (0, 1), b, (1, 2), (2, 0))
    for optimize in ([(0, 1), (0, 1)], [(1, 2), (0, 1)], "greedy"):
        args = "ij,jk,kl->il", a, b, c
        compare(partial(jax_nano.einsum, optimize=optimize), partial(jnp.einsum, optimize=optimize), *args)
    compare(jax_nano.einsum, jnp.einsum, "ij,jk", np.asarray(a), np.asarray(b))
    compare(jax_nano.einsum, jnp.einsum, "ij,j", a, [1, 2, 3, 4])
    compare(partial(jax_nano.einsum, out=a), partial(jnp.einsum, out=a), "ij,jk", a, b)
    ours = partial(jax_nano.einsum, preferred_element_type=jnp.float32)
    theirs = partial(jnp.einsum, preferred_element_type=jnp.float32)
    compare(ours, theirs, "ij,jk,kl", *(x.astype(jnp.bfloat16) for x in (a, b, c)))


OPTIMIZE = [
    *("auto", "optimal", "greedy", "branch-1", "branch-2", "branch-all", "auto-hq", "dp", "eager", "nonsense", ""),
    *(True, False, None, 1, 2.5, opt_einsum.BranchBound()),
    *([], (), [()], [0], [(0,)], [(0, 1)], [(1, 0)], ((0, 1),), [[0, 1]], [(0, 1), (0, 1)], ((1, 2), (0, 1))),
    *([(0, 2), (0, 1)], [(0, 1, 2)], [(2, 1, 0)], [(0, 1), (0, 1), (0, 1)], [(0, 3), (0, 1)], [(-1, 0), (0, 1)]),
    *(["einsum_path", (0, 1), (0, 1)], [(0, 0), (0, 1)]),
]


@pytest.mark.parametrize("optimize", OPTIMIZE, ids=str)
def test_every_kind_of_optimize(optimize: Any, rng: np.random.Generator) -> None:
    """Paths of two and three operands, as jnp reads them: the same result, or the same error."""
    arrays = [integers(rng, shape) for shape in ((3, 4), (4, 5), (5, 2))]
    for subscripts, count in (("ij,jk,kl->li", 3), ("ij,jk->ki", 2), ("ij->ji", 1)):
        ours, theirs = (partial(m.einsum, subscripts, optimize=optimize) for m in (jax_nano, jnp))
        compare(ours, theirs, *arrays[:count])


def test_dot_general_fits_jnps_hook(rng: np.random.Generator) -> None:
    for subscripts, shapes in EINSUMS:
        args = [integers(rng, shape) for shape in shapes]
        ours = partial(jnp.einsum, subscripts, _dot_general=jax_nano.dot_general)
        compare(ours, partial(jnp.einsum, subscripts), *args)


@pytest.mark.parametrize(
    "numbers",
    [
        (((1,), (0,)), ((), ())),
        ((1, 0), ((), ())),  # lax takes an int for a sequence of one
        (([-1], [0]), ([], [])),
        (((2,), (0,)), ((), ())),
        (((1,), (0,)), ((0,), ())),
        (((1,), (1,)), ((1,), (0,))),
        (((1, 1), (0, 0)), ((), ())),
        (((0,), (0,)), ((), ())),
        (((1,), ()), ((), ())),
        (((1.0,), (0,)), ((), ())),
        (((1,), (0,)),),
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.vmap(f, (None, 0))], ids=["eager", "jit", "vmap"])
def test_dot_general_errors(numbers: Any, wrap: Callable, rng: np.random.Generator) -> None:
    lhs, rhs = integers(rng, (3, 4)), integers(rng, (4, 4, 5) if "vmap" in repr(wrap) else (4, 5))
    try:
        want = wrap(lambda a, b: jax.lax.dot_general(a, b, numbers))(lhs, rhs)
    except Exception as error:
        with pytest.raises(type(error)):
            wrap(lambda a, b: jax_nano.dot_general(a, b, numbers))(lhs, rhs)
    else:
        np.testing.assert_array_equal(wrap(lambda a, b: jax_nano.dot_general(a, b, numbers))(lhs, rhs), want)


BAD = ["text", object(), None, np.array(["a"]), [1.0, 2.0], {}, np.zeros((2, 2), "M8[s]")]


@pytest.mark.parametrize("name", ["matmul", "dot", "inner", "vdot", "matvec", "vecmat", "tensordot"])
@pytest.mark.parametrize("bad", BAD, ids=lambda x: type(x).__name__)
def test_what_is_not_an_array(name: str, bad: Any) -> None:
    good = np.ones((2, 2), np.float32)
    for args in ((bad, good), (good, bad)):
        compare(getattr(jax_nano, name), getattr(jnp, name), *args)


@pytest.mark.parametrize("bad", BAD[:4], ids=lambda x: type(x).__name__)
def test_dot_general_of_what_is_not_an_array(bad: Any) -> None:
    numbers = (((0,), (0,)), ((), ()))
    for args in ((bad, np.ones(2)), (np.ones(2), bad)):
        with pytest.raises((TypeError, ValueError, AttributeError)) as want:
            jax.lax.dot_general(*args, numbers)
        with pytest.raises(want.type):
            jax_nano.dot_general(*args, numbers)


@pytest.mark.parametrize(
    "preferred", ["int8", "float64", "text", "complex64", object, int, float, bool, np.zeros(1)], ids=str
)
@pytest.mark.parametrize("name", ["matmul", "dot", "inner", "vdot", "tensordot"])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_preferred_element_type(name: str, preferred: Any, dtype: str, rng: np.random.Generator) -> None:
    x = integers(rng, (4, 4), dtype)
    options = {"preferred_element_type": preferred}
    compare(partial(getattr(jax_nano, name), **options), partial(getattr(jnp, name), **options), x, x)


@pytest.mark.parametrize(
    "precision", [None, "highest", "bfloat16", "nonsense", jax.lax.Precision.HIGH, ("high", "default"), 3]
)
def test_precision(precision: Any, rng: np.random.Generator) -> None:
    x = integers(rng, (4, 4))
    for name in ("matmul", "dot", "tensordot"):
        ours, theirs = (partial(getattr(m, name), precision=precision) for m in (jax_nano, jnp))
        compare(ours, theirs, x, x)
    try:
        want = jax.make_jaxpr(partial(jnp.matmul, precision=precision))(x, x).eqns[0].params["precision"]
    except ValueError:
        return
    assert jax.make_jaxpr(partial(jax_nano.matmul, precision=precision))(x, x).eqns[0].params["precision"] == want


def test_out_of_memory_shapes_fail_as_in_jax() -> None:
    x = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)
    assert jax.eval_shape(jax_nano.matmul, x, x).shape == (2**20, 2**20)


def test_products_with_sizes_of_zero(rng: np.random.Generator) -> None:
    for m, k, n in itertools.product((0, 3), repeat=3):
        compare(jax_nano.matmul, jnp.matmul, integers(rng, (m, k)), integers(rng, (k, n)))
        compare(jax_nano.matmul, jnp.matmul, integers(rng, (2, m, k)), integers(rng, (2, k, n)))


def test_array_like_arguments() -> None:
    class Wrapped:
        def __jax_array__(self) -> jax.Array:
            return jnp.ones((2, 2), jnp.float32)

    for name in ("matmul", "dot", "inner", "vdot"):
        compare(getattr(jax_nano, name), getattr(jnp, name), Wrapped(), np.ones((2, 2), np.float32))
    compare(jax_nano.dot, jnp.dot, 2, np.ones((2, 2), np.float32))
    compare(jax_nano.dot, jnp.dot, 2.5, 3)
