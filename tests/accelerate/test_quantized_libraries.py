"""Models quantised by Qwix and by AQT, unmodified: their products run on kernels that read 8 and 4 bits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import Array

import jax_nano
from jax_nano._core import record

WIDTH, HIDDEN = 128, 256

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # both use names that JAX is about to remove


def run(program: Any, *args: Any) -> tuple[Array, Array, list[record.Product]]:
    """The result of XLA, that of the accelerated program, and what became of its products."""
    plain = jax.jit(lambda *v: program(*v))(*args)
    jax_nano.clear_report()
    with jax_nano.accelerate():
        fast = jax.jit(program)(*args)
    return plain, fast, [product for product, count in record.products() for _ in range(count)]


def close(got: Array, want: Array, tolerance: float) -> None:
    got, want = (np.asarray(v, np.float64) for v in (got, want))
    assert abs(got - want).max() <= tolerance * abs(want).max()


class Perceptron(nnx.Module):
    def __init__(self, dtype: Any) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs, dtype=dtype, param_dtype=dtype)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs, use_bias=False, dtype=dtype, param_dtype=dtype)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.gelu(self.up(x)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        ({"weight_qtype": jnp.int8}, "int8"),
        ({"weight_qtype": jnp.int4, "tile_size": 32}, "int4"),
        ({"weight_qtype": jnp.float8_e4m3fn}, "float8_e4m3fn"),
        ({"weight_qtype": jnp.int8, "act_qtype": jnp.int8}, "int8"),
    ],
    ids=["int8", "int4", "float8", "dynamic"],
)
def test_qwix(rule: dict[str, Any], weights: str, rows: int, dtype: Any, rng: np.random.Generator) -> None:
    qwix = pytest.importorskip("qwix")
    x = jnp.asarray(rng.normal(size=(rows, WIDTH)), dtype)
    rules = [qwix.QuantizationRule(module_path=".*", **rule)]
    model = qwix.quantize_model(Perceptron(dtype), qwix.PtqProvider(rules), x)
    graph, state = nnx.split(model)
    plain, fast, products = run(lambda state, x: nnx.merge(graph, state)(x), state, x)
    close(fast, plain, 1e-4 if dtype == jnp.float32 and "act_qtype" not in rule else 4e-2)
    assert [product.declined for product in products] == [None, None]
    for product in products:
        given = [array.dtype for array in product.arrays]
        assert given[1] == weights or given[0] == weights
        assert ("quantized" in product.kernel) == ("act_qtype" not in rule)
        assert ("int32" in given) == ("act_qtype" in rule)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("activations", [None, 8])
def test_aqt(activations: int | None, rows: int, rng: np.random.Generator) -> None:
    """Weights are frozen as int8, with one scale a column; activations are floats, or quantised a row at a time."""
    pytest.importorskip("aqt")
    from aqt.jax.v2 import config, utils
    from aqt.jax.v2.flax import aqt_flax

    settings = config.config_v4(fwd_bits=8, dlhs_bits=None)
    if activations is None:
        config.set_bits(settings, None, 8, None, None, None, None)

    frozen = aqt_flax.FreezerMode.CALIBRATION_AND_VALUE

    def model(mode: Any) -> linen.Module:
        products = functools.partial(aqt_flax.AqtDotGeneral, settings, rhs_quant_mode=mode, rhs_freeze_mode=frozen)
        return linen.Sequential(
            [
                linen.Dense(HIDDEN, dot_general_cls=products),
                jax.nn.gelu,
                linen.Dense(WIDTH, use_bias=False, dot_general_cls=products),
            ]
        )

    x = jnp.asarray(rng.normal(size=(rows, WIDTH)), jnp.float32)
    converting, serving = model(utils.QuantMode.CONVERT), model(utils.QuantMode.SERVE)
    variables = converting.init(jax.random.key(0), x)
    _, weights = converting.apply(variables, x, rngs={"params": jax.random.key(1)}, mutable=True)
    assert any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(weights["aqt"]))
    plain, fast, products = run(
        lambda v, x: serving.apply(v, x, rngs={"params": jax.random.key(1)}), {**variables, **weights}, x
    )
    close(fast, plain, 1e-4 if activations is None else 4e-2)
    assert [product.declined for product in products] == [None, None]
    for product in products:
        assert "int8" in [array.dtype for array in product.arrays], jax_nano.report()
        assert ("quantized" in product.kernel) == (activations is None)
