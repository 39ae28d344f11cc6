"""What a kernel promises beyond small sizes: blocking, strides, batches, special values, far addresses."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from guarded import Region

PACKS = pytest.mark.parametrize(("pack_a", "pack_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])


def operands(kernel, rng, m, n, k):
    return reference.random(rng, (m, k), kernel.lhs), reference.random(rng, (k, n), kernel.rhs)


def check(kernel, a, b, c, **kwargs):
    reference.expected("mk,kn->mn", a, b, out=kernel.out, acc=kernel.acc, **kwargs).check(c)


def is_poison(array):
    return np.array_equal(array, reference.poisoned(array.shape, array.dtype), equal_nan=True)


@PACKS
@pytest.mark.parametrize(("m", "n", "k"), [(127, 129, 131), (61, 521, 263), (331, 67, 1031), (3, 5, 4099)])
def test_larger_odd_sizes(kernel, rng, m, n, k, pack_a, pack_b):
    a, b = operands(kernel, rng, m, n, k)
    c = reference.poisoned((m, n), kernel.out)
    kernel.call(a, b, c, pack_a=pack_a, pack_b=pack_b)
    check(kernel, a, b, c)


@PACKS
@pytest.mark.parametrize("accumulate", [0, 1])
def test_blocks_of_every_loop(kernel, rng, pack_a, pack_b, accumulate):
    """One, exactly several, and several and a bit of the smallest cache blocks there can be."""
    mc, nc, kc = 2 * kernel.mr, 2 * kernel.nr, 8 * kernel.kr
    for m in (mc, 2 * mc, 2 * mc + 1, 3 * mc - 1):
        for n in (nc, 2 * nc, 2 * nc + 1, 3 * nc - 1):
            for k in (kc, 2 * kc, 2 * kc + 1, 3 * kc - 1):
                a, b = operands(kernel, rng, m, n, k)
                c = reference.random(rng, (m, n), kernel.out) if accumulate else reference.poisoned((m, n), kernel.out)
                initial = c.copy() if accumulate else None
                blocking = {"mc": mc, "nc": nc, "kc": kc}
                kernel.call(a, b, c, pack_a=pack_a, pack_b=pack_b, accumulate=accumulate, **blocking)
                check(kernel, a, b, c, initial=initial)


@pytest.mark.parametrize("pack", [0, 1])
def test_only_kc_decides_the_bits(kernel, rng, pack):
    """The promise behind "the same for any number of threads": cut m and n anywhere, pack or do not."""
    m, n, k = 5 * kernel.mr + 3, 3 * kernel.nr + 5, 300
    a, b = operands(kernel, rng, m, n, k)
    whole, pieces = reference.poisoned((m, n), kernel.out), reference.poisoned((m, n), kernel.out)
    kc = 128 * kernel.kr
    kernel.call(a, b, whole, kc=kc)
    for rows in np.array_split(np.arange(m), [1, 2 * kernel.mr, m - 2]):
        for cols in np.array_split(np.arange(n), [3, kernel.nr, n - 1]):
            i, j = slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)
            blocking = {"mc": kernel.mr, "nc": kernel.nr, "kc": kc}
            kernel.call(a[i], b[:, j], pieces[i, j], pack_a=pack, pack_b=pack, **blocking)
    assert whole.tobytes() == pieces.tobytes()


@PACKS
@pytest.mark.parametrize("infinite", [False, True])
def test_nothing_outside_leaks_in(kernel, rng, pack_a, pack_b, infinite):
    """NaN or Inf in the gaps of every operand; the gaps of C keep what they hold."""

    def room(shape, dtype):
        value = np.inf if infinite and not reference.is_integer(dtype) else reference.poison(dtype)
        return np.full(shape, value, dtype)

    for m, n, k in [(1, 1, 1), (kernel.mr + 1, kernel.nr + 1, 7), (3, 17, 33), (29, 70, 64)]:
        a_room, b_room = room((m + 4, k + 5), kernel.lhs), room((k + 4, n + 35), kernel.rhs)
        c_room = room((m + 4, n + 35), kernel.out)
        a, b, c = a_room[2 : 2 + m, 3 : 3 + k], b_room[2 : 2 + k, 1 : 1 + n], c_room[2 : 2 + m, 1 : 1 + n]
        a[...], b[...] = operands(kernel, rng, m, n, k)
        kernel.call(a, b, c, pack_a=pack_a, pack_b=pack_b)
        check(kernel, a, b, c)
        c[...] = c_room[0, 0]
        assert c_room.tobytes() == room(c_room.shape, kernel.out).tobytes()


@PACKS
def test_nan_and_inf_inside(kernel, rng, pack_a, pack_b):
    """They reach exactly the rows and columns that IEEE arithmetic takes them to; 0 * Inf is NaN."""
    if reference.is_integer(kernel.acc):
        pytest.skip("integers have neither")
    m, n, k = 2 * kernel.mr + 1, kernel.nr + 7, 40
    a, b = operands(kernel, rng, m, n, k)
    a[1, 3], a[4, 0], a[m - 1, k - 1] = np.nan, np.inf, -np.inf
    b[3, 2], b[0, 5], b[k - 1, n - 1] = np.inf, 0, np.nan
    a[2, :] = 0
    c = reference.poisoned((m, n), kernel.out)
    kernel.call(a, b, c, pack_a=pack_a, pack_b=pack_b)
    check(kernel, a, b, c)
    assert np.isnan(c[4, 5])
    assert np.isnan(c[2, 2])


@pytest.mark.parametrize(
    ("order_a", "order_b"), [("row", "row"), ("column", "column"), ("reversed", "reversed"), ("zero", "zero")]
)
@pytest.mark.parametrize("pack_a", [0, 1])
def test_general_strides(kernel, rng, order_a, order_b, pack_a):
    """Every second element, stored either way, backwards, and one row or column repeated (stride 0)."""
    m, n, k = kernel.mr + 2, kernel.nr + 3, 21
    a_room, b_room = operands(kernel, rng, 2 * max(m, k), 2 * max(n, k), 2 * max(k, m, n))
    views = {
        "row": lambda x, r, s: x[: 2 * r : 2, : 2 * s : 2],
        "column": lambda x, r, s: x.T[: 2 * r : 2, : 2 * s : 2],
        "reversed": lambda x, r, s: x[:r, :s][::-1, ::-1],
        "zero": lambda x, r, s: np.broadcast_to(x[:1, :s], (r, s)),
    }
    a, b = views[order_a](a_room, m, k), views[order_b](b_room, k, n)
    c = reference.poisoned((m, n), kernel.out)
    kernel.call(a, b, c, pack_a=pack_a, pack_b=int(b.strides[1] != b.itemsize))
    check(kernel, a, b, c)


def test_rows_of_c_backwards(kernel, rng):
    m, n, k = kernel.mr + 2, kernel.nr + 3, 21
    a, b = operands(kernel, rng, m, n, k)
    c = reference.poisoned((m, n), kernel.out)[::-1]
    kernel.call(a, b, c)
    check(kernel, a, b, c)


@PACKS
def test_batches(kernel, rng, pack_a, pack_b):
    """Products with gaps between them, in reverse, and with an operand that all share (stride 0)."""
    m, n, k, batch = kernel.mr + 1, kernel.nr + 1, 9, 4
    a = reference.random(rng, (batch, m, k), kernel.lhs)
    b = reference.random(rng, (2 * batch, k, n), kernel.rhs)
    for lhs, rhs in [
        (a, b[::2]),
        (a[::-1], b[:batch]),
        (np.broadcast_to(a[0], a.shape), b[:batch]),
        (a, np.broadcast_to(b[0], (batch, k, n))),
    ]:
        c = reference.poisoned((batch, m + 1, n), kernel.out)
        kernel.call(lhs, rhs, c[:, :m], pack_a=pack_a, pack_b=pack_b)
        reference.expected("bmk,bkn->bmn", lhs, rhs, out=kernel.out, acc=kernel.acc).check(c[:, :m])
        assert is_poison(c[:, m:])


@PACKS
@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 3), (5, 0, 3), (0, 0, 0), (5, 3, 0)])
def test_zero_sizes(kernel, m, n, k, pack_a, pack_b):
    """No element, nothing touched; no product in the sum, zeros."""
    with Region(64) as a_region, Region(64) as b_region:
        a, b = a_region.array((m, k), kernel.lhs), b_region.array((k, n), kernel.rhs)
        c = reference.poisoned((m, n), kernel.out)
        kernel.call(a, b, c, pack_a=pack_a, pack_b=pack_b)
        assert (c == 0).all()
        c = reference.poisoned((m, n), kernel.out)
        kernel.call(a, b, c, pack_a=pack_a, pack_b=pack_b, accumulate=1)
        assert is_poison(c)


@pytest.mark.parametrize(
    "where", ["a rows", "a columns", "b rows", "b columns", "c rows", "a batch", "b batch", "c batch"]
)
@pytest.mark.parametrize("pack", [0, 1])
def test_offsets_beyond_two_gigabytes(kernel, rng, where, pack):
    """Strides of more than 2**31 bytes in address space that is only reserved."""
    m, n, k = 3, 5, 4
    batched = "batch" in where
    operand, axis = where.split()
    shape = {"a": (m, k), "b": (k, n), "c": (m, n)}[operand]
    dtype = np.dtype({"a": kernel.lhs, "b": kernel.rhs, "c": kernel.out}[operand])
    far_away = 2**31 // dtype.itemsize + 3
    strides = {"rows": (far_away, 1), "columns": (1, far_away), "batch": (far_away, shape[1], 1)}[axis]
    if batched:
        shape = (2, *shape)
    pack_b = int(pack or where == "b columns")
    lead = (2,) if batched else ()
    a = reference.random(rng, (*lead, m, k), kernel.lhs)
    b = reference.random(rng, (*lead, k, n), kernel.rhs)
    c = reference.poisoned((*lead, m, n), kernel.out)
    extent = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    with Region(extent * dtype.itemsize) as region:
        far = region.strided(shape, strides, dtype)
        if operand == "a":
            far[...] = a
            kernel.call(far, b, c, pack_a=pack, pack_b=pack_b)
        elif operand == "b":
            far[...] = b
            kernel.call(a, far, c, pack_a=pack, pack_b=pack_b)
        else:
            kernel.call(a, b, far, pack_a=pack, pack_b=pack_b)
            c = far.copy()
    subscripts = "bmk,bkn->bmn" if batched else "mk,kn->mn"
    reference.expected(subscripts, a, b, out=kernel.out, acc=kernel.acc).check(c)


def test_many_rows_lie_beyond_two_gigabytes(kernel):
    """A product of two integers overflows 32 bits long before memory ends: m * rsa with ordinary m and rsa."""
    m, n, k, rsa = 40_000, 1, 2, 20_000
    with Region(m * rsa * np.dtype(kernel.lhs).itemsize) as region:
        a = region.strided((m, k), (rsa, 1), kernel.lhs)[::499]
        a[...] = (np.arange(a.size).reshape(a.shape) % 13).astype(kernel.lhs)
        b = np.ones((k, n), kernel.rhs)
        c = reference.poisoned((len(a), n), kernel.out)
        kernel.call(a, b, c)
        assert np.array_equal(c[:, 0], a.astype(np.int64).sum(1).astype(kernel.out))


@pytest.mark.parametrize(("pack_a", "pack_b"), [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("order", "CF")
def test_packing_stays_in_the_workspace(kernel, rng, pack_a, pack_b, order):
    """Exactly as much as kernel_abi.h grants, beside a guard page."""
    slack = 8192
    for m, n, k in [(1, 1, 1), (kernel.mr + 1, kernel.nr + 1, 7), (29, 70, 65), (100, 100, 100)]:
        mc, nc = (-(-x // r) * r for x, r in ((m, kernel.mr), (n, kernel.nr)))
        kc = -(-k // kernel.kr) * kernel.kr
        a, b = operands(kernel, rng, m, n, k)
        stored = (x if order == "C" else np.asfortranarray(x) for x in (a, b))
        a_in, b_in = stored
        c = reference.poisoned((m, n), kernel.out)
        sizes = [-(-x // 64) * 64 + slack for x in (mc * kc * kernel.a_panel_bytes, nc * kc * kernel.b_panel_bytes)]
        with Region(sizes[0]) as a_region, Region(sizes[1]) as b_region:
            packs = {"a_pack": a_region.end - sizes[0], "b_pack": b_region.end - sizes[1]}
            for region, size in zip((a_region, b_region), sizes, strict=True):
                region.array((size // 4,), np.float32).fill(np.nan)  # never read before it is written
            pack_b_too = pack_b or order == "F"
            kernel.call(a_in, b_in, c, pack_a=pack_a, pack_b=int(pack_b_too), mc=mc, nc=nc, kc=kc, **packs)
        check(kernel, a, b, c)


def test_bad_calls_are_refused(kernel):
    from jax_nano import _runtime

    with pytest.raises(ValueError, match="no such kernel"):
        _runtime.call("nonesuch", {})
    with pytest.raises(ValueError, match="unknown field"):
        _runtime.call(kernel.name, {"ldc": 1})
    with pytest.raises(ValueError, match="csb must be 1"):
        _runtime.call(kernel.name, {"csb": 2})
    with pytest.raises(ValueError, match="multiples"):
        _runtime.call(kernel.name, {"mc": kernel.mr + 1})
