"""attention_fn in the place of flax's dot_product_attention: alone, and in layers of both of flax's libraries."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nano


def arrays(rng, batch=(2,), t=9, s=11, n=4, k=4, h=16, dtype="float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    shapes = ((*batch, t, n, h), (*batch, s, k, h), (*batch, s, k, h))
    q, key, v = (jnp.asarray(rng.standard_normal(x), dtype) for x in shapes)
    return q, key, v


def plain(q, k, v, bias=None, mask=None, *, is_causal=False) -> Any:
    """flax's composition, for any number of batch dimensions and heads that share keys."""
    group = q.shape[-2] // k.shape[-2]
    k, v = (jnp.repeat(x, group, -2) for x in (k, v))
    scores = jnp.einsum("...qhd,...khd->...hqk", q / np.sqrt(q.shape[-1]).astype(q.dtype), k)
    if bias is not None:
        scores = scores + bias
    allowed = jnp.ones(scores.shape, bool) if mask is None else jnp.broadcast_to(mask != 0, scores.shape)
    if is_causal:
        allowed = allowed & jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(allowed, scores, jnp.finfo(q.dtype).min)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores).astype(q.dtype), v)


def has_call(function, *args) -> bool:
    return "jax_nano_attention" in jax.jit(function).lower(*args).as_text()


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_pass(rng, batch, kv_heads):
    args = arrays(rng, batch, k=kv_heads)
    bias = jnp.asarray(rng.standard_normal((4, 9, 11)), np.float32)
    mask = jnp.asarray(rng.random((*batch, 1, 9, 11)) < 0.7, np.float32)
    for options in (
        {},
        {"is_causal": True},
        {"bias": bias},
        {"mask": mask},
        {"mask": mask[..., :1, :], "bias": bias[:1]},
    ):
        ours = partial(jax_nano.attention_fn, **options)
        got, want = ours(*args), plain(*args, **options)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        assert has_call(ours, *args)


def test_what_takes_one_pass(rng):
    args = arrays(rng)
    key = jax.random.key(0)
    assert has_call(partial(jax_nano.attention_fn, dropout_rate=0.5, dropout_rng=key, deterministic=True), *args)
    assert has_call(partial(jax_nano.attention_fn, precision=jax.lax.Precision.HIGHEST), *args)
    assert has_call(partial(jax_nano.attention_fn, precision="highest", force_fp32_for_softmax=True), *args)
    assert has_call(partial(jax_nano.attention_fn, dtype=jnp.bfloat16), *args)
    for options in (
        {"dropout_rate": 0.5, "dropout_rng": key},
        {"precision": "BF16_BF16_F32"},
        {"einsum_dot_general": jax.lax.dot_general},
        {"qk_attn_weights_einsum": jnp.einsum, "attn_weights_value_einsum": jnp.einsum},
    ):
        function = partial(jax_nano.attention_fn, **options)
        assert not has_call(function, *args)
        assert np.isfinite(function(*args)).all()


def test_dtypes_are_promoted(rng):
    q, k, v = arrays(rng)
    assert jax_nano.attention_fn(q.astype(jnp.bfloat16), k, v).dtype == np.float32
    assert jax_nano.attention_fn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert jax_nano.attention_fn(*(x.astype(np.int32) for x in (q, k, v))).dtype == np.float32
    called = []

    def promote(arrays, *, dtype):
        called.append(dtype)
        return arrays

    jax_nano.attention_fn(q, k, v, dtype=np.float32, promote_dtype=promote)
    assert called == [np.float32]
    with pytest.raises(ValueError, match="inexact"):
        jax_nano.attention_fn(q, k, v, dtype=np.int32)


def test_values_of_another_width(rng):
    q, k, v = arrays(rng)
    got = jax_nano.attention_fn(q, k, v[..., :5])
    np.testing.assert_allclose(got, plain(q, k, v[..., :5]), rtol=2e-5, atol=2e-5)


def test_dropout_drops(rng):
    """The share of zeros, and the same weights for all heads where that is asked for."""
    q, k, _ = arrays(rng, s=11, h=11)
    v = jnp.broadcast_to(jnp.eye(11)[:, None], k.shape)  # results are weights
    key = jax.random.key(1)
    dropped = jax_nano.attention_fn(q, k, v, dropout_rng=key, dropout_rate=0.25)
    whole = jax_nano.attention_fn(q, k, v)
    kept = np.asarray(dropped != 0)
    assert (kept == kept[:1, :, :1]).all()
    np.testing.assert_allclose(dropped[kept], (whole / 0.75)[kept], rtol=2e-5)
    assert 0.1 < 1 - kept.mean() < 0.4
    each = jax_nano.attention_fn(q, k, v, dropout_rng=key, dropout_rate=0.25, broadcast_dropout=False)
    assert not ((each != 0) == (each != 0)[:1, :, :1]).all()


def test_errors(rng):
    q, k, v = arrays(rng)
    for wrong, message in (
        ((q[0], k, v), "same rank"),
        ((q[:1], k, v), "batch dims"),
        ((q, k[:, :5], v), "lengths"),
        ((q[..., :3], k, v), "depths"),
        ((q[..., :3, :], k, v), "multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            jax_nano.attention_fn(*wrong)
    with pytest.raises(ValueError, match="together"):
        jax_nano.attention_fn(q, k, v, qk_attn_weights_einsum=jnp.einsum)
    einsums = {"qk_attn_weights_einsum": jnp.einsum, "attn_weights_value_einsum": jnp.einsum}
    with pytest.raises(ValueError, match="exclusive"):
        jax_nano.attention_fn(q, k, v, precision="highest", **einsums)


class TestLinen:
    @pytest.fixture
    def nn(self):
        return pytest.importorskip("flax.linen")

    @pytest.mark.parametrize("mask", ["none", "causal"])
    def test_layer(self, nn, rng, mask):
        x = jnp.asarray(rng.standard_normal((2, 13, 32)), np.float32)
        allowed = None if mask == "none" else nn.make_causal_mask(x[..., 0])
        results = []
        for function in (nn.dot_product_attention, jax_nano.attention_fn):
            layer = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=function)
            params = layer.init(jax.random.key(0), x)

            def loss(params, layer=layer):
                return (layer.apply(params, x, mask=allowed) ** 2).sum()

            results.append((layer.apply(params, x, mask=allowed), jax.grad(loss)(params)))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *results)
        assert has_call(lambda x: layer.apply(params, x, mask=allowed), x)

    @pytest.mark.parametrize("broadcast", [True, False])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_dropout(self, nn, rng, broadcast, dtype):
        """The same bits as flax's."""
        args = arrays(rng, dtype=dtype)
        mask = jnp.asarray(rng.random((2, 1, 9, 11)) < 0.7)
        options = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.3, "broadcast_dropout": broadcast}
        for more in ({}, {"mask": mask, "force_fp32_for_softmax": True}):
            got, want = (f(*args, **options, **more) for f in (jax_nano.attention_fn, nn.dot_product_attention))
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)

    def test_sown_weights(self, nn, rng):
        x = jnp.asarray(rng.standard_normal((2, 5, 8)), np.float32)
        sown = []
        for function in (nn.dot_product_attention, jax_nano.attention_fn):
            layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=function)
            params = layer.init(jax.random.key(0), x)
            sown.append(layer.apply(params, x, sow_weights=True, mutable=["intermediates"])[1])
        jax.tree.map(np.testing.assert_array_equal, *sown)


class TestNnx:
    @pytest.fixture
    def nnx(self):
        return pytest.importorskip("flax.nnx")

    def layer(self, nnx, function, **options):
        return nnx.MultiHeadAttention(
            num_heads=4, in_features=32, decode=False, attention_fn=function, rngs=nnx.Rngs(0), **options
        )

    def test_layer(self, nnx, rng):
        x = jnp.asarray(rng.standard_normal((2, 13, 32)), np.float32)
        allowed = nnx.make_causal_mask(x[..., 0])
        results = []
        for function in (nnx.dot_product_attention, jax_nano.attention_fn):
            layer = self.layer(nnx, function)
            gradients = nnx.grad(lambda layer: (layer(x, mask=allowed) ** 2).sum())(layer)
            results.append((layer(x, mask=allowed), nnx.to_pure_dict(nnx.state(gradients))))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *results)
        graph, state = nnx.split(layer)
        assert has_call(lambda state, x: nnx.merge(graph, state)(x, mask=allowed), state, x)

    def test_dropout(self, nnx, rng):
        args = arrays(rng)
        options = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.3}
        got, want = (f(*args, **options) for f in (jax_nano.attention_fn, nnx.dot_product_attention))
        np.testing.assert_array_equal(got, want)

    @pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
    def test_sown_weights(self, nnx, rng):
        x = jnp.asarray(rng.standard_normal((2, 5, 32)), np.float32)
        sown = []
        for function in (nnx.dot_product_attention, jax_nano.attention_fn):
            layer = self.layer(nnx, function)
            layer(x, sow_weights=True)
            sown.append(nnx.to_pure_dict(nnx.pop(layer, nnx.Intermediate)))
        jax.tree.map(np.testing.assert_array_equal, *sown)
