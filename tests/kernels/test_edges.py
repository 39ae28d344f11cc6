"""Every small size of every kernel, in memory where one byte too many is fatal, C full of poison beforehand.

How thousands of calls are judged at once: for each K the product of the largest size is computed by one call and
compared with the oracle. An element of C depends on its row of A and column of B alone, bit for bit, whatever the size
of the call, so every smaller product must be a block of that one exactly; what surrounds it in memory must keep its
poison. The calls of a sweep run without returning to Python, and all of C is compared at once.

What the sweeps cover, for every kernel (``m`` and ``n`` decide which microkernels and masks run; the storage orders
and ``k`` which packing code runs):

* all of 1..40 x 1..40, and the sizes around two tiles and more where 40 does not reach them: every number of rows
  and columns modulo the tile with 0, 1 and 2 full tiles in front;
* K = 0, below, at and above the units of packing, and long; both storage orders of A and B, packed or not;
* operands and C that end at a forbidden page, and that begin at one;
* rows with gaps, and dense ones (where a single row or column makes two orders look alike);
* wide C against unpacked B, up to two of the widest tiles (eight vectors);
* sums that two calls finish, through C or, in narrow kernels, through ``partial``;
* the inner-product path, also with copies of operands, and the sweep path, where there are such, over the first four.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import pytest
import reference
from guarded import Region, Slots
from numpy.typing import NDArray

SMALL = tuple(range(1, 41))
KS = (0, 1, 2, 7, 8, 64, 257)
GAP = 5  # elements of poison between rows of C

LAYOUTS = [pytest.param(a, b, id=f"A{a}-B{b}") for a in "CF" for b in "CF"]
ENDS = pytest.mark.parametrize("at", ["end", "begin"])


def beyond(tile: int) -> tuple[int, ...]:
    """Sizes around two tiles and more that SMALL does not reach."""
    return tuple(x for t in (2, 3) for x in (t * tile - 1, t * tile, t * tile + 1, t * tile + 7) if x > SMALL[-1])


@dataclass(frozen=True)
class Sizes:
    """All pairs of some m and n."""

    ms: tuple[int, ...]
    ns: tuple[int, ...]

    @staticmethod
    def small(kernel) -> Sizes:
        return Sizes(SMALL + beyond(kernel.mr), SMALL + beyond(kernel.nr))

    @staticmethod
    def wide(kernel) -> Sizes:
        """Few rows, for which the widest tiles are, by every number of vectors of 4, 8 or 16 up to 16 of them."""
        ns = {16 * v + r for v in range(2, 17) for r in (0, 1, 4, 7, 8, 9, 15)}
        return Sizes((*range(1, kernel.mr + 2), 2 * kernel.mr + 1), tuple(sorted(ns)))

    @property
    def m(self) -> NDArray[np.int64]:
        return np.repeat(self.ms, len(self.ns))

    @property
    def n(self) -> NDArray[np.int64]:
        return np.tile(self.ns, len(self.ms))

    @property
    def shape(self) -> tuple[int, int]:
        """The largest pair, of which every other is a corner."""
        return max(self.ms), max(self.ns)


@cache
def corners(sizes: Sizes, at: str) -> NDArray[np.int32]:
    """For the C of all pairs in one array, rows GAP apart: which element of the largest C belongs where.

    An element that belongs to no C is one past the last. The corner is the lower right one if operands end at a page.
    """
    m_most, n_most = sizes.shape
    pieces = [np.full(GAP, m_most * n_most, np.int32)]
    source = np.arange(m_most * n_most, dtype=np.int32).reshape(m_most, n_most)
    for m, n in zip(sizes.m, sizes.n, strict=True):
        block = np.full((m + 1, n + GAP), m_most * n_most, np.int32)
        block[:m, :n] = source[-m:, -n:] if at == "end" else source[:m, :n]
        pieces.append(block.ravel())
    return np.concatenate(pieces)


def corner_offsets(sizes: Sizes) -> NDArray[np.int64]:
    """Where each pair's C begins in that array, in elements."""
    return np.concatenate([[0], np.cumsum((sizes.m + 1) * (sizes.n + GAP))])[:-1] + GAP


def bits(x: NDArray[np.generic]) -> NDArray[np.unsignedinteger]:
    return x.view(f"u{x.itemsize}")


def with_poison(product: NDArray[np.generic]) -> NDArray[np.unsignedinteger]:
    """The bits of all elements, and of one more that is poison."""
    return bits(np.append(product.ravel(), reference.poisoned((1,), product.dtype)))


def whole_k(kernel, k: int) -> int:
    """The smallest kc that does not cut k."""
    return max(-(-k // kernel.kr), 1) * kernel.kr


@lru_cache(maxsize=32)
def largest(kernel, sizes: Sizes, k: int, kc: int = 0, path: str = "") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random operands of the largest size and their product, by blocks or the named path, which the oracle has seen."""
    rng = np.random.default_rng([k, *kernel.name.encode()])
    m, n = sizes.shape
    a, b = reference.random(rng, (m, k), kernel.lhs), reference.random(rng, (k, n), kernel.rhs)
    way = {path: 1} if path else {"kc": kc or whole_k(kernel, k)}
    c = kernel.product(a, np.asfortranarray(b) if path == "inner" else b, **way)
    kernel.check(a, b, c, (m, n, k))
    return a, b, c


@pytest.fixture(scope="module")
def memory() -> Iterator[dict[str, Slots | Region]]:
    """Room for operands: whole ones, one for each size, C of each pair of small sizes, unfinished sums."""
    most, widest = 112, 288
    places: dict[str, Slots | Region] = {
        "a": Region(most * KS[-1] * 8),
        "b": Region(widest * KS[-1] * 8),
        "a of each": Slots(most, most * KS[-1] * 8),
        "b of each": Slots(widest, most * KS[-1] * 8),
        "c of each": Slots(len(SMALL) ** 2, SMALL[-1] ** 2 * 8),
        "partial": Region(most * widest * 4),
    }
    yield places
    for place in places.values():
        place.__exit__(None, None, None)


def stored(target: NDArray[np.generic], x: NDArray[np.generic], order: str) -> NDArray[np.generic]:
    """Fills flat memory with a matrix by rows (C) or columns (F)."""
    view = target.reshape(x.shape) if order == "C" else target.reshape(x.shape[::-1]).T
    view[...] = x
    return view


def by_rows(place: Region, x: NDArray[np.generic], order: str, at: str, sizes: tuple[int, ...]) -> tuple:
    """Address, row and column stride of each corner of some rows of x, in one copy of x beside a page."""
    whole = stored(place.array((x.size,), x.dtype, at=at), x, order)
    rows, columns = (
        s // x.itemsize for s in ((x.shape[1], 1) if order == "C" else (1, x.shape[0])) for s in [s * x.itemsize]
    )
    skipped = (len(x) - np.array(sizes)) * (at == "end")
    return whole.ctypes.data + skipped * rows * x.itemsize, rows, columns


def dense(place: Slots, x: NDArray[np.generic], order: str, at: str, sizes: tuple[int, ...]) -> tuple:
    """The same for a dense copy of each."""
    found = []
    for slot, size in enumerate(sizes):
        part = x[-size:] if at == "end" else x[:size]
        copy = place.array(slot, (part.size,), x.dtype, at=at)
        stored(copy, part, order)
        found.append((copy.ctypes.data, *((x.shape[1], 1) if order == "C" else (1, size))))
    return tuple(np.array(found, np.int64).T)


def operand_fields(memory, sizes: Sizes, a, b, order_a: str, order_b: str, at: str, *, each: bool) -> dict:
    """GemmArgs for all pairs: where their operands lie."""
    flip = {"C": "F", "F": "C"}
    if each:
        of_a = dense(memory["a of each"], a, order_a, at, sizes.ms)
        of_b = dense(memory["b of each"], b.T, flip[order_b], at, sizes.ns)
    else:
        of_a = by_rows(memory["a"], a, order_a, at, sizes.ms)
        of_b = by_rows(memory["b"], b.T, flip[order_b], at, sizes.ns)
    rows = [np.repeat(np.broadcast_to(x, len(sizes.ms)), len(sizes.ns)) for x in of_a]
    columns = [np.tile(np.broadcast_to(x, len(sizes.ns)), len(sizes.ms)) for x in of_b]
    names = ("a", "rsa", "csa", "b", "csb", "rsb")
    return dict(zip(names, [*rows, *columns], strict=True)) | {"m": sizes.m, "n": sizes.n, "batch": 1}


def judge(sizes: Sizes, source: NDArray[np.int32], got: NDArray[np.generic], want: NDArray[np.generic], what: object):
    """Compares all C of a sweep with the corners of the largest one."""
    wrong = np.flatnonzero(bits(got) != with_poison(want)[source])
    if len(wrong):
        block = np.searchsorted(corner_offsets(sizes) - GAP, wrong[0], side="right") - 1
        m, n = sizes.m[block], sizes.n[block]
        row, column = divmod(int(wrong[0] - corner_offsets(sizes)[block]), int(n) + GAP)
        outside = row >= m or column >= n
        raise AssertionError(
            f"{what}: m={m} n={n}: C[{row}, {column}]{', outside C,' if outside else ''} is {got[wrong[0]]}, expected "
            f"{np.append(want.ravel(), reference.poisoned((1,), want.dtype))[source[wrong[0]]]} ({len(wrong)} wrong)"
        )


def sweep(kernel, memory, sizes: Sizes, k: int, *, order_a="C", order_b="C", at="end", each=False) -> None:
    """All pairs for one K and storage, packed in every way that the kernel permits."""
    a, b, _ = largest(kernel, sizes, k)
    fields = operand_fields(memory, sizes, a, b, order_a, order_b, at, each=each)
    source = corners(sizes, at)
    for way in kernel.ways(order_a=order_a, order_b=order_b):
        path = next((x for x in ("inner", "sweep") if x in way), "")
        _, _, want = largest(kernel, sizes, k, path=path)
        c = reference.poisoned(source.shape, kernel.out)
        addresses = c.ctypes.data + corner_offsets(sizes) * c.itemsize
        blocks = {} if path else {"kc": whole_k(kernel, k)}
        kernel.call_many(**fields, k=k, c=addresses, rsc=sizes.n + GAP, **blocks, **way)
        judge(sizes, source, c, want, {"k": k, **way})


@ENDS
@pytest.mark.parametrize(("order_a", "order_b"), LAYOUTS)
def test_every_size_in_every_layout(kernel, memory, at, order_a, order_b):
    for k in KS:
        sweep(kernel, memory, Sizes.small(kernel), k, order_a=order_a, order_b=order_b, at=at)


@ENDS
@pytest.mark.parametrize(("order_a", "order_b"), LAYOUTS)
def test_every_size_dense(kernel, memory, at, order_a, order_b):
    """Operands without gaps: each size has strides of its own, and one row or column has both orders at once."""
    for k in (1, 7, 64):
        sweep(kernel, memory, Sizes.small(kernel), k, order_a=order_a, order_b=order_b, at=at, each=True)


@ENDS
def test_every_width_of_few_rows(kernel, memory, at):
    """Tiles of up to eight vectors meet B where it lies; most of their sizes are wider than 40 columns."""
    for k in (1, 9):
        sweep(kernel, memory, Sizes.wide(kernel), k, at=at)


@ENDS
def test_every_c_beside_guard_pages(kernel, memory, at):
    """C itself ends, or begins, at a page: a masked store or load that is not masked would be fatal there."""
    sizes, k = Sizes(SMALL, SMALL), 9
    a, b, want = largest(kernel, sizes, k)
    fields = operand_fields(memory, sizes, a, b, "C", "C", at, each=False)
    slots, item = memory["c of each"], want.itemsize
    c = slots.elements(kernel.out)
    elements = sizes.m * sizes.n
    first = (slots.end - elements * item if at == "end" else slots.begin) - slots.base
    m_most, n_most = sizes.shape
    whole = np.arange(m_most * n_most).reshape(m_most, n_most)
    blocks = [whole[-m:, -n:] if at == "end" else whole[:m, :n] for m, n in zip(sizes.m, sizes.n, strict=True)]
    source = np.concatenate([x.ravel() for x in blocks])
    place = np.repeat(first // item - (np.cumsum(elements) - elements), elements) + np.arange(elements.sum())
    for pack_a, pack_b in kernel.packs():
        for accumulate in (0,) if kernel.narrow_out else (0, 1):
            c[place] = np.zeros(1, kernel.out) if accumulate else reference.poisoned((1,), kernel.out)
            packs = {"pack_a": pack_a, "pack_b": pack_b}
            call = {**fields, **packs, "k": k, "kc": whole_k(kernel, k), "accumulate": accumulate}
            kernel.call_many(**call, c=first + slots.base, rsc=sizes.n)
            assert np.array_equal(c[place], want.ravel()[source]), packs
    for path, has, order_b in (("inner", kernel.has_inner, "F"), ("sweep", kernel.has_sweep, "C")):
        if not has:
            continue
        _, _, want = largest(kernel, sizes, k, path=path)
        fields = operand_fields(memory, sizes, a, b, "C", order_b, at, each=False)
        c[place] = reference.poisoned((1,), kernel.out)
        kernel.call_many(**fields, k=k, c=first + slots.base, rsc=sizes.n, **{path: 1})
        assert np.array_equal(c[place], want.ravel()[source]), path


@ENDS
@pytest.mark.parametrize("k", [2, 9, 64])
def test_every_size_in_two_calls(kernel, memory, k, at):
    """A sum that a second call finishes has the bits of one call that cuts K at the same place.

    Narrow kernels leave what is unfinished in ``partial``, here exactly as large as promised and beside a page, and
    do not touch C before the end.
    """
    cut = max(kernel.kr, k // 2 // kernel.kr * kernel.kr)
    k = max(k, cut + 1)
    sizes = Sizes.small(kernel)
    a, b, want = largest(kernel, sizes, k, kc=cut)
    fields = operand_fields(memory, sizes, a, b, "C", "C", at, each=False)
    source = corners(sizes, at)
    acc = np.dtype(kernel.acc).itemsize
    rs_partial = -(-sizes.n // kernel.nr) * kernel.nr
    region = memory["partial"]
    partial = region.end - sizes.m * rs_partial * acc if at == "end" else np.full(sizes.m.shape, region.begin)
    per_pair = {"rs_partial": rs_partial, "partial": partial, "rsc": sizes.n + GAP, "kc": cut + 0 * sizes.m}
    firsts = {**fields, **per_pair, "k": cut, "more": 1}
    seconds = {**fields, **per_pair, "k": k - cut, "accumulate": 1}
    seconds["a"] = fields["a"] + cut * fields["csa"] * a.itemsize
    seconds["b"] = fields["b"] + cut * fields["rsb"] * b.itemsize
    calls = {
        name: np.stack([firsts.get(name, 0) + 0 * sizes.m, seconds.get(name, 0) + 0 * sizes.m], 1)
        for name in {**firsts, **seconds}
    }
    for pack_a, pack_b in kernel.packs():
        c = reference.poisoned(source.shape, kernel.out)
        packs = {"pack_a": pack_a, "pack_b": pack_b}
        addresses = c.ctypes.data + corner_offsets(sizes) * c.itemsize
        region.array(((region.end - region.begin) // acc,), kernel.acc)[...] = reference.poison(kernel.acc)
        if kernel.narrow_out:
            kernel.call_many(**firsts, c=addresses, **packs)
            assert np.array_equal(bits(c), bits(reference.poisoned(c.shape, c.dtype))), "C is touched before the end"
        kernel.call_many(**calls, c=addresses[:, None], **packs)
        judge(sizes, source, c, want, {"k": k, "cut": cut, **packs})


@pytest.mark.parametrize("k", [0, 1, 8, 64])
def test_every_size_adds_to_c(kernel, memory, rng, k):
    """What C holds beforehand is added, also to an empty sum."""
    if kernel.narrow_out:
        pytest.skip("a narrow kernel never adds to C")
    sizes = Sizes.small(kernel)
    a, b, _ = largest(kernel, sizes, k)
    before = reference.random(rng, sizes.shape, kernel.out)
    want = before.copy()
    kernel.call(a, b, want, accumulate=1, kc=whole_k(kernel, k))
    kernel.check(a, b, want, initial=before)
    assert k or np.array_equal(want, before)
    fields = operand_fields(memory, sizes, a, b, "C", "C", "end", each=False)
    source = corners(sizes, "end")
    for pack_a, pack_b in kernel.packs():
        c = with_poison(before)[source].view(kernel.out)
        addresses = c.ctypes.data + corner_offsets(sizes) * c.itemsize
        packs = {"pack_a": pack_a, "pack_b": pack_b}
        call = {**fields, **packs, "k": k, "kc": whole_k(kernel, k), "accumulate": 1}
        kernel.call_many(**call, c=addresses, rsc=sizes.n + GAP)
        judge(sizes, source, c, want, {"k": k, **packs})


@pytest.mark.parametrize("k", [1, 7, 64, 257])
def test_small_integers_are_exact(kernel, memory, rng, k):
    """And rounded once, to nearest even, or wrapped around, where C is narrow."""
    m, n = Sizes.small(kernel).shape
    a, b = reference.small_integers(rng, (m, k), kernel.lhs), reference.small_integers(rng, (k, n), kernel.rhs)
    want = (a.astype(np.int64) @ b.astype(np.int64)).astype(kernel.out)
    for order_a in "CF":
        for order_b in "CF":
            for way in kernel.ways(order_a=order_a, order_b=order_b):
                stored_a, stored_b = np.array(a, order=order_a), np.array(b, order=order_b)
                assert np.array_equal(kernel.product(stored_a, stored_b, **way), want), way
