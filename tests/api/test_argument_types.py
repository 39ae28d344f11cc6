"""Every dtype beside every other and Python's numbers, in every function: what jnp and lax give, or their error.

Of programs that are lowered and no further: types, not values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from programs import outcome

import jax_nano
from jax_nano._core import contraction, cost
from jax_nano._dispatch import decision

PLAIN = ["bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))]
FLOATS = ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"]
# All that JAX has, by whichever names this release of it knows.
NARROW = sorted(
    name
    for name in dir(ml_dtypes)
    if name.startswith(("int", "uint", "float")) and hasattr(jnp, name) and name not in PLAIN
)
DTYPES = [*PLAIN, *FLOATS, *NARROW]
WIDE = ("int64", "uint64", "float64", "complex128")  # only with x64

NUMBERS = (((1,), (0,)), ((), ()))


def functions(numpy: Any, lax: Any) -> dict[str, Callable[..., Any]]:
    """Each public function of a product of two square matrices, from these modules."""
    named = {name: getattr(numpy, name) for name in ("matmul", "dot", "vdot", "inner", "tensordot", "matvec", "vecmat")}
    return {
        **named,
        "dot_general": partial(lax.dot_general, dimension_numbers=NUMBERS),
        "dot_general, float32": partial(lax.dot_general, dimension_numbers=NUMBERS, preferred_element_type=jnp.float32),
        "einsum": partial(numpy.einsum, "ij,jk->ki"),
        "einsum of three": lambda a, b: numpy.einsum("ij,jk,kl->il", a, b, a),
    }


OURS, THEIRS = functions(jax_nano, jax_nano), functions(jnp, jax.lax)


def linear(a: Any, b: Any) -> Any:
    """What jax_nano.linear of two operands means, in jnp's functions."""
    return jnp.matmul(a, b)


OURS["linear"], THEIRS["linear"] = jax_nano.linear, linear


def type_of(fun: Callable[..., Any], *args: Any) -> Any:
    out, error = outcome(jax.eval_shape, fun, *args)
    return error or (out.shape, out.dtype, out.weak_type)


# What stands for all functions: each way in which they reach the two primitives, with each kind of result.
LOWERED = ("matmul", "dot_general, float32", "einsum", "linear")


def beside(lhs: str, x64: bool) -> list[tuple[str, tuple[str, ...]]]:
    """The dtypes to try beside one, and the functions: narrow ones beside each other have no promotion in any."""
    if x64:  # which changes the rest of the matrix only
        return [(rhs, tuple(OURS)) for rhs in DTYPES if rhs not in NARROW]
    different = [(rhs, ("matmul", "dot_general")) for rhs in NARROW if lhs in NARROW and rhs != lhs]
    return different + [
        (rhs, tuple(OURS)) for rhs in DTYPES if rhs not in WIDE and (rhs == lhs or not {lhs, rhs} <= {*NARROW})
    ]


MATRIX = [(lhs, False) for lhs in DTYPES if lhs not in WIDE] + [(lhs, True) for lhs in DTYPES if lhs not in NARROW]


@pytest.fixture
def short_tracebacks() -> Iterator[None]:
    """JAX takes longer to filter the traceback of an error than to find it."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


@pytest.mark.usefixtures("short_tracebacks")
@pytest.mark.parametrize(("lhs", "x64"), MATRIX)
def test_every_dtype_beside_every_other(lhs: str, x64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))  # it looks at dtypes too
    with jax.enable_x64(x64):
        for rhs, names in beside(lhs, x64):
            a, b = (jax.ShapeDtypeStruct((16, 16), x) for x in (lhs, rhs))
            valid = []
            for name in names:
                got, want = type_of(OURS[name], a, b), type_of(THEIRS[name], a, b)
                failed = want[0] if isinstance(want[0], type) else None
                assert got == want or (failed and got[0] is failed and sorted(got[1]) == sorted(want[1])), (name, rhs)
                valid += [] if failed or name not in LOWERED else [name]
            ours, theirs = (jax.jit(lambda a, b, t=t: [t[x](a, b) for x in valid]) for t in (OURS, THEIRS))  # noqa: B023
            _, error = outcome(ours.lower, a, b)  # a type that StableHLO cannot name
            assert error is None or error[0] is outcome(theirs.lower, a, b)[1][0], rhs


def test_the_gate_knows_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))
    for name in DTYPES:
        assert cost.element_bytes(name) == jnp.dtype(name).itemsize
    matrix, vector = (contraction.labels_of(((((x,), (0,))), ((), ())), None, x + 1, 2) for x in (1, 0))
    for dtypes in itertools.product(DTYPES, repeat=2):
        for labels, lhs in ((matrix, (64, 64)), (vector, (64,)), (matrix, (4, 4)), (matrix, (1, 64))):
            names = jnp.dtype(dtypes[0]), jnp.dtype(dtypes[1]), jnp.dtype(dtypes[0])
            product = decision.Product(labels, lhs, (lhs[-1], 64), names, None)
            found = decision.dispatch(product, decision.this_machine(), decision.policy)
            assert (found.signature is None) == bool(found.declined)


SCALAR: dict[str, Callable[[Any, Any], Callable[..., Any]]] = {
    "dot": lambda numpy, lax: numpy.dot,
    "vdot": lambda numpy, lax: numpy.vdot,
    "inner": lambda numpy, lax: numpy.inner,
    "tensordot": lambda numpy, lax: partial(numpy.tensordot, axes=0),
    "tensordot of two axes": lambda numpy, lax: numpy.tensordot,
    "einsum": lambda numpy, lax: partial(numpy.einsum, ","),
    "einsum of three": lambda numpy, lax: lambda x, y: numpy.einsum(",,", x, y, x),
    "einsum of vectors": lambda numpy, lax: partial(numpy.einsum, "i,i"),
    "dot_general": lambda numpy, lax: partial(lax.dot_general, dimension_numbers=(((), ()), ((), ()))),
    "dot_general of vectors": lambda numpy, lax: partial(lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ()))),
    "matmul": lambda numpy, lax: numpy.matmul,
    "matvec": lambda numpy, lax: numpy.matvec,
    "vecmat": lambda numpy, lax: numpy.vecmat,
}

THREE = np.arange(3, dtype=np.float32)
TRANSFORMED: dict[str, Callable[[Callable[..., Any], Any], Any]] = {
    "call": lambda f, x: f(x, x),
    "with another": lambda f, x: f(x, 2),
    "jit": lambda f, x: jax.jit(lambda x: f(x, x))(x),
    "grad": lambda f, x: jax.grad(lambda x: f(x, x))(x),
    "grad of lhs": lambda f, x: jax.grad(lambda x: f(x, 2.0))(x),
    "grad of rhs": lambda f, x: jax.grad(lambda x: f(3, x))(x),
    "jit grad": lambda f, x: jax.jit(jax.grad(lambda x: f(x, x)))(x),
    "jacfwd": lambda f, x: jax.jacfwd(lambda x: f(x, x))(x),
    "jacrev": lambda f, x: jax.jacrev(lambda x: f(x, x))(x),
    "hessian": lambda f, x: jax.hessian(lambda x: f(x, x) * x)(x),
    "vmap": lambda f, x: jax.vmap(lambda y: f(x, y))(THREE),
    "vmap of lhs": lambda f, x: jax.vmap(lambda y: f(y, x))(THREE),
    "vmap grad": lambda f, x: jax.vmap(jax.grad(lambda y: f(x, y)))(THREE),
    "linear_transpose": lambda f, x: jax.linear_transpose(lambda y: f(x, y), x)(1.0)[0],
    "checkpoint": lambda f, x: jax.grad(jax.checkpoint(lambda x: f(x, x)))(x),
}


@pytest.mark.parametrize("transformed", TRANSFORMED)
def test_pythons_numbers(transformed: str) -> None:
    """They stay what they are in eager transformations: no arrays, with neither shape nor dtype."""
    numbers = (1.5, 2, True) if transformed in ("grad of rhs", "vmap") else (1.5,)
    for name, x in itertools.product(SCALAR, numbers):
        ours, theirs = SCALAR[name](jax_nano, jax_nano), SCALAR[name](jnp, jax.lax)
        (got, our_error), (want, error) = (outcome(TRANSFORMED[transformed], f, x) for f in (ours, theirs))
        if name.startswith("dot_general"):  # whose texts count dimensions with those of vmap, or without
            our_error, error = our_error and our_error[0], error and error[0]
        assert our_error == error, (name, x)
        if error is None:
            assert jax.typeof(got) == jax.typeof(want), (name, x)
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want), err_msg=f"{name} of {x}")
