"""Whole plans on real memory: any contraction, any number of threads, always the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import reference
from contraction import Contraction, random_contraction

from jax_nano import _runtime

if not _runtime.supports("float32", "float32", "float32"):
    pytest.skip("no float32 kernel runs on this CPU", allow_module_level=True)

SHAPES = [
    Contraction("mk,kn->mn", m=512, n=512, k=700),
    Contraction("km,nk->mn", m=301, n=257, k=403),
    Contraction("mk,kn->mn", m=5, n=4099, k=300),
    Contraction("mk,kn->nm", m=2050, n=7, k=300),
    Contraction("k,nk->n", n=3000, k=1000),
    Contraction("bmk,bkn->bmn", b=37, m=33, n=35, k=31),
    Contraction("bqhd,bkhd->bhqk", b=3, q=70, h=4, d=64, k=67),
    Contraction("bhqk,bkhd->bqhd", b=3, q=70, h=4, d=64, k=67),
    Contraction("mij,jin->mn", m=200, n=210, i=17, j=40),
]


def operands(c, rng):
    return [reference.random(rng, shape) for shape in c.shapes[:2]]


@pytest.mark.parametrize("c", SHAPES, ids=str)
def test_bits_do_not_depend_on_threads(c, rng):
    lhs, rhs = operands(c, rng)
    alone = c.dot(lhs, rhs)
    reference.expected(c.subscripts, lhs, rhs).check(alone)
    for threads in (1, 2, 3, 4, 7):
        for _ in range(3):
            assert c.dot(lhs, rhs, threads=threads).tobytes() == alone.tobytes(), threads


def test_these_shapes_are_really_split():
    for c in SHAPES:
        assert np.prod(c.plan(threads=4)["split"]) > 1, c


DTYPES = [
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "float32"),
    ("float16", "float16", "float32"),
    ("float64", "float64", "float64"),
    ("int8", "int8", "int8"),
    ("uint8", "int8", "int32"),
    ("uint8", "uint8", "uint32"),  # these three by the kernels of the other sign
    ("int8", "uint8", "uint16"),
    ("int8", "int8", "uint8"),
]
LONG_SUMS = [
    Contraction("mk,kn->mn", m=130, n=200, k=3000),
    Contraction("mk,kn->nm", m=2050, n=7, k=1000),
    Contraction("bmk,bkn->bmn", b=5, m=33, n=35, k=2000),
    Contraction("bmij,bjin->bmn", b=5, m=20, n=35, i=7, j=20),
    Contraction("bmijl,lbjin->bmn", b=3, m=20, n=35, i=3, j=5, l=7),
    Contraction("mk,nk->mn", m=3, n=200, k=3001),
]
SPLIT_K = [
    Contraction("mk,kn->mn", m=17, n=33, k=9001),
    Contraction("km,kn->nm", m=40, n=3, k=9001),
    Contraction("bmk,bnk->bmn", b=3, m=5, n=40, k=8190),
    Contraction("mik,kin->mn", m=20, n=35, i=3, k=4200),
    Contraction("bk,bkn->bn", b=2, n=64, k=9001),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize("c", LONG_SUMS + SPLIT_K, ids=str)
def test_other_dtypes(c, dtypes, rng):
    """Sums longer than a block of K, in passes, of several products: rounded once, the same for any threads."""
    if not _runtime.supports(*dtypes):
        pytest.skip("no kernel")
    lhs, rhs = (reference.random(rng, shape, dtype) for shape, dtype in zip(c.shapes, dtypes[:2], strict=False))
    acc = {"f": np.float64 if dtypes[2] == "float64" else np.float32, "i": np.int32, "u": np.int32, "b": np.float32}
    alone = c.dot(lhs, rhs, out=dtypes[2])
    reference.expected(c.subscripts, lhs, rhs, out=dtypes[2], acc=acc[dtypes[2][0]]).check(alone)
    for threads in (2, 7):
        assert c.dot(lhs, rhs, out=dtypes[2], threads=threads).tobytes() == alone.tobytes(), threads


@pytest.mark.parametrize("c", SPLIT_K, ids=str)
def test_split_k(c, rng):
    """Into as many slices on any number of threads, or bits would differ."""
    slices = {c.plan(threads=threads)["split_k"] for threads in (1, 2, 7, 64)}
    assert len(slices) == 1
    assert slices.pop() > 1
    lhs, rhs = operands(c, rng)
    alone = c.dot(lhs, rhs)
    reference.expected(c.subscripts, lhs, rhs).check(alone)
    for threads in (2, 3, 16, 64):
        assert c.dot(lhs, rhs, threads=threads).tobytes() == alone.tobytes(), threads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_slice_of_k_is_lost(dtype, rng):
    """Infinities and NaN reach the result from any slice, and opposite infinities of two slices meet."""
    if not _runtime.supports(*[dtype] * 3):
        pytest.skip("no kernel")
    c = Contraction("mk,kn->mn", m=20, n=16, k=20_000)
    assert c.plan(dtypes=(dtype,) * 3)["split_k"] > 1
    lhs, rhs = (np.abs(reference.random(rng, shape, dtype)) + np.asarray(1, dtype) for shape in c.shapes[:2])
    places = np.linspace(0, 19_999, 18).astype(int)
    for row, k in enumerate(places):
        lhs[row, k] = (np.inf, -np.inf, np.nan)[row % 3]
    lhs[18, 0], lhs[18, -1] = np.inf, -np.inf
    got = np.float64(c.dot(lhs, rhs, threads=2))
    want = np.array([*([np.inf, -np.inf, np.nan] * 6), np.nan])
    np.testing.assert_array_equal(got[:19], np.broadcast_to(want[:, None], (19, 16)))
    assert np.isfinite(got[19]).all()


@pytest.mark.parametrize("algorithm", ["BF16_BF16_F32", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6"])
def test_algorithms(algorithm, rng):
    if not _runtime.supports(*["float32"] * 3, algorithm):
        pytest.skip("no kernel")
    for m, n, k in [(1, 1, 1), (130, 70, 300), (3, 50, 1001)]:
        c = Contraction("mk,kn->mn", m=m, n=n, k=k)
        lhs, rhs = operands(c, rng)
        want = reference.expected("mk,kn->mn", *reference.algorithm_operands(algorithm, lhs, rhs))
        want.check(c.dot(lhs, rhs, algorithm=algorithm, threads=2))


@pytest.mark.parametrize("block", range(10))
def test_random_contractions(block):
    for seed in range(100 * block, 100 * (block + 1)):
        rng = np.random.default_rng(seed)
        c = random_contraction(rng)
        lhs, rhs = operands(c, rng)
        reference.expected(c.subscripts, lhs, rhs).check(c.dot(lhs, rhs), c)


def test_random_sizes_and_layouts(rng):
    for subscripts in ("mk,kn->mn", "km,kn->mn", "mk,nk->mn", "km,nk->mn", "mk,kn->nm"):
        for _ in range(15):
            sizes = dict(zip("mnk", (int(x) for x in 10 ** rng.uniform(0, 2.8, 3)), strict=True))
            c = Contraction(subscripts, **sizes)
            lhs, rhs = operands(c, rng)
            reference.expected(subscripts, lhs, rhs).check(c.dot(lhs, rhs, threads=2), c)


@pytest.mark.parametrize("k", [1, 2, 3, 300])
def test_powers_of_two_and_their_neighbours(rng, k):
    for m in (63, 64, 65, 256):
        for n in (63, 64, 65, 256):
            c = Contraction("mk,kn->mn", m=m, n=n, k=k)
            lhs, rhs = operands(c, rng)
            reference.expected(c.subscripts, lhs, rhs).check(c.dot(lhs, rhs), c)


def test_zero_sizes(rng):
    for zero in "bmnk":
        c = Contraction("bmk,bkn->bmn", **{"b": 2, "m": 3, "n": 5, "k": 7, zero: 0})
        out = c.dot(*operands(c, rng))
        assert out.shape == c.shapes[2]
        assert not out.any()


def test_concurrent_callers(rng):
    """Each thread has its own workspace."""
    c = SHAPES[1]
    lhs, rhs = operands(c, rng)
    alone = c.dot(lhs, rhs).tobytes()
    wrong = []

    def work():
        wrong.extend(i for i in range(10) if c.dot(lhs, rhs, threads=2).tobytes() != alone)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_workspace_stays_within_8_mib(rng):
    for c in (
        Contraction("mk,nk->mn", m=3000, n=1200, k=500),
        Contraction("mk,kn->mn", m=40, n=50_000, k=400),
        Contraction("km,nk->mn", m=40, n=40, k=100_000),
    ):
        c.dot(*operands(c, rng), threads=2)
    assert 0 < _runtime.testing.workspace_bytes() <= 8 << 20


def run(code: str) -> str:
    """Standard output of the code in a fresh interpreter that imports the installed package."""
    prelude = """
        import os, resource, sys
        import numpy as np
        from jax_nano import _runtime
        def matrices(n):
            a, b = (np.random.default_rng(i).standard_normal((n, n)).astype("f") for i in range(2))
            return a, b, np.full((n, n), np.nan, "f")
        def dot(a, b, c, threads):
            at = [x.ctypes.data for x in (a, b, c)]
            _runtime.testing.dot(*at, a.shape, b.shape, [0, 1], [1, 2], [0, 2], *["float32"] * 3, threads)
            return None if c.size > 1 << 18 else c.tobytes()
    """
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            textwrap.dedent(prelude) + textwrap.dedent(code),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FORKS = pytest.mark.skipif(
    "libtsan" in os.environ.get("LD_PRELOAD", ""), reason="TSan takes a child's threads for its parent's and ends it"
)


@FORKS
def test_fork():
    """Before a fork, in the child, in the child's child, and in the parent again."""
    out = run("""
        abc = matrices(300)
        want = dot(*abc, 3)
        child = os.fork()
        if child == 0:
            ok = dot(*abc, 3) == want and dot(*abc, 1) == want
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if dot(*abc, 3) == want else 1)
            os._exit(0 if ok and os.waitpid(grandchild, 0)[1] == 0 else 1)
        print(os.waitpid(child, 0)[1], dot(*abc, 3) == want)
    """)
    assert out == "0 True"


@FORKS
def test_forks_while_helpers_wait():
    """Who waits in the parent is not in the child, whose threads may have that memory as their stacks."""
    out = run("""
        abc = matrices(96)
        want = dot(*abc, 2)
        _runtime.testing.share_every_call(True)  # helpers wait for as long as they may
        statuses = set()
        for _ in range(60):
            dot(*abc, 2)
            child = os.fork()
            if child == 0:
                os._exit(0 if all(dot(*abc, 2) == want for _ in range(5)) else 1)
            statuses.add(os.waitpid(child, 0)[1])
        print(statuses, dot(*abc, 2) == want)
    """)
    assert out == "{0} True"


@pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers need address space themselves")
def test_no_memory_for_the_workspace_is_an_error():
    out = run("""
        abc = [np.full((1024, 1024), x, "f") for x in (1, 1, np.nan)]  # no temporaries for malloc to keep
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 18), resource.RLIM_INFINITY))
        try:
            dot(*abc, 1)
        except MemoryError as e:
            print(type(e).__name__, abc[2][0, 0], abc[2][-1, -1])
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        dot(*abc, 1)
        print((abc[2] == 1024).all())
    """)
    assert out.split() == ["MemoryError", "nan", "nan", "True"]
