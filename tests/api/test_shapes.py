"""The pure logic of dimension numbers, against NumPy's einsum where it means something."""

from __future__ import annotations

import itertools
import string
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from contraction import random_contraction
from jax import export
from jax.lax import DotAlgorithmPreset

from jax_nano import _runtime
from jax_nano._core import contraction, native, signatures
from jax_nano._core import jax_compat as compat
from jax_nano._core.contraction import Labels
from jax_nano._dispatch import decision
from jax_nano._ops import einsum, sharding

MATMUL = (((1,), (0,)), ((), ()))
BATCHED = (((2,), (1,)), ((0,), (0,)))


def run(labels: Labels, lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    names = ("".join(string.ascii_letters[x] for x in dims) for dims in labels)
    return np.einsum("{},{}->{}".format(*names), lhs, rhs)


def arrays(labels: Labels, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    size = {x: 2 + i for i, x in enumerate(sorted({*labels.lhs, *labels.rhs}))}
    return tuple(rng.standard_normal([size[x] for x in dims]) for dims in labels[:2])


def test_labels_name_the_roles() -> None:
    labels = contraction.labels_of(BATCHED, None, 3, 3)
    assert labels == Labels((0, 1, 2), (0, 2, 5), (0, 1, 5))
    assert labels.batch == (0,)
    assert labels.contracting == (2,)
    assert labels.lhs_free == (1,)
    assert labels.rhs_free == (5,)
    assert labels.out_shape((7, 3, 4), (7, 4, 5)) == (7, 3, 5)


@pytest.mark.parametrize("out_perm", [None, *itertools.permutations(range(3))])
def test_labels_and_dimension_numbers_are_inverse(out_perm: tuple[int, ...] | None) -> None:
    labels = contraction.labels_of(BATCHED, out_perm, 3, 3)
    numbers, perm = contraction.dimension_numbers_of(labels)
    assert contraction.labels_of(numbers, perm, 3, 3) == labels
    if out_perm in (None, (0, 1, 2)):
        assert (numbers, perm) == (BATCHED, None)


@pytest.mark.parametrize("out_perm", [None, (1, 0, 2), (2, 1, 0)])
def test_cotangents_are_laid_out_as_their_operands(out_perm: tuple[int, ...] | None, rng: np.random.Generator) -> None:
    labels = contraction.labels_of(BATCHED, out_perm, 3, 3)
    lhs, rhs = arrays(labels, rng)
    out = run(labels, lhs, rhs)
    g = rng.standard_normal(out.shape)
    # <g, lhs rhs> is linear in each: its derivative along a direction is the cotangent's product with it.
    for wrt, cotangent in (
        (0, run(contraction.lhs_cotangent(labels), g, rhs)),
        (1, run(contraction.rhs_cotangent(labels), lhs, g)),
    ):
        assert cotangent.shape == (lhs, rhs)[wrt].shape
        direction = rng.standard_normal(cotangent.shape)
        moved = run(labels, *((direction, rhs) if wrt == 0 else (lhs, direction)))
        np.testing.assert_allclose(np.sum(g * moved), np.sum(cotangent * direction))


@pytest.mark.parametrize(("lhs_dim", "rhs_dim"), [(0, 0), (2, 1), (None, 2), (1, None), (2, 0)])
def test_batching_stacks_in_front(lhs_dim: int | None, rhs_dim: int | None, rng: np.random.Generator) -> None:
    labels = contraction.labels_of(MATMUL, None, 2, 2)
    batched = contraction.batched(labels, lhs_dim, rhs_dim)
    lhs = rng.standard_normal((5, 3, 4) if lhs_dim is not None else (3, 4))
    rhs = rng.standard_normal((5, 4, 2) if rhs_dim is not None else (4, 2))
    want = np.matmul(lhs, rhs)
    got = run(
        batched,
        lhs if lhs_dim is None else np.moveaxis(lhs, 0, lhs_dim),
        rhs if rhs_dim is None else np.moveaxis(rhs, 0, rhs_dim),
    )
    np.testing.assert_allclose(got, want)


@pytest.mark.parametrize("perm", list(itertools.permutations(range(3))))
def test_transpose_before_a_product_is_a_matter_of_labels(perm: tuple[int, ...], rng: np.random.Generator) -> None:
    labels = contraction.labels_of(BATCHED, None, 3, 3)
    lhs, rhs = arrays(labels, rng)
    x = np.transpose(lhs, np.argsort(perm))
    assert np.array_equal(np.transpose(x, perm), lhs)
    folded = labels._replace(lhs=contraction.before_transpose(labels.lhs, perm))
    np.testing.assert_allclose(run(folded, x, rhs), run(labels, lhs, rhs))


@pytest.mark.parametrize(
    ("out", "lhs_shape", "rhs_shape", "stored"),
    [
        ((0, 1, 5), (7, 3, 4), (7, 4, 5), (0, 1, 5)),
        ((1, 5, 0), (7, 3, 4), (7, 4, 5), (0, 1, 5)),  # rows of C would be batches
        ((1, 0, 5), (7, 3, 4), (7, 4, 5), (1, 0, 5)),
        ((1, 5, 0), (1, 3, 4), (1, 4, 5), (1, 5, 0)),  # a batch dimension of one does not count
        ((5, 1, 0), (7, 1, 4), (7, 4, 1), (5, 1, 0)),  # nor do M and N
        ((0, 1, 5), (7, 3, 4), (7, 4, 1), (0, 1, 5)),
        ((1, 5, 0), (0, 3, 4), (0, 4, 5), (0, 1, 5)),
    ],
)
def test_the_result_is_stored_in_rows(out: tuple, lhs_shape: tuple, rhs_shape: tuple, stored: tuple) -> None:
    assert contraction.runnable_out(Labels((0, 1, 2), (0, 2, 5), out), lhs_shape, rhs_shape) == stored


BATCHES = [(), (1,), (3,), (2, 3), (2, 1), (1, 1), (1, 3), (4, 2, 3), (1, 2, 1)]


@pytest.mark.parametrize("lhs_core", [(4,), (3, 4), (1, 4)])
@pytest.mark.parametrize("rhs_core", [(4,), (4, 5), (4, 1)])
def test_matmul_layout_is_numpys_matmul(lhs_core: tuple, rhs_core: tuple, rng: np.random.Generator) -> None:
    for lhs_batch, rhs_batch in itertools.product(BATCHES, BATCHES):
        lhs = rng.standard_normal((lhs_batch if len(lhs_core) > 1 else ()) + lhs_core)
        rhs = rng.standard_normal((rhs_batch if len(rhs_core) > 1 else ()) + rhs_core)
        layout = contraction.matmul_layout(lhs.shape, rhs.shape)
        try:
            want = np.matmul(lhs, rhs)
        except ValueError:
            assert layout is None
            continue
        assert layout is not None
        out = run(layout.labels, lhs.squeeze(layout.lhs_squeeze), rhs.squeeze(layout.rhs_squeeze))
        np.testing.assert_allclose(np.expand_dims(out, layout.expand), want)


def test_matmul_does_not_broadcast_sharded_dimensions() -> None:
    assert contraction.matmul_layout((1, 3, 4), (2, 4, 5), ("x",), (None,)) is None
    assert contraction.matmul_layout((2, 3, 4), (2, 4, 5), ("x",), ("y",)) is None
    assert contraction.matmul_layout((2, 3, 4), (2, 4, 5), ("x",), ("x",)) is not None
    assert contraction.matmul_layout((1, 3, 4), (1, 4, 5), ("x",), ("x",)).expand == ()


@pytest.mark.parametrize(
    ("inputs", "output", "shapes"),
    [
        ("ii,ij", "j", [(2, 2), (2, 3)]),  # a diagonal
        ("ij,kl", "il", [(2, 3), (4, 5)]),  # j and k summed out of one operand
        ("ij,jk", "ii", [(2, 3), (3, 4)]),
        ("ij,jk", "ik", [(2, 1), (3, 4)]),  # j broadcasts
        ("ij,jk", "ik", [(2, 3, 4), (3, 4)]),
        ("ij,jk", "il", [(2, 3), (3, 4)]),
        ("ij", "i", [(2, 3)]),
    ],
)
def test_what_is_not_one_product(inputs: str, output: str, shapes: list) -> None:
    assert contraction.einsum_labels(inputs.split(","), output, shapes) is None


def test_einsum_steps() -> None:
    def zeros(*shapes: tuple[int, ...]) -> list[np.ndarray]:
        return [np.zeros(shape, np.float32) for shape in shapes]

    (step,) = einsum.steps("bqhd,bkhd->bhqk", zeros((2, 3, 4, 5), (2, 6, 4, 5)), "auto", None)
    assert step.labels == Labels((0, 1, 2, 3), (0, 4, 2, 3), (0, 2, 1, 4))
    (step,) = einsum.steps("...ij,jk", zeros((2, 3, 4), (4, 5)), "auto", None)
    assert step.labels.out_shape((2, 3, 4), (4, 5)) == (2, 3, 5)
    three = einsum.steps("ij,jk,kl", zeros((2, 3), (3, 4), (4, 5)), False, None)
    assert [step.operands for step in three] == [(0, 1), (0, 1)] or len(three) == 2
    assert all(step.labels is not None for step in three)
    (diagonal,) = einsum.steps("ii->i", zeros((3, 3)), "auto", None)
    assert diagonal.labels is None
    # Left to jnp.einsum: malformed, unusual forms, several steps into one sharding.
    assert einsum.steps("ij,jk->il", zeros((2, 3), (3, 4)), "auto", None) is None
    assert einsum.steps("ij,jk", zeros((2, 3), (5, 4)), "auto", None) is None
    assert einsum.steps(zeros((2, 3))[0], ([0, 1],), "auto", None) is None
    assert einsum.steps("ij,jk,kl", zeros((2, 3), (3, 4), (4, 5)), "auto", object()) is None


DEFAULT_SIGNATURES = frozenset((x["lhs"], x["rhs"], x["out"], "default") for x in _runtime.kernels())
MACHINES = [
    decision.Machine("x86-64-v3", DEFAULT_SIGNATURES, cpu="AMD Zen 3"),
    decision.Machine("x86-64-v4", DEFAULT_SIGNATURES),  # one that nobody has measured
]


def decided(
    subscripts: str, lhs: tuple, rhs: tuple, dtype: str = "float32", *, machine: int = 0, placed: bool = True
) -> decision.Decision:
    inputs, output = subscripts.split("->")
    labels = contraction.einsum_labels(inputs.split(","), output, (lhs, rhs))
    out = "int32" if dtype == "int8" else dtype
    dtypes = tuple(np.dtype(getattr(ml_dtypes, x, x)) for x in (dtype, dtype, out))
    product = decision.Product(labels, lhs, rhs, dtypes, None, placed=placed)
    return decision.dispatch(product, MACHINES[machine], decision.Policy(declines=True))


@pytest.mark.parametrize("machine", [0, 1])
@pytest.mark.parametrize(
    ("subscripts", "lhs", "rhs", "why"),
    [
        ("mk,kn->mn", (2, 2), (2, 2), "too small"),
        ("mk,kn->mn", (3, 3), (3, 3), "too small"),
        ("mk,kn->mn", (4, 4), (4, 4), None),
        ("km,kn->mn", (17, 512), (17, 512), None),
        ("bkm,bkn->bmn", (2, 16, 512), (2, 16, 512), None),
        ("mk,kn->mn", (512, 512), (512, 512), None),
        ("mk,kn->mn", (4096, 4096), (4096, 4096), None),
        ("bmk,bkn->bmn", (64, 4, 4), (64, 4, 4), None),
        ("mk,kn->mn", (0, 512), (512, 512), "empty"),
        ("mk,kn->mn", (512, 0), (0, 512), "empty"),
        ("mk,kn->mn", (512, 1), (1, 512), "outer"),
        ("m,n->mn", (512,), (512,), "outer"),
        ("mk,k->m", (4096, 4), (4,), "vector"),
    ],
)
def test_the_engine_of_less_predicted_time(
    subscripts: str, lhs: tuple, rhs: tuple, why: str | None, machine: int
) -> None:
    """Where there is no doubt; benchmarks/data and tests/test_engines.py say how good it is elsewhere."""
    found = decided(subscripts, lhs, rhs, machine=machine)
    assert (found.declined is None) if why is None else (why in found.declined)
    assert (found.signature is None) == (why is not None)
    if found.times is not None:
        assert found.times.cpu == "AMD Zen 3"
        assert found.times.prefers_xla == (why is not None)
        assert found.times.kernel_ns > 0 < found.times.xla_ns
        assert why is None or str(found.times) in found.declined


def test_the_policy_and_the_kernels_decide_before_time_does() -> None:
    labels = contraction.labels_of(MATMUL, None, 2, 2)
    product = decision.Product(labels, (2, 2), (2, 2), (np.dtype(np.float32),) * 3, None)
    always, never = decision.Policy(declines=False), decision.Policy(declines=True)
    assert decision.dispatch(product, MACHINES[0], always).declined is None
    assert decision.dispatch(product, MACHINES[0], always).times == decision.dispatch(product, MACHINES[0], never).times
    for policy in (always, never):
        found = decision.dispatch(product, decision.Machine("", frozenset()), policy)
        assert found.signature is None
        assert found.declined.startswith("no kernel for float32 x float32 -> float32")


def test_a_machine_that_was_not_measured_decides_like_the_reference() -> None:
    for n in (3, 16, 100, 300):
        for dtype in ("float32", "bfloat16", "float64", "int8"):
            for subscripts, lhs in (("mk,kn->mn", (n, n)), ("k,kn->n", (n,))):
                here, there = (decided(subscripts, lhs, (n, n), dtype, machine=x) for x in (0, 1))
                assert here == there


def test_small_products_in_loops_of_one_function() -> None:
    """XLA computes those of 4x4x4 in place where it may compile a loop around them into one function."""
    inside = decided("mk,kn->mn", (4, 4), (4, 4), placed=False)
    assert (inside.declined is not None) == compat.INLINES_SMALL_PRODUCTS
    assert decided("mk,kn->mn", (8, 8), (8, 8), placed=False).declined is None


def test_every_product_can_be_decided() -> None:
    """Dtypes that kernels read only after a conversion, and results that no kernel stores in their order, too."""
    machine = decision.this_machine()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        c = random_contraction(rng)
        dtypes = tuple(np.dtype(x) for x in rng.choice(["float32", "float64", "float16", "int8", "uint8"], 3))
        lhs, rhs, out = (tuple(x) for x in c.labels)
        labels = contraction.Labels(lhs, rhs, tuple(rng.permutation(out).tolist()))
        product = decision.Product(labels, tuple(c.shapes[0]), tuple(c.shapes[1]), dtypes, None)
        found = decision.dispatch(product, machine, decision.Policy(declines=True))
        assert (found.signature is None) == (found.declined is not None)


def test_the_gate_is_for_what_xla_computes_alike() -> None:
    labels = contraction.labels_of(MATMUL, None, 2, 2)
    float32 = np.dtype(np.float32)
    names = ("float32", "float32", "float32")
    machine = decision.Machine("x86-64-v4", frozenset({(*names, "default"), (*names, "BF16_BF16_F32")}))
    for precision, declined in ((None, True), (DotAlgorithmPreset.BF16_BF16_F32, False)):
        product = decision.Product(labels, (2, 2), (2, 2), (float32,) * 3, precision)
        assert (decision.dispatch(product, machine, decision.Policy()).declined is not None) == declined


def test_this_machine_has_what_the_extension_says() -> None:
    machine = decision.this_machine()
    assert machine.target == native.target()
    for names in (("float32",) * 3, ("int8", "int8", "uint32"), ("int64",) * 3, ("float16", "float64", "float32")):
        assert machine.supports(*names, "default") == native.supports(*names)


def signature(lhs: str, rhs: str, out: str, precision: Any = None, terms: Any = 8, kernels: str = "") -> str | None:
    """The call for a product where there are these kernels, as text."""
    every = kernels or (
        "float32,float32,float32,default bfloat16,bfloat16,float32,default bfloat16,bfloat16,bfloat16,default "
        "float32,bfloat16,float32,default float64,float64,float64,default float32,float32,float32,BF16_BF16_F32 "
        "int8,int8,int32,default int8,uint8,int32,default int8,int8,int8,default"
    )
    found = signatures.find(
        *map(jnp.dtype, (lhs, rhs, out)), precision, terms, lambda *names: ",".join(names) in every.split()
    )
    return found and " ".join([found.lhs.name, found.rhs.name, found.out.name, found.algorithm])


def test_signatures() -> None:
    bf16, f32 = DotAlgorithmPreset.BF16_BF16_F32, DotAlgorithmPreset.F32_F32_F32
    assert signature("float32", "bfloat16", "float32") == "float32 bfloat16 float32 default"
    # lax rounds the wider operand to the dtype of the result first.
    assert signature("float32", "bfloat16", "bfloat16") == "bfloat16 bfloat16 bfloat16 default"
    assert signature("float16", "bfloat16", "float32") == "float32 bfloat16 float32 default"
    assert signature("float32", "float32", "bfloat16") is None
    assert signature("float32", "float64", "float64") == "float64 float64 float64 default"
    assert signature("int8", "int8", "int16") == "int8 int8 int32 default"
    assert signature("int8", "uint8", "int8") == "int8 uint8 int32 default"
    assert signature("int8", "float32", "float32") == "float32 float32 float32 default"
    # Sums of bytes in int32 are those of float32 only as long as they do not wrap around.
    assert signature("int8", "int8", "float32") == "int8 int8 int32 default"
    for unknown in (2**15 + 1, "k"):
        assert signature("int8", "int8", "float32", terms=unknown) is None
    assert signature("int8", "int8", "int32", terms="k") == "int8 int8 int32 default"
    assert signature("float32", "float32", "float32", bf16) == "float32 float32 float32 BF16_BF16_F32"
    assert signature("float32", "bfloat16", "float32", bf16) == "float32 float32 float32 BF16_BF16_F32"
    assert signature("bfloat16", "bfloat16", "bfloat16", bf16) == "bfloat16 bfloat16 bfloat16 default"
    assert signature("bfloat16", "bfloat16", "float32", f32) == "bfloat16 bfloat16 float32 default"
    assert signature("float32", "float32", "bfloat16", f32) == "float32 float32 float32 default"
    # A sum in float64, as named, even of operands that a float32 kernel takes.
    f64 = DotAlgorithmPreset.F64_F64_F64
    assert signature("float32", "float32", "float32", f64) == "float64 float64 float64 default"
    assert signature("float32", "float32", "float32", DotAlgorithmPreset.F16_F16_F16) is None
    assert signature("float32", "bfloat16", "bfloat16", DotAlgorithmPreset.DEFAULT) is None
    assert signature("complex64", "complex64", "complex64") is None
    assert signature("bool", "bool", "bool", f32) is None


def test_symbolic_sizes_pass_the_gate() -> None:
    labels = contraction.labels_of(MATMUL, None, 2, 2)
    m, k = export.symbolic_shape("m, k")
    for lhs, rhs, why in (
        ((m, k), (k, 5), None),
        ((m, 2), (2, 2), None),
        ((m, 1), (1, 2), "outer"),
        ((m, 0), (0, 2), "empty"),
    ):
        product = decision.Product(labels, lhs, rhs, (np.dtype(np.float32),) * 3, None)
        declined = decision.dispatch(product, MACHINES[0], decision.Policy(declines=True)).declined
        assert declined is None if why is None else why in declined


def test_gate_switch_is_on_or_off() -> None:
    with pytest.raises(ValueError, match="JAX_NANO_GATE=maybe: expected one of on, off"):
        decision.Policy.of_environment({"JAX_NANO_GATE": "maybe"})


def test_sharding_rule() -> None:
    labels = contraction.labels_of(BATCHED, None, 3, 3)
    assert sharding.sharding_rule(labels) == "a b c, a c f -> a b f"
    assert [sharding.factor(i) for i in (0, 25, 26, 27, 26 * 26)] == ["a", "z", "ba", "bb", "baa"]


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "want"),
    [
        # m k, k n -> m n
        ((("x",), ()), ((), ()), (("x",), ()), {0: ("x",)}),
        (((), ("x",)), (("x",), ()), ((), ()), {1: ("x",)}),
        (((), ("x",)), ((), ()), ((), ()), {1: ("x",)}),
        ((("x",), ()), ((), ("x",)), ((), ("x",)), {3: ("x",)}),  # the result keeps it
        ((("x", "y"), ()), (("y",), ()), ((), ()), {0: ("x", "y")}),  # lhs before rhs
    ],
)
def test_shardings_are_settled(lhs: tuple, rhs: tuple, out: tuple, want: dict) -> None:
    labels = contraction.labels_of(MATMUL, None, 2, 2)
    axes = sharding.settle(labels, lhs, rhs, out)
    assert {label: names for label, names in axes.items() if names} == want
    assert set(axes) == {0, 1, 3}
