"""Every small size of every kernel, in memory where one byte too many is fatal, C full of NaN beforehand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import reference
from guarded import Region

SIZES = range(1, 41)
KS = (0, 1, 2, 7, 8, 64, 257)
MOST = SIZES[-1]

# Storage of A and B, and what is packed: B needs packing unless its rows are contiguous.
LAYOUTS = [
    pytest.param(order_a, order_b, pack_a, pack_b, id=f"A{order_a}{'p' * pack_a}-B{order_b}{'p' * pack_b}")
    for order_a in "CF"
    for order_b in "CF"
    for pack_a in (0, 1)
    for pack_b in (0, 1)
    if order_b == "C" or pack_b
]


@pytest.fixture(scope="module")
def memory() -> Iterator[list[Region]]:
    regions = [Region(MOST * max(*KS, MOST) * 8) for _ in range(3)]
    yield regions
    for r in regions:
        r.__exit__(None, None, None)


def place(region: Region, like: np.ndarray, order: str, at: str) -> np.ndarray:
    """A copy of ``like`` in guarded memory, stored by rows (C) or by columns (F)."""
    stored = region.array(like.shape if order == "C" else like.shape[::-1], like.dtype, at=at)
    view = stored if order == "C" else stored.T
    view[...] = like
    return view


@pytest.mark.parametrize("at", ["end", "begin"])
@pytest.mark.parametrize(("order_a", "order_b", "pack_a", "pack_b"), LAYOUTS)
def test_every_size_beside_guard_pages(kernel, memory, rng, at, order_a, order_b, pack_a, pack_b):
    a_memory, b_memory, c_memory = memory
    for k in KS:
        a_all = reference.random(rng, (MOST, k), kernel.lhs)
        b_all = reference.random(rng, (k, MOST), kernel.rhs)
        want = reference.expected("mk,kn->mn", a_all, b_all, out=kernel.out, acc=kernel.acc)
        # The operand whose rows are cut short lies at a guard page without being copied for each size.
        b_full = place(b_memory, b_all, order_b, at)
        for n in SIZES:
            columns = slice(MOST - n, None) if at == "end" else slice(n)
            b = b_full[:, columns]
            a_full = place(a_memory, a_all, order_a, at)
            for m in SIZES:
                rows = slice(MOST - m, None) if at == "end" else slice(m)
                c = c_memory.array((m, n), kernel.out, at=at)
                c.fill(reference.poison(kernel.out))
                kernel.call(a_full[rows], b, c, pack_a=pack_a, pack_b=pack_b)
                want[rows, columns].check(c, (m, n, k))


@pytest.mark.parametrize("at", ["end", "begin"])
@pytest.mark.parametrize("pack", [0, 1])
def test_every_size_dense(kernel, memory, rng, at, pack):
    """As above with operands that have no gap between rows, so that each size has strides of its own."""
    a_memory, b_memory, c_memory = memory
    for k in (1, 7, 64):
        a_all = reference.random(rng, (MOST, k), kernel.lhs)
        b_all = reference.random(rng, (k, MOST), kernel.rhs)
        want = reference.expected("mk,kn->mn", a_all, b_all, out=kernel.out, acc=kernel.acc)
        for n in SIZES:
            b = place(b_memory, b_all[:, :n], "C", at)
            for m in SIZES:
                a = place(a_memory, a_all[:m], "C", at)
                c = c_memory.array((m, n), kernel.out, at=at)
                c.fill(reference.poison(kernel.out))
                kernel.call(a, b, c, pack_a=pack, pack_b=pack)
                want[:m, :n].check(c, (m, n, k))


@pytest.mark.parametrize("pack", [0, 1])
def test_every_size_accumulates(kernel, memory, rng, pack):
    a_memory, b_memory, c_memory = memory
    for k in (0, 1, 8, 64):
        a_all = place(a_memory, reference.random(rng, (MOST, k), kernel.lhs), "C", "end")
        b_all = place(b_memory, reference.random(rng, (k, MOST), kernel.rhs), "C", "end")
        before = reference.random(rng, (MOST, MOST), kernel.out)
        want = reference.expected("mk,kn->mn", a_all, b_all, out=kernel.out, acc=kernel.acc, initial=before)
        for n in SIZES:
            for m in SIZES:
                c = c_memory.array((m, n), kernel.out)
                c[...] = before[-m:, -n:]
                kernel.call(a_all[-m:], b_all[:, -n:], c, pack_a=pack, pack_b=pack, accumulate=1)
                want[-m:, -n:].check(c, (m, n, k))
                if k == 0:
                    assert np.array_equal(c, before[-m:, -n:])


@pytest.mark.parametrize("pack", [0, 1])
def test_small_integers_are_exact(kernel, memory, rng, pack):
    a_memory, b_memory, c_memory = memory
    for k in (7, 64, 257):
        a_all = place(a_memory, reference.small_integers(rng, (MOST, k), kernel.lhs), "C", "begin")
        b_all = place(b_memory, reference.small_integers(rng, (k, MOST), kernel.rhs), "C", "begin")
        want = a_all.astype(np.int64) @ b_all.astype(np.int64)
        for n in SIZES:
            for m in SIZES:
                c = c_memory.array((m, n), kernel.out)
                kernel.call(a_all[:m], b_all[:, :n], c, pack_a=pack, pack_b=pack)
                assert np.array_equal(c, want[:m, :n].astype(kernel.out)), (m, n, k)  # rounded once, or wrapped
