"""JAX's tables over primitives: ours are wherever lax.dot_general is, and mean what its entry means."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.experimental import checkify, jet, sparse
from jax.experimental import pallas as pl
from jax.experimental.roofline import roofline
from programs import outcome, run_python

import jax_nano

# Tables of lax.dot_general in which one or both of ours are not, and why.
EXCEPTIONS = {
    "jax._src.core.pp_eqn_rules": "how an equation is printed: ours are printed with all of their parameters",
    "jax._src.checkify.nan_primitives": "read when the module is imported, to fill error_checks",
    "jax.experimental.sparse.transform._BCOO_STANDARD_PRIMITIVES": "read at import, to fill sparse_rules_bcoo",
    "jax.experimental.sparse.transform._BCSR_STANDARD_PRIMITIVES": "read at import, to fill sparse_rules_bcsr",
    "jax._src.interpreters.ad.fancy_transposes": "linear has its rule in primitive_transposes",
    "jax._src.interpreters.mlir._platform_specific_lowerings[cpu]": "one rule of ours serves all platforms",
    "jax._src.interpreters.mlir._platform_specific_lowerings[tpu]": "one rule of ours serves all platforms",
    # Within a kernel that Pallas compiles for an accelerator, where a call into the host's library cannot be.
    "jax._src.pallas.fuser.block_spec.eval_rules": "Pallas",
    "jax._src.pallas.fuser.block_spec.pull_block_spec_rules": "Pallas",
    "jax._src.pallas.fuser.block_spec.push_block_spec_rules": "Pallas",
    "jax._src.pallas.fuser.block_spec.usage_rules": "Pallas",
    "jax._src.pallas.mosaic.lowering.lowering_rules[tc]": "Pallas",
    "jax._src.pallas.mosaic.lowering.lowering_rules[coretype.tc]": "Pallas",
    "jax._src.pallas.triton.lowering.triton_lowering_rules": "Pallas",
}

# Imports every module of JAX whose text names lax's primitive, and prints the containers that hold it: directly, or in
# a table of tables. Aliases are printed once, by the first name in order.
WALK = """
import importlib, sys, warnings
from collections.abc import Mapping
from pathlib import Path
import jax
from jax.extend.core.primitives import dot_general_p
import jax_nano

from jax_nano.quantized import quantized_p

ours = {"dot_general": jax_nano.dot_general_p, "linear": jax_nano.linear_p, "quantized": quantized_p}
root = Path(jax.__file__).parent
for path in sorted(root.rglob("*.py")):
    if "dot_general_p" in path.read_text():
        name = ".".join(("jax", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        except ImportError:
            continue  # for accelerators that are not here, or a test of JAX's own

def holds(x):
    try:
        return isinstance(x, (Mapping, list, tuple, set, frozenset)) and dot_general_p in x
    except Exception:
        return False

seen, modules = set(), [(k, m) for k, m in sorted(sys.modules.items()) if k.split(".")[0] == "jax"]
for module_name, module in sorted(modules, key=lambda x: (not x[0].startswith("jax._src"), x[0])):
    for name, value in sorted(vars(module).items()):
        if name.startswith("__"):
            continue
        found = [(f"{module_name}.{name}", value)]
        if isinstance(value, dict):
            found += [(f"{module_name}.{name}[{str(key).lower()}]", x) for key, x in list(value.items())]
        for label, table in found:
            if holds(table) and id(table) not in seen:
                seen.add(id(table))
                print(label, *(k for k, p in ours.items() if p in table))
"""


def test_ours_are_in_every_table() -> None:
    found = {name: entries for name, *entries in map(str.split, run_python(WALK, timeout=300).splitlines())}
    # So that a walk that finds nothing does not pass.
    assert {"jax._src.interpreters.mlir._lowerings", "jax._src.checkify.error_checks"} <= found.keys()
    assert {"jax.experimental.jet.jet_rules", "jax._src.pallas.cost_estimate._cost_rules"} <= found.keys()
    missing = {name for name, entries in found.items() if entries != ["dot_general", "linear", "quantized"]}
    assert missing <= EXCEPTIONS.keys(), missing - EXCEPTIONS.keys()


def test_tables_that_were_there_before() -> None:
    """Whichever of the two is imported first."""
    run_python(
        """
        from jax.experimental import checkify, jet
        import jax.experimental.sparse
        import jax_nano
        from jax._src.checkify import error_checks
        from jax.experimental.sparse.transform import sparse_rules_bcoo
        for p in (jax_nano.dot_general_p, jax_nano.linear_p):
            assert p in error_checks and p in jet.jet_rules and p in sparse_rules_bcoo
        """
    )


def test_an_entry_that_fails_is_a_warning() -> None:
    run_python(
        """
        import warnings
        from jax_nano._core import imports
        import colorsys as before
        def fail(module):
            raise KeyError("made by the test")
        for name in ("colorsys", "this_is_no_module", "fractions"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                imports.when_imported(name, fail)
                try:
                    __import__(name)
                except ModuleNotFoundError as error:
                    assert error.name == name == "this_is_no_module"
            assert len(caught) == (name != "this_is_no_module"), (name, caught)
        """
    )


def arrays(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(reference.random(rng, shape)) for shape in shapes]


def einsum(a: Any, b: Any) -> jax.Array:
    return jax_nano.einsum("ij,jk->ki", a, b)


LAYER = {"activation": "silu", "scale": 0.5}


def layer(a: Any, b: Any) -> jax.Array:
    return jax_nano.linear(a, b, b[0], residual=a, **LAYER)


def same_layer(a: Any, b: Any) -> jax.Array:
    return jax.nn.silu(0.5 * (a @ b) + b[0]) + a


def weights(b: Any) -> jax.Array:
    """Integers in b's shape."""
    return jnp.asarray(np.arange(np.prod(b.shape)).reshape(b.shape) % 5 + 1, jnp.int8)


def quantised(a: Any, b: Any) -> jax.Array:
    return jax_nano.quantized_matmul(a, weights(b), b[:1], bias=b[0])


def dequantised(a: Any, b: Any) -> jax.Array:
    return a @ (weights(b) * b[:1]) + b[0]


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "matmul": (jax_nano.matmul, jnp.matmul),
    "einsum": (einsum, partial(jnp.einsum, "ij,jk->ki")),
    "linear": (layer, same_layer),
    "quantised": (quantised, dequantised),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("bad", ["operand", "result", "none"])
def test_checkify_finds_nan(name: str, bad: str, rng: np.random.Generator) -> None:
    a, b = arrays(rng, (8, 8), (8, 8))
    if bad == "operand":
        a = a.at[2, 3].set(jnp.nan)
    elif bad == "result":  # infinity less infinity
        a, b = a.at[2, :2].set(jnp.array([jnp.inf, -jnp.inf])), b.at[:2].set(1.0)
    ours, theirs = PAIRS[name]
    for wrap in (lambda f: f, jax.jit, lambda f: jax.grad(lambda a, b: f(a, b).sum())):
        found = [checkify.checkify(wrap(f), errors=checkify.float_checks)(a, b)[0].get() for f in (ours, theirs)]
        assert (found[0] is None) == (found[1] is None) == (bad == "none"), found
    nan = checkify.checkify(ours, errors=checkify.float_checks)(a, b)[0].get()
    assert bad == "none" or "generated by primitive: jax_nano" in nan
    scanned = checkify.checkify(
        lambda a, b: jax.lax.scan(lambda x, _: (ours(x, b), None), a, None, length=2)[0], errors=checkify.float_checks
    )
    assert (scanned(a, b)[0].get() is None) == (bad == "none")


@pytest.mark.parametrize("name", PAIRS)
def test_jet_to_third_order(name: str, rng: np.random.Generator) -> None:
    a, b, *rest = arrays(rng, *((6, 6),) * 8)
    ours, theirs = (jet.jet(lambda a, b, f=f: f(jnp.sin(a), b), (a, b), (rest[:3], rest[3:])) for f in PAIRS[name])
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(y))))


@pytest.mark.parametrize("gradient", [False, True])
def test_jet_of_attention(gradient: bool, rng: np.random.Generator) -> None:
    """Of float operands, beside a mask and lengths, which have no derivatives."""
    *args, bias = arrays(rng, *((1, 5, 2, 8),) * 3, (1, 2, 5, 5))
    given = {"bias": bias, "is_causal": True, "key_value_seq_lengths": jnp.asarray([4], jnp.int32)}
    series = tuple(arrays(rng, *((1, 5, 2, 8),) * 3) for _ in args)

    def of(attention: Any) -> Any:
        def program(*x: jax.Array) -> jax.Array:
            return attention(*x, mask=jnp.arange(5) % 2 == 0, **given)

        function = jax.grad(lambda *x: jnp.sum(program(*x) ** 2)) if gradient else program
        return jet.jet(function, tuple(args), series)

    ours, theirs = of(jax_nano.dot_product_attention), of(jax.nn.dot_product_attention)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(y))))


def dense(x: Any) -> np.ndarray:
    return np.asarray(x.todense() if isinstance(x, sparse.JAXSparse) else x)


@pytest.mark.parametrize("kind", ["BCOO", "BCSR"])
def test_sparsify(kind: str, rng: np.random.Generator) -> None:
    m, b = arrays(rng, (9, 6), (6, 7))
    m = jnp.where(m > 0.3, m, 0)
    s = sparse.BCOO.fromdense(m) if kind == "BCOO" else sparse.BCSR.fromdense(m)
    tried = {
        "matmul": lambda np_, s, b: np_.matmul(s, b),
        "einsum": lambda np_, s, b: np_.einsum("ij,jk->ki", s, b),
        "from the right": lambda np_, s, b: np_.matmul(b.T, s.T),
        "both": lambda np_, s, b: np_.einsum("ij,kj->ki", s, s),
        "vector": lambda np_, s, b: np_.matmul(s, b[:, 0]),
    }
    worked = 0
    for name, fun in tried.items():
        ours, theirs = (sparse.sparsify(partial(fun, module)) for module in (jax_nano, jnp))
        (got, our_error), (want, error) = outcome(ours, s, b), outcome(theirs, s, b)
        if our_error is None:
            worked += 1
            np.testing.assert_allclose(dense(got), fun(jnp, m, b), rtol=1e-5, atol=1e-5, err_msg=name)
        if error is None:
            assert isinstance(got, sparse.JAXSparse) == isinstance(want, sparse.JAXSparse)
        else:  # jnp.einsum exchanges operands, and then JAX has no rule
            assert our_error is None or our_error[0] is error[0], name
    assert worked >= 2
    got = sparse.sparsify(partial(jax_nano.linear, residual=m @ b))(s, b, b[0])
    np.testing.assert_allclose(got, 2 * (m @ b) + b[0], rtol=1e-5, atol=1e-5)
    if kind == "BCOO":
        got = sparse.sparsify(jax_nano.quantized_matmul)(s, weights(b), b[0])
        np.testing.assert_allclose(dense(got), m @ (weights(b) * b[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shapes", [((8, 24), (24, 40)), ((3, 8, 24), (3, 24, 40)), ((24,), (24, 40))])
def test_estimates_of_cost(shapes: tuple[tuple[int, ...], ...], rng: np.random.Generator) -> None:
    a, b = arrays(rng, *shapes)
    (_, ours), (_, theirs) = (roofline(f)(a, b) for f in (jax_nano.matmul, jnp.matmul))
    assert (ours.flops, ours.hbm_bytes) == (theirs.flops, theirs.hbm_bytes)
    assert theirs.flops > 0
    assert pl.estimate_cost(jax_nano.matmul, a, b) == pl.estimate_cost(jnp.matmul, a, b)
    if b.ndim == 2:
        bias = b[0]
        assert roofline(jax_nano.linear)(a, b, bias)[1].flops == theirs.flops
        assert pl.estimate_cost(jax_nano.linear, a, b, bias).flops == pl.estimate_cost(jnp.matmul, a, b).flops
        q = weights(b)
        assert roofline(jax_nano.quantized_matmul)(a, q, bias)[1].flops == theirs.flops
        assert pl.estimate_cost(jax_nano.quantized_matmul, a, q, bias).flops >= theirs.flops


def test_linear_is_transposed_where_it_is_linear(rng: np.random.Generator) -> None:
    x, w, g = arrays(rng, (5, 6), (6, 7), (5, 7))
    for f, h, of in (
        (lambda x: jax_nano.linear(x, w, scale=2.0), lambda x: 2 * (x @ w), x),
        (lambda w: jax_nano.linear(x, w), lambda w: x @ w, w),
    ):
        (got,), (want,) = (jax.linear_transpose(fun, of)(g) for fun in (f, h))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match=r"[Tt]ransp"):
        jax.linear_transpose(lambda x: jax_nano.linear(x, w, activation="tanh"), x)(g)


def test_quantised_products_are_transposed_where_they_are_linear(rng: np.random.Generator) -> None:
    x, b, g = arrays(rng, (5, 6), (6, 7), (5, 7))
    q = weights(b)
    for f, h, of in (
        (lambda x: jax_nano.quantized_matmul(x, q, b[0]), lambda x: x @ (q * b[0]), x),
        (lambda s: jax_nano.quantized_matmul(x, q, s), lambda s: x @ (q * s), b[0]),
        (lambda r: jax_nano.quantized_matmul(x * 0, q, b[0], residual=r), lambda r: r, g),
    ):
        (got,), (want,) = (jax.linear_transpose(fun, of)(g) for fun in (f, h))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match=r"[Tt]ransp"):
        jax.linear_transpose(lambda x: jax_nano.quantized_matmul(x, q, b[0], activation="tanh"), x)(g)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"query_seq_lengths": np.asarray([3, 0], np.int32)}])
def test_attention_is_transposed_where_it_is_linear(options: dict[str, Any], rng: np.random.Generator) -> None:
    """In values; solvers ask for that, which need no derivative."""
    q, k, v = arrays(rng, (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8))

    def transposed(attention: Any) -> Any:
        return jax.linear_transpose(lambda v: attention(q, k, v, **options), v)(q)[0]

    want = transposed(jax.nn.dot_product_attention)
    np.testing.assert_allclose(transposed(jax_nano.dot_product_attention), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match=r"[Tt]ransp"):
        jax.linear_transpose(lambda k: jax_nano.dot_product_attention(q, k, v, **options), k)(q)


@pytest.mark.parametrize("policy", ["dots_saveable", "dots_with_no_batch_dims_saveable", "nothing_saveable"])
def test_policies_know_quantised_products(policy: str, rng: np.random.Generator) -> None:
    x, b = arrays(rng, (5, 6), (6, 7))
    counted = []
    for f in (quantised, dequantised):
        saved = getattr(jax.checkpoint_policies, policy)
        layer = jax.checkpoint(lambda x, f=f: jnp.sum(jnp.sin(f(x, b))), policy=saved)
        text = str(jax.make_jaxpr(jax.grad(layer))(x))
        counted.append(text.count("jax_nano_quantized[") if f is quantised else text.count("dot_general["))
    assert counted[0] == (2 if policy == "nothing_saveable" else 1)
    assert counted[1] == counted[0] + 1  # its gradient is one too
