"""The handler that XLA calls, without jax_nano's Python layer."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from contraction import Contraction

from jax_nano import _runtime

if not _runtime.supports("float32", "float32", "float32"):
    pytest.skip("no float32 kernel runs on this CPU", allow_module_level=True)

TARGET = "jax_nano_dot_general"
for name, stages in _runtime.registrations().items():
    jax.ffi.register_ffi_target(name, stages, platform="cpu")


def call(c, lhs, rhs, *, out=None, **attributes):
    """The custom call for a contraction; attributes and the result's type can be wrong on purpose."""
    names = ("lhs_labels", "rhs_labels", "out_labels")
    attributes = {
        "abi": np.int64(_runtime.ABI_VERSION),
        "algorithm": "default",
        **{name: np.array(labels, np.int64) for name, labels in zip(names, c.labels, strict=True)},
        **attributes,
    }
    out = out or jax.ShapeDtypeStruct(c.shapes[2], lhs.dtype)
    return jax.ffi.ffi_call(TARGET, out)(lhs, rhs, **attributes)


MATMUL = Contraction("mk,kn->mn", m=3, n=5, k=7)
A, B = np.ones((3, 7), np.float32), np.ones((7, 5), np.float32)


@pytest.mark.parametrize(
    "c",
    [
        MATMUL,
        Contraction("bqhd,bkhd->bhqk", b=2, q=33, h=3, d=64, k=35),
        Contraction("mk,kn->nm", m=300, n=200, k=500),
        Contraction("mk,kn->mn", m=0, n=5, k=7),
        Contraction("mk,kn->mn", m=3, n=5, k=0),
        Contraction("k,k->", k=1000),
    ],
    ids=str,
)
def test_contractions(c, rng):
    lhs, rhs = (reference.random(rng, shape) for shape in c.shapes[:2])
    f = jax.jit(lambda x, y: call(c, x, y))
    want = reference.expected(c.subscripts, lhs, rhs)
    want.check(f(lhs, rhs))
    want.check(f(lhs, rhs))  # the cached plan
    assert np.asarray(f(lhs, rhs)).tobytes() == c.dot(lhs, rhs).tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rhs_labels": np.array([3, 2])}, r"float32\[3,7\]\{109,107\}, float32\[7,5\]\{3,2\}"),
        ({"lhs_labels": np.array([109])}, "1 labels for 2 dimensions"),
        ({"abi": np.int64(99)}, f"asks for ABI 99, the installed one is {_runtime.ABI_VERSION}"),
        ({"algorithm": "magic"}, "no kernel on this machine for .*, algorithm magic"),
        ({"out": jax.ShapeDtypeStruct((3, 6), np.float32)}, "label 110 has sizes 5 and 6"),
        ({"out": jax.ShapeDtypeStruct((3, 5), np.int32)}, r"no kernel .* float32\[3,7\].* -> int32\[3,5\]"),
    ],
)
def test_bad_calls(change, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: jax_nano.*" + message):
        jax.jit(lambda x, y: call(MATMUL, x, y, **change))(A, B)


def test_unsupported_dtypes():
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT: .* complex64|INVALID_ARGUMENT: .*dtype#"):
        jax.jit(lambda x, y: call(MATMUL, x, y))(A.astype(np.complex64), B.astype(np.complex64))


def test_a_missing_attribute_is_an_error():
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT: .*attributes"):
        jax.jit(lambda x, y: jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((3, 5), np.float32))(x, y))(A, B)


def test_an_error_leaves_the_process_usable():
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(lambda x, y: call(MATMUL, x, y, algorithm="magic"))(A, B)
    assert np.array_equal(jax.jit(lambda x, y: call(MATMUL, x, y))(A, B), A @ B)


def test_inside_loops_and_branches(rng):
    x = reference.random(rng, (64, 64)) / 8
    c = Contraction("mk,kn->mn", m=64, n=64, k=64)

    @jax.jit
    def f(x):
        y = jax.lax.fori_loop(0, 5, lambda _, y: call(c, y, x), x)
        return jax.lax.cond(y[0, 0] > 0, lambda y: call(c, y, x), lambda y: -call(c, y, x), y)

    want = np.linalg.matrix_power(x.astype(np.float64), 7)
    assert np.allclose(np.abs(f(x)), np.abs(want), rtol=1e-4, atol=1e-4)


def test_subnormals_are_zero_as_in_xla():
    """XLA runs everything with FTZ and DAZ set; the handler inherits that."""
    tiny = np.full((3, 7), 1e-40, np.float32)
    ours = jax.jit(lambda x, y: call(MATMUL, x, y))(tiny, B)
    assert np.array_equal(ours, jax.jit(jnp.dot)(tiny, B))


def run(code: str, **environment: str) -> str:
    """Standard output of the code in a fresh interpreter; a deadlock ends in TimeoutExpired."""
    prelude = f"""
        import sys; sys.path[:0] = {[p for p in sys.path if p.endswith("tests")]}
        import threading
        import jax, numpy as np
        from contraction import Contraction
        from kernels.test_ffi import call
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("nproc", ["1", "2", "4"])
def test_many_independent_calls_from_many_threads(nproc):
    """XLA runs such calls on the very pool that they split their work over: waiting for the pool would hang.

    Operands that are arguments of the program matter: with computed ones XLA runs the calls one by one, and a
    handler that waits for its tasks passes.
    """
    out = run(
        """
        from jax_nano import _runtime
        _runtime.testing.share_every_call(True)
        c = Contraction("mk,kn->mn", m=128, n=128, k=128)
        rng = np.random.default_rng(0)
        xs = [rng.standard_normal((128, 128)).astype("f") for _ in range(24)]

        @jax.jit
        def independent(xs):
            return [call(c, x, x) for x in xs]

        want = [np.asarray(y).tobytes() for y in independent(xs)]
        wrong = []

        def work():
            for _ in range(100):
                wrong.extend(i for i, y in enumerate(independent(xs)) if np.asarray(y).tobytes() != want[i])

        workers = [threading.Thread(target=work) for _ in range(4)]
        for w in workers: w.start()
        for w in workers: w.join()
        split = np.prod(c.plan(threads=2)["split"])
        right = [np.allclose(np.frombuffer(w, "f"), (x @ x).ravel(), atol=1e-2) for w, x in zip(want, xs)]
        print(len(wrong), split > 1, all(right))
        """,
        NPROC=nproc,
    )
    assert out == "0 True True"


def test_bits_do_not_depend_on_the_pool():
    code = """
        import hashlib
        digest = hashlib.sha256()
        for c in (
            Contraction("mk,kn->mn", m=512, n=300, k=700),
            Contraction("bqhd,bkhd->bhqk", b=3, q=70, h=4, d=64, k=67),
        ):
            x, y = (np.random.default_rng(0).standard_normal(s).astype("f") for s in c.shapes[:2])
            digest.update(np.asarray(jax.jit(lambda x, y: call(c, x, y))(x, y)).tobytes())
        print(digest.hexdigest())
    """
    assert len({run(code, NPROC=nproc) for nproc in ("1", "2", "3", "7")}) == 1


def test_helpers_stand_by_and_change_nothing():
    """One product after the other finds its helper awake; results, and where threads may run, stay as they were."""
    out = run(
        """
        import pathlib, re
        from jax_nano import _runtime
        def where():
            status = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/status")]
            return {re.search("Cpus_allowed_list:(.*)", text)[1] for text in status}
        c = Contraction("mk,kn->mn", m=256, n=256, k=256)
        x = np.linalg.qr(np.random.default_rng(0).standard_normal((256, 256)))[0].astype("f")
        power = jax.jit(lambda y, x: jax.lax.fori_loop(0, 300, lambda _, y: call(c, y, x), y))
        before = where()
        _runtime.testing.share_every_call(True)
        found, want = {np.asarray(power(x, x)).tobytes() for _ in range(5)}, np.linalg.matrix_power(x, 301)
        right = np.allclose(np.frombuffer(found.pop(), "f").reshape(256, 256), want, atol=1e-3)
        print(right, not found, where() == before, _runtime.testing.handed_jobs() > 0)
        """,
        NPROC="2",
    )
    assert out == "True True True True"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_where_threads_may_run_is_for_others_to_say():
    """A mask that somebody sets while products run stays: for all threads, in every round."""
    out = run(
        """
        import os, pathlib
        from jax_nano import _runtime
        _runtime.testing.share_every_call(True)
        c = Contraction("mk,kn->mn", m=256, n=256, k=256)
        x = np.linalg.qr(np.random.default_rng(0).standard_normal((256, 256)))[0].astype("f")
        power = jax.jit(lambda y, x: jax.lax.fori_loop(0, 10, lambda _, y: call(c, y, x), y))
        power(x, x).block_until_ready()
        tasks = [int(path.name) for path in pathlib.Path("/proc/self/task").iterdir()]
        cpus = os.sched_getaffinity(0)
        undone = 0
        for i in range(60):
            mask = {sorted(cpus)[i % 2]} if i % 3 else cpus
            result = power(x, x)  # runs while the masks are set
            for task in tasks: os.sched_setaffinity(task, mask)
            result.block_until_ready()
            undone += any(os.sched_getaffinity(task) != mask for task in tasks)
        print(undone, _runtime.testing.handed_jobs() > 0)
        """,
        NPROC="2",
    )
    assert out == "0 True"


def test_helpers_of_any_pool_compute_as_the_caller_does():
    """Of subnormals a thread of XLA's pool makes zeros, one of a private pool does not: the caller's way counts."""
    out = run(
        """
        from jax_nano import _runtime
        c = Contraction("mk,kn->mn", m=256, n=256, k=256)
        x = np.full((256, 256), 1e-30, "f")
        y = np.full((256, 256), 1e-12, "f")
        ours = jax.jit(lambda x, y: call(c, x, y))
        _runtime.testing.share_every_call(True)
        seen = set()
        def private():
            for _ in range(100): seen.add(float(c.dot(x, y, threads=2).max()))
        worker = threading.Thread(target=private)
        worker.start()
        flushed = {float(np.asarray(ours(x, y)).max()) for _ in range(100)}
        worker.join()
        print(flushed, len(seen), min(seen) > 0, _runtime.testing.handed_jobs() > 0)
        """,
        NPROC="2",
    )
    assert out == "{0.0} 1 True True"


def test_one_executable_many_devices():
    """The same executable on four devices at once: one state, four concurrent runs."""
    out = run(
        """
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        c = Contraction("mk,kn->mn", m=128, n=128, k=128)
        mesh = Mesh(np.array(jax.devices()), "d")
        x = np.random.default_rng(0).standard_normal((4, 128, 128)).astype("f")
        f = jax.jit(jax.shard_map(lambda x: call(c, x[0], x[0])[None], mesh=mesh, in_specs=P("d"), out_specs=P("d")))
        for _ in range(50):
            y = f(jax.device_put(x, NamedSharding(mesh, P("d"))))
        print(len(jax.devices()), np.allclose(y, x @ x, atol=1e-3))
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    assert out == "4 True"
