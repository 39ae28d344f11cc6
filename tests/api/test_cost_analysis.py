"""cost_analysis() of lowered and compiled programs with our calls: what it is with jnp's products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_nano
from jax_nano._dispatch import decision
from jax_nano._ops import cost_analysis

PROGRAMS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "matmul": (lambda m, a, b: m.matmul(a, b), [(9, 17), (17, 25)]),
    "batched": (lambda m, a, b: m.matmul(a, b), [(3, 9, 17), (3, 17, 25)]),
    "reversed": (lambda m, a, b: m.einsum("ij,jk->ki", a, b), [(9, 17), (17, 25)]),
    "attention": (lambda m, q, k: m.einsum("bqhd,bkhd->bhqk", q, k), [(2, 5, 3, 8), (2, 7, 3, 8)]),
    "two contracting": (lambda m, a, b: m.tensordot(a, b, 2), [(9, 4, 5), (4, 5, 7)]),
    "vector": (lambda m, a, b: m.matmul(a, b), [(9, 17), (17,)]),
    "scalar": (lambda m, a, b: m.vdot(a, b), [(9,), (9,)]),
    "outer": (lambda m, a, b: m.einsum("i,j->ij", a, b), [(9,), (17,)]),
    "twelve labels": (
        lambda m, a, b: m.einsum("abcdefgh,ghijkl->abcdefijkl", a, b),
        [(2,) * 8, (2,) * 6],
    ),
    "loop": (
        lambda m, a, b: jax.lax.scan(lambda x, _: (m.matmul(x, b), None), a, None, length=5)[0],
        [(9, 17), (17, 17)],
    ),
    "branch": (lambda m, a, b: jax.lax.cond(a[0, 0] > 0, m.matmul, lambda a, b: a + 1, a, b), [(17, 17), (17, 17)]),
    "gradient": (lambda m, a, b: jax.grad(lambda a: jnp.sin(m.matmul(a, b)).sum())(a), [(9, 17), (17, 25)]),
    "with more": (lambda m, a, b: jnp.tanh(m.matmul(a, b)) + 1, [(9, 17), (17, 25)]),
}


def specs(shapes: list[tuple[int, ...]]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


@pytest.mark.parametrize("name", PROGRAMS)
def test_lowered(name: str) -> None:
    program, shapes = PROGRAMS[name]
    ours, theirs = (jax.jit(partial(program, m)).lower(*specs(shapes)) for m in (jax_nano, jnp))
    assert "@jax_nano_dot_general" in ours.as_text()
    assert ours.cost_analysis()["flops"] == theirs.cost_analysis()["flops"] > 0
    assert ours.cost_analysis().get("transcendentals") == theirs.cost_analysis().get("transcendentals")


@pytest.mark.parametrize("name", ["matmul", "batched", "attention", "loop"])
def test_compiled(name: str) -> None:
    program, shapes = PROGRAMS[name]
    ours, theirs = (jax.jit(partial(program, m)).lower(*specs(shapes)).compile() for m in (jax_nano, jnp))
    assert ours.cost_analysis()["flops"] == theirs.cost_analysis()["flops"] > 0
    assert ours.cost_analysis()["bytes accessed"] > 0


@pytest.mark.parametrize("name", ["matmul", "loop", "with more"])
def test_accelerated(name: str) -> None:
    program, shapes = PROGRAMS[name]
    plain = jax.jit(partial(program, jnp)).lower(*specs(shapes)).cost_analysis()
    with jax_nano.accelerate():
        lowered = jax.jit(partial(program, jnp)).lower(*specs(shapes))
        compiled = lowered.compile()
    assert "jax_nano" in compiled.as_text()
    assert lowered.cost_analysis() == plain
    product = 2 * 9 * 17 * (17 if name == "loop" else 25)
    assert product <= compiled.cost_analysis()["flops"] <= plain["flops"]


def test_linear_counts_as_its_product() -> None:
    x, w, b, r = specs([(9, 17), (17, 25), (25,), (9, 25)])
    lowered = jax.jit(partial(jax_nano.linear, activation="gelu", residual=None)).lower(x, w, b)
    assert lowered.cost_analysis()["flops"] == 2 * 9 * 17 * 25
    both = jax.jit(lambda x, w, b, r: jax_nano.linear(x, w, b, residual=r, scale=0.5)).lower(x, w, b, r)
    assert both.compile().cost_analysis()["flops"] == 2 * 9 * 17 * 25


def test_programs_without_our_calls_are_left_alone() -> None:
    lowered = jax.jit(lambda x: jnp.tanh(x @ x)).lower(*specs([(8, 8)]))
    module = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
    assert cost_analysis.with_dots(module) is None
    assert lowered.cost_analysis()["flops"] == 2 * 8**3


def test_flax_tabulates_our_products() -> None:
    nn = pytest.importorskip("flax.linen")
    flops = []
    for product in (jax_nano.dot_general, jax.lax.dot_general):
        model = nn.Dense(16, use_bias=False, dot_general=product)
        table = model.tabulate(jax.random.key(0), jnp.ones((8, 32)), compute_flops=True, console_kwargs={"width": 200})
        flops.append([word for word in table.split() if word == str(2 * 8 * 32 * 16)])
    assert flops[0] == flops[1] != []


def attention_flops(program: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[float, float]:
    """Of the lowered and the compiled program."""
    lowered = jax.jit(program).lower(*specs(list(shapes)))
    return lowered.cost_analysis()["flops"], lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize("heads", [4, 2], ids=["", "grouped"])
def test_attention_counts_as_its_products(heads: int) -> None:
    q, kv = (2, 24, 4, 16), (2, 40, heads, 16)
    products = 2 * 2 * 2 * 4 * 24 * 40 * 16
    for flops in attention_flops(lambda *x: jax_nano.dot_product_attention(*x, is_causal=True), q, kv, kv):
        assert flops == products


@pytest.mark.parametrize("heads", [4, 2], ids=["", "grouped"])
def test_gradients_of_attention_count_as_their_products(heads: int) -> None:
    q, kv = (2, 24, 4, 16), (2, 40, heads, 16)

    def program(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(lambda *x: jax_nano.dot_product_attention(*x[:3], bias=x[3]), q, k, v, bias)[1](q)

    # Two forward; the scores and those of q, k, v and the weights. The scores are written twice (for their sums, then
    # for the weights), which XLA makes one when it compiles.
    product = 2 * 2 * 4 * 24 * 40 * 16
    for flops in attention_flops(program, q, kv, kv, (1, 1, 24, 40)):
        assert 7 * product <= flops < 1.1 * 8 * product


def test_accelerated_attention_counts_as_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=False))
    q = (2, 40, 4, 16)

    def program(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v)

    with jax_nano.accelerate():
        compiled = jax.jit(program).lower(*specs([q, q, q])).compile()
    assert "jax_nano_attention" in compiled.as_text()
    products = 2 * 2 * 2 * 4 * 40 * 40 * 16
    assert products <= compiled.cost_analysis()["flops"] < 1.1 * products


@pytest.mark.parametrize("along_k", [False, True])
def test_quantised_weights_count_as_their_product(along_k: bool) -> None:
    x, q, scale = specs([(9, 32), (48, 32) if along_k else (32, 48), (48,)])
    q = jax.ShapeDtypeStruct(q.shape, jnp.int8)

    def product(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
        return jax_nano.quantized_matmul(x, q, scale, contracting=int(along_k))

    compiled = jax.jit(product).lower(x, q, scale).compile()
    assert "jax_nano_quantized" in compiled.as_text()
    assert 2 * 9 * 32 * 48 <= compiled.cost_analysis()["flops"] < 2.1 * 9 * 32 * 48


def test_accelerated_quantised_weights_count_as_their_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=False))
    x, scale = specs([(9, 32), (48,)])
    q = jax.ShapeDtypeStruct((32, 48), jnp.int4)
    with jax_nano.accelerate():
        compiled = jax.jit(lambda x, q, s: x @ (q.astype(x.dtype) * s)).lower(x, q, scale).compile()
    assert "jax_nano_quantized" in compiled.as_text()
    assert compiled.cost_analysis()["flops"] == 2 * 9 * 32 * 48
