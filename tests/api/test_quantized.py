"""`quantized_matmul`, `quantize` and `QuantizedArray`: values, errors, transformations, export."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import ops

import jax_nano
from jax_nano._core import native, record, spec

WEIGHTS = tuple(spec.WEIGHTS)
has_kernels = pytest.mark.skipif(not native.target(), reason="this CPU runs no kernels")


def operands(
    weights: str, m: int = 3, n: int = 64, k: int = 96, groups: int = 3, x: str = "float32", zero: bool = False
) -> tuple[Any, ...]:
    """x, q, scale[, zero point]."""
    rng = np.random.default_rng(list(f"{weights}{m}{n}{k}{groups}{x}".encode()))
    facts = spec.WEIGHTS[weights]
    if facts.form[0] in "iu":
        q = rng.integers(-facts.flip, 2**facts.bits - facts.flip, (k, n))
    else:
        q = rng.standard_normal((k, n)) * 3
    scale = jnp.asarray(rng.random((groups, n)) + 0.5, jnp.float32)
    points = (jnp.asarray(rng.integers(0, 8, (groups, n)), weights),) if zero else ()
    return jnp.asarray(rng.standard_normal((m, k)), x), jnp.asarray(q, jnp.dtype(weights)), scale, *points


def in_float64(x: Any, q: Any, scale: Any, zero: Any = None) -> np.ndarray:
    w = np.asarray(q.astype(jnp.float32), np.float64)
    size = w.shape[0] // scale.shape[0]
    if zero is not None:
        w = w - np.repeat(np.asarray(zero.astype(jnp.float32), np.float64), size, 0)
    return np.asarray(x.astype(jnp.float32), np.float64) @ (w * np.repeat(np.asarray(scale, np.float64), size, 0))


def close(got: Any, want: Any) -> None:
    assert got.shape == want.shape
    tolerance = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}[got.dtype.name]
    scale = np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got.astype(jnp.float32)), want, rtol=tolerance, atol=tolerance * scale)


def calls(f: Any, *args: Any) -> int:
    """How many of our custom calls a compiled program has."""
    return jax.jit(f).lower(*args).compile().as_text().count(f'custom_call_target="{native.QUANTIZED_TARGET_NAME}"')


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("x", ["float32", "bfloat16", "float16"])
def test_values(weights: str, x: str) -> None:
    for m, zero in itertools.product((1, 3, 20), (False, True)):
        if zero and weights.startswith("float"):
            continue
        given = operands(weights, m, x=x, zero=zero)
        want = in_float64(*given)
        close(jax_nano.quantized_matmul(*given), want)
        close(jax.jit(jax_nano.quantized_matmul)(*given), want)
        wide = jax_nano.quantized_matmul(*given, preferred_element_type=jnp.float32)
        close(wide, want)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_both_orders_of_storage(weights: str) -> None:
    for m, zero in itertools.product((1, 20), (False, True)):
        if zero and weights.startswith("float"):
            continue
        x, *given = operands(weights, m, zero=zero)
        want = in_float64(x, *given)
        turned = [v.T for v in given]
        close(jax_nano.quantized_matmul(x, *turned, contracting=1), want)
        # A transpose inside of a program is read through.
        program = jax.jit(lambda x, *w: jax_nano.quantized_matmul(x, *(v.T for v in w)))
        close(program(x, *turned), want)
        back = jax.jit(lambda x, *w: jax_nano.quantized_matmul(x, *(v.T for v in w), contracting=1))
        close(back(x, *given), want)


@has_kernels
def test_weights_become_one_call() -> None:
    for weights in WEIGHTS:
        assert calls(jax_nano.quantized_matmul, *operands(weights)) == 1
    x, q, scale, zero = operands("uint4", zero=True)
    assert calls(jax_nano.quantized_matmul, x, q, scale, zero) == 1
    text = jax.jit(lambda x, q, s: jax_nano.quantized_matmul(x, q.T, s)).lower(x, q.T, scale).compile().as_text()
    # The transpose of the weights is gone; that of the scales is small.
    assert "u4[96,64]" not in text


@has_kernels
def test_the_report_has_it() -> None:
    jax_nano.clear_report()
    x, q, scale = operands("int8", 7, 80)  # of a shape that no other test has compiled
    jax.block_until_ready(jax.jit(jax_nano.quantized_matmul)(x, q, scale))
    (found,) = [product for product, _ in record.products()]
    assert found.declined is None
    assert "scales of 3 groups of" in found.kernel
    assert "quantized_i8" in jax_nano.report()


def test_leading_dimensions_and_vectors() -> None:
    x, q, scale = operands("int8", 12)
    want = in_float64(x, q, scale)
    close(jax_nano.quantized_matmul(x.reshape(2, 3, 2, 96), q, scale), want.reshape(2, 3, 2, 64))
    close(jax_nano.quantized_matmul(x[0], q, scale), want[0])
    assert jax_nano.quantized_matmul(x[:0], q, scale).shape == (0, 64)


def test_shapes_of_scales() -> None:
    x, q, _ = operands("int8", groups=1)
    scale = jnp.asarray(np.random.default_rng(0).random(64) + 0.5, jnp.float32)
    want = in_float64(x, q, scale[None])
    close(jax_nano.quantized_matmul(x, q, scale), want)
    close(jax_nano.quantized_matmul(x, q, scale[None]), want)
    close(jax_nano.quantized_matmul(x, q.T, scale, contracting=1), want)
    close(jax_nano.quantized_matmul(x, q, jnp.float32(0.25)), in_float64(x, q, jnp.full((1, 64), 0.25)))
    close(jax_nano.quantized_matmul(x, q, scale, group=96), want)


def test_what_has_no_kernel_is_the_composition() -> None:
    x, q, scale = operands("int8", k=24, groups=3)  # groups of 8
    close(jax_nano.quantized_matmul(x, q, scale), in_float64(x, q, scale))
    x, q, scale = operands("int8")
    zero = jnp.asarray(np.random.default_rng(1).standard_normal(scale.shape), jnp.float32)
    close(jax_nano.quantized_matmul(x, q, scale, zero), in_float64(x, q, scale, zero))
    assert calls(jax_nano.quantized_matmul, x, q, scale, zero) == 0


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "contracting dimensions", {"x": jnp.zeros((3, 95))}),
        (TypeError, "floating-point", {"x": jnp.zeros((3, 96), jnp.int32)}),
        (TypeError, "one of int8", {"q": jnp.zeros((96, 64), jnp.int32)}),
        (ValueError, "two dimensions", {"q": jnp.zeros((96,), jnp.int8)}),
        (ValueError, "at least one dimension", {"x": jnp.float32(1)}),
        (ValueError, "for each of 64 columns", {"scale": jnp.ones(63)}),
        (ValueError, "groups that divide K", {"scale": jnp.ones((5, 64))}),
        (ValueError, "zero points of the scales' shape", {"zero_point": jnp.ones((2, 64), jnp.int8)}),
        (ValueError, "even sizes", {"q": jnp.zeros((96, 63), jnp.int4), "scale": jnp.ones(63)}),
        (ValueError, "groups of 31", {"group": 31}),
        (ValueError, "contracting", {"contracting": 2}),
        (ValueError, "activations to be", {"activations": "int4"}),
        (ValueError, "activation", {"activation": "cube"}),
        (ValueError, "bias of shape", {"bias": jnp.zeros(63)}),
        (ValueError, "residual of shape", {"residual": jnp.zeros((64,))}),
        (TypeError, "requires a scale", {"scale": None}),
        (TypeError, "floating-point result", {"preferred_element_type": jnp.int32}),
        (TypeError, "a", {"x": "a"}),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    x, q, scale = operands("int8")
    given = {"x": x, "q": q, "scale": scale, **change}
    with pytest.raises(error, match=message):
        jax_nano.quantized_matmul(**given)


@pytest.mark.parametrize("weights", ["int8", "int4", "float8_e5m2"])
def test_gradients(weights: str) -> None:
    x, q, scale = operands(weights, 5)

    def ours(x: Any, scale: Any) -> Any:
        return jnp.sum(jnp.sin(jax_nano.quantized_matmul(x, q, scale)))

    def theirs(x: Any, scale: Any) -> Any:
        w = q.astype(jnp.float32) * jnp.repeat(scale, 32, 0)
        return jnp.sum(jnp.sin(jnp.matmul(x, w, precision="highest")))

    x = x / 50
    for got, want in zip(jax.grad(ours, (0, 1))(x, scale), jax.grad(theirs, (0, 1))(x, scale), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())
    got, want = (jax.jvp(f, (x, scale), (x, scale))[1] for f in (ours, theirs))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_batching() -> None:
    x, q, scale = operands("int8", 6)
    want = in_float64(x, q, scale)
    batched = jax.vmap(lambda x: jax_nano.quantized_matmul(x, q, scale), in_axes=0)
    close(batched(x), want)
    middle = jax.vmap(lambda x: jax_nano.quantized_matmul(x, q, scale), in_axes=1, out_axes=1)
    close(middle(x.reshape(2, 3, 96)), want.reshape(2, 3, 64))
    both = jax.vmap(jax_nano.quantized_matmul)
    close(both(x, jnp.stack([q] * 6), jnp.stack([scale] * 6)), want)
    scales = jax.vmap(jax_nano.quantized_matmul, in_axes=(None, None, 0))(x, q, jnp.stack([scale, 2 * scale]))
    close(scales, np.stack([want, 2 * want]))


def test_it_can_be_exported() -> None:
    x, q, scale = operands("int4", 2)
    exported = jax.export.export(
        jax.jit(jax_nano.quantized_matmul), disabled_checks=jax_nano.export_checks(), platforms=("cpu",)
    )(x, q, scale)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x, q, scale), jax_nano.quantized_matmul(x, q, scale))
    (rows,) = jax.export.symbolic_shape("rows")
    shapes = [jax.ShapeDtypeStruct((rows, 96), x.dtype), q, scale]
    symbolic = jax.export.export(jax.jit(jax_nano.quantized_matmul), disabled_checks=jax_nano.export_checks())(*shapes)
    for m in (1, 30):
        given = operands("int4", m)
        close(symbolic.call(given[0], q, scale), in_float64(given[0], q, scale))


@pytest.mark.parametrize("contracting", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize(bits: int, symmetric: bool, contracting: int) -> None:
    rng = np.random.default_rng(7)
    w = rng.standard_normal((256, 64)).astype(np.float32) + (0 if symmetric else 0.5)
    given = w if contracting == 0 else w.T
    array = jax_nano.quantize(given, bits, group=64, symmetric=symmetric, contracting=contracting)
    assert array.q.dtype.name == {True: f"int{bits}", False: f"uint{bits}"}[symmetric]
    assert array.shape == (256, 64)
    assert array.nbytes == 256 * 64 * bits // 8 + 4 * 64 * (4 if symmetric else 5)
    grouped = w.reshape(4, 64, 64)
    if symmetric:
        step = np.abs(grouped).max(1) / (2 ** (bits - 1) - 1)
    else:
        step = (np.maximum(grouped.max(1), 0) - np.minimum(grouped.min(1), 0)) / (2**bits - 1)
    # A level off by the rounding of the zero point at most, half a level by that of the weight.
    most = np.repeat(step, 64, 0) * (0.501 if symmetric else 1.001)
    assert (np.abs(np.asarray(array.dequantize()) - w) <= most).all()
    x = jnp.asarray(rng.standard_normal((3, 256)), jnp.float32)
    want = np.asarray(x, np.float64) @ np.asarray(array.dequantize(), np.float64)
    close(x @ array, want)
    close(jax.jit(lambda x, w: x @ w)(x, array), want)
    close(np.asarray(x) @ array, want)


def test_quantize_groups_of_zeros_and_whole_columns() -> None:
    assert not np.asarray(jax_nano.quantize(jnp.zeros((128, 2)), 4).dequantize()).any()
    assert jax_nano.quantize(jnp.ones((96, 2)), group=None).scale.shape == (1, 2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_numbers_at_the_ends(bits: int, symmetric: bool) -> None:
    """Ranges as wide as float32; and what is no number is not hidden."""
    w = jnp.asarray(np.random.default_rng(0).uniform(-3e38, 3e38, (64, 6)), jnp.float32).at[0].set(3e38)
    w = w.at[1].set(-3e38)
    got = jax_nano.quantize(w, bits, group=32, symmetric=symmetric).dequantize()
    step = 3e38 / (2 ** (bits - 1) - 1)
    assert np.isfinite(got).all()
    assert (np.abs(np.asarray(got, np.float64) - w) <= step).all()
    for bad in (jnp.nan, jnp.inf):
        got = jax_nano.quantize(w.at[5, 2].set(bad), bits, group=32, symmetric=symmetric).dequantize()
        assert not np.isfinite(got[5, 2])
        assert np.isfinite(got[32:]).all()


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ValueError, "two dimensions", {"w": jnp.zeros(4)}),
        (ValueError, "4 or 8", {"bits": 3}),
        (ValueError, "groups that divide K", {"group": 48}),
        (ValueError, "even sizes", {"w": jnp.zeros((128, 3)), "bits": 4}),
        (TypeError, "floating-point", {"w": jnp.zeros((128, 2), jnp.int32)}),
        (ValueError, "contracting", {"contracting": -1}),
    ],
)
def test_errors_of_quantize(error: type[Exception], message: str, given: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        jax_nano.quantize(**{"w": jnp.zeros((128, 2)), **given})


def test_an_array_is_a_pytree() -> None:
    array = jax_nano.quantize(jnp.ones((128, 4)), 4, contracting=1, group=None)
    leaves, tree = jax.tree.flatten(array)
    assert len(leaves) == 2
    again = jax.tree.unflatten(tree, leaves)
    assert again.contracting == 1
    assert jax.tree.structure(again) == tree
    stacked = jax.tree.map(lambda *v: jnp.stack(v), array, array)
    x = jnp.ones((4,))
    found = jax.lax.scan(lambda _, w: (None, x @ w), None, stacked)[1]
    np.testing.assert_allclose(found, np.full((2, 128), 4.0), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("m", [1, 20])
def test_epilogues(m: int, dtype: str) -> None:
    x, q, scale = operands("int4", m, x=dtype)
    rng = np.random.default_rng(2)
    bias, residual = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((64,), (m, 64)))
    y = in_float64(x, q, scale) + np.asarray(bias, np.float64)
    relu = np.maximum(y, 0) + np.asarray(residual, np.float64)

    def program(*v: Any) -> Any:
        return jax_nano.quantized_matmul(*v[:3], bias=v[3], activation="relu", residual=v[4])

    close(program(x, q, scale, bias, residual), relu)
    if native.target():
        assert calls(program, x, q, scale, bias, residual) == 1
    silu = jax_nano.quantized_matmul(x, q, scale, bias=bias, activation=jax.nn.silu)
    close(silu, y / (1 + np.exp(-y)))
    close(jax_nano.quantized_matmul(x, q, scale, residual=residual), y - np.asarray(bias, np.float64) + residual)


def test_epilogues_where_there_is_no_kernel() -> None:
    x, q, scale = operands("int8", k=24, groups=3)
    bias = jnp.linspace(-1, 1, 64)
    got = jax_nano.quantized_matmul(x, q, scale, bias=bias, activation="relu")
    close(got, np.maximum(in_float64(x, q, scale) + np.asarray(bias, np.float64), 0))


def test_gradients_and_batches_with_an_epilogue() -> None:
    x, q, scale = operands("int8", 5)
    bias, residual = jnp.linspace(-1, 1, 64), jnp.linspace(0, 2, 320).reshape(5, 64)

    def ours(x: Any, scale: Any, bias: Any, residual: Any) -> Any:
        y = jax_nano.quantized_matmul(x / 50, q, scale, bias=bias, activation="silu", residual=residual)
        return jnp.sum(jnp.sin(y))

    def theirs(x: Any, scale: Any, bias: Any, residual: Any) -> Any:
        w = q.astype(jnp.float32) * jnp.repeat(scale, 32, 0)
        return jnp.sum(jnp.sin(jax.nn.silu(jnp.matmul(x / 50, w, precision="highest") + bias) + residual))

    given = (x, scale, bias, residual)
    for got, want in zip(jax.grad(ours, range(4))(*given), jax.grad(theirs, range(4))(*given), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())

    def row(x: Any, residual: Any) -> Any:
        return jax_nano.quantized_matmul(x, q, scale, bias=bias, activation="relu", residual=residual)

    np.testing.assert_allclose(jax.vmap(row)(x, residual), row(x, residual), rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(
        jax.vmap(row, (None, 0))(x[0], residual), row(jnp.stack([x[0]] * 5), residual), rtol=1e-6, atol=1e-3
    )


@pytest.mark.parametrize("weights", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("contracting", [0, 1])
def test_activations_of_8_bits(weights: str, contracting: int) -> None:
    """Exactly the product of the rounded rows, within float32; and not far from that of the rows."""
    for zero in (False, True):
        x, q, scale, *points = operands(weights, 4, zero=zero)
        x = x.at[2].set(0)
        most = np.abs(np.asarray(x)).max(1, keepdims=True)
        step = np.where(most > 0, most / np.float32(127), 1).astype(np.float32)
        rounded = np.round(np.asarray(x) / step) * step.astype(np.float64)
        turned = [v.T if contracting else v for v in (q, scale, *points)]
        got = jax_nano.quantized_matmul(x, *turned, contracting=contracting, activations="int8")
        want = in_float64(jnp.asarray(rounded, jnp.float32), q, scale, *points)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
        exact = in_float64(x, q, scale, *points)
        w = np.abs(in_float64(jnp.eye(96), q, scale, *points)).sum(0)
        assert (np.abs(got - exact) <= 0.5 * step * w * 1.001 + 1e-3).all()
    y = jax_nano.quantized_matmul(x.astype(jnp.bfloat16), q, scale, activations="int8", activation="relu")
    assert y.dtype == jnp.bfloat16
    assert (y >= 0).all()


@pytest.mark.parametrize("weights", ["int8", "uint4"])
def test_activations_of_rows_that_are_not_finite(weights: str) -> None:
    """They give no numbers, and other rows what they gave."""
    x, q, scale, zero = operands(weights, 4, zero=True)
    whole = jax_nano.quantized_matmul(x, q, scale, zero, activations="int8")
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        got = jax_nano.quantized_matmul(x.at[1, 5].set(bad), q, scale, zero, activations="int8")
        assert not np.isfinite(got[1]).any()
        np.testing.assert_array_equal(got[jnp.asarray([0, 2, 3])], whole[jnp.asarray([0, 2, 3])])


@pytest.mark.parametrize("weights", ["int8", "uint4"])
def test_gradients_with_activations(weights: str) -> None:
    """They take no notice of the rounding of x."""
    x, q, scale, zero = operands(weights, 4, zero=True)
    bias = jnp.linspace(-1, 1, 64)

    def loss(x: Any, scale: Any, bias: Any, activations: str | None) -> Any:
        y = jax_nano.quantized_matmul(x, q, scale, zero, bias=bias, activations=activations)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape)))

    got, want = (jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)(x, scale, bias, a) for a in ("int8", None))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    both = jax.vmap(lambda x: jax.grad(loss)(x, scale, bias, "int8"))(jnp.stack([x, -x]))
    np.testing.assert_allclose(both[1], want[0], rtol=1e-5, atol=1e-5 * np.abs(want[0]).max())


@pytest.mark.parametrize("k", [2**16, 2**17, 300001])
def test_activations_whose_sums_are_long(k: int) -> None:
    """No int32 holds the sums of more than 2**16 products."""
    x, q = jnp.ones((1, k)), jnp.full((k, 4), 255, jnp.uint8)
    got = jax_nano.quantized_matmul(x, q, jnp.ones(4), jnp.zeros(4, jnp.uint8), activations="int8")
    np.testing.assert_allclose(got, 255.0 * k, rtol=1e-4)


def test_activations_need_integers() -> None:
    with pytest.raises(ValueError, match="requires q of integers"):
        jax_nano.quantized_matmul(*operands("float8_e5m2"), activations="int8")


class QArray(NamedTuple):
    """As Qwix has it: scales of the weights' rank, whose sizes divide theirs."""

    qvalue: Any
    scale: Any
    zero_point: Any = None


def test_arrays_of_other_libraries() -> None:
    x, q, scale, zero = operands("uint8", zero=True)
    want = in_float64(x, q, scale, zero)
    close(jax_nano.quantized_matmul(x, QArray(q, scale, zero)), want)
    close(jax_nano.quantized_matmul(x, QArray(q.T, scale.T, zero.T), contracting=1), want)
    one = QArray(q, jnp.full((1, 1), 0.5))
    close(jax_nano.quantized_matmul(x, one), in_float64(x, q, jnp.full((1, 64), 0.5)))
    few = jnp.linspace(1, 2, 8).reshape(1, 8)  # one for 8 columns
    close(jax_nano.quantized_matmul(x, QArray(q, few)), in_float64(x, q, jnp.repeat(few, 8, 1)))


def in_blocks(q: Any, scale: Any) -> np.ndarray:
    """The dequantised array in float64, with a scale for each block."""
    scale = np.asarray(scale, np.float64)
    for i, size in enumerate(scale.shape):
        scale = np.repeat(scale, q.shape[i] // size, i)
    return np.asarray(q.astype(jnp.float32), np.float64) * scale


@pytest.mark.parametrize(
    ("x", "q", "scale", "numbers", "einsum", "served"),
    [
        ((3, 96), (96, 64), (3, 64), (((1,), (0,)), ((), ())), "ak,kn->an", True),
        ((96, 3), (64, 96), (1, 3), (((0,), (1,)), ((), ())), "ka,nk->an", True),
        ((2, 3, 96), (96, 4, 16), (1, 4, 1), (((2,), (0,)), ((), ())), "abk,kno->abno", True),
        ((3, 6, 16), (6, 16, 64), (6, 1, 64), (((1, 2), (0, 1)), ((), ())), "ajk,jkn->an", True),
        ((3, 16, 6), (6, 16, 64), (2, 1, 1), (((2, 1), (0, 1)), ((), ())), "akj,jkn->an", True),
        ((3, 6, 16), (6, 16, 64), (2, 2, 64), (((1, 2), (0, 1)), ((), ())), "ajk,jkn->an", False),
        ((3, 6, 16), (6, 64, 16), (6, 64, 1), (((1, 2), (0, 2)), ((), ())), "ajk,jnk->an", True),
        ((5, 3, 32), (5, 32, 64), (5, 1, 64), (((2,), (1,)), ((0,), (0,))), "bak,bkn->ban", False),
        ((3,), (4, 2), (4, 1), (((), ()), ((), ())), "a,no->ano", False),
    ],
)
def test_dot_general(x: Any, q: Any, scale: Any, numbers: Any, einsum: str, served: bool) -> None:
    rng = np.random.default_rng(5)
    a = jnp.asarray(rng.standard_normal(x), jnp.float32)
    b = jnp.asarray(rng.integers(-128, 128, q), jnp.int8)
    s = jnp.asarray(rng.random(scale) + 0.5, jnp.float32)
    want = np.einsum(einsum, np.asarray(a, np.float64), in_blocks(b, s))

    def program(a: Any, b: Any, s: Any) -> Any:
        return jax_nano.quantized_dot_general(a, b, s, dimension_numbers=numbers)

    close(program(a, b, s), want)
    close(jax_nano.quantized_dot_general(a, QArray(b, s), dimension_numbers=numbers), want)
    if native.target():
        assert calls(program, a, b, s) == int(served)


def test_dot_general_with_zero_points_of_another_grid() -> None:
    x, q, scale = operands("uint8")
    zero = jnp.asarray(np.random.default_rng(0).integers(0, 9, (6, 64)), jnp.uint8)
    got = jax_nano.quantized_dot_general(x, q, scale, zero, dimension_numbers=(((1,), (0,)), ((), ())))
    w = (np.asarray(q, np.float64) - np.repeat(np.asarray(zero, np.float64), 16, 0)) * np.repeat(scale, 32, 0)
    close(got, np.asarray(x, np.float64) @ w)


@pytest.mark.parametrize("scale", [(5, 64), (64,), (3, 0)])
def test_errors_of_dot_general(scale: Any) -> None:
    x, q, _ = operands("int8")
    with pytest.raises(ValueError, match="whose sizes divide"):
        jax_nano.quantized_dot_general(x, q, jnp.ones(scale), dimension_numbers=(((1,), (0,)), ((), ())))


@pytest.mark.parametrize(
    ("x", "q", "numbers"),
    [
        ((3, 6, 16), (16, 6, 64), (((1, 2), (0, 1)), ((), ()))),
        ((3, 96), (96, 64), (((1,), (0,)), ((0,), ()))),
        ((3, 96), (96, 64), (((1,), (0, 1)), ((), ()))),
        ((96, 96), (96, 64), (((0, 1), (0, 0)), ((), ()))),
        ((3, 96), (96, 64), (((2,), (0,)), ((), ()))),
    ],
)
def test_dimensions_that_do_not_fit(x: Any, q: Any, numbers: Any) -> None:
    """lax's errors."""
    arrays = jnp.ones(x), jnp.ones(q, jnp.int8)
    with pytest.raises((TypeError, ValueError)) as want:
        jax.lax.dot_general(arrays[0], arrays[1].astype(jnp.float32), numbers)
    with pytest.raises((TypeError, ValueError)) as got:
        jax_nano.quantized_dot_general(*arrays, jnp.ones([1] * len(q)), dimension_numbers=numbers)
    assert (got.type, str(got.value)) == (want.type, str(want.value))


@pytest.mark.parametrize("shape", [(96,), (96, 1), (32, 3), (3, 32)])
def test_dot_general_with_weights_of_4_bits_of_any_sizes(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.integers(-8, 8, shape), jnp.int4)
    x = jnp.asarray(rng.standard_normal((5, shape[0])), jnp.float32)
    scale = jnp.asarray(rng.random([1] * len(shape)) + 0.5, jnp.float32)
    got = jax_nano.quantized_dot_general(x, q, scale, dimension_numbers=(((1,), (0,)), ((), ())))
    w = np.asarray(q.astype(jnp.int8), np.float64)
    np.testing.assert_allclose(got, np.asarray(x, np.float64) @ w * float(scale.ravel()[0]), rtol=1e-5, atol=1e-4)


def test_dtypes_that_do_not_fit() -> None:
    numbers = (((2,), (1,)), ((0,), (0,)))
    x, q, scale = jnp.ones((2, 3, 32)), jnp.ones((2, 32, 4), jnp.int8), jnp.ones((2, 1, 4))
    with pytest.raises(TypeError, match="q of one of"):
        jax_nano.quantized_dot_general(x, q.astype(jnp.float32), scale, dimension_numbers=numbers)
    with pytest.raises(TypeError, match="x of floating-point"):
        jax_nano.quantized_dot_general(x.astype(jnp.int32), q, scale, dimension_numbers=numbers)
    with pytest.raises(ValueError, match="activations"):
        jax_nano.quantized_dot_general(x, q, scale, dimension_numbers=numbers, activations="int3")


several_devices = pytest.mark.skipif(jax.device_count("cpu") < 4, reason="needs four devices")


GRID = ("x", "y")


@several_devices
@has_kernels
@pytest.mark.parametrize("weights", ["int8", "uint4"])
@pytest.mark.parametrize("along_k", [False, True], ids=["columns", "along K"])
@pytest.mark.parametrize("layer", [False, True], ids=["product", "layer"])
@pytest.mark.parametrize(
    ("groups", "x_spec", "q_spec", "scale_spec", "reduces", "gathers"),
    [
        (4, P(), P(None, "x"), P(None, "x"), 0, 0),  # columns
        (4, P("x", None), P(), P(), 0, 0),  # rows
        (4, P(("x", "y"), None), P(), P(), 0, 0),
        (4, P(None, "x"), P("x", None), P("x", None), 1, 0),  # K with its groups
        (4, P(None, GRID), P(GRID, None), P(GRID, None), 1, 0),
        (4, P("y", "x"), P("x", None), P("x", None), 1, 0),  # and rows
        (4, P(None, "x"), P("x", "y"), P("x", "y"), 1, 0),  # and columns
        (4, P(None, "x"), P("x", None), P(), 1, 0),  # scales are whole, and cut
        (1, P(None, "x"), P("x", None), P(), 1, 0),  # one scale a column
        (3, P(None, "x"), P("x", None), P(), 0, 2),  # shards would divide groups
    ],
)
def test_sharded_arrays(
    weights: str,
    along_k: bool,
    layer: bool,
    groups: int,
    x_spec: P,
    q_spec: P,
    scale_spec: P,
    reduces: int,
    gathers: int,
) -> None:
    """Each device makes one call, with the collectives that the product needs and no others."""
    x, q, scale, zero = operands(weights, 8, k=192, groups=groups, zero=True)
    mesh = jax.make_mesh((2, 2), GRID, (AxisType.Auto,) * 2)

    def turned(spec: P) -> P:
        return P(*reversed((*spec, None, None)[:2])) if along_k else spec

    arrays = [x, *((v.T if along_k else v) for v in (q, scale, zero))]
    specs = [x_spec, *map(turned, (q_spec, scale_spec, scale_spec))]
    given = [jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip(arrays, specs, strict=True)]
    want = in_float64(x, q, scale, zero)
    contracting = 1 if along_k else 0

    def product(x: Any, q: Any, scale: Any, zero: Any) -> Any:
        more = {"bias": jnp.arange(64.0), "activation": "relu", "residual": jnp.ones((8, 64))} if layer else {}
        return jax_nano.quantized_matmul(x, q, scale, zero, contracting=contracting, **more)

    close(jax.jit(product)(*given), np.maximum(want + np.arange(64), 0) + 1 if layer else want)
    found = ops(product, *given)
    assert found["quantized"] == 1
    assert found["all-reduce"] == reduces
    assert found["all-gather"] + found["all-to-all"] <= (gathers + 1 if gathers else 0)


@several_devices
@has_kernels
def test_gradients_of_sharded_arrays() -> None:
    x, q, scale = operands("int8", 8, groups=4)
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,))
    given = [jax.device_put(v, NamedSharding(mesh, P(None, "d"))) for v in (x, q, scale)]
    of = jax.grad(lambda x, scale, q: jnp.sin(jax_nano.quantized_matmul(x, q, scale)).sum(), (0, 1))
    for got, want in zip(jax.jit(of)(given[0], given[2], given[1]), of(x, scale, q), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@several_devices
@has_kernels
def test_each_device_of_a_shard_map_makes_its_own_call() -> None:
    x, q, scale = operands("int4", 2, n=128)
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,))
    columns = P(None, "d")
    program = jax.shard_map(jax_nano.quantized_matmul, mesh=mesh, in_specs=(P(), columns, columns), out_specs=columns)
    close(jax.jit(program)(x, q, scale), in_float64(x, q, scale))
    assert calls(program, x, q, scale) == 1
