"""Random products, random dtypes, random transformations, against the same program with lax."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from programs import outcome

import jax_nano
from jax_nano._core import contraction
from jax_nano._core.contraction import Labels

# The same examples in every run; the sizes leave a few seconds for each of the tests.
EXAMPLES = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class Product:
    """A product by labels, and the size of each label."""

    labels: Labels
    sizes: dict[int, int]
    seed: int

    @property
    def subscripts(self) -> str:
        lhs, rhs, out = ("".join(LETTERS[x] for x in dims) for dims in self.labels)
        return f"{lhs},{rhs}->{out}"

    @property
    def dimension_numbers(self) -> tuple:
        numbers, _ = contraction.dimension_numbers_of(self.labels)
        return numbers

    def arrays(self, lhs: Any = jnp.float32, rhs: Any = jnp.float32) -> list[jax.Array]:
        rng = np.random.default_rng(self.seed)
        return [
            jnp.asarray(reference.random(rng, tuple(self.sizes[x] for x in dims)), dtype)
            for dims, dtype in zip(self.labels, (lhs, rhs), strict=False)
        ]


@st.composite
def products(draw: st.DrawFn, natural: bool = False, most: int = 2, sizes: Any = None) -> Product:
    """Up to `most` labels of each kind, in any order; natural: the result is in lax's order."""
    kinds = [draw(st.integers(0, most)) for _ in range(4)]
    starts = np.cumsum([0, *kinds])
    batch, contracting, m, n = (list(range(a, b)) for a, b in itertools.pairwise(starts))
    lhs = tuple(draw(st.permutations(batch + contracting + m)))
    rhs = tuple(draw(st.permutations(batch + contracting + n)))
    out = tuple(draw(st.permutations(batch + m + n)))
    labels = Labels(lhs, rhs, out)
    if natural:
        labels = labels._replace(out=labels.batch + labels.lhs_free + labels.rhs_free)
    sizes = sizes if sizes is not None else st.sampled_from([0, 1, 1, 2, 3, 3, 4, 5, 9, 17])
    return Product(
        labels,
        {x: draw(sizes) for x in range(int(starts[-1]))},
        draw(st.integers(0, 2**32 - 1)),
    )


def dot_general(product: Product, module: Any, **options: Any) -> Callable[..., jax.Array]:
    fun = jax_nano.dot_general if module is jax_nano else jax.lax.dot_general
    return lambda lhs, rhs: fun(lhs, rhs, product.dimension_numbers, **options)


def same(got: Any, want: Any, k: int, dtype: Any = jnp.float32) -> None:
    """Equal types; values within twice the rounding bound of a sum of k, on the scale of the array."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    eps = float(jnp.finfo(dtype).eps)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.aval == y.aval
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.all(np.abs(x - y) <= 8 * max(k, 4) * eps * max(np.max(np.abs(y), initial=0), 4.0))


@given(products())
@settings(EXAMPLES, max_examples=100)
def test_any_product_of_any_layout(product: Product) -> None:
    lhs, rhs = product.arrays()
    got = jax_nano.einsum(product.subscripts, lhs, rhs)
    want = jax.eval_shape(lambda a, b: jnp.einsum(product.subscripts, a, b), lhs, rhs)
    assert (got.shape, got.dtype, got.weak_type) == (want.shape, want.dtype, want.weak_type)
    reference.expected(product.subscripts, np.asarray(lhs), np.asarray(rhs)).check(got, product)


@given(products(natural=True), st.booleans(), st.booleans())
@settings(EXAMPLES, max_examples=80)
def test_dot_general_with_transposed_operands(product: Product, flip_lhs: bool, flip_rhs: bool) -> None:
    """Operands arrive through transposes that are folded into the call."""
    lhs, rhs = product.arrays()

    @jax.jit
    def program(a: jax.Array, b: jax.Array) -> jax.Array:
        return dot_general(product, jax_nano)(a.T if flip_lhs else a, b.T if flip_rhs else b)

    got = program(lhs.T if flip_lhs else lhs, rhs.T if flip_rhs else rhs)
    reference.expected(product.subscripts, np.asarray(lhs), np.asarray(rhs)).check(got, product)


FLOATS = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])


@given(products(natural=True, most=1), FLOATS, FLOATS, st.sampled_from([None, jnp.float32]))
@settings(EXAMPLES, max_examples=40)
def test_dtypes(product: Product, lhs_dtype: Any, rhs_dtype: Any, preferred: Any) -> None:
    args = product.arrays(lhs_dtype, rhs_dtype)
    ours, theirs = (dot_general(product, m, preferred_element_type=preferred) for m in (jax_nano, jax.lax))
    (got, our_error), (want, error) = outcome(ours, *args), outcome(theirs, *args)
    assert our_error == error
    if error is None:
        same(got, want, int(np.prod([product.sizes[x] for x in product.labels.contracting])), want.dtype)


SMALL = st.sampled_from([0, 1, 2, 3, 5])
TRANSFORMATIONS: dict[str, Callable[[Callable, jax.Array, jax.Array], Any]] = {
    "jit": lambda f, a, b: jax.jit(f)(a, b),
    "grad": lambda f, a, b: jax.grad(lambda a, b: jnp.sin(f(a, b)).sum(), (0, 1))(a, b),
    "jvp": lambda f, a, b: jax.jvp(f, (a, b), (jnp.cos(a), jnp.sin(b))),
    "vmap": lambda f, a, b: jax.vmap(f)(jnp.stack([a, 2 * a]), jnp.stack([b, b + 1])),
    "vmap lhs": lambda f, a, b: jax.vmap(f, (-1, None))(jnp.stack([a, 2 * a], -1), b),
    "vmap rhs": lambda f, a, b: jax.vmap(f, (None, 0), -1)(a, jnp.stack([b, 2 * b])),
    "scan": lambda f, a, b: jax.lax.scan(lambda c, x: (c + 1, f(x * c, b)), 1.0, jnp.stack([a, -a])),
    "grad of vmap": lambda f, a, b: jax.grad(lambda b: (jax.vmap(f, (0, None))(jnp.stack([a, 2 * a]), b) ** 2).sum())(
        b
    ),
    "jvp of grad": lambda f, a, b: jax.jvp(jax.grad(lambda a: jnp.sin(f(a, b)).sum()), (a,), (jnp.cos(a),)),
    "checkpoint": lambda f, a, b: jax.grad(lambda a: jax.checkpoint(f)(jnp.sin(a), b).sum())(a),
}


@given(products(natural=True, most=1, sizes=SMALL), st.sampled_from(sorted(TRANSFORMATIONS)))
@settings(EXAMPLES, max_examples=60)
def test_transformations(product: Product, name: str) -> None:
    args = product.arrays()
    program = TRANSFORMATIONS[name]
    got, want = (program(dot_general(product, m), *args) for m in (jax_nano, jax.lax))
    k = int(np.prod([max(size, 1) for size in product.sizes.values()]))
    same(got, want, k)


@given(products(natural=True, most=1, sizes=st.sampled_from([4, 8])), st.data(), st.booleans())
@settings(EXAMPLES, max_examples=25)
def test_shard_map(product: Product, data: st.DataObject, check_vma: bool) -> None:
    """One label is sharded over four devices; a contracting one is summed over them."""
    if not product.sizes or jax.device_count() < 4:
        return
    sharded = data.draw(st.sampled_from(sorted(product.sizes)))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    lhs, rhs, out = (P(*("x" if x == sharded else None for x in dims)) for dims in product.labels)
    args = product.arrays()

    def program(module: Any) -> Any:
        def body(a: jax.Array, b: jax.Array) -> jax.Array:
            part = dot_general(product, module)(a, b)
            return jax.lax.psum(part, "x") if sharded in product.labels.contracting else part

        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(lhs, rhs), out_specs=out, check_vma=check_vma))(*args)

    same(program(jax_nano), program(jax.lax), int(np.prod(list(product.sizes.values()))))


WRONG = st.lists(st.integers(-1, 3), max_size=2).map(tuple)


@given(products(natural=True, most=1, sizes=SMALL), WRONG, WRONG, WRONG, WRONG)
@settings(EXAMPLES, max_examples=100)
def test_wrong_dimension_numbers(product: Product, lc: tuple, rc: tuple, lb: tuple, rb: tuple) -> None:
    """Mostly errors: type and message are lax's. At times a product after all."""
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in product.arrays()]
    numbers = ((lc, rc), (lb, rb))
    ours, theirs = (
        outcome(jax.eval_shape, lambda a, b, m=m: m.dot_general(a, b, numbers), *args) for m in (jax_nano, jax.lax)
    )
    assert ours == theirs
