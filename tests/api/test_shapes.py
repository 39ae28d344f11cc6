"""The pure logic of dimension numbers, against NumPy's einsum where it means something."""

from __future__ import annotations

import itertools
import string
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.lax import DotAlgorithmPreset

from jax_nano._core import contraction, native, signatures
from jax_nano._core.contraction import Labels
from jax_nano._dispatch import decision, xla
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


@pytest.mark.parametrize(
    ("subscripts", "lhs", "rhs", "why"),
    [
        ("mk,kn->mn", (2, 2), (2, 2), "too small"),
        ("mk,kn->mn", (3, 3), (3, 3), "too small"),
        ("mk,kn->mn", (4, 4), (4, 4), None),
        ("km,kn->mn", (16, 512), (16, 512), "terms"),
        ("km,kn->mn", (17, 512), (17, 512), None),
        ("km,kn->mn", (16, 128), (16, 512 - 1), None),
        ("bkm,bkn->bmn", (2, 16, 512), (2, 16, 512), None),
        ("mk,kn->mn", (512, 512), (512, 512), None),
        ("bmk,bkn->bmn", (64, 3, 3), (64, 3, 3), "too small"),
        ("bmk,bkn->bmn", (64, 4, 4), (64, 4, 4), None),
        ("bmk,bkn->bmn", (1, 3, 4), (1, 4, 3), "too small"),
        ("mk,kn->mn", (0, 512), (512, 512), "empty"),
        ("mk,kn->mn", (512, 0), (0, 512), "empty"),
        ("mk,kn->mn", (512, 1), (1, 512), "outer"),
        ("m,n->mn", (512,), (512,), "outer"),
        ("mk,k->m", (200, 200), (200,), "vector"),
        ("mk,k->m", (256, 256), (256,), None),
        ("mk,k->m", (1024, 1024), (1024,), "vector"),
        ("km,k->m", (1024, 1024), (1024,), "vector"),
        ("km,k->m", (4096, 1024), (4096,), None),
        ("mk,k->m", (4096, 1024), (1024,), None),
        ("k,k->", (2**24,), (2**24,), "vector"),
        ("k,k->", (4096,), (4096,), "vector"),
        ("mk,kn->mn", (1, 256), (256, 256), "vector"),
    ],
)
def test_gate(subscripts: str, lhs: tuple, rhs: tuple, why: str | None) -> None:
    inputs, output = subscripts.split("->")
    labels = contraction.einsum_labels(inputs.split(","), output, (lhs, rhs))
    reason = xla.is_faster(labels, lhs, rhs)
    assert (reason is None) if why is None else (why in reason)
    float32 = np.dtype(np.float32)
    product = decision.Product(labels, lhs, rhs, (float32,) * 3, None, placed=True)
    machine = decision.Machine("x86-64-v4", frozenset({("float32", "float32", "float32", "default")}))
    assert decision.dispatch(product, machine, decision.Policy(declines=True)).declined == reason
    for declines, kernels, signature, text in (
        (True, machine, reason is None, reason),
        (False, machine, True, None),
        (False, decision.Machine("", frozenset()), False, "no kernel for float32 x float32 -> float32"),
    ):
        found = decision.dispatch(product, kernels, decision.Policy(declines=declines))
        assert (found.signature is not None) == signature
        assert found.declined is None if text is None else found.declined.startswith(text)


def test_where_vectors_are_short_products_along_k_go_to_kernels_later() -> None:
    labels = contraction.einsum_labels(["mk", "k"], "m", ((256, 256), (256,)))
    for size, dtype, bits, declined in (
        *((256, "float32", 256, True), (512, "float32", 256, False)),
        *((256, "float32", 512, False), (256, "float64", 256, False)),
    ):
        why = xla.is_faster(labels, (size, size), (size,), dtypes=(dtype, dtype), vector_bits=bits)
        assert (why is not None) == declined


def test_the_gate_lets_large_vectors_of_narrow_elements_through() -> None:
    labels = contraction.labels_of(MATMUL, None, 2, 2)
    shapes = ((1, 128), (128, 128))
    assert "vector" in (xla.is_faster(labels, *shapes) or "")
    assert xla.is_faster(labels, *shapes, dtypes=("bfloat16", "bfloat16")) is None
    assert xla.is_faster(labels, *shapes, dtypes=("float32", "bfloat16")) is None
    assert xla.is_faster(labels, *shapes, dtypes=("bfloat16", "float32")) is not None
    assert xla.is_faster(labels, (1, 64), (64, 64), dtypes=("bfloat16", "bfloat16")) is not None
    for dtype in ("int8", "float16"):
        assert xla.is_faster(labels, (1, 16), (16, 16), dtypes=(dtype, dtype)) is None
    along_k = contraction.labels_of((((1,), (1,)), ((), ())), None, 2, 2)
    assert xla.is_faster(along_k, (1, 128), (128, 128), dtypes=("bfloat16", "bfloat16")) is not None
    assert xla.is_faster(along_k, (1, 256), (256, 256), dtypes=("bfloat16", "bfloat16")) is None


def test_the_gate_lets_batches_of_vectors_through() -> None:

    def why(inputs: list[str], out: str, shapes: tuple[tuple[int, ...], ...], dtype: str) -> str | None:
        return xla.is_faster(contraction.einsum_labels(inputs, out, shapes), *shapes, dtypes=(dtype, dtype))

    for dtype in ("int8", "bfloat16", "float32", "float64"):
        assert why(["bk", "bkn"], "bn", ((2, 16), (2, 16, 16)), dtype) is None
        assert "vector" in (why(["bk", "bkn"], "bn", ((2, 15), (2, 15, 17)), dtype) or "")
    assert "vector" in (why(["bk", "bkn"], "bn", ((1, 16), (1, 16, 16)), "float32") or "")
    assert "vector" in (why(["bk", "bk"], "b", ((2, 4096), (2, 4096)), "float32") or "")


def test_the_gate_lets_vectors_through_where_memory_or_l2_is_read() -> None:
    """float64: along K within L2, and everything that lies in memory."""
    for subscripts, n, passes in (
        ("k,nk->n", 256, True),
        ("k,nk->n", 1024, False),
        ("k,nk->n", 2048, True),
        ("k,kn->n", 256, False),
        ("k,kn->n", 1024, False),
        ("k,kn->n", 2048, True),
    ):
        shapes = ((n,), (n, n))
        inputs, output = subscripts.split("->")
        labels = contraction.einsum_labels(inputs.split(","), output, shapes)
        assert (xla.is_faster(labels, *shapes, dtypes=("float64", "float64")) is None) == passes, (subscripts, n)


def test_the_gate_keeps_small_products_by_dtype_and_place() -> None:
    labels = contraction.labels_of(MATMUL, None, 2, 2)
    for dtype, in_function, least in (
        ("float32", False, 4),
        ("float64", False, 4),
        ("bfloat16", False, 4),
        ("int8", False, 6),
        ("float32", True, 7),
        ("float64", True, 5),
        ("bfloat16", True, 7),
        ("int8", True, 6),
    ):
        for n in range(2, 9):
            why = xla.is_faster(labels, (n, n), (n, n), dtypes=(dtype, dtype), in_function=in_function)
            assert (why is None) == (n >= least), (dtype, in_function, n)
    assert xla.is_faster(labels, (512, 16), (16, 512), dtypes=("bfloat16", "bfloat16")) is None


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
    assert xla.is_faster(labels, (m, k), (k, 5)) is None
    assert xla.is_faster(labels, (m, 2), (2, 2)) is None


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
