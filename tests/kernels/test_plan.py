"""Planning, which runs nothing: for both targets on any machine, with caches of our choice.

What is chosen is that of a CPU without a profile, by thresholds; test_costs.py has the choices by predicted time."""

from __future__ import annotations

import numpy as np
import pytest
from contraction import Contraction, random_contraction
from kernel_abi import reads_a

from jax_nano import _runtime

ZEN4 = (32 << 10, 1 << 20, 32 << 20)
SMALL = (32 << 10, 256 << 10, 8 << 20)
HUGE = (48 << 10, 16 << 20, 1 << 30)
TARGETS = ["x86-64-v3", "x86-64-v4"]


def plan(subscripts, *, target="x86-64-v4", threads=1, caches=ZEN4, **sizes):
    return Contraction(subscripts, **sizes).plan(target=target, threads=threads, caches=caches, cpu="")


def loops(p):
    return {k: p[k] for k in ("m", "n", "k", "rsa", "csa", "rsb", "csb", "rsc")}


class TestLoops:
    def test_matmul(self):
        p = plan("mk,kn->mn", m=3, n=5, k=7)
        assert loops(p) == {"m": 3, "n": 5, "k": 7, "rsa": 7, "csa": 1, "rsb": 5, "csb": 1, "rsc": 5}
        assert (p["swapped"], p["batch"], p["outer"], p["k_outer"]) == (False, 1, [], [])

    @pytest.mark.parametrize(
        ("subscripts", "rsa", "csa", "rsb", "csb"),
        [("mk,kn->mn", 7, 1, 5, 1), ("km,kn->mn", 1, 3, 5, 1), ("mk,nk->mn", 7, 1, 1, 7), ("km,nk->mn", 1, 3, 1, 7)],
    )
    def test_transposes_are_strides(self, subscripts, rsa, csa, rsb, csb):
        p = plan(subscripts, m=3, n=5, k=7)
        assert (p["rsa"], p["csa"], p["rsb"], p["csb"]) == (rsa, csa, rsb, csb)
        assert p["pack_b"] or p["inner"] or csb == 1

    def test_transposed_result_swaps_roles(self):
        p = plan("mk,kn->nm", m=3, n=5, k=7)
        assert p["swapped"]
        assert loops(p) == {"m": 5, "n": 3, "k": 7, "rsa": 1, "csa": 5, "rsb": 1, "csb": 7, "rsc": 3}

    def test_batch_runs_in_the_kernel(self):
        p = plan("bmk,bkn->bmn", b=4, m=3, n=5, k=7)
        assert (p["batch"], p["bsa"], p["bsb"], p["bsc"], p["outer"]) == (4, 21, 35, 15, [])

    def test_adjacent_batch_dimensions_merge(self):
        p = plan("abcmk,abckn->abcmn", a=2, b=3, c=4, m=3, n=5, k=7)
        assert (p["batch"], p["outer"]) == (24, [])

    def test_broadcast_weights_are_one_product(self):
        """A batch dimension of one operand is M, and merges with it."""
        p = plan("bmk,kn->bmn", b=4, m=3, n=5, k=7)
        assert (p["m"], p["batch"], p["products"]) == (12, 1, 1)

    def test_broadcast_lhs_has_stride_zero(self):
        p = plan("mk,bkn->bmn", b=4, m=3, n=5, k=7)
        assert (p["batch"], p["bsa"], p["bsb"], p["bsc"]) == (4, 0, 35, 15)

    def test_attention_scores(self):
        p = plan("bqhd,bkhd->bhqk", b=2, q=11, h=3, d=8, k=13)
        assert (p["m"], p["n"], p["k"]) == (11, 13, 8)
        assert (p["rsa"], p["csa"], p["rsb"], p["csb"]) == (24, 1, 1, 24)
        assert (p["batch"], p["outer"], p["products"]) == (3, [(2, 264, 312, 429)], 6)

    def test_attention_values(self):
        p = plan("bhqk,bkhd->bqhd", b=2, q=11, h=3, d=8, k=13)
        assert (p["m"], p["n"], p["k"], p["rsc"], p["pack_b"]) == (11, 8, 13, 24, False)
        assert p["products"] == 6

    def test_contracting_dimensions_merge(self):
        p = plan("mij,ijn->mn", m=3, n=5, i=4, j=6)
        assert (p["k"], p["k_outer"]) == (24, [])

    def test_contracting_dimensions_that_do_not_merge_are_passes(self):
        p = plan("mij,jin->mn", m=3, n=5, i=4, j=6)
        assert (p["k"], p["csa"], p["rsb"]) == (6, 1, 20)
        assert p["k_outer"] == [(4, 6, 5, 0)]

    def test_free_dimensions_that_do_not_merge_are_loops(self):
        p = plan("xkm,kn->xmn", x=4, m=30, n=5, k=7)
        assert (p["m"], p["rsa"], p["batch"], p["bsa"], p["bsb"], p["bsc"]) == (30, 1, 4, 210, 0, 150)
        p = plan("mk,xkn->mxn", x=40, m=3, n=5, k=7)
        assert (p["n"], p["batch"], p["bsa"], p["bsb"], p["bsc"]) == (5, 40, 0, 35, 5)

    def test_unit_dimensions_vanish(self):
        assert loops(plan("aubmk,akvn->aubmvn", a=1, u=1, b=1, m=3, n=5, k=7, v=1)) == loops(
            plan("mk,kn->mn", m=3, n=5, k=7)
        )

    @pytest.mark.parametrize(
        ("subscripts", "m", "n", "swapped"),
        [
            ("k,kn->n", 1, 5, False),  # rows of the matrix are B's
            ("k,nk->n", 5, 1, True),  # rows of the matrix are A's
            ("mk,k->m", 3, 1, False),
            ("km,k->m", 1, 3, True),
        ],
    )
    def test_matrix_times_vector_never_packs(self, subscripts, m, n, swapped):
        p = plan(subscripts, m=3, n=5, k=7)
        assert (p["m"], p["n"], p["swapped"], p["pack_b"]) == (m, n, swapped, False)

    def test_inner_and_outer_product(self):
        assert loops(plan("k,k->", k=7)) | {"rsa": 0, "rsc": 0} == {
            "m": 1,
            "n": 1,
            "k": 7,
            "rsa": 0,
            "csa": 1,
            "rsb": 1,
            "csb": 1,
            "rsc": 0,
        }
        p = plan("m,n->mn", m=3, n=5)
        assert (p["m"], p["n"], p["k"], p["rsa"], p["csb"], p["rsc"]) == (3, 5, 1, 1, 1, 5)

    def test_elementwise_product_is_a_batch(self):
        p = plan("ab,ab->ab", a=3, b=4)
        assert (p["batch"], p["m"], p["n"], p["k"]) == (12, 1, 1, 1)

    def test_empty_sum(self):
        p = plan("mij,ijn->mn", m=3, n=5, i=0, j=6)
        assert (p["k"], p["m"], p["n"], p["empty"]) == (0, 3, 5, False)

    @pytest.mark.parametrize("zero", ["b", "m", "n"])
    def test_empty_result(self, zero):
        assert plan("bmk,bkn->bmn", **{"b": 2, "m": 3, "n": 5, "k": 7, zero: 0})["empty"]

    @pytest.mark.parametrize("cpu", ["", *_runtime.profiles()])
    @pytest.mark.parametrize("target", TARGETS)
    def test_loops_compute_the_contraction(self, target, cpu):
        """The plan, executed in NumPy by its loops and strides alone, is einsum."""
        for seed in range(300):
            rng = np.random.default_rng(seed)
            c = random_contraction(rng)
            lhs, rhs = (rng.integers(-5, 6, shape) for shape in c.shapes[:2])
            plan = c.plan(target=target, cpu=cpu)
            assert np.array_equal(interpret(c, plan, lhs, rhs), np.einsum(c.subscripts, lhs, rhs)), c


def interpret(c, p, lhs, rhs):
    a, b = (rhs, lhs) if p["swapped"] else (lhs, rhs)
    a, b, out = a.ravel(), b.ravel(), np.zeros(int(np.prod(c.shapes[2])), lhs.dtype)
    nest = [
        *p["outer"],
        (p["batch"], p["bsa"], p["bsb"], p["bsc"]),
        *p["k_outer"],
        (p["m"], p["rsa"], 0, p["rsc"]),
        (p["n"], 0, p["csb"], 1),
        (p["k"], p["csa"], p["rsb"], 0),
    ]
    at = np.zeros((1, 3), np.int64)
    for size, *strides in nest:
        at = (at[:, None] + np.arange(size)[None, :, None] * np.array(strides)).reshape(-1, 3)
    np.add.at(out, at[:, 2], a[at[:, 0]] * b[at[:, 1]])
    return out.reshape(c.shapes[2])


class TestErrors:
    @pytest.mark.parametrize(
        ("lhs", "rhs", "labels", "message"),
        [
            ([3, 4], [5, 6], "01,12,02", r"float32\[3,4\]\{0,1\}.*label 1 has sizes 4 and 5"),
            ([3, 4], [4, 6], "0,12,02", "1 labels for 2 dimensions"),
            ([3, 3], [3, 6], "00,02,02", "label 0 repeated"),
            ([3, 4], [4, 6], "01,12,023", "result label 3 stands in no operand"),
            ([3, 4], [5, 6], "01,23,02", "label 1 stands in one operand only"),
            ([2, 3, 4], [2, 4, 6], "012,023,130", "last dimension is a batch dimension"),
            ([-3, 4], [4, 6], "01,12,02", "negative size"),
            ([2**32, 2**32], [2**32, 2], "01,12,02", "larger than the address space"),
            ([2**31, 2], [2, 2**31], "01,12,02", "larger than the address space"),
        ],
    )
    def test_arrays_that_do_not_fit(self, lhs, rhs, labels, message):
        labels = [[int(x) for x in term] for term in labels.split(",")]
        with pytest.raises(ValueError, match=message):
            _runtime.plan(lhs, rhs, *labels, *["float32"] * 3, 1, target="x86-64-v3")

    @pytest.mark.parametrize("dtype", ["float128", "object", "int32"])
    def test_dtypes_without_kernel(self, dtype):
        with pytest.raises(ValueError, match=rf"{dtype}.* \[?.*|no kernel"):
            Contraction("mk,kn->mn", m=3, n=5, k=7).plan(dtypes=(dtype, "float32", "float32"), target="x86-64-v3")

    def test_unknown_target(self):
        with pytest.raises(ValueError, match="unknown target: z80"):
            plan("mk,kn->mn", m=3, n=5, k=7, target="z80")


def test_few_rows_read_pairs_in_memory_once():
    """By a kernel of any target that widens them where they lie: no second sweep, and nothing packed."""
    for m, sweeps in ((4, True), (5, False), (8, False), (20, False)):
        p = Contraction("mk,kn->mn", m=m, n=4096, k=4096).plan(dtypes=("bfloat16",) * 3, caches=ZEN4, cpu="")
        assert (p["sweep"], p["pack_b"]) == (sweeps, False)


def shapes():
    rng = np.random.default_rng(0)
    fixed = [
        (1, 1, 1),
        (512, 512, 512),
        (4096, 4096, 4096),
        (1, 100_000, 100_000),
        (100_000, 1, 100_000),
        (7, 13, 10**7),
    ]
    return [*fixed, (2**20, 2**20, 3), *(tuple(int(x) for x in 10 ** rng.uniform(0, 4.5, 3)) for _ in range(100))]


@pytest.mark.parametrize("target", TARGETS)
class TestBlocking:
    @pytest.mark.parametrize("subscripts", ["mk,kn->mn", "km,nk->mn"])
    @pytest.mark.parametrize("caches", [ZEN4, SMALL, HUGE])
    def test_bounds(self, target, subscripts, caches):
        mr, nr = {"x86-64-v3": (6, 16), "x86-64-v4": (14, 32)}[target]
        for m, n, k in shapes():
            p = plan(subscripts, m=m, n=n, k=k, target=target, caches=caches, threads=3)
            assert p["workspace_bytes"] <= 8 << 20
            if p["inner"] or p["sweep"]:
                assert (p["mc"], p["kc"], p["nc"]) == (0, 0, 0)
                continue
            assert 0 < p["tile_rows"] <= mr
            assert p["mc"] % p["tile_rows"] == 0 or p["mc"] < p["tile_rows"]
            assert p["nc"] % nr == 0
            assert 0 < p["mc"] < p["m"] + mr
            assert p["nc"] < p["n"] + (nr if p["pack_b"] else 3 * nr)
            narrow = target == "x86-64-v4" and p["n"] <= 8
            assert 1 <= p["kc"] <= (4096 if narrow else 512 if p["pack_b"] else 1024)
            assert p["pack_b"] or p["csb"] == 1
            if p["pack_b"]:
                assert p["nc"] * p["kc"] * 4 <= max(min(caches[1], 2 << 20), nr * p["kc"] * 4)
            if p["pack_a"]:
                assert p["mc"] * p["kc"] * 4 <= 4 << 20

    def test_rows_of_a_that_share_a_set_of_l1_are_packed(self, target):
        """Those that are multiples of 4 KiB apart, or an element more or less."""
        for k, packs in ((512, False), (1000, False), (1023, True), (1024, True), (1025, True), (2047, True)):
            assert plan("mk,kn->mn", m=512, n=512, k=k, target=target)["pack_a"] == packs

    def test_no_tiny_last_block(self, target):
        for k in range(1, 3000, 7):
            p = plan("mk,kn->mn", m=100, n=100, k=k, target=target)
            last = k % p["kc"] or p["kc"]
            assert last > 0.9 * p["kc"] or k < p["kc"]

    @pytest.mark.parametrize("subscripts", ["mk,kn->mn", "mk,nk->mn"])
    def test_the_order_of_a_sum_depends_on_the_call_alone(self, target, subscripts):
        """Or else results would depend on the number of threads, or on the machine's caches."""
        for k in (1, 100, 385, 5000):
            for m, n in ((1, 1), (1, 4096), (5, 3000), (100, 3000), (3000, 100), (700, 700)):
                plans = [
                    plan(subscripts, m=m, n=n, k=k, target=target, caches=caches, threads=threads)
                    for caches in (ZEN4, SMALL, HUGE)
                    for threads in (1, 2, 7, 64)
                ]
                assert len({(p["kernel"], p["kc"], p["inner"], p["sweep"]) for p in plans}) == 1

    def test_small_products_pack_nothing(self, target):
        for size in (1, 8, 16, 32):
            p = plan("bmk,bkn->bmn", b=100, m=size, n=size, k=size, target=target)
            assert (p["pack_a"], p["pack_b"], p["workspace_bytes"]) == (False, False, 0)

    def test_large_products_pack_both(self, target):
        p = plan("mk,kn->mn", m=1024, n=1024, k=1024, target=target)
        assert (p["pack_a"], p["pack_b"]) == (True, True)

    def test_one_row_packs_nothing(self, target):
        p = plan("mk,kn->mn", m=1, n=4096, k=4096, target=target)
        assert (p["pack_a"], p["pack_b"]) == (False, False)

    @pytest.mark.parametrize("subscripts", ["mk,kn->mn", "km,kn->mn"])
    def test_few_rows_sweep_a_large_row_major_b(self, target, subscripts):
        for m in (1, 2, 3, 4):
            p = plan(subscripts, m=m, n=4096, k=4096, target=target)
            assert (p["sweep"], p["pack_a"], p["pack_b"], p["workspace_bytes"]) == (True, False, False, 0)
        assert not plan(subscripts, m=9, n=4096, k=4096, target=target)["sweep"]
        assert not plan(subscripts, m=4, n=64, k=64, target=target)["sweep"]  # register tiles reach all of it
        assert not plan("mk,nk->mn", m=4, n=4096, k=4096, target=target)["sweep"]

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
    def test_few_rows_sweep_what_instructions_want_interleaved(self, target, dtype):
        best = {"bfloat16": "avx512_bf16", "int8": "avx512_vnni"}[dtype] if target == "x86-64-v4" else target
        for m in (1, 8):
            p = Contraction("mk,kn->mn", m=m, n=600, k=5000).plan(target=best, dtypes=(dtype,) * 3, caches=ZEN4, cpu="")
            chosen = KERNELS[p["kernel"]]
            assert p["sweep"] == (m == 1 or (dtype == "bfloat16" and not chosen["direct_b"]))
            if p["sweep"]:
                assert p["rs_partial"] >= 600  # sums wait there until they are rounded
                assert p["workspace_bytes"] == -(-m // chosen["mr"]) * chosen["mr"] * p["rs_partial"] * 4

    def test_pairs_of_rows_are_taken_as_they_lie_where_that_pays(self, target):
        """By the kernel that packs other products' B, not by one that widens elements, sweeps or inner products."""
        best = "avx512_bf16" if target == "x86-64-v4" else target

        def plan_of(m, n, k, subscripts="bmk,bkn->bmn"):
            c = Contraction(subscripts, b=9, m=m, n=n, k=k)
            return c.plan(target=best, dtypes=("bfloat16",) * 3, caches=ZEN4, cpu="")

        for m, n, k in ((2, 2, 2), (1, 8, 8), (3, 7, 5), (8, 8, 8), (4, 32, 32), (64, 64, 64), (8, 64, 64)):
            p = plan_of(m, n, k)
            if KERNELS[p["kernel"]]["pairs_most"]:
                assert (p["inner"], p["sweep"], p["pack_b"]) == (False, False, True)
            assert (KERNELS[p["kernel"]]["pairs_most"] > 0) == (target == "x86-64-v4")
        for m, n, k in ((1, 64, 64), (2, 64, 64), (64, 1, 64), (4, 65, 64)):
            p = plan_of(m, n, k)
            assert p["inner"] or p["sweep"] or not p["pack_b"]

    @pytest.mark.parametrize(("subscripts", "path"), [("mk,kn->mn", "sweep"), ("mk,nk->mn", "inner")])
    def test_what_lies_in_memory_is_prefetched(self, target, subscripts, path):
        for n, prefetch in ((100, False), (10_000, True)):
            p = plan(subscripts, m=1, n=n, k=1000, target=target, caches=(32 << 10, 1 << 20, 32 << 20))
            assert (p[path], p["prefetch"]) == (True, prefetch)

    def test_rows_that_share_sets_are_read_where_they_lie_by_few(self, target):
        """float32 rows 4 KiB apart, of which an L1 of eight ways holds no more."""
        few = plan("mk,kn->mn", m=1024, n=16, k=1024, target=target)
        assert (few["mc"], few["pack_a"], few["pack_b"]) == ({"x86-64-v3": 6, "x86-64-v4": 7}[target], False, False)
        assert plan("mk,kn->mn", m=1024, n=16, k=1000, target=target)["mc"] >= 1024
        assert plan("mk,kn->mn", m=1024, n=1024, k=1024, target=target)["pack_a"]

    def test_passes_go_on_with_the_sums_of_sweeps(self, target):
        p = plan("mij,jin->mn", m=1, n=4096, i=64, j=512, target=target)
        assert p["sweep"]
        assert len(p["k_outer"]) == 1

    @pytest.mark.parametrize(
        ("subscripts", "m", "n", "packs"),
        [
            ("mk,kn->mn", 300, 4, (False, True)),
            ("mk,nk->mn", 300, 4, (False, False)),
            ("km,nk->mn", 4, 300, (True, False)),
            ("mk,nk->mn", 4, 300, (False, False)),
        ],
    )
    def test_the_smaller_operand_is_copied_along_k(self, target, subscripts, m, n, packs):
        p = plan(subscripts, m=m, n=n, k=100, target=target)
        assert (p["inner"], (p["pack_a"], p["pack_b"])) == (True, packs)
        assert p["workspace_bytes"] == 4 * 100 * 4 * sum(packs)
        assert not plan(subscripts, m=max(m, 200), n=max(n, 200), k=100, target=target)["inner"]

    @pytest.mark.parametrize(
        ("subscripts", "m", "n", "short", "long"),
        [
            ("mk,kn->mn", 2048, 4, 8, 64),
            ("mk,nk->mn", 2048, 4, 8, 64),
            ("mk,nk->mn", 4, 2048, 8, 128),
            ("km,nk->mn", 4, 2048, 8, 128),
        ],
    )
    def test_lanes_are_summed_only_where_sums_are_long(self, target, subscripts, m, n, short, long):
        chosen = [plan(subscripts, m=m, n=n, k=k, target=target)["inner"] for k in (short, long)]
        assert chosen == [False, True]

    def test_what_is_copied_along_k_is_bounded(self, target):
        p = plan("mk,kn->mn", m=300, n=4, k=10**6, target=target)
        assert not p["inner"]


@pytest.mark.parametrize("target", TARGETS)
class TestSplit:
    def test_one_thread_does_not_split(self, target):
        assert plan("mk,kn->mn", m=4096, n=4096, k=4096, target=target)["split"] == (1, 1, 1)

    def test_tiny_products_do_not_hop_threads(self, target):
        assert plan("mk,kn->mn", m=32, n=32, k=32, threads=8, target=target)["split"] == (1, 1, 1)
        assert plan("bmk,bkn->bmn", b=16, m=16, n=16, k=16, threads=8, target=target)["split"] == (1, 1, 1)

    def test_items_are_worth_a_thread(self, target):
        for m, n, k in shapes():
            p = plan("mk,kn->mn", m=m, n=n, k=k, threads=64, target=target)
            items = np.prod(p["split"])
            assert items == 1 or m * n * k / items >= 64 << 10

    @pytest.mark.parametrize("threads", [2, 3, 4, 7, 16])
    def test_large_products_keep_every_thread_busy(self, target, threads):
        for sizes in [(1024, 1024, 1024), (64, 8192, 1024), (8192, 64, 1024)]:
            m, n, k = sizes
            p = plan("mk,kn->mn", m=m, n=n, k=k, threads=threads, target=target)
            assert np.prod(p["split"]) >= threads

    def test_packing_is_not_repeated_for_balance(self, target):
        """Each item packs for itself: two threads share a large square in as few pieces as keep both busy."""
        for size in (1024, 2048):
            p = plan("mk,kn->mn", m=size, n=size, k=size, threads=2, target=target)
            assert p["pack_a"]
            assert p["pack_b"]
            assert 2 <= np.prod(p["split"]) <= 6

    def test_few_rows_share_each_column_of_a_large_b(self, target):
        """Memory would bring a column once for each part of the rows; it brings long rows faster than short ones."""
        for m, items in ((1, 2), (4, 2), (5, 4), (16, 4), (32, 4)):
            p = plan("mk,kn->mn", m=m, n=4096, k=4096, threads=2, target=target)
            assert (p["pack_b"], p["split"]) == (False, (1, 1, items))

    def test_columns_are_cut_finely_where_only_b_is_packed(self, target):
        """Then nothing is packed twice, and a core that is disturbed leaves its share to the other."""
        for size in (512, 768, 1536):
            p = plan("mk,kn->mn", m=size, n=size, k=size, threads=2, target=target)
            assert not p["pack_a"]
            assert p["pack_b"]
            assert p["split"] == (1, 1, 8)

    def test_what_is_not_packed_is_cut_finely(self, target):
        """A thread that wakes up late then still finds most of its half of the work."""
        p = plan("mk,kn->mn", m=256, n=256, k=256, threads=2, target=target)
        assert not p["pack_b"]
        assert np.prod(p["split"]) >= 4

    def test_long_results_are_cut_across_their_length(self, target):
        """Nothing is read twice then, and no page of the result is written by two cores."""
        products, m, n = plan("mk,kn->mn", m=65536, n=64, k=64, threads=2, target=target)["split"]
        assert (products, n) == (1, 1)
        assert m >= 16

    def test_batches_are_split_whole(self, target):
        products, m, n = plan("bmk,bkn->bmn", b=512, m=32, n=32, k=32, threads=4, target=target)["split"]
        assert products >= 4
        assert (m, n) == (1, 1)

    def test_few_products_are_split_inside_too(self, target):
        p = plan("bmk,bkn->bmn", b=3, m=512, n=512, k=512, threads=8, target=target)
        assert np.prod(p["split"]) >= 8

    def test_thin_products_are_split_along_their_length(self, target):
        assert plan("mk,kn->mn", m=4, n=8192, k=4096, threads=2, target=target)["split"][1] == 1
        assert plan("mk,kn->mn", m=8192, n=4, k=4096, threads=2, target=target)["split"][2] == 1

    def test_split_k_follows_from_the_product_alone(self, target):
        """Where the result has few tiles and sums are long, whoever computes it."""
        for sizes in [(16, 16, 65536), (30, 30, 8192), (1, 100, 9000), (20, 1, 30_000)]:
            m, n, k = sizes
            machines = [(1, ZEN4), (2, ZEN4), (64, ZEN4), (2, SMALL), (2, HUGE)]
            plans = [plan("mk,kn->mn", m=m, n=n, k=k, threads=t, caches=c, target=target) for t, c in machines]
            assert len({p["split_k"] for p in plans}) == 1
            assert plans[0]["split_k"] > 1
            assert m * n * k / plans[0]["split_k"] >= 128 << 10

    def test_no_split_k_where_there_are_tiles_or_little_work(self, target):
        for sizes in [(256, 256, 65536), (2, 2, 9000), (64, 64, 1500)]:
            m, n, k = sizes
            assert plan("mk,kn->mn", m=m, n=n, k=k, threads=2, target=target)["split_k"] == 1


class TestSplitByCosts:
    """Where a CPU's costs were measured, the split follows predicted times."""

    @staticmethod
    def plan(m, n, k, threads, subscripts="mk,kn->mn", **sizes):
        c = Contraction(subscripts, m=m, n=n, k=k, **sizes)
        return c.plan(target="x86-64-v3", threads=threads, caches=ZEN4, cpu="AMD Zen 3")

    def test_nothing_else_follows_the_threads(self):
        for sizes in [*shapes(), (64, 8192, 1024), (16, 16, 65536)]:
            one, many = self.plan(*sizes, 1), self.plan(*sizes, 7)
            assert one["split"] == (1, 1, 1)
            for name in ("kernel", "inner", "sweep", "pack_b", "kc", "split_k"):
                assert one[name] == many[name], (name, sizes)

    def test_items_are_worth_a_thread(self):
        for m, n, k in shapes():
            items = np.prod(self.plan(m, n, k, 64)["split"])
            assert items == 1 or m * n * k / items >= 64 << 10

    @pytest.mark.parametrize("threads", [2, 3, 4, 7, 16])
    def test_large_products_keep_every_thread_busy(self, threads):
        for sizes in [(1024, 1024, 1024), (64, 8192, 1024), (8192, 64, 1024)]:
            assert np.prod(self.plan(*sizes, threads)["split"]) >= threads
        batches = self.plan(512, 512, 512, threads, "bmk,bkn->bmn", b=3)
        assert np.prod(batches["split"]) >= threads

    def test_a_tall_a_is_not_read_again_for_few_columns(self):
        """Each part of the columns reads all of A, so that rows are cut first (2.0 times the time otherwise)."""
        assert self.plan(2048, 64, 64, 2)["split"][2] == 1

    def test_batches_are_split_whole(self):
        split = self.plan(64, 64, 64, 2, "bmk,bkn->bmn", b=64)["split"]
        assert split[0] > 1
        assert split[1:] == (1, 1)


KERNELS = {k["name"]: k for k in _runtime.kernels()}
every_kernel = pytest.mark.parametrize("info", KERNELS.values(), ids=list(KERNELS))


def plan_of(info, subscripts, **where):
    """A plan for the kernel's signature and target; it may name another kernel that does better."""
    sizes = {x: where.pop(x) for x in list(where) if len(x) == 1}
    dtypes = (info["lhs"], info["rhs"], info["out"])
    where = {"target": info["target"], "algorithm": info["algorithm"], "caches": ZEN4, **where}
    return Contraction(subscripts, **sizes).plan(dtypes=dtypes, cpu="", **where)


class TestEveryKernel:
    @every_kernel
    def test_packs_what_it_cannot_read_where_it_lies(self, info):
        for sizes in [(1, 1, 1), (3, 5, 7), (1, 512, 512), (64, 64, 64), (700, 800, 900)]:
            for subscripts in ("mk,kn->mn", "km,nk->mn", "mk,nk->mn"):
                p = plan_of(info, subscripts, **dict(zip("mnk", sizes, strict=True)))
                chosen = KERNELS[p["kernel"]]
                if p["inner"]:
                    assert chosen["inner"]
                    assert (p["csa"] == 1 or p["pack_a"], p["rsb"] == 1 or p["pack_b"]) == (True, True)
                    continue
                if p["sweep"]:
                    assert chosen["sweep"]
                    assert (p["csb"], p["pack_a"], p["pack_b"]) == (1, False, False)
                    continue
                assert p["pack_a"] or reads_a(chosen, p)
                assert p["pack_b"] or (chosen["direct_b"] and p["csb"] == 1)

    @every_kernel
    def test_blocks_are_whole_tiles_within_the_workspace(self, info):
        for m, n, k in [*shapes()[:12], (10**6, 10**6, 10**6), (10**6, 3, 10**6), (3, 10**6, 10**5)]:
            for caches, threads in ((ZEN4, 1), (SMALL, 2), (HUGE, 64)):
                for subscripts in ("mk,kn->mn", "mk,nk->mn"):
                    p = plan_of(info, subscripts, m=m, n=n, k=k, caches=caches, threads=threads)
                    assert 0 <= p["workspace_bytes"] <= 8 << 20
                    if not p["inner"] and not p["sweep"]:
                        chosen = KERNELS[p["kernel"]]
                        assert 0 < p["tile_rows"] <= chosen["mr"]
                        assert p["tile_rows"] == chosen["mr"] or not p["pack_a"] or p["csa"] == 1
                        assert p["mc"] % p["tile_rows"] == 0 or p["mc"] < p["tile_rows"]
                        assert p["nc"] % chosen["nr"] == p["kc"] % chosen["kr"] == 0
                        assert min(p["mc"], p["nc"], p["kc"]) > 0


def ceil_div(x, y):
    return -(-x // y)


NARROW = [k for k in KERNELS.values() if k["narrow_out"]]


@pytest.mark.parametrize("info", NARROW, ids=[k["name"] for k in NARROW])
class TestPartialSums:
    """Sums that C cannot hold while they are unfinished."""

    BIG = ((4096, 4096, 10**4), (10**6, 100, 10**4), (40, 10**6, 10**4), (10**6, 10**6, 10**5))

    def test_short_sums_need_no_room(self, info):
        p = plan_of(info, "mk,kn->mn", m=4096, n=10**6, k=64)
        assert p["kc"] >= 64
        assert p["rs_partial"] == 0
        assert p["split"] == (1, 1, 1)

    @pytest.mark.parametrize("threads", [1, 2, 64])
    def test_items_fit_into_the_workspace(self, info, threads):
        for m, n, k in self.BIG:
            p = plan_of(info, "mk,kn->mn", m=m, n=n, k=k, threads=threads)
            chosen = KERNELS[p["kernel"]]
            _, pieces_m, pieces_n = p["split"]
            item_m = ceil_div(ceil_div(p["m"], chosen["mr"]), pieces_m) * chosen["mr"]
            item_n = ceil_div(ceil_div(p["n"], chosen["nr"]), pieces_n) * chosen["nr"]
            assert p["rs_partial"] == item_n
            room = item_m * item_n * 4
            assert room <= 3 << 19
            assert room <= p["workspace_bytes"] <= 8 << 20
            assert room >= 3 << 16  # cut no further than needed

    def test_the_cut_does_not_change_the_bits(self, info):
        for m, n, k in self.BIG:
            plans = [plan_of(info, "mk,kn->mn", m=m, n=n, k=k, threads=t) for t in (1, 3, 64)]
            assert len({(p["kernel"], p["kc"]) for p in plans}) == 1

    def test_passes_need_room_however_short(self, info):
        p = plan_of(info, "mij,jin->mn", m=30, n=50, i=4, j=6)
        assert p["k_outer"]
        assert p["rs_partial"] >= 50

    def test_products_in_passes_go_one_by_one(self, info):
        """Else the second product's first pass would overwrite what the first one's left."""
        p = plan_of(info, "bmij,bjin->bmn", b=10, m=30, n=50, i=4, j=6)
        assert (p["batch"], p["products"]) == (1, 10)
        assert plan_of(info, "bmk,bkn->bmn", b=10, m=30, n=50, k=10**4)["batch"] == 10
