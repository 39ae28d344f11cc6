"""Where the decline gate belongs: products in a loop, ours with the gate off compared with XLA's own, by dtype."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases import DTYPES, Case, matmul
from benchmarks.pairs import Timed, interleave, row
from benchmarks.peers.in_jax import JaxRunner
from benchmarks.report import Section

_HEADER = ("product", "jax_nano µs", "jnp µs", "jax_nano / jnp", "the gate")
_SQUARES = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24)
_BATCHED = (2, 3, 4, 5, 6, 8)
_VECTORS = (16, 64, 256, 1024)
_NARROW = ((128, 2, 128), (1024, 2, 1024), (1024, 8, 1024), (1024, 16, 1024), (4, 256, 256), (4, 1024, 1024))
_SHALLOW = (2, 4, 8, 16, 32)  # K of 512 x 512
_SAMPLE_SECONDS = 4e-3
_CLEARLY = 1.1  # two medians that are closer cannot be told apart on a machine with neighbours


def report(*, quick: bool) -> Section:
    """Microseconds of one product inside a fori_loop, and on which side of the gate it is."""
    from jax_nano._dispatch import decision

    rounds = 2 if quick else 7
    rows = []
    decision.policy = decision.Policy(declines=False)
    dtypes = ("f32", "bf16") if quick else ("f32", "f64", "bf16", "bf16-f32", "f16", "i8")
    for dtype in dtypes:
        for case in _quick(dtype) if quick else _cases(dtype):
            rows.append(_measured(case, _declined(case), rounds))
    text = "Ours with the gate open. `wrong`: it lets through what XLA computes faster, or keeps what we do."
    return Section("Products around the gate", text, _HEADER, tuple(rows))


def _quick(dtype: str) -> Iterator[Case]:
    yield matmul(2, 2, 2, dtype)
    yield matmul(8, 8, 8, dtype)


def _cases(dtype: str) -> Iterator[Case]:
    for n in _SQUARES:
        yield matmul(n, n, n, dtype)
    for n in _BATCHED:
        yield matmul(n, n, n, dtype, batch=256)
    for n in _VECTORS:
        yield matmul(1, n, n, dtype)
        yield matmul(1, n, n, dtype, layout="NT")
        yield matmul(n, 1, n, dtype)
    for k in _SHALLOW:
        yield matmul(512, 512, k, dtype, layout="TN")
    for sizes in _NARROW:
        for layout in ("NN", "NT", "TN"):
            yield matmul(*sizes, dtype, layout=layout)


def _declined(case: Case) -> bool:
    """Whether the gate leaves a product to XLA."""
    from jax_nano._core import contraction
    from jax_nano._dispatch import decision

    (*operands, out), (lhs, rhs, _) = case.labels, case.shapes
    labels = contraction.einsum_labels(operands, out, (lhs, rhs))
    assert labels is not None
    dtype = DTYPES[case.dtype]
    product = decision.Product(labels, lhs, rhs, (dtype.operand_dtype, dtype.operand_dtype, dtype.out_dtype), None)
    found = decision.dispatch(product, decision.this_machine(), decision.Policy(declines=True))
    return found.declined is not None


def _measured(case: Case, declined: bool, rounds: int) -> tuple[str, ...]:
    samples = interleave({"ours": _loop(case, True), "theirs": _loop(case, False)}, rounds)
    what, ours, theirs, ratio = row(case.key, samples["ours"], samples["theirs"], 1e-6, 2)
    slower = float(ratio) > _CLEARLY
    faster = float(ratio) < 1 / _CLEARLY
    side = "XLA" if declined else "kernel"
    return what, ours, theirs, ratio, f"{side}, wrong" if (faster if declined else slower) else side


def _loop(case: Case, ours: bool) -> Timed:
    runner = JaxRunner(1, ours=ours)
    runner.prepare(case, 1)
    runner.load([case.random_operands()])
    runner.run(10)
    trips = max(10, round(_SAMPLE_SECONDS / (runner.run(100) / 100)))
    return lambda: runner.run(trips) / trips
