"""dot_product_attention against jax.nn's: values, errors, transformations, programs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jax_nano
from jax_nano._ops import attention

TOLERANCE = {"float64": 1e-5, "float32": 2e-5, "bfloat16": 4e-2, "float16": 6e-3}


def arrays(rng, b=2, t=9, s=11, n=4, k=2, h=16, dtype="float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h))
    q, k, v = (jnp.asarray(rng.standard_normal(x), dtype) for x in shapes)
    return q, k, v


def close(got: Any, want: Any, tolerance: float | None = None) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        near = max(TOLERANCE[str(y.dtype)] if y.dtype.itemsize < 4 else 0, tolerance or TOLERANCE[str(y.dtype)])
        wide, want = np.asarray(x, np.float64), np.asarray(y, np.float64)
        finite = np.isfinite(want)
        scale = max(1.0, np.abs(want[finite]).max(initial=0))
        np.testing.assert_array_equal(wide[~finite], want[~finite])
        np.testing.assert_allclose(wide[finite], want[finite], rtol=near, atol=near * scale)


def plain(*args: Any, **options: Any) -> Any:
    """jax.nn's function, in float32 where plain JAX has no products of float16 on CPUs."""
    dtype = args[0].dtype
    if dtype != np.float16:
        return jax.nn.dot_product_attention(*args, **options)
    out = jax.nn.dot_product_attention(*(x.astype(np.float32) for x in args[:3]), *args[3:], **options)
    return jax.tree.map(lambda x: x.astype(dtype), out)


def cases(rng, b=2, t=9, s=11, n=4) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Further arguments by name: positional ones, and options."""
    bias = jnp.asarray(rng.standard_normal((b, n, t, s)), np.float32)
    mask = jnp.asarray(rng.random((b, n, t, s)) < 0.7)
    lengths = {
        "query_seq_lengths": jnp.asarray([t, 4], np.int32)[:b],
        "key_value_seq_lengths": jnp.asarray([3, s], np.int32)[:b],
    }
    return {
        "nothing": ((), {}),
        "scale": ((), {"scale": 0.7}),
        "causal": ((), {"is_causal": True}),
        "bias": ((bias,), {}),
        "one bias": ((bias[:1, :1],), {}),
        "bias of keys": ((bias[:, :1, :1].astype(jnp.bfloat16),), {}),
        "bias of queries": ((bias[..., :1],), {}),
        "mask": ((None, mask), {}),
        "one mask": ((None, mask[:1, :1]), {"is_causal": True}),
        "bias and mask": ((bias[:1], mask[:, :1]), {}),
        "mask of nothing": ((None, mask[:, :, :1] & False), {}),
        "lengths": ((), lengths),
        "a length of zero": ((), {"key_value_seq_lengths": jnp.zeros(b, np.int32), "is_causal": True}),
        "window": ((), {"local_window_size": (2, 3)}),
        "one window": ((), {"local_window_size": 2, "is_causal": True}),
        "a window aside": ((), {"local_window_size": (-2, 20)}),
        "infinite bias": ((jnp.where(mask, bias, -jnp.inf),), {}),
        "all": ((bias[:, :1], mask[:1]), {**lengths, "is_causal": True, "local_window_size": (5, 5)}),
    }


NAMES = list(cases(np.random.default_rng(0)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_values(rng, name, dtype):
    more, options = cases(rng)[name]
    args = arrays(rng, dtype=dtype)
    close(jax_nano.dot_product_attention(*args, *more, **options), plain(*args, *more, **options))
    close(
        jax_nano.dot_product_attention(*args, *more, **options, return_residual=True),
        plain(*args, *more, **options, return_residual=True),
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradients(rng, name):
    more, options = cases(rng)[name]
    args = arrays(rng)
    weight = jnp.asarray(rng.standard_normal(args[0].shape), np.float32)
    with_bias = bool(more) and more[0] is not None
    which = (0, 1, 2, 3) if with_bias else (0, 1, 2)

    def gradients(function):
        return jax.grad(lambda *x: (function(*x, **options) * weight).sum(), which)(*args, *more)

    close(gradients(jax_nano.dot_product_attention), gradients(plain), 5e-5)


def test_gradients_of_many_keys(rng):
    """More than `backward` holds weights of at once, and no multiple of it."""
    args = arrays(rng, 1, 17, 2 * attention.KEYS_AT_ONCE + 33, 2, 1, 24)
    bias = jnp.asarray(rng.standard_normal((1, 2, 1, args[1].shape[1])), np.float32)

    def gradients(function):
        return jax.grad(lambda *x: (function(*x) ** 2).sum(), (0, 1, 2, 3))(*args, bias)

    close(gradients(jax_nano.dot_product_attention), gradients(plain), 1e-4)


def test_gradients_against_differences(rng):
    args = arrays(rng, 1, 5, 7, 2, 1, 8)
    check_grads(
        partial(jax_nano.dot_product_attention, is_causal=True),
        args,
        order=2,
        modes=("fwd", "rev"),
        rtol=2e-2,
        atol=2e-2,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_narrow_dtypes(rng, dtype):
    args = arrays(rng, dtype=dtype)

    def gradients(function, *x):
        return jax.grad(lambda *y: function(*y, is_causal=True).astype(np.float32).sum(), (0, 1, 2))(*x)

    got = gradients(jax_nano.dot_product_attention, *args)
    want = gradients(plain, *(x.astype(np.float32) for x in args))
    close([x.astype(np.float32) for x in got], want, TOLERANCE[dtype])
    assert {x.dtype for x in got} == {args[0].dtype}


def test_keys_narrower_than_queries(rng):
    q, k, v = arrays(rng)
    for dtype in ("bfloat16", "float16"):
        narrow = [x.astype(dtype) for x in (k, v)]
        got = jax_nano.dot_product_attention(q, *narrow, is_causal=True)
        close(got, plain(q, *(x.astype(np.float32) for x in narrow), is_causal=True))


def test_float64(rng):
    with jax.enable_x64(True):
        args = arrays(rng, dtype="float64")
        close(jax_nano.dot_product_attention(*args, is_causal=True), plain(*args, is_causal=True))


def test_forward_mode(rng):
    args = arrays(rng)
    tangents = arrays(rng)
    for more, options in cases(rng).values():
        if more and more[0] is not None:
            continue
        results = [
            jax.jvp(lambda *x, f=f: f(*x, *more, **options), args, tangents)  # noqa: B023
            for f in (jax_nano.dot_product_attention, plain)
        ]
        close(*results, 5e-5)


def test_second_derivatives(rng):
    q, k, v = arrays(rng, 1, 3, 5, 2, 1, 4)

    def hessian(function):
        return jax.hessian(lambda q, k: (function(q, k, v, is_causal=True) ** 2).sum(), (0, 1))(q, k)

    close(hessian(jax_nano.dot_product_attention), hessian(plain), 1e-4)


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 1, 1), (2, 0, None)])
def test_vmap(rng, axes):
    args = [x if a is None else jnp.stack([x, 2 * x, x - 1], a) for x, a in zip(arrays(rng), axes, strict=True)]

    def both(function):
        mapped = jax.vmap(partial(function, is_causal=True), axes)
        return mapped(*args), jax.grad(lambda *x: (mapped(*x) ** 2).sum(), (0, 1, 2))(*args)

    close(both(jax_nano.dot_product_attention), both(plain), 1e-4)


def test_vmap_of_bias_mask_and_lengths(rng):
    args = arrays(rng)
    more, options = cases(rng)["all"]
    bias, mask = more
    biases, masks = jnp.stack([bias, bias * 2]), jnp.stack([mask, ~mask])
    lengths = jnp.stack([options["key_value_seq_lengths"]] * 2)

    def mapped(function):
        def one(bias, mask, length):
            return function(*args, bias, mask, key_value_seq_lengths=length)

        out = jax.vmap(one)(biases, masks, lengths), jax.vmap(one, (None, 0, None))(bias, masks, lengths[0])
        grads = jax.vmap(jax.grad(lambda b, m, n: (one(b, m, n) ** 2).sum()), (0, None, None))(biases, mask, lengths[0])
        return out, grads

    close(mapped(jax_nano.dot_product_attention), mapped(plain), 1e-4)


def test_programs(rng):
    """jit, scan, remat, and a layout that a transpose would make: all in calls of ours."""
    args = arrays(rng, s=9)

    def scanned(function, q, k, v):
        def step(x, _):
            return jax.checkpoint(partial(function, is_causal=True))(x, k, v), None

        return jax.lax.scan(step, q, None, length=3)[0]

    def transposed(function, q, k, v):
        swap = partial(jnp.transpose, axes=(0, 2, 1, 3))
        return function(*map(swap, (swap(q) * 2, swap(k) + 1, swap(v) - 1)))

    for program in (scanned, transposed):
        ours, theirs = (jax.jit(partial(program, f)) for f in (jax_nano.dot_product_attention, plain))
        close(ours(*args), theirs(*args))
        assert "jax_nano_attention" in ours.lower(*args).as_text()
        grads = (jax.grad(lambda *x, f=f: (f(*x) ** 2).sum(), (0, 1, 2))(*args) for f in (ours, theirs))
        close(*grads, 1e-4)


def test_no_transpose_stands_before_the_call(rng):
    args = [jnp.transpose(x, (0, 2, 1, 3)) for x in arrays(rng)]
    program = jax.jit(lambda *x: jax_nano.dot_product_attention(*(jnp.transpose(y, (0, 2, 1, 3)) for y in x)))
    close(program(*args), plain(*(jnp.transpose(y, (0, 2, 1, 3)) for y in args)))
    assert " transpose(" not in program.lower(*args).compile().as_text()


def test_no_matrix_of_scores(rng):
    q, k, v = arrays(rng, 1, 640, 768, 2, 2, 16)

    def memory(function):
        return jax.jit(function).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert memory(partial(jax_nano.dot_product_attention, is_causal=True)) < 640 * 768
    assert memory(partial(plain, is_causal=True)) >= 640 * 768 * 4


def test_three_dimensions_and_other_arguments(rng):
    q, k, v = arrays(rng)
    close(jax_nano.dot_product_attention(q[0], k[0], v[0]), plain(q[0], k[0], v[0]))
    close(
        jax_nano.dot_product_attention(q[0], k[0], v[0], return_residual=True),
        plain(q[0], k[0], v[0], return_residual=True),
    )
    close(jax_nano.dot_product_attention(np.asarray(q), k, v, scale=np.float32(0.3)), plain(q, k, v, scale=0.3))
    close(jax.jit(lambda s: jax_nano.dot_product_attention(q, k, v, scale=s))(0.3), plain(q, k, v, scale=0.3))
    close(jax_nano.dot_product_attention(q, k, v, implementation="xla"), plain(q, k, v))


def test_no_derivative_of_the_residual(rng):
    q, k, v = arrays(rng)
    grads = jax.grad(lambda q: jax_nano.dot_product_attention(q, k, v, return_residual=True)[1].sum())(q)
    assert not np.asarray(grads).any()


def wrong(rng) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    q, k, v = arrays(rng)
    lengths = jnp.ones(2, np.int32)
    return {
        "value's shape": ((q, k, v[:, :5]), {}),
        "value's dtype": ((q, k, v.astype(jnp.bfloat16)), {}),
        "query's batch": ((q[:1], k, v), {}),
        "query's size": ((q[..., :8], k, v), {}),
        "query's dtype": ((q.astype(jnp.bfloat16), k, v), {}),
        "heads": ((q[:, :, :3], k, v), {}),
        "mask's dtype": ((q, k, v, None, jnp.ones((1, 1, 9, 11))), {}),
        "mask's dimensions": ((q[None], k, v), {}),
        "lengths' dtype": ((q, k, v), {"query_seq_lengths": lengths.astype(np.float32)}),
        "lengths' shape": ((q, k, v), {"key_value_seq_lengths": lengths[:1]}),
        "implementation": ((q, k, v), {"implementation": "none such"}),
    }


@pytest.mark.parametrize("name", list(wrong(np.random.default_rng(0))))
def test_errors(rng, name):
    args, options = wrong(rng)[name]
    kinds = []
    for function in (jax_nano.dot_product_attention, jax.nn.dot_product_attention):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            function(*args, **options)
        kinds.append(str(raised.value))
    assert kinds[0] == kinds[1]


def test_biases_that_do_not_fit(rng):
    q, k, v = arrays(rng)
    for bias in (jnp.ones((1, 1, 9, 10)), jnp.ones((1, 3, 9, 11)), jnp.ones((3, 1, 1, 1))):
        with pytest.raises(ValueError, match="broadcast"):
            jax_nano.dot_product_attention(q, k, v, bias)


def test_no_elements(rng):
    q, k, v = arrays(rng)
    for args in ((q[:, :0], k, v), (q[:0], k[:0], v[:0])):
        close(jax_nano.dot_product_attention(*args), plain(*args))


def test_shard_map_and_sharded_arrays(rng):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    args = arrays(rng)
    want = plain(*args, is_causal=True)
    ours = partial(jax_nano.dot_product_attention, is_causal=True)
    local = jax.shard_map(ours, mesh=mesh, in_specs=(P("x"),) * 3, out_specs=P("x"))
    close(jax.jit(local)(*args), want)
    close(
        jax.grad(lambda *x: (jax.jit(local)(*x) ** 2).sum())(*args), jax.grad(lambda *x: (ours(*x) ** 2).sum())(*args)
    )
    sharded = [jax.device_put(x, NamedSharding(mesh, P("x"))) for x in args]
    close(jax.jit(ours)(*sharded), want)


def test_export(rng):
    args = arrays(rng)
    program = jax.jit(partial(jax_nano.dot_product_attention, is_causal=True))
    exported = jax.export.export(program, disabled_checks=jax_nano.export_checks())(*args)
    again = jax.export.deserialize(exported.serialize())
    close(again.call(*args), plain(*args, is_causal=True))
