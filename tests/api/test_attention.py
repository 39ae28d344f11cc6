"""dot_product_attention against jax.nn's: values, errors, transformations, programs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jax_nano
from jax_nano._core import record
from jax_nano._dispatch import decision
from jax_nano._ops import attention_gradients, attention_lowering

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


@pytest.mark.parametrize("kernel", [True, False])
def test_gradients_of_many_keys(rng, monkeypatch, kernel):
    """More than a composition holds weights of at once, and no multiple of it."""
    args = arrays(rng, 1, 17, 2 * attention_gradients.KEYS_AT_ONCE + 33, 2, 1, 24)
    bias = jnp.asarray(rng.standard_normal((1, 2, 1, args[1].shape[1])), np.float32)
    if not kernel:
        monkeypatch.setattr(attention_lowering, "why_no_kernel", lambda *_: "a test")

    def gradients(function):
        return jax.jit(jax.grad(lambda *x: (function(*x) ** 2).sum(), (0, 1, 2, 3)))

    ours = gradients(jax_nano.dot_product_attention)
    assert ("jax_nano_attention_gradients" in ours.lower(*args, bias).as_text()) == kernel
    close(ours(*args, bias), gradients(plain)(*args, bias), 1e-4)


@pytest.mark.parametrize("name", ["bias", "one bias", "bias of keys", "all"])
def test_vmap_of_gradients_of_a_bias(rng, name):
    """Each member of a batch has a gradient of its own, also of a bias that all share."""
    more, options = cases(rng)[name]
    args = arrays(rng)
    queries = jnp.stack([args[0], 2 * args[0], args[0] - 1])

    def gradients(function):
        def one(q, bias):
            return (function(q, *args[1:], bias, *more[1:], **options) ** 2).sum()

        return jax.vmap(jax.grad(one, (0, 1)), (0, None))(queries, more[0])

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

    def step(*x):
        return jax.grad(lambda *y: (jax_nano.dot_product_attention(*y, is_causal=True) ** 2).sum(), (0, 1, 2))(*x)

    assert memory(step) < 640 * 768
    assert "jax_nano_attention_gradients" in jax.jit(step).lower(q, k, v).as_text()


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


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("shape", [(), (1,), (11,), (9, 1), (1, 9, 11), (2, 1, 1, 11), "heads", "a batch and heads"])
def test_scales_of_several_numbers(rng, shape, heads):
    """They broadcast to the scores of one query head for each of the keys' heads, as in jax.nn, and may be traced."""
    q, k, v = arrays(rng, k=heads)
    shape = {"heads": (heads, 1, 1), "a batch and heads": (2, heads, 1, 1)}.get(shape, shape)
    if len(shape) == 4 and shape[1] == 1 and heads == 4:
        shape = (1, *shape[1:])
    scale = jnp.asarray(rng.random(shape), np.float32)
    want = plain(q, k, v, scale=scale, is_causal=True)
    close(jax_nano.dot_product_attention(q, k, v, scale=scale, is_causal=True), want)
    close(jax.jit(lambda s: jax_nano.dot_product_attention(q, k, v, scale=s, is_causal=True))(scale), want)

    def loss(function, scale):
        return jnp.sum(function(q, k, v, scale=scale) ** 2)

    close(*(jax.grad(partial(loss, f))(scale) for f in (jax_nano.dot_product_attention, plain)), 1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_of_heads_in_one_pass(rng, dtype):
    """A temperature that is learned takes no matrix of scores."""
    q, k, v = arrays(rng, dtype=dtype)
    scale = jnp.asarray([0.2, 0.4], dtype)[:, None, None]

    def attend(q, k, v, scale):
        return jax_nano.dot_product_attention(q, k, v, scale=scale, return_residual=True)

    close(jax.jit(attend)(q, k, v, scale), plain(q, k, v, scale=scale.astype(np.float32), return_residual=True))
    grads = jax.jit(jax.grad(lambda *x: attend(*x)[0].astype(np.float32).sum(), (0, 1, 2, 3)))(q, k, v, scale)
    assert [x.dtype for x in grads] == [np.dtype(dtype)] * 4
    if attention_lowering.why_no_kernel(q, k, v) is None:
        assert "jax_nano_attention" in jax.jit(attend).lower(q, k, v, scale).as_text()


def test_scales_that_do_not_fit(rng):
    q, k, v = arrays(rng)
    for shape in ((3,), (4, 1, 1), (1, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match="broadcast"):
            jax_nano.dot_product_attention(q, k, v, scale=jnp.ones(shape))


def test_windows_that_are_traced(rng):
    """As in a scan over layers with windows of their own."""
    q, k, v = arrays(rng)
    mask = jnp.asarray(rng.random((2, 1, 9, 11)) < 0.7)

    def attend(function, left, right):
        return function(q, k, v, None, mask, local_window_size=(left, right), is_causal=True)

    for window in ((1, 2), (3, 0), (-1, 4)):
        want = attend(plain, *window)
        close(jax.jit(partial(attend, jax_nano.dot_product_attention))(*window), want)
        close(attend(jax_nano.dot_product_attention, *map(np.int64, window)), want)
    same = jax.jit(lambda n: jax_nano.dot_product_attention(q, k, v, local_window_size=(n, n)))(2)
    close(same, plain(q, k, v, local_window_size=2))
    with pytest.raises(ValueError, match="unpack"):
        jax_nano.dot_product_attention(q, k, v, local_window_size=(1, 2, 3))
    with pytest.raises(ValueError, match="two numbers"):
        jax_nano.dot_product_attention(q, k, v, local_window_size=jnp.ones((2, 2), np.int32))


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
    for args in ((q[:, :0], k, v), (q[:0], k[:0], v[:0]), (q, k[:, :0], v[:, :0])):
        for options in ({}, {"is_causal": True, "return_residual": True}):
            close(jax_nano.dot_product_attention(*args, **options), plain(*args, **options))
        functions = jax_nano.dot_product_attention, plain
        close(*(jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), (0, 1, 2))(*args) for f in functions))
    assert jax_nano.dot_product_attention(q[..., :0], k[..., :0], v[..., :0]).shape == (2, 9, 4, 0)


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

    def step(*x):
        return jax.grad(lambda *y: (ours(*y) ** 2).sum(), (0, 1, 2))(*x)

    whole = step(*args)
    close(jax.jit(step)(*sharded), whole, 1e-4)

    def summed(q, k, v):
        return jax.lax.psum((ours(q, k, v) ** 2).sum(), "x")

    total = jax.shard_map(summed, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=P())
    shared = [args[0], *(x[:1] for x in args[1:])]
    both = [shared[0], *(jnp.concatenate([x, x]) for x in shared[1:])]
    of_both = jax.grad(lambda *y: (ours(*y) ** 2).sum(), (0, 1, 2))(*both)
    want_shared = [of_both[0], *(x.sum(0, keepdims=True) for x in of_both[1:])]
    close(jax.jit(jax.grad(total, (0, 1, 2)))(*shared), want_shared, 1e-4)


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")])
def test_jit_with_sharded_batches_and_heads(rng, spec):
    """Each device calls the kernel for its own, forward and backward; a shared bias' gradients are summed."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    args = arrays(rng)
    bias = jnp.asarray(rng.standard_normal((1, 4, 9, 11)), np.float32)
    mask = jnp.asarray(rng.random((2, 1, 1, 11)) < 0.8)

    def step(function, *x):
        return jax.value_and_grad(lambda *y: (function(*y, mask) ** 2).sum(), (0, 1, 2, 3))(*x)

    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in args]
    ours = jax.jit(partial(step, jax_nano.dot_product_attention)).lower(*sharded, bias).compile()
    close(ours(*sharded, bias), step(plain, *args, bias), 1e-4)
    text = ours.as_text()
    assert "jax_nano_attention_gradients" in text
    assert "all-gather(" not in text


def test_jit_with_sharded_positions(rng):
    """XLA gathers them: attention needs all keys, and causal masks know positions."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    args = arrays(rng, t=10, s=12)
    sharded = [jax.device_put(x, NamedSharding(mesh, P(None, "x"))) for x in args]
    ours = jax.jit(partial(jax_nano.dot_product_attention, is_causal=True))
    close(ours(*sharded), plain(*args, is_causal=True))


def test_why_a_kernel_does_not_compute_it():
    machine = decision.Machine("x86-64-v3", frozenset(), frozenset({("float32", "float32"), ("float32", "bfloat16")}))
    f32, bf16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)
    q, k = (2, 9, 4, 16), (2, 11, 2, 16)

    def why(shapes, dtypes):
        return decision.why_no_attention(decision.Attention(shapes, dtypes), machine)

    assert why((q, k, k), (f32, f32, f32)) is None
    assert why((q, k, k), (f32, bf16, bf16)) is None
    assert why((q, k, k), (bf16, bf16, bf16)) == "no kernel for attention of bfloat16, bfloat16 and bfloat16"
    assert why((q, k, k), (f32, f32, bf16)) == "no kernel for attention of float32, float32 and bfloat16"
    assert why((q, (2, 0, 2, 16), k), (f32, f32, f32)) == "there are no elements"
    assert why((q, k, (*k[:3], 1025)), (f32, f32, f32)) == "heads of 1025 elements, more than 1024"
    (size,) = jax.export.symbolic_shape("n")
    assert why(((size, *q[1:]), k, k), (f32, f32, f32)) == "a size is symbolic"
    assert why((q, k, k), (f32, f32, f32)) is None


def test_the_report_lists_it(rng):
    q, k, v = arrays(rng)
    narrow = [x.astype(np.float16) for x in (q, k, v)]
    long = [jnp.zeros((1, 3, 1, decision.MOST_ATTENTION_ELEMENTS + 1), np.float32)] * 3
    record.clear()
    jax.jit(partial(jax_nano.dot_product_attention, is_causal=True))(q, k, v)
    jax.jit(jax_nano.dot_product_attention)(*narrow)
    jax.jit(jax_nano.dot_product_attention)(*long)
    (ours, count), (other, _), (left, _) = record.attentions()
    assert count == 1
    assert (ours.detail, ours.declined) == ("causal", None)
    assert [x.shape for x in ours.arrays] == [q.shape, k.shape, v.shape, q.shape]
    assert other.declined is None
    assert left.declined == "heads of 1025 elements, more than 1024"
    text = jax_nano.report()
    assert "2 attentions run in one pass" in text
    assert "stays two products and softmax: heads of 1025 elements" in text


def test_checkify_finds_nan(rng):
    q, k, v = arrays(rng)
    checked = checkify.checkify(jax_nano.dot_product_attention, errors=checkify.nan_checks)
    error, out = checked(q, k, v)
    close(out, plain(q, k, v))
    assert error.get() is None
    error, _ = checked(q, k.at[0, 0, 0, 0].set(np.nan), v)
    assert "nan generated" in error.get()
    assert "jax_nano_attention" in error.get()


def test_export(rng):
    args = arrays(rng)
    program = jax.jit(partial(jax_nano.dot_product_attention, is_causal=True))
    exported = jax.export.export(program, disabled_checks=jax_nano.export_checks())(*args)
    again = jax.export.deserialize(exported.serialize())
    close(again.call(*args), plain(*args, is_causal=True))

    def step(function, *x):
        return jax.grad(lambda *y: (function(*y) ** 2).sum(), (0, 1, 2))(*x)

    exported = jax.export.export(jax.jit(partial(step, program)), disabled_checks=jax_nano.export_checks())(*args)
    again = jax.export.deserialize(exported.serialize())
    close(again.call(*args), step(partial(plain, is_causal=True), *args), 1e-4)


@pytest.mark.parametrize("value", [-1e9, -1e10, -3e38, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("keys", [48, 600])
@pytest.mark.parametrize("mask", [False, True], ids=["bias alone", "with a mask"])
@pytest.mark.parametrize("kernel", [True, False])
def test_a_bias_may_be_a_mask_that_is_added(rng, monkeypatch, value, keys, mask, kernel):
    """So large that the scores, and the logarithm of their sum, are lost beside it: such a query weighs keys alike."""
    if not kernel:
        monkeypatch.setattr(attention_lowering, "why_no_kernel", lambda *_: "a test")
    q, k, v = (jnp.asarray(rng.standard_normal((1, keys, 2, 16)), jnp.float32) for _ in range(3))
    bias = jnp.zeros((1, 1, keys, keys)).at[..., 5, :].set(value).at[..., 7, : keys // 2].set(value)
    given = {"mask": jnp.asarray(rng.random((1, 1, keys, keys)) > 0.2)} if mask else {}

    def loss(attention):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sin(2 * attention(*x[:3], x[3], **given)).sum(), (0, 1, 2, 3)))

    want = loss(jax.nn.dot_product_attention)(q, k, v, bias)
    ours = loss(jax_nano.dot_product_attention)
    assert ("jax_nano_attention_gradients" in ours.lower(q, k, v, bias).as_text()) == kernel
    got = ours(q, k, v, bias)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5 * np.abs(y).max())


def test_a_bias_of_minus_infinity_alone_gives_nan_as_jax_does(rng):
    q, k, v = (jnp.asarray(rng.standard_normal((1, 9, 2, 16)), jnp.float32) for _ in range(3))
    bias = jnp.zeros((1, 1, 9, 9)).at[..., 5, :].set(-np.inf)
    got, want = (np.asarray(f(q, k, v, bias)) for f in (jax_nano.dot_product_attention, jax.nn.dot_product_attention))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
