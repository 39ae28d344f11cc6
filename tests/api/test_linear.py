"""linear against its composition in JAX's own operations: values, errors, transformations, sharding, programs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import epilogues
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import ops, outcome

import jax_nano
from jax_nano._core import activations
from jax_nano._dispatch import decision

FLOATS = ("float32", "bfloat16", "float16")
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


def composed(x, w, b=None, *, activation=None, residual=None, scale=1.0, preferred_element_type=None):
    """What linear means, with nothing of jax_nano but the activations' names."""
    arrays = [v for v in (x, w, b, residual) if v is not None]
    dtype = preferred_element_type or jnp.result_type(*arrays)
    wide = jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
    y = jnp.matmul(x, w, preferred_element_type=wide)
    y = y if scale == 1 else y * jnp.asarray(scale, wide)
    y = y if b is None else y + b.astype(dtype).astype(wide)
    y = activations.FUNCTIONS[activations.name_of(activation)](y)
    y = y if residual is None else y + residual.astype(dtype).astype(wide)
    return y.astype(dtype)


def arrays(rng, m=9, k=17, n=33, dtype="float32", batch=()):
    """x, w, b and a residual whose products are of order 1."""
    shapes = ((*batch, m, k), (k, n), (n,), (*batch, m, n))
    x, w, b, r = (jnp.asarray(reference.random(rng, s), dtype) for s in shapes)
    return x, w / jnp.asarray(k**0.5, dtype), b, r


def close(got, want) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
        tolerance = TOLERANCE.get(str(y.dtype), 0)
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", epilogues.NAMES)
def test_values(rng, activation, dtype):
    x, w, b, r = arrays(rng, dtype=dtype)
    for options in ({}, {"residual": r}, {"scale": 0.5, "residual": r}):
        for bias in (None, b):
            close(
                jax_nano.linear(x, w, bias, activation=activation, **options),
                composed(x, w, bias, activation=activation, **options),
            )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [1, 9])
def test_long_sums(rng, m, dtype):
    """Taken in pieces: bias, activation and residual meet their sum, once."""
    x, w, b, r = arrays(rng, m=m, k=9001, dtype=dtype)
    for activation in epilogues.NAMES:
        options = {"activation": activation, "residual": r, "scale": 0.5}
        close(jax_nano.linear(x, w, b, **options), composed(x, w, b, **options))


@pytest.mark.parametrize("shape", [(17,), (1, 17), (2, 3, 5, 17), (0, 17), (4, 0)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 40])
def test_shapes(rng, shape, n):
    """Any number of dimensions before K, rows and columns of one, empty ones, no terms."""
    *batch, k = shape
    x, w = (jnp.asarray(reference.random(rng, s)) for s in (shape, (k, n)))
    b, r = (jnp.asarray(reference.random(rng, s)) for s in ((n,), (*batch, n)))
    for options in ({}, {"activation": "silu"}, {"residual": r}, {"activation": "tanh", "residual": r}):
        for bias in (None, b):
            close(jax_nano.linear(x, w, bias, **options), composed(x, w, bias, **options))


@pytest.mark.parametrize(
    ("dtypes", "preferred"),
    [
        (("bfloat16", "bfloat16", "float32", "float32"), None),
        (("float32", "bfloat16", "bfloat16", "float32"), None),
        (("bfloat16", "bfloat16", "bfloat16", "bfloat16"), "float32"),
        (("float16", "float16", "float16", "float16"), "float32"),
        (("float32", "float32", "float32", "float32"), "bfloat16"),
        (("int8", "int8", "int32", "int32"), "int32"),
        (("int8", "int8", "float32", "float32"), "float32"),
        (("int32", "float32", "int32", "float32"), None),
    ],
    ids=str,
)
def test_dtypes(rng, dtypes, preferred):
    """The result's dtype is that of all operands promoted, or the one asked for; rounded to it once."""
    shapes = ((5, 16), (16, 24), (24,), (5, 24))
    x, w, b, r = (jnp.asarray(reference.random(rng, s, np.float32) * 4, d) for s, d in zip(shapes, dtypes, strict=True))
    activation = None if preferred == "int32" else "relu"
    options = {"activation": activation, "residual": r, "preferred_element_type": preferred}
    got, want = jax_nano.linear(x, w, b, **options), composed(x, w, b, **options)
    assert got.dtype == want.dtype
    tolerance = TOLERANCE.get(str(want.dtype), 0)
    np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=tolerance, atol=40 * tolerance)


def test_float64(rng):
    with jax.enable_x64(True):
        x, w, b, r = arrays(rng, dtype="float64")
        for activation in epilogues.NAMES:
            options = {"activation": activation, "residual": r, "scale": 1.25}
            close(jax_nano.linear(x, w, b, **options), composed(x, w, b, **options))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (None, "none"),
        ("gelu", "gelu_tanh"),
        ("swish", "silu"),
        (jax.nn.relu, "relu"),
        (jax.nn.gelu, "gelu_tanh"),
        (partial(jax.nn.gelu, approximate=True), "gelu_tanh"),
        (partial(jax.nn.gelu, approximate=False), "gelu_erf"),
        (jax.nn.silu, "silu"),
        (jax.nn.swish, "silu"),
        (jnp.tanh, "tanh"),
        (jax.nn.tanh, "tanh"),
        (jax.lax.tanh, "tanh"),
        (jax.nn.sigmoid, "sigmoid"),
        (jax.lax.logistic, "sigmoid"),
    ],
)
def test_ways_to_name_an_activation(activation, name):
    assert activations.name_of(activation) == name


@pytest.mark.parametrize("activation", [n for n in epilogues.NAMES if n != "none"])
def test_extremes_are_those_of_jax_nn(activation):
    x = np.array([[-np.inf, np.inf, np.nan, 0.0, -1e30, 1e30, -200.0]], np.float32)
    ours = jax_nano.linear(np.ones((1, 1), np.float32), x, activation=activation)
    np.testing.assert_array_equal(ours, activations.FUNCTIONS[activation](jnp.asarray(x)))


@pytest.mark.parametrize("activation", [n for n in epilogues.NAMES if n not in ("none", "relu")])
def test_activations_err_no_more_than_xlas(rng, activation):
    """Over numbers of all exponents, and where the functions bend; and by 2 units in the last place at most."""
    x = np.concatenate([rng.uniform(-s, s, 100_000) for s in (1, 4, 12, 80)]).astype(np.float32)
    want = epilogues.exact(activation, x)
    ours = jax_nano.linear(np.ones((1, 1), np.float32), x[None], activation=activation)[0]
    xlas = jax.jit(activations.FUNCTIONS[activation])(x)
    error, of_xla = (epilogues.ulps(np.asarray(y), want).max() for y in (ours, xlas))
    assert error <= min(of_xla, 2)


BAD: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "K": (lambda x, w, b, r: jax_nano.linear(x[:, 1:], w), TypeError, "contracting dimensions"),
    "w of three dimensions": (lambda x, w, b, r: jax_nano.linear(x, w[None]), ValueError, "w of two"),
    "x of none": (lambda x, w, b, r: jax_nano.linear(x[0, 0], w), ValueError, "at least one dimension"),
    "b": (lambda x, w, b, r: jax_nano.linear(x, w, b[1:]), TypeError, r"b of shape \(33,\), got \(32,\)"),
    "b of two dimensions": (lambda x, w, b, r: jax_nano.linear(x, w, b[None]), TypeError, "b of shape"),
    "residual": (lambda x, w, b, r: jax_nano.linear(x, w, residual=r[:1]), TypeError, "residual of shape"),
    "activation": (
        lambda x, w, b, r: jax_nano.linear(x, w, activation="mish"),
        ValueError,
        "unknown activation 'mish'",
    ),
    "function": (lambda x, w, b, r: jax_nano.linear(x, w, activation=jnp.sin), ValueError, "unknown activation"),
    "integers": (
        lambda x, w, b, r: jax_nano.linear(x.astype("int8"), w.astype("int8"), activation="gelu"),
        TypeError,
        "requires a floating-point result, got int8",
    ),
    "scale of integers": (
        lambda x, w, b, r: jax_nano.linear(x.astype("int8"), w.astype("int8"), scale=2.0),
        TypeError,
        "requires a floating-point result",
    ),
    "no array": (lambda x, w, b, r: jax_nano.linear(x, "w"), TypeError, "got w of type"),
    "scale that is traced": (
        lambda x, w, b, r: jax.jit(lambda s: jax_nano.linear(x, w, scale=s))(2.0),
        jax.errors.ConcretizationTypeError,
        "scale|concrete",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(rng, name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(*arrays(rng))
    with pytest.raises(error, match=message):
        jax.eval_shape(call, *arrays(rng))


# --- transformations ----------------------------------------------------------------------------------------------


def loss(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A scalar that depends on every element of f in another way."""
    return lambda x, w, b, r: jnp.sin(f(x, w, b, residual=r, **options) * 1.5).sum()


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("activation", epilogues.NAMES)
def test_gradients(rng, activation, with_residual):
    x, w, b, r = arrays(rng)
    r = r if with_residual else None
    which = (0, 1, 2, 3) if with_residual else (0, 1, 2)
    ours, theirs = (loss(f, activation=activation, scale=0.75) for f in (jax_nano.linear, composed))
    close(jax.jit(jax.value_and_grad(ours, which))(x, w, b, r), jax.value_and_grad(theirs, which)(x, w, b, r))
    tangents = (x * 0.5, w * 0.25, b, r)[: len(which)]
    primals = (x, w, b, r)[: len(which)]

    def at(f):
        return lambda *args: f(*args, *(None,) * (4 - len(args)))

    close(jax.jvp(at(ours), primals, tangents), jax.jvp(at(theirs), primals, tangents))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", "tanh"])
def test_gradients_of_narrow_dtypes(rng, activation, dtype):
    """As near to the gradient in float32 as the dtype is fine."""
    args = arrays(rng, dtype=dtype)
    got = jax.grad(lambda *a: loss(jax_nano.linear, activation=activation)(*a).astype("float32"), (0, 1, 2, 3))(*args)
    wide = [v.astype("float32") for v in args]
    want = jax.grad(loss(composed, activation=activation), (0, 1, 2, 3))(*wide)
    for g, v in zip(got, want, strict=True):
        assert g.dtype == dtype
        size = float(jnp.abs(v).max())
        np.testing.assert_allclose(np.float64(g), np.float64(v), rtol=0, atol=8 * TOLERANCE[dtype] * size)


@pytest.mark.parametrize("activation", epilogues.NAMES)
def test_second_order(rng, activation):
    args = arrays(rng, 3, 4, 5)

    def twice(f):
        first = jax.grad(loss(f, activation=activation), (0, 1))
        return jax.grad(lambda *a: sum(jnp.cos(g).sum() for g in first(*a)), (0, 1, 2))(*args)

    close(twice(jax_nano.linear), twice(composed))


def test_gradient_of_one_operand(rng):
    x, w, b, r = arrays(rng)
    for i in range(4):
        ours, theirs = (jax.grad(loss(f, activation="silu"), i)(x, w, b, r) for f in (jax_nano.linear, composed))
        close(ours, theirs)


@pytest.mark.parametrize("activation", ["none", "gelu_erf"])
@pytest.mark.parametrize(
    "axes",
    [
        (0, None, None, 0),
        (1, None, None, None),
        (2, None, None, 0),
        (None, 0, 1, None),
        (None, 2, None, 1),
        (0, 0, None, 2),
        (0, 1, 0, 0),
        (None, None, 1, None),
        (None, None, None, 0),
    ],
    ids=str,
)
def test_vmap(rng, axes, activation):
    """Of any operands along any axis, and of that once more."""
    args = arrays(rng)
    size = 3
    batched = [
        v if axis is None else jnp.moveaxis(jnp.stack([v * (1 + i) for i in range(size)]), 0, axis)
        for v, axis in zip(args, axes, strict=True)
    ]

    def f(g):
        return lambda x, w, b, r: g(x, w, b, residual=r, activation=activation)

    close(jax.vmap(f(jax_nano.linear), axes)(*batched), jax.vmap(f(composed), axes)(*batched))
    twice = [v if axis is None else jnp.stack([v, v + 1]) for v, axis in zip(batched, axes, strict=True)]
    outer = tuple(None if axis is None else 0 for axis in axes)
    close(*(jax.vmap(jax.vmap(f(g), axes), outer)(*twice) for g in (jax_nano.linear, composed)))


def test_vmap_of_gradients(rng):
    x, w, b, r = arrays(rng, batch=(4,))
    axes = (0, None, None, 0)
    close(
        *(
            jax.vmap(jax.grad(loss(f, activation="gelu"), (0, 1, 2)), axes)(x, w, b, r)
            for f in (jax_nano.linear, composed)
        )
    )


def test_scan_and_remat(rng):
    x, w, b, _ = arrays(rng, 8, 16, 16)
    ws = jnp.stack([w, -w, w + 0.1])

    def model(f, ws):
        layer = jax.checkpoint(lambda h, w: (f(h, w, b, activation="gelu", residual=h), None))
        return jax.lax.scan(layer, x, ws)[0].sum()

    close(*(jax.jit(jax.value_and_grad(partial(model, f)))(ws) for f in (jax_nano.linear, composed)))


# --- programs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", epilogues.NAMES)
def test_one_call_and_nothing_else(rng, activation, dtype):
    x, w, b, r = arrays(rng, dtype=dtype)
    f = partial(jax_nano.linear, activation=activation, scale=0.5)
    counted = ops(lambda x, w, b, r: f(x, w, b, residual=r), x, w, b, r)
    assert dict(counted) == {"linear": 1, "parameter": 4}
    transposed = ops(lambda x, w, b, r: f(x.T, w.T, b, residual=r), x.T, w.T, b, r)
    assert dict(transposed) == {"linear": 1, "parameter": 4}


def test_calls_of_a_training_step(rng):
    """relu follows from the result: one call forward. gelu stops before itself. Two plain products go backward."""
    x, w, b, _ = arrays(rng)
    for activation in ("relu", "gelu"):
        layer = partial(jax_nano.linear, activation=activation)
        counted = ops(jax.grad(lambda x, w, b, f=layer: jnp.sin(f(x, w, b)).sum(), (0, 1, 2)), x, w, b)
        assert (counted["linear"], counted["product"]) == (1, 2)
        assert not counted["dot"]
        assert not counted["transpose"]
        assert not counted["copy"]


def test_vmap_is_one_call(rng):
    x, w, b, r = arrays(rng, batch=(4,))
    f = jax.vmap(lambda x, r: jax_nano.linear(x, w, b, activation="silu", residual=r))
    counted = ops(f, x, r)
    assert counted["linear"] == 1
    assert not counted["copy"]
    assert not counted["fusion"]


def test_declined_products_are_xlas(rng, monkeypatch):
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))
    x, w, b, _ = arrays(rng, 2, 3, 4)
    f = partial(jax_nano.linear, activation="relu")
    jax.clear_caches()
    assert not ops(f, x, w, b)["linear"]
    close(f(x, w, b), composed(x, w, b, activation="relu"))


def test_export(rng):
    x, w, b, _ = arrays(rng)
    f = jax.jit(partial(jax_nano.linear, activation="gelu"))
    exported = jax.export.export(f, disabled_checks=jax_nano.export_checks())(x, w, b)
    again = jax.export.deserialize(bytearray(exported.serialize()))
    np.testing.assert_array_equal(again.call(x, w, b), f(x, w, b))


def test_export_of_any_size_and_platform(rng):
    x, w, b, r = arrays(rng)
    f = jax.jit(lambda x, r: jax_nano.linear(x, w, b, activation="gelu", residual=r))
    rows = jax.export.symbolic_shape("m")
    specs = (jax.ShapeDtypeStruct((*rows, 17), x.dtype), jax.ShapeDtypeStruct((*rows, 33), x.dtype))
    options = {"disabled_checks": jax_nano.export_checks(), "platforms": ("cpu", "cuda")}
    exported = jax.export.export(f, **options)(*specs)
    np.testing.assert_array_equal(exported.call(x, r), f(x, r))


def test_bits_do_not_depend_on_the_split(rng):
    """Whole and in pieces by rows: as over threads."""
    x, w, b, r = arrays(rng, 200, 64, 300)
    f = jax.jit(partial(jax_nano.linear, activation="gelu_erf"))
    whole = f(x, w, b, residual=r)
    pieces = [f(x[i : i + 50], w, b, residual=r[i : i + 50]) for i in range(0, 200, 50)]
    assert np.asarray(whole).tobytes() == np.concatenate(pieces).tobytes()


# --- several devices ----------------------------------------------------------------------------------------------

MESHES = {
    "rows": (P("x", None), P(), P(), P("x", None), 1),
    "columns": (P(), P(None, "x"), P("x"), P(None, "x"), 1),
    "rows and columns": (P("x", None), P(None, "y"), P("y"), P("x", "y"), 1),
    "K": (P(None, "x"), P("x", None), P(), P(), 0),
    "replicated": (P(), P(), P(), P(), 1),
}


@pytest.mark.parametrize("name", MESHES)
def test_sharded(rng, name):
    """Fused on the shards; where K is sharded the epilogue waits for the sum over the devices."""
    if jax.device_count("cpu") < 4:
        pytest.skip("a backend with fewer devices was started before these tests")
    *specs, fused = MESHES[name]
    mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Auto,) * 2)
    args = arrays(rng, 16, 32, 24)
    placed = [jax.device_put(v, NamedSharding(mesh, spec)) for v, spec in zip(args, specs, strict=True)]
    f = jax.jit(lambda x, w, b, r: jax_nano.linear(x, w, b, activation="gelu", residual=r, scale=0.5))
    want = composed(*args[:3], activation="gelu", residual=args[3], scale=0.5)
    np.testing.assert_allclose(f(*placed), want, rtol=1e-5, atol=1e-5)
    counted = ops(f, *placed)
    assert counted["linear"] == fused
    assert counted["all-reduce"] == 1 - fused
    assert not counted["all-gather"]
    gradients = (
        jax.jit(jax.grad(loss(g, activation="relu"), (0, 1, 2)))(*a)
        for g, a in ((jax_nano.linear, placed), (composed, args))
    )
    for got, right in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4)


def test_in_shard_map(rng):
    if jax.device_count("cpu") < 4:
        pytest.skip("a backend with fewer devices was started before these tests")
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,))
    x, w, b, r = arrays(rng, 16, 32, 24)
    f = partial(jax_nano.linear, activation="silu")
    specs = (P("x", None), P(), P(), P("x", None))
    mapped = jax.shard_map(lambda x, w, b, r: f(x, w, b, residual=r), mesh=mesh, in_specs=specs, out_specs=P("x", None))
    close(jax.jit(mapped)(x, w, b, r).astype(x.dtype), composed(x, w, b, activation="silu", residual=r))
    got = jax.jit(jax.grad(lambda w, b: mapped(x, w, b, r).sum(), (0, 1)))(w, b)
    want = jax.grad(lambda w, b: composed(x, w, b, activation="silu", residual=r).sum(), (0, 1))(w, b)
    for g, v in zip(got, want, strict=True):
        np.testing.assert_allclose(g, v, rtol=1e-4, atol=1e-4)


EXPLICIT = {
    "rows and columns": (P("x", None), P(None, "y"), P("y"), P("x", "y")),
    "bias and residual elsewhere": (P("x", None), P(None, "y"), P(), P()),
    "K": (P(None, "x"), P("x", None), P(), P()),
    "the same axis twice": (P("x", None), P(None, "x"), P(), P()),
}


@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit_sharding_is_that_of_the_composition(rng, name):
    """Types, values, and errors, of calls and gradients."""
    if jax.device_count("cpu") < 4:
        pytest.skip("a backend with fewer devices was started before these tests")
    mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        args = arrays(rng, 16, 32, 24)
        placed = [jax.device_put(v, NamedSharding(mesh, spec)) for v, spec in zip(args, EXPLICIT[name], strict=True)]

        def layer(f, x, w, b, r):
            return f(x, w, b, activation="gelu", residual=r)

        for program in (layer, lambda f, *a: jax.grad(lambda *a: layer(f, *a).sum(), (0, 1, 2, 3))(*a)):
            (got, error), (want, expected) = (outcome(jax.jit(partial(program, f)), *placed) for f in (ours, composed))
            assert error == expected
            assert [jax.typeof(v) for v in jax.tree.leaves(got)] == [jax.typeof(v) for v in jax.tree.leaves(want)]
            for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(g, v, rtol=1e-4, atol=1e-4)


def ours(x, w, b, **options):
    return jax_nano.linear(x, w, b, **options)


def test_out_sharding(rng):
    """What a sharded K needs, and it is matmul's."""
    if jax.device_count("cpu") < 4:
        pytest.skip("a backend with fewer devices was started before these tests")
    mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        args = arrays(rng, 16, 32, 24)
        specs = (P("y", "x"), P("x", None), P(), P("y"))
        x, w, b, r = (jax.device_put(v, NamedSharding(mesh, spec)) for v, spec in zip(args, specs, strict=True))
        f = jax.jit(lambda *a: jax_nano.linear(*a[:3], activation="silu", residual=a[3], out_sharding=P("y", None)))
        got = f(x, w, b, r)
        want = composed(*args[:3], activation="silu", residual=args[3])
        assert jax.typeof(got).sharding.spec == P("y", None)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        (_, error), (_, expected) = (
            outcome(partial(g, out_sharding=P("z", None)), x, w) for g in (jax_nano.linear, jax_nano.matmul)
        )
        assert error == expected
        assert error is not None
