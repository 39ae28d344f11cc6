"""The checks are checked: rules that are broken on purpose, each of which the property tests' checks must notice.

The checks are those of test_properties.py, on a few fixed products instead of random ones.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jax_nano
from jax_nano import api
from jax_nano._core import contraction
from jax_nano._core.contraction import Labels
from jax_nano._dispatch import decision
from jax_nano._ops import dot_general


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"mutated_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


properties = _load("test_properties")

# No two sizes are equal, so that no swap of dimensions goes unseen.
BATCHED = properties.Product(Labels((3, 0, 1, 2), (1, 4, 2, 0), (0, 3, 4)), {0: 2, 1: 3, 2: 4, 3: 5, 4: 6}, seed=1)
PERMUTED = properties.Product(Labels((2, 0), (1, 0), (1, 2)), {0: 3, 1: 4, 2: 5}, seed=2)
# The dimension that a kernel cannot store last.
BATCH_LAST = properties.Product(Labels((0, 1, 2), (0, 2, 3), (1, 3, 0)), {0: 2, 1: 3, 2: 4, 3: 5}, seed=3)


def layouts() -> None:
    for product in (BATCHED, PERMUTED, BATCH_LAST):
        lhs, rhs = product.arrays()
        got = jax_nano.einsum(product.subscripts, lhs, rhs)
        reference.expected(product.subscripts, np.asarray(lhs), np.asarray(rhs)).check(got, product)


def transposed_operands() -> None:
    lhs, rhs = BATCHED.arrays()
    perm = (2, 0, 3, 1)  # not its own inverse
    back = tuple(np.argsort(perm))
    dot = properties.dot_general(BATCHED, jax_nano)
    got = jax.jit(lambda a, b: dot(a.transpose(back), b.T))(lhs.transpose(perm), rhs.T)
    reference.expected(BATCHED.subscripts, np.asarray(lhs), np.asarray(rhs)).check(got)


def transformed(name: str) -> None:
    args = BATCHED.arrays()
    program = properties.TRANSFORMATIONS[name]
    got, want = (program(properties.dot_general(BATCHED, module), *args) for module in (jax_nano, jax.lax))
    properties.same(got, want, k=12)


def dtypes() -> None:
    """Types of results and gradients, and the parameters of a gradient's products."""
    for lhs, rhs, options in (
        (jnp.bfloat16, jnp.bfloat16, {"preferred_element_type": jnp.float32}),
        (jnp.float32, jnp.bfloat16, {"precision": jax.lax.Precision.HIGHEST}),
    ):
        args = BATCHED.arrays(lhs, rhs)
        programs = []
        for module in (jax_nano, jax.lax):
            dot = properties.dot_general(BATCHED, module, **options)
            gradient = jax.grad(lambda a, b, dot=dot: dot(a, b).astype(jnp.float32).sum(), (0, 1))
            jaxpr = jax.make_jaxpr(gradient)(*args)
            products = [e for e in jaxpr.eqns if "dot_general" in e.primitive.name]
            chosen = [(e.params["precision"], e.params["preferred_element_type"]) for e in products]
            programs.append((jaxpr.out_avals, chosen))
        assert programs[0] == programs[1]


def conjugates() -> None:
    a, b = (jnp.asarray([1 + 2j, 3 - 1j]) * x for x in (1, 1j))
    m = jnp.outer(a, b + 1)
    np.testing.assert_allclose(jax_nano.vdot(a, b), jnp.vdot(a, b), rtol=1e-5)
    np.testing.assert_allclose(jax_nano.vecmat(a, m), jnp.vecmat(a, m), rtol=1e-5)


def weak_types() -> None:
    for args in ((jnp.ones((2, 3)), jnp.ones((3, 4))), (jnp.float32(2) * jnp.ones(3), jnp.ones(3))):
        got, want = (jax.eval_shape(module.matmul, *args) for module in (jax_nano, jnp))
        assert (got.dtype, got.weak_type) == (want.dtype, want.weak_type)


CHECKS: list[Callable[[], None]] = [
    layouts,
    transposed_operands,
    dtypes,
    conjugates,
    weak_types,
    *(partial(transformed, name) for name in properties.TRANSFORMATIONS),
]


def _batched_one_later(labels: Labels, *dims: int | None) -> Labels:
    new, *rest = (made := _TRUE["batched"](labels, *dims)).out
    return made._replace(out=(*rest[:1], new, *rest[1:]))


def _paired_backwards(numbers: Any, *rest: Any) -> Labels:
    (lhs, rhs), batch = numbers
    return _TRUE["labels_of"](((lhs, rhs[::-1]), batch), *rest)


def _inverse_perm(labels: Labels) -> tuple[Any, Any]:
    numbers, perm = _TRUE["dimension_numbers_of"](labels)
    return numbers, perm and tuple(perm[-i] for i in range(1, len(perm) + 1))


def _gradient_without(name: str) -> Callable[..., Any]:
    place = {"precision": 4, "preferred_element_type": 5}[name]
    return lambda *args: _TRUE["_cotangent"](*args[:place], None, *args[place + 1 :])


_TRUE: dict[str, Any] = {
    name: getattr(module, name)
    for module, name in (
        (contraction, "batched"),
        (contraction, "labels_of"),
        (contraction, "dimension_numbers_of"),
        (contraction, "lhs_cotangent"),
        (contraction, "rhs_cotangent"),
        (dot_general, "_cotangent"),
        (decision, "stored"),
    )
}
MUTATIONS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "vmap's axis is not the first": (contraction, "batched", _batched_one_later),
    "vmap forgets the axis of rhs": (
        contraction,
        "batched",
        lambda labels, lhs, _: _TRUE["batched"](labels, lhs, None),
    ),
    "vmap swaps the axes": (contraction, "batched", lambda labels, lhs, rhs: _TRUE["batched"](labels, rhs, lhs)),
    "contracting dimensions are paired backwards": (contraction, "labels_of", _paired_backwards),
    "a gradient is laid out as its transpose": (
        contraction,
        "lhs_cotangent",
        lambda labels: (made := _TRUE["lhs_cotangent"](labels))._replace(out=made.out[::-1]),
    ),
    "the gradient of rhs is that of lhs": (contraction, "rhs_cotangent", lambda labels: _TRUE["lhs_cotangent"](labels)),
    "a transpose of an operand is forgotten": (contraction, "before_transpose", lambda operand, perm: operand),
    "a transpose of an operand is applied twice": (
        contraction,
        "before_transpose",
        lambda operand, perm: tuple(operand[i] for i in perm),
    ),
    "the result is permuted the wrong way": (contraction, "dimension_numbers_of", _inverse_perm),
    "the transpose after a call is dropped": (
        decision,
        "stored",
        lambda *args: _TRUE["stored"](*args)._replace(perm=None),
    ),
    "a gradient loses the precision": (dot_general, "_cotangent", _gradient_without("precision")),
    "a gradient loses the preferred type": (dot_general, "_cotangent", _gradient_without("preferred_element_type")),
    "nothing is conjugated": (api, "jnp", None),
    "results are weakly typed": (api, "_result_type", lambda name, preferred, *arrays: (arrays[0].dtype, True)),
}


class _NumpyWithoutConj:
    """jnp, but for `conj`."""

    def __getattr__(self, name: str) -> Any:
        return (lambda x: x) if name == "conj" else getattr(jnp, name)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing that was traced or lowered by other rules is found again."""

    def clear() -> None:
        jax.clear_caches()
        decision.dispatch.cache_clear()
        _TRUE["stored"].cache_clear()

    clear()
    yield
    clear()


def test_the_checks_pass_as_things_are(fresh: None) -> None:
    for check in CHECKS:
        check()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_is_noticed(name: str, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, wrong = MUTATIONS[name]
    monkeypatch.setattr(module, attribute, wrong or _NumpyWithoutConj())
    for check in CHECKS:
        try:
            check()
        except Exception:
            return
    pytest.fail(f"no check notices that {name}")
