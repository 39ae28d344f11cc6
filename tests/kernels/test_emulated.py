"""Kernels of targets that this CPU lacks, run by emulation; and of those it has, the same bits as natively.

JAX_NANO_REQUIRE_TARGET=emulated turns the skipping of these tests (for want of LLVM 22) into a failure.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import emulated
import epilogues
import ml_dtypes
import numpy as np
import pytest
import reference
from guarded import Region

from jax_nano import _runtime
from jax_nano.codegen import catalog, emulate
from jax_nano.codegen.nanokernel.fma import Fma
from jax_nano.codegen.toolchain import ToolchainError

SUPPORTED = {t["name"] for t in _runtime.targets() if t["supported"]}
# Where the CPU has the target, only kernels with emulated instructions are of interest.
KERNELS = [
    k
    for k in catalog.kernels()
    if k.target != emulate.BASELINE and (k.target.name not in SUPPORTED or not isinstance(k.family, Fma))
]
KS = (0, 1, 3, 4, 33, 130)


@pytest.fixture(scope="session")
def library() -> dict[str, emulated.Kernel]:
    if emulate.BASELINE.name not in SUPPORTED:
        pytest.skip(f"this CPU is no {emulate.BASELINE.name}")
    try:
        return emulated.load(KERNELS)
    except ToolchainError as error:
        message = str(error)
    if "emulated" in os.environ.get("JAX_NANO_REQUIRE_TARGET", "").split(","):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(params=[k.name for k in KERNELS])
def subject(request: pytest.FixtureRequest, library: dict[str, emulated.Kernel]) -> emulated.Kernel:
    return library[request.param]


@pytest.fixture(scope="module")
def memory() -> Iterator[list[Region]]:
    regions = [Region(1 << 20) for _ in range(3)]
    yield regions
    for r in regions:
        r.__exit__(None, None, None)


def place(region: Region, like: np.ndarray, order: str, at: str) -> np.ndarray:
    """A copy of ``like`` in guarded memory, stored by rows (C), by columns (F), or as every other element (S)."""
    if order == "S":
        view = region.array([max(2 * size - 1, 0) for size in like.shape], like.dtype, at=at)[::2, ::2]
        view[...] = like
        return view
    stored = region.array(like.shape if order == "C" else like.shape[::-1], like.dtype, at=at)
    view = stored if order == "C" else stored.T
    view[...] = like
    return view


def sizes(unit: int) -> tuple[int, ...]:
    return (1, unit // 2 + 1, unit - 1, unit, 2 * unit + 3)


def exact_parts(x: np.ndarray) -> list[np.ndarray]:
    """An f32 array as the sum of three bf16 arrays, in float64."""
    parts, rest = [], x.astype(np.float32)
    for _ in range(3):
        part = rest.astype(ml_dtypes.bfloat16).astype(np.float32)
        parts.append(part.astype(np.float64))
        with np.errstate(invalid="ignore"):
            rest = np.where(np.isfinite(part), rest - part, 0).astype(np.float32)
    return parts


PRODUCTS = {
    "BF16_BF16_F32": [(0, 0)],
    "BF16_BF16_F32_X3": [(0, 0), (0, 1), (1, 0)],
    "BF16_BF16_F32_X6": [(0, 0), (0, 1), (1, 0), (0, 2), (2, 0), (1, 1)],
}


def expected(
    kernel: emulated.Kernel, a: np.ndarray, b: np.ndarray, initial: np.ndarray | None = None, out: str | None = None
) -> reference.Expected:
    out = out or kernel.out
    if kernel.algorithm == "default":
        return reference.expected("mk,kn->mn", a, b, out=out, acc=kernel.acc, initial=initial)
    left, right = exact_parts(a), exact_parts(b)
    with np.errstate(invalid="ignore"):
        value = sum(left[i] @ right[j] for i, j in PRODUCTS[kernel.algorithm])
    judged = reference.expected("mk,kn->mn", left[0], right[0], out=out, acc=kernel.acc, initial=initial)
    if initial is not None:
        value = value + initial
    return reference.Expected(np.broadcast_to(value, judged.value.shape), 2 * judged.bound)


def operands(kernel: emulated.Kernel, rng: np.random.Generator, m: int, n: int, k: int) -> tuple:
    return reference.random(rng, (m, k), kernel.lhs), reference.random(rng, (k, n), kernel.rhs)


def packs(kernel: emulated.Kernel, order_b: str) -> list[dict[str, int]]:
    """What may be packed: everything, and as little as possible."""
    least = {"pack_a": int(not kernel.direct_a), "pack_b": int(not kernel.direct_b or order_b != "C")}
    most = {"pack_a": 1, "pack_b": 1}
    return [most] if least == most else [most, least]


@pytest.mark.parametrize(
    ("at", "orders"), [("end", "CC"), ("begin", "CF"), ("end", "FC"), ("begin", "FF"), ("end", "SS")]
)
def test_edges_beside_guard_pages(subject, memory, rng, at, orders):
    ms, ns = sizes(subject.mr), sizes(subject.nr)
    for k in KS:
        a_all, b_all = operands(subject, rng, ms[-1], ns[-1], k)
        want = expected(subject, a_all, b_all)
        for n in ns:
            b = place(memory[1], b_all[:, :n], orders[1], at)
            for m in ms:
                a = place(memory[0], a_all[:m], orders[0], at)
                for pack in packs(subject, orders[1]):
                    c = memory[2].array((m, n), subject.out, at=at)
                    c.fill(reference.poison(subject.out))
                    subject.call(a, b, c, **pack)
                    want[:m, :n].check(c, (m, n, k))


@pytest.mark.parametrize("at", ["end", "begin"])
def test_inner_products_beside_guard_pages(subject, memory, rng, at):
    if not subject.inner:
        pytest.skip("no inner-product path")
    for k in KS[1:]:
        a_all, b_all = operands(subject, rng, 9, 10, k)
        want = expected(subject, a_all, b_all)
        for m, n in [(1, 1), (1, 10), (9, 1), (3, 5), (9, 10)]:
            a, b = place(memory[0], a_all[:m], "C", at), place(memory[1], b_all[:, :n], "F", at)
            c = memory[2].array((m, n), subject.out, at=at)
            for prefetch in (0, 1):
                c.fill(reference.poison(subject.out))
                subject.call(a, b, c, inner=1, prefetch=prefetch, pack_a=0, pack_b=0, rsa=k, csa=1, rsb=1, csb=k)
                want[:m, :n].check(c, (m, n, k, prefetch))
            a, b = place(memory[0], a_all[:m], "F", at), place(memory[1], b_all[:, :n], "C", at)
            c.fill(reference.poison(subject.out))
            subject.call(a, b, c, inner=1, pack_a=1, pack_b=1, rsa=1, csa=m, rsb=n, csb=1)
            want[:m, :n].check(c, (m, n, k, "copied"))


@pytest.mark.parametrize("at", ["end", "begin"])
def test_sweeps_beside_guard_pages(subject, memory, rng, at):
    """Every number of rows at once and more; columns below, at and above groups of vectors; steps and what is left."""
    if not subject.sweep:
        pytest.skip("no sweep path")
    widest = 3 * subject.nr + 1
    for k in (1, 2, 7, 8, 9, 17):
        a_all, b_all = operands(subject, rng, 6, widest, k)
        want = expected(subject, a_all, b_all)
        for m, n in [(1, 1), (1, widest), (2, subject.nr), (3, subject.nr + 7), (4, 17), (5, subject.nr - 1), (6, 33)]:
            for order in "CF":
                a, b = place(memory[0], a_all[:m], order, at), place(memory[1], b_all[:, :n], "C", at)
                c = memory[2].array((m, n), subject.out, at=at)
                for prefetch in (0, 1):
                    c.fill(reference.poison(subject.out))
                    subject.call(a, b, c, sweep=1, prefetch=prefetch, pack_a=0, pack_b=0)
                    want[:m, :n].check(c, (m, n, k, prefetch))


@pytest.mark.parametrize("orders", ["CC", "CF", "FC", "FF"])
def test_exact_on_integers_in_blocks(subject, rng, orders):
    """Small blocks of every loop; sums that go on from C or `partial`, rounded or wrapped once, at the end."""
    mc, nc, kc = 2 * subject.mr, subject.nr, 8 * subject.kr
    m, n, k = mc + subject.mr + 1, 2 * nc + 5, 2 * kc + 3
    a = np.asarray(reference.small_integers(rng, (m, k), subject.lhs), order=orders[0])
    b = np.asarray(reference.small_integers(rng, (k, n), subject.rhs), order=orders[1])
    want = (a.astype(np.int64) @ b.astype(np.int64)).astype(subject.out)
    for pack in packs(subject, orders[1]):
        blocks = {"mc": mc, "nc": nc, "kc": kc, **pack}
        c = reference.poisoned((m, n), subject.out)
        subject.call(a, b, c, **blocks)
        assert np.array_equal(c, want)
        for first in (kc + 1, k):  # or all of it, and the second call only finishes
            c = reference.poisoned((m, n), subject.out)
            rs_partial = -(-n // subject.nr) * subject.nr
            partial = np.zeros((m, rs_partial), subject.acc)
            sums = {"partial": partial.ctypes.data, "rs_partial": rs_partial} if subject.narrow_out else {}
            subject.call(a[:, :first], b[:first], c, more=1, **blocks, **sums)
            subject.call(a[:, first:], b[first:], c, accumulate=1, **blocks, **sums)
            assert np.array_equal(c, want)


@pytest.mark.parametrize(("at", "order_b"), [("end", "C"), ("begin", "F")])
def test_epilogues_beside_guard_pages(subject, memory, rng, at, order_b):
    if not subject.epilogue:
        pytest.skip("sums in another type than float32: no epilogue")
    activations = itertools.cycle(epilogues.NAMES)
    with Region(1 << 20) as residuals, Region(1 << 16) as biases:
        for k, m, n in itertools.product((3, 40), sizes(subject.mr), sizes(subject.nr)):
            a_all, b_all = operands(subject, rng, m, n, k)
            a, b = place(memory[0], a_all, "C", at), place(memory[1], b_all, order_b, at)
            residual = place(residuals, reference.random(rng, (m, n), subject.out), "C", at)
            bias = place(biases, reference.random(rng, (n,), subject.out), "C", at)
            sums = expected(subject, a, b, out=subject.acc)
            for pack in packs(subject, order_b):
                for kc in {-(-k // subject.kr) * subject.kr, subject.kr * 4}:
                    epilogue = epilogues.Epilogue(next(activations), 0.5, bias, residual)
                    c = memory[2].array((m, n), subject.out, at=at)
                    c.fill(reference.poison(subject.out))
                    struct = epilogue.struct(c)
                    subject.call(a, b, c, epilogue=epilogues.address(struct), kc=kc, **pack)
                    epilogue.expected(sums, subject.out).check(c, (m, n, k, kc, epilogue.activation))


def test_nothing_outside_leaks_in(subject, rng):
    """Poison in the gaps of every operand; the gaps of C keep what they hold."""
    for m, n, k in [(subject.mr + 1, subject.nr + 1, 7), (3, 17, 33)]:
        a_room, b_room, c_room = (
            reference.poisoned(shape, dtype)
            for shape, dtype in (
                ((m + 4, k + 5), subject.lhs),
                ((k + 4, n + 35), subject.rhs),
                ((m + 4, n + 35), subject.out),
            )
        )
        a, b, c = a_room[2 : 2 + m, 3 : 3 + k], b_room[2 : 2 + k, 1 : 1 + n], c_room[2 : 2 + m, 1 : 1 + n]
        a[...], b[...] = operands(subject, rng, m, n, k)
        subject.call(a, b, c)
        expected(subject, a, b).check(c)
        c[...] = c_room[0, 0]
        assert c_room.tobytes() == reference.poisoned(c_room.shape, subject.out).tobytes()


def test_nan_and_inf(subject, rng):
    if reference.is_integer(subject.acc):
        pytest.skip("integers have neither")
    m, n, k = subject.mr + 1, subject.nr + 7, 37
    a, b = operands(subject, rng, m, n, k)
    a[1, 3], a[4, 0], a[m - 1, k - 1] = np.nan, np.inf, -np.inf
    b[3, 2], b[0, 5], b[k - 1, n - 1] = np.inf, 0, np.nan
    a[2, :] = 0
    c = reference.poisoned((m, n), subject.out)
    subject.call(a, b, c)
    want = expected(subject, a, b)
    if subject.algorithm == "default":
        want.check(c)
    else:  # the rest of an Inf is zero, and zero times Inf is NaN: where exactly is the algorithm's business
        finite = np.isfinite(want.value)
        assert not np.isfinite(c[~finite]).any()
        want[finite].check(c[finite])


def test_extreme_integers(subject):
    if not reference.is_integer(subject.acc):
        pytest.skip("floats have tests of their own")
    m, n, k = subject.mr + 1, subject.nr + 1, 515
    for a_value in (np.iinfo(subject.lhs).min, np.iinfo(subject.lhs).max):
        for b_value in (np.iinfo(subject.rhs).min, np.iinfo(subject.rhs).max):
            a, b = np.full((m, k), a_value, subject.lhs), np.full((k, n), b_value, subject.rhs)
            c = reference.poisoned((m, n), subject.out)
            subject.call(a, b, c)
            assert (c == np.array(int(a_value) * int(b_value) * k).astype(subject.out)).all()


def test_bf16_products_flush_subnormals(subject):
    if "bf" not in next(k for k in KERNELS if k.name == subject.name).family.instructions[0]:
        pytest.skip("not a bf16 product instruction")
    for x, y in [(2.0**-130, 2.0**20), (2.0**-70, 2.0**-60)]:
        a, b = np.full((1, 2), x, subject.lhs), np.full((2, 1), y, subject.rhs)
        c = reference.poisoned((1, 1), subject.out)
        subject.call(a, b, c)
        assert c[0, 0] == 0


def bits(x: np.ndarray) -> np.ndarray:
    """Bit patterns; a NaN's sign and payload mean nothing."""
    raw = x.view(f"u{x.itemsize}")
    return raw if reference.is_integer(x.dtype) else np.where(np.isnan(x), 0x7FC1, raw)


def test_the_same_bits_as_natively(subject, rng):
    """The emulation itself is right, NaN, Inf and subnormal numbers included: where the CPU can tell."""
    if subject.target not in SUPPORTED:
        pytest.skip(f"this CPU has no {subject.target}")
    m, n, k = 2 * subject.mr + 1, 2 * subject.nr + 5, 67
    for anything in (False, True):
        a, b = operands(subject, rng, m, n, k)
        if anything:  # all bit patterns
            a, b = (np.frombuffer(rng.bytes(x.nbytes), x.dtype).reshape(x.shape) for x in (a, b))
        ours, native = (reference.poisoned((m, n), subject.out) for _ in range(2))
        kc = 16 * subject.kr
        subject.call(a, b, ours, kc=kc)
        strides = {"m": m, "n": n, "k": k, "rsa": k, "csa": 1, "rsb": n, "csb": 1, "rsc": n}
        addresses = {"a": a.ctypes.data, "b": b.ctypes.data, "c": native.ctypes.data}
        _runtime.testing.call(subject.name, {**addresses, **strides, "kc": kc})
        assert np.array_equal(bits(ours), bits(native))
