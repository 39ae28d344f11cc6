"""What a kernel promises beyond small sizes: blocking, strides, batches, workspace, special values, far addresses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
from guarded import Region
from kernel_abi import FIELDS, PACK_SLACK_BYTES, packed_a_row

from jax_nano import _runtime


def operands(kernel, rng, m, n, k):
    return reference.random(rng, (m, k), kernel.lhs), reference.random(rng, (k, n), kernel.rhs)


def is_poison(array):
    return np.array_equal(array, reference.poisoned(array.shape, array.dtype), equal_nan=True)


def same_bits(x, y):
    return x.tobytes() == y.tobytes()


@pytest.mark.parametrize(("m", "n", "k"), [(127, 129, 131), (61, 521, 263), (331, 67, 1031), (3, 5, 4099)])
def test_larger_odd_sizes(kernel, rng, m, n, k):
    a, b = operands(kernel, rng, m, n, k)
    want = kernel.expected(a, b)
    for order in "CF":
        stored_b = np.array(b, order=order)
        for way in kernel.ways(order_b=order):
            want.check(kernel.product(a, stored_b, **way), way)


def test_long_sums_of_few_columns(kernel, rng):
    """Half vectors and tall tiles have the bits that the same columns have beside others."""
    m, n, k = 3 * kernel.mr + kernel.mr // 2, kernel.nr + 3, 1100 * kernel.kr
    a, b = operands(kernel, rng, m, n, k)
    blocks = {"mc": 2 * kernel.mr, "nc": kernel.nr, "kc": 700 * kernel.kr, "tile_rows": kernel.mr}
    for order in "CF":
        for path in kernel.ways(order_b=order):
            way = path if path.get("inner") or path.get("sweep") else {**path, **blocks}
            want = kernel.product(a, np.array(b, order=order), **way)
            for columns in (1, 2, 3, 4, 5, 6, 8):
                got = kernel.product(a, np.array(b[:, :columns], order=order), **way)
                assert same_bits(got, np.ascontiguousarray(want[:, :columns])), (way, columns)


def test_blocks_of_every_loop(kernel, rng):
    """One, exactly several, and several and a bit of the smallest cache blocks there can be."""
    mc, nc, kc = 2 * kernel.mr, 2 * kernel.nr, 8 * kernel.kr
    blocking = {"mc": mc, "nc": nc, "kc": kc}
    a_all, b_all = operands(kernel, rng, 3 * mc, 3 * nc, 3 * kc)
    before = reference.random(rng, (3 * mc, 3 * nc), kernel.out)
    for k in (kc, 2 * kc, 2 * kc + 1, 3 * kc - 1):
        want = kernel.expected(a_all[:, :k], b_all[:k])
        added = None if kernel.narrow_out else kernel.expected(a_all[:, :k], b_all[:k], initial=before)
        for m in (mc, 2 * mc, 2 * mc + 1, 3 * mc - 1):
            for n in (nc, 2 * nc, 2 * nc + 1, 3 * nc - 1):
                a, b = a_all[:m, :k], b_all[:k, :n]
                for pack_a, pack_b in kernel.packs():
                    fields = {"pack_a": pack_a, "pack_b": pack_b, **blocking}
                    want[:m, :n].check(kernel.product(a, b, **fields), (m, n, k))
                    if added is not None:
                        c = before[:m, :n].copy()
                        kernel.call(a, b, c, accumulate=1, **fields)
                        added[:m, :n].check(c, (m, n, k))


def test_only_kc_decides_the_bits(kernel, rng):
    """The promise behind "the same for any number of threads": cut m, n and tiles anywhere, pack or do not."""
    m, n, k = 5 * kernel.mr + 3, 3 * kernel.nr + 5, 300
    a, b = operands(kernel, rng, m, n, k)
    kc = 64 * kernel.kr
    whole = kernel.product(a, b, kc=kc)
    half = kernel.mr // 2
    blocks = ((kernel.mr, kernel.mr), (half, kernel.mr), (half, half), (2 * half, half))
    for (pack_a, pack_b), (mc, tile_rows) in itertools.product(kernel.packs(), blocks):
        blocking = {"mc": mc, "nc": kernel.nr, "kc": kc, "tile_rows": tile_rows}
        pieces = reference.poisoned((m, n), kernel.out)
        for rows in np.array_split(np.arange(m), [1, 2 * kernel.mr, m - 2]):
            for cols in np.array_split(np.arange(n), [3, kernel.nr, n - 1]):
                i, j = slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)
                kernel.call(a[i], b[:, j], pieces[i, j], pack_a=pack_a, pack_b=pack_b, **blocking)
        assert same_bits(whole, pieces)


@pytest.mark.parametrize("at", ["end", "begin"])
def test_prefetching_changes_no_bit(kernel, rng, at):
    """One vector against long ones, several streams of them and what is left; B between pages that may not be read."""
    for path, order_b in (("inner", "F"), ("sweep", "C")):
        if not kernel.info[path]:
            continue
        for m, n, k in ((1, 21, 4099), (21, 1, 4099), (3, 21, 4096), (1, 100, 45), (4, 33, 45)):
            a, b = operands(kernel, rng, m, n, k)
            with Region(a.nbytes) as near, Region(b.nbytes) as far:
                placed_a = near.array(a.shape, kernel.lhs, at=at)
                placed_b = (
                    far.array(b.T.shape, kernel.rhs, at=at).T
                    if order_b == "F"
                    else far.array(b.shape, kernel.rhs, at=at)
                )
                placed_a[...], placed_b[...] = a, b
                plain, fetching = (kernel.product(placed_a, placed_b, **{path: 1}, prefetch=x) for x in (0, 1))
            kernel.check(a, b, plain, (path, m, n, k))
            assert same_bits(plain, fetching), (path, m, n, k)


def test_a_sum_cut_into_calls_is_rounded_once(kernel, rng):
    """Several calls with ``more``, each of them with K beyond kc, and one call: the same bits, also of batches."""
    m, n, kc = kernel.mr + 3, 2 * kernel.nr + 5, 8 * kernel.kr
    k = 7 * kc + 3
    a, b = operands(kernel, rng, m, n, k)
    whole = kernel.product(a, b, kc=kc)
    kernel.check(a, b, whole)
    blocking = {"mc": kernel.mr, "nc": kernel.nr, "kc": kc}
    rs_partial = -(-n // kernel.nr) * kernel.nr
    for pack_a, pack_b in kernel.packs():
        with Region(m * rs_partial * np.dtype(kernel.acc).itemsize) as region:
            partial = region.array((m, rs_partial), kernel.acc)
            partial.fill(reference.poison(kernel.acc))
            place = {"partial": partial.ctypes.data, "rs_partial": rs_partial}
            c = reference.poisoned((m, n), kernel.out)
            for k0, k1 in ((0, 2 * kc), (2 * kc, 3 * kc), (3 * kc, 6 * kc), (6 * kc, k)):
                assert not kernel.narrow_out or is_poison(c)
                steps = {"accumulate": int(k0 > 0), "more": int(k1 < k)}
                kernel.call(a[:, k0:k1], b[k0:k1], c, pack_a=pack_a, pack_b=pack_b, **steps, **blocking, **place)
        assert same_bits(c, whole), (pack_a, pack_b)


def test_an_empty_call_ends_a_sum(kernel, rng):
    """k = 0 with something to add: C becomes what was summed so far."""
    m, n, k = kernel.mr + 1, kernel.nr + 3, 8
    a, b = operands(kernel, rng, m, n, k)
    rs_partial = 2 * kernel.nr
    partial = reference.poisoned((m, rs_partial), kernel.acc)
    place = {"partial": partial.ctypes.data, "rs_partial": rs_partial}
    c = reference.poisoned((m, n), kernel.out)
    kernel.call(a, b, c, more=1, **place)
    kernel.call(a[:, :0], b[:0], c, accumulate=1, **place)
    assert same_bits(c, kernel.product(a, b))


@pytest.mark.parametrize("k", [5, 700])
def test_narrow_is_wide_rounded_once(kernel, rng, k):
    """To nearest even, or wrapped: exactly the kernel with a C as wide as the accumulators, converted."""
    if kernel.wide is None:
        pytest.skip("C is as wide as the accumulators" if not kernel.narrow_out else "there is no such kernel")
    a, b = operands(kernel, rng, 61, 67, k)
    kc = 64 * kernel.kr
    wide = kernel.wide.product(a, b, kc=kc)
    assert same_bits(kernel.product(a, b, kc=kc), wide.astype(kernel.out))


@pytest.mark.parametrize("infinite", [False, True])
def test_nothing_outside_leaks_in(kernel, rng, infinite):
    """NaN or Inf in the gaps of every operand; the gaps of C keep what they hold."""

    def room(shape, dtype):
        value = np.inf if infinite and not reference.is_integer(dtype) else reference.poison(dtype)
        return np.full(shape, value, dtype)

    tails = (16, 17, 31, 33, 47, 49, 63, 65, 95, 97, 127, 129)
    for m, n, k in [(1, 1, 1), (kernel.mr + 1, kernel.nr + 1, 7), (29, 70, 64), *((3, 17, k) for k in tails)]:
        for orders in ("CC", "FF", "CF"):
            a_room = np.array(room((m + 4, k + 5), kernel.lhs), order=orders[0])
            b_room = np.array(room((k + 4, n + 35), kernel.rhs), order=orders[1])
            a, b = a_room[2 : 2 + m, 3 : 3 + k], b_room[2 : 2 + k, 1 : 1 + n]
            a[...], b[...] = operands(kernel, rng, m, n, k)
            want = kernel.expected(a, b)
            for way in kernel.ways(order_a=orders[0], order_b=orders[1], n=n):
                c_room = room((m + 4, n + 35), kernel.out)
                c = c_room[2 : 2 + m, 1 : 1 + n]
                kernel.call(a, b, c, **way)
                want.check(c, (m, n, k, orders, way))
                c[...] = c_room[0, 0]
                assert same_bits(c_room, room(c_room.shape, kernel.out))


def test_nan_and_inf_inside(kernel, rng):
    """They reach exactly the rows and columns that IEEE arithmetic takes them to; 0 * Inf is NaN."""
    if kernel.integer:
        pytest.skip("integers have neither")
    m, n, k = 2 * kernel.mr + 1, kernel.nr + 7, 40
    a, b = operands(kernel, rng, m, n, k)
    a[1, 3], a[4, 0], a[m - 1, k - 1] = np.nan, np.inf, -np.inf
    b[3, 2], b[0, 5], b[k - 1, n - 1] = np.inf, 0, np.nan
    a[2, :] = 0
    a[5, 6], a[5, 7], b[6, :], b[7, :] = np.inf, np.inf, 1, 1
    for orders in ("CC", "FF", "CF"):
        stored_a, stored_b = np.array(a, order=orders[0]), np.array(b, order=orders[1])
        for way in kernel.ways(order_a=orders[0], order_b=orders[1]):
            c = kernel.product(stored_a, stored_b, **way)
            kernel.check(a, b, c)
            assert np.isnan(c[4, 5])
            assert np.isnan(c[2, 2])
            assert c[5, 0] == np.inf  # not Inf - Inf, however an algorithm takes its operands apart


def flushes(kernel):
    """Whether its instructions take subnormal numbers as zero, whatever the floating-point environment says."""
    return "bf16" in kernel.target or "amx" in kernel.target


@pytest.mark.parametrize("operand", ["lhs", "rhs"])
def test_subnormals_are_numbers(kernel, operand):
    """Read as they are, in vectors and one by one; units that always flush them may take them as zero.

    So it is outside XLA. XLA's own threads flush subnormal f32 and f64 numbers, and may flush what becomes one.
    """
    dtype = np.dtype(kernel.info[operand])
    if kernel.integer or dtype == np.float64:
        pytest.skip("no such numbers, or none that a product with another could make normal")
    tiny = np.array([1, 2, 3, 77], f"u{dtype.itemsize}").view(dtype).astype(np.float64)
    large = 2.0 ** (10 if "float16" in (kernel.lhs, kernel.rhs, kernel.out) else 100)
    for k in (1, 4, 37):
        a, b = np.full((9, k), large), np.full((k, 41), large)
        x = a if operand == "lhs" else b
        x[...] = np.resize(tiny, x.size).reshape(x.shape)
        want = (a @ b).astype(np.float32).astype(kernel.out)
        a, b = a.astype(kernel.lhs), b.astype(kernel.rhs)
        for orders in ("CC", "FF", "CF"):
            for way in kernel.ways(order_a=orders[0], order_b=orders[1]):
                c = kernel.product(np.array(a, order=orders[0]), np.array(b, order=orders[1]), **way)
                zero_is_fine = flushes(kernel) or kernel.algorithm != "default"
                flushed = zero_is_fine and ((c >= 0) & (c <= want)).all()  # some of the terms, perhaps
                assert flushed or np.array_equal(c, want), (k, orders, way)


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_of_narrow_floats(kernel, sign):
    """Ties go to even, the largest numbers to infinity, the smallest to subnormals: all as NumPy rounds them.

    The sums are exact in the accumulator, so only the last step rounds.
    """
    if kernel.integer or not kernel.narrow_out:
        pytest.skip("C holds whatever the accumulators do")
    info = reference.finfo(kernel.out)
    ulp, most, top = float(info.eps), float(info.max), 2.0 ** (info.maxexp - 1)
    halves = np.array([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2.5, 3.5])  # of the last place; .5 and 2.5 go down
    a = np.array([*((1, ulp * x) for x in halves), *((most, top * ulp * x) for x in halves[:3])]) * sign
    b = np.ones((2, 35))
    check_rounding(kernel, a, b)
    # Quarters of the smallest subnormal, as products of two factors that are not small.
    exponent = int(np.log2(float(info.smallest_subnormal))) - 2
    a = sign * np.arange(24)[:, None] * 2.0 ** (exponent // 2)
    b = np.full((1, 35), 2.0 ** (exponent - exponent // 2))
    if not flushes(kernel):
        check_rounding(kernel, a, b)


def check_rounding(kernel, a, b):
    lhs, rhs = a.astype(kernel.lhs), b.astype(kernel.rhs)
    assert np.array_equal(lhs.astype(np.float64), a)
    assert np.array_equal(rhs.astype(np.float64), b)
    with np.errstate(over="ignore"):
        want = (a @ b).astype(np.float32).astype(kernel.out)
        assert np.array_equal((a @ b).astype(np.float32), a @ b)
    for order in "CF":
        for way in kernel.ways(order_b=order):
            c = kernel.product(lhs, np.array(rhs, order=order), **way)
            assert np.array_equal(c, want), (way, c[:, 0], want[:, 0])


@pytest.mark.parametrize("k", [1, 2, 3, 4, 255, 70_000])
def test_integers_wrap_and_never_saturate(kernel, rng, k):
    """The extremes: -128 * -128 and 255 * 255 in chains that pass 2**31, and every mixture of both ends."""
    if not kernel.integer:
        pytest.skip("floats")
    lo, hi = ([np.iinfo(x).min, np.iinfo(x).max] for x in (kernel.lhs, kernel.rhs))
    for x in (*lo, None):
        for y in (*hi, None):
            a = np.full((3, k), x if x is not None else 0, kernel.lhs)
            b = np.full((k, 19), y if y is not None else 0, kernel.rhs)
            if x is None:
                a[...] = rng.choice(lo, a.shape)
            if y is None:
                b[...] = rng.choice(hi, b.shape)
            want = (a.astype(np.int64) @ b.astype(np.int64)).astype(kernel.out)
            ways = kernel.ways(order_b="F")
            for way in ways if k < 1000 else ways[-1:]:
                assert np.array_equal(kernel.product(a, np.asfortranarray(b), **way), want), (x, y, way)
            assert np.array_equal(kernel.product(a, b), want), (x, y)


def test_every_pair_of_bytes(kernel):
    """All 65536 products of one element, alone in its unit and beside others."""
    if not kernel.integer:
        pytest.skip("floats")
    a = np.arange(256).astype(np.uint8).view(kernel.lhs)[:, None]
    b = np.arange(256).astype(np.uint8).view(kernel.rhs)[None]
    want = a.astype(np.int64) * b.astype(np.int64)
    assert np.array_equal(kernel.product(a, b), want.astype(kernel.out))
    assert np.array_equal(kernel.product(np.repeat(a, 4, 1), np.repeat(b, 4, 0)), (4 * want).astype(kernel.out))


@pytest.mark.parametrize("pack_a", [0, 1])
@pytest.mark.parametrize(
    ("order_a", "order_b"),
    [
        ("row", "row"),
        ("column", "column"),
        ("reversed", "reversed"),
        ("zero", "zero"),
        ("zero", "row"),
        ("row", "zero"),
    ],
)
def test_general_strides(kernel, rng, order_a, order_b, pack_a):
    """Every second element, stored either way, backwards, and one row or column repeated (stride 0)."""
    for k in (1, 21, 64):
        m, n = kernel.mr + 2, kernel.nr + 3
        a_room, b_room = operands(kernel, rng, 2 * max(m, k), 2 * max(n, k), 2 * max(k, m, n))
        views = {
            "row": lambda x, r, s: x[: 2 * r : 2, : 2 * s : 2],
            "column": lambda x, r, s: x.T[: 2 * r : 2, : 2 * s : 2],
            "reversed": lambda x, r, s: x[:r, :s][::-1, ::-1],
            "zero": lambda x, r, s: np.broadcast_to(x[:1, :s], (r, s)),
        }
        a, b = views[order_a](a_room, m, k), views[order_b](b_room, k, n)
        kernel.check(a, b, kernel.product(a, b, pack_a=pack_a, pack_b=int(b.strides[1] != b.itemsize)), k)
        repeated = np.broadcast_to(a[:, :1], a.shape)  # a column stride of 0
        kernel.check(repeated, b, kernel.product(repeated, b, pack_a=pack_a, pack_b=int(b.strides[1] != b.itemsize)), k)


def test_rows_of_c_backwards(kernel, rng):
    m, n, k = kernel.mr + 2, kernel.nr + 3, 21
    a, b = operands(kernel, rng, m, n, k)
    c = reference.poisoned((m, n), kernel.out)[::-1]
    kernel.call(a, b, c)
    kernel.check(a, b, c)


@pytest.mark.parametrize("blocks", [0, 1])
def test_batches(kernel, rng, blocks):
    """Products with gaps between them, in reverse, and with an operand that all share (stride 0).

    With K cut into blocks each product's unfinished sums must end before the next one's begin.
    """
    m, n, k, batch = kernel.mr + 1, kernel.nr + 1, 2 * kernel.kr + 7, 4
    kc = blocks * kernel.kr
    a = reference.random(rng, (batch, m, k), kernel.lhs)
    b = reference.random(rng, (2 * batch, k, n), kernel.rhs)
    along_k = np.ascontiguousarray(b.swapaxes(1, 2)).swapaxes(1, 2)
    if kernel.has_inner:
        c = kernel.product(a, along_k[:batch], inner=1)
        kernel.check(a, b[:batch], c)
    for lhs, rhs in [
        (a, b[::2]),
        (a[::-1], b[:batch]),
        (np.broadcast_to(a[0], a.shape), b[:batch]),
        (a, np.broadcast_to(b[0], (batch, k, n))),
    ]:
        want = kernel.expected(lhs, rhs)
        for pack_a, pack_b in kernel.packs():
            c = reference.poisoned((batch, m + 1, n), kernel.out)
            kernel.call(lhs, rhs, c[:, :m], pack_a=pack_a, pack_b=pack_b, kc=kc)
            want.check(c[:, :m])
            assert is_poison(c[:, m:])


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 9, 16, 17, 23, 24, 25, 33, 40, 56, 64, 65])
def test_small_products_have_the_bits_of_larger_ones(kernel, rng, size):
    """A kernel that reads operands where they lie has loops of its own for small products; packed ones take others."""
    for m, n, k in [(size, size, size), (size, 24, 1), (1, size, 24), (24, size, size), (size, size, 25)]:
        a, b = operands(kernel, rng, 3 * m, n, k)
        a, b = a.reshape(3, m, k), np.broadcast_to(b, (3, k, n))
        kc = -(-k // kernel.kr) * kernel.kr
        results = [kernel.product(a, b, pack_a=x, pack_b=y, kc=kc) for x, y in kernel.packs()]
        kernel.check(a, b, results[0])
        for other in results[1:]:
            np.testing.assert_array_equal(other.view(np.uint8), results[0].view(np.uint8))


@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 64), (9, 40, 37), (23, 64, 3), (12, 16, 5), (64, 17, 2)])
@pytest.mark.parametrize("shared", [False, True])
def test_small_products_of_large_batches(kernel, rng, m, n, k, shared):
    """Batches of more than 8 MiB have their next product prefetched; the last one has no next one."""
    takes_b = kernel.info["direct_b"] or kernel.info["pairs_most"] > 0
    if kernel.lhs != kernel.rhs or not (kernel.info["direct_a"] and takes_b):
        pytest.skip("has no loops of its own for small products, or none that prefetch")
    batch = (8 << 20) // ((m * k + k * n + m * n) * np.dtype(kernel.lhs).itemsize) + 2
    a, b = operands(kernel, rng, m, n, k)
    with Region(a.nbytes) as a_region, Region(b.nbytes) as b_region:
        lhs, rhs = a_region.array(a.shape, kernel.lhs), b_region.array(b.shape, kernel.rhs)
        lhs[...], rhs[...] = a, b
        kc = -(-k // kernel.kr) * kernel.kr
        single = kernel.product(a, b, kc=kc)
        kernel.check(a, b, single)
        many = np.repeat(a[None], batch, axis=0) if not shared else np.broadcast_to(lhs, (batch, m, k))
        c = kernel.product(many, np.broadcast_to(rhs, (batch, k, n)), kc=kc)
        assert (c.view(np.uint8) == single.view(np.uint8)).all()


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 3), (5, 0, 3), (0, 0, 0), (5, 3, 0), (41, 67, 0)])
def test_zero_sizes(kernel, m, n, k):
    """No element, nothing touched; no product in the sum, zeros."""
    for way in kernel.ways(order_b="F", n=1):  # no strides to speak of
        with Region(64) as a_region, Region(64) as b_region:
            a, b = a_region.array((m, k), kernel.lhs), b_region.array((k, n), kernel.rhs)
            c = kernel.product(a, b, **way)
            assert c.shape == (m, n)
            assert (c == 0).all()
            if not kernel.narrow_out and "inner" not in way:
                c = reference.poisoned((m, n), kernel.out)
                kernel.call(a, b, c, accumulate=1, **way)
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
    kernel.check(a, b, c)


def test_many_rows_lie_beyond_two_gigabytes(kernel):
    """A product of two integers overflows 32 bits long before memory ends: m * rsa with ordinary m and rsa."""
    m, n, k, rsa = 40_000, 1, 2, 60_000
    with Region(m * rsa * np.dtype(kernel.lhs).itemsize) as region:
        a = region.strided((m, k), (rsa, 1), kernel.lhs)[::499]
        a[...] = (np.arange(a.size).reshape(a.shape) % 13).astype(kernel.lhs)
        b = np.ones((k, n), kernel.rhs)
        c = kernel.product(a, b)
        assert np.array_equal(c[:, 0], a.astype(np.int64).sum(1).astype(kernel.out))


def test_operands_are_no_better_aligned_than_their_elements(kernel, rng):
    """Where kr values of A are read at once, too."""
    m, n, k = kernel.mr + 1, kernel.nr + 1, 4 * kernel.kr
    a, b = operands(kernel, rng, m, n, k)
    with Region(a.nbytes + a.itemsize) as region:
        shifted = region.array((a.size + 1,), kernel.lhs, at="begin")[1:].reshape(m, k)
        shifted[...] = a
        for pack_a, pack_b in kernel.packs():
            kernel.expected(a, b).check(kernel.product(shifted, b, pack_a=pack_a, pack_b=pack_b))


@pytest.mark.parametrize("order", "CF")
def test_packing_stays_in_the_workspace(kernel, rng, order):
    """Exactly as much as kernel_abi.h grants, beside a guard page."""
    for m, n, k in [(1, 1, 1), (kernel.mr + 1, kernel.nr + 1, 7), (29, 70, 65), (100, 100, 100)]:
        mc, nc = (-(-x // r) * r for x, r in ((m, kernel.mr), (n, kernel.nr)))
        kc = -(-k // kernel.kr) * kernel.kr
        a, b = operands(kernel, rng, m, n, k)
        want = kernel.expected(a, b)
        a, b = (np.array(x, order=order) for x in (a, b))
        of_a, of_b = (
            mc * packed_a_row(kc * kernel.a_panel_bytes),
            nc * (kc * kernel.b_panel_bytes + kernel.b_header_bytes),
        )
        sizes = [-(-x // 64) * 64 + PACK_SLACK_BYTES for x in (of_a, of_b)]
        for pack_a, pack_b in kernel.packs(transposed_b=order == "F" and n > 1):
            with Region(sizes[0]) as a_region, Region(sizes[1]) as b_region:
                packs = {"a_pack": a_region.end - sizes[0], "b_pack": b_region.end - sizes[1]}
                for region, size in zip((a_region, b_region), sizes, strict=True):
                    region.array((size // 4,), np.float32).fill(np.nan)  # never read before it is written
                c = kernel.product(a, b, pack_a=pack_a, pack_b=pack_b, mc=mc, nc=nc, kc=kc, **packs)
            want.check(c)


def test_bad_calls_are_refused(kernel):
    with pytest.raises(ValueError, match="no such kernel"):
        _runtime.testing.call("nonesuch", {})
    with pytest.raises(ValueError, match="unknown field"):
        _runtime.testing.call(kernel.name, {"ldc": 1})
    with pytest.raises(ValueError, match="csb must be 1" if kernel.direct_b else "needs pack_b"):
        _runtime.testing.call(kernel.name, {"csb": 2, "pack_a": 1, "pack_b": 0})
    with pytest.raises(ValueError, match="multiples"):
        _runtime.testing.call(kernel.name, {"mc": kernel.mr + 1})
    for bad in ({"tile_rows": kernel.mr + 1}, {"tile_rows": kernel.mr - 1, "pack_a": 1, "csa": 2}):
        with pytest.raises(ValueError, match="tile_rows must not be"):
            _runtime.testing.call(kernel.name, bad)
    for field, direct in (("pack_a", kernel.direct_a), ("pack_b", kernel.direct_b)):
        if not direct:
            with pytest.raises(ValueError, match=f"this kernel needs {field}"):
                _runtime.testing.call(kernel.name, {field: 0})
    if kernel.kr > 1:
        for awkward in ({"k": kernel.kr + 1}, {"rsa": kernel.kr + 1}, {"csa": 2}):
            with pytest.raises(ValueError, match="this kernel needs pack_a"):
                _runtime.testing.call(kernel.name, {"k": kernel.kr, "pack_a": 0, **awkward})
    if kernel.narrow_out:
        with pytest.raises(ValueError, match="rs_partial must be at least"):
            _runtime.testing.call(kernel.name, {"n": 3, "rs_partial": 3, "more": 1})
    if kernel.has_inner:
        for bad, message in (({"csa": 2}, "csa and rsb must be 1"), ({"accumulate": 1}, "takes the whole of k")):
            with pytest.raises(ValueError, match=message):
                _runtime.testing.call(kernel.name, {"inner": 1, "csa": 1, "rsb": 1, **bad})
        _runtime.testing.call(kernel.name, {"inner": 1, "csa": 2, "pack_a": 1, "rsb": 1})
    else:
        with pytest.raises(ValueError, match="no inner-product path"):
            _runtime.testing.call(kernel.name, {"inner": 1, "csa": 1, "rsb": 1})
    if kernel.has_sweep:
        for bad, message in (({"csb": 2}, "csb must be 1 for the sweep"), ({"pack_a": 1}, "sweep path packs nothing")):
            with pytest.raises(ValueError, match=message):
                _runtime.testing.call(kernel.name, {"sweep": 1, **bad})
    else:
        with pytest.raises(ValueError, match="no sweep path"):
            _runtime.testing.call(kernel.name, {"sweep": 1})


def test_bad_rows_are_refused(kernel):
    """Rows before the bad one run; a table of another width is no GemmArgs."""
    for bad in (np.zeros((1, len(FIELDS) + 1), np.int64), np.zeros((1, len(FIELDS)), np.float64)):
        with pytest.raises(TypeError):
            _runtime.testing.call_many(kernel.name, bad)
    with pytest.raises(ValueError, match="multiples"):
        kernel.call_many(mc=kernel.mr + 1, csb=1, pack_a=1, pack_b=1)
    _runtime.testing.call_many(kernel.name, np.zeros((0, len(FIELDS)), np.int64))
