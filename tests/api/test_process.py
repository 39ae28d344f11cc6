"""What the rest of a process, and other processes, may do while products run: interrupt, take memory, take the CPUs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from programs import fresh_environment, run_python

from jax_nano import _runtime

if not _runtime.supports("float32", "float32", "float32"):
    pytest.skip("no float32 kernel runs on this CPU", allow_module_level=True)

KINDS = ("product", "attention", "quantised")

# A function and operands of each kind, whose result is small and whose workspace is not.
CALLS = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_enable_async_dispatch", False)  # so that the main thread runs programs
import jax_nano
rng = np.random.default_rng(0)
def random(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))
calls = {
    "product": (jax_nano.matmul, (random(64, 16384), random(16384, 64))),
    "attention": (jax_nano.dot_product_attention, (random(1, 8, 1, 64), *[random(1, 4096, 1, 64)] * 2)),
    "quantised": (
        jax_nano.quantized_matmul,
        (random(64, 8192), jnp.asarray(rng.integers(-8, 8, (8192, 64)), jnp.int8), random(64)),
    ),
}
compiled = {kind: jax.jit(fun).lower(*operands).compile() for kind, (fun, operands) in calls.items()}
def run(kind):
    return np.asarray(compiled[kind](*calls[kind][1])).tobytes()
"""


# `run` runs code in another interpreter, and returns its exception as text, if there was one.
INTERPRETERS = """
import sys
if sys.version_info >= (3, 13):
    import _interpreters
    other = _interpreters.create("isolated" if isolated else "legacy")
    def run(code):
        failed = _interpreters.exec(other, code)
        return failed and f"{failed.type.__name__}: {failed.msg}"
else:
    import _xxsubinterpreters as _interpreters
    other = _interpreters.create(isolated=isolated)
    def run(code):
        try:
            _interpreters.run_string(other, code)
        except _interpreters.RunFailedError as error:
            return str(error)
"""


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("first", ["", "import jax_nano; jax_nano.matmul"])
def test_another_interpreter_of_the_process(isolated: bool, first: str) -> None:
    """JAX does not work in one; neither does what needs it, and the first interpreter goes on."""
    run_python(
        f"""
        {first}
        isolated = {isolated}
        exec({INTERPRETERS!r})
        assert run("import jax_nano; assert 'jax' not in __import__('sys').modules") is None
        for code in ("jax_nano.matmul", "from jax_nano import linear", "jax_nano.report()"):
            refused = run("import jax_nano; " + code)
            assert "ImportError" in refused and "main interpreter" in refused, refused
        loaded = run("from jax_nano import _runtime; assert _runtime.kernels()")
        assert loaded is None or "does not support loading in subinterpreters" in loaded, loaded
        _interpreters.destroy(other)
        import jax_nano, numpy as np
        a = np.arange(64, dtype=np.float32).reshape(8, 8)
        np.testing.assert_array_equal(jax_nano.matmul(a, a), a @ a)
        """
    )


def test_a_fork_before_the_first_product() -> None:
    """As workers of multiprocessing are: what was imported works in both. After a product, JAX warns of a fork."""
    run_python(
        """
        import os
        import jax, numpy as np, jax_nano
        def work():
            a = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) % 7
            np.testing.assert_array_equal(jax_nano.matmul(a, a), a @ a)
            with jax_nano.accelerate():
                np.testing.assert_array_equal(jax.jit(lambda a: a @ a)(a), a @ a)
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(os.EX_OK if len(jax_nano.report().ran) == 2 else 1)
        assert os.waitpid(child, 0)[1] == 0
        work()
        """
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_signals_while_products_run(threads: int) -> None:
    """A handler runs between programs, whatever they wait for meanwhile, and results stay as they are."""
    run_python(
        CALLS
        + """
import signal
want = {kind: run(kind) for kind in calls}
seen = 0
def handle(*_):
    global seen
    seen += 1
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
while seen < 100:
    for kind in calls:
        assert run(kind) == want[kind]
signal.setitimer(signal.ITIMER_REAL, 0)

def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
for _ in range(20):
    signal.setitimer(signal.ITIMER_REAL, 0.002)
    try:
        while True:
            for kind in calls:
                run(kind)
    except KeyboardInterrupt:
        pass
for kind in calls:
    assert run(kind) == want[kind]
""",
        env={"NPROC": str(threads)},
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_no_memory_for_a_workspace(kind: str, threads: int) -> None:
    """An error of that run, and the next one, with memory, is right."""
    run_python(
        CALLS
        + """
import ctypes, pathlib, resource, sys
kind = sys.argv[1]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), unlimited[1]))
taken = []
try:
    while block := libc.malloc(65536):  # what is left is in smaller pieces
        taken.append(block)
    run(kind)
except jax.errors.JaxRuntimeError as error:
    message = str(error)
else:
    message = "it ran"
finally:
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    for block in taken:
        libc.free(block)
assert "jax_nano: out of memory" in message, message
got = run(kind)
fun, operands = calls[kind]
assert got == np.asarray(jax.jit(fun)(*operands)).tobytes()
""",
        kind,
        env={"NPROC": str(threads), "MALLOC_ARENA_MAX": "1"},  # or other threads have memory of their own
    )


# Eight threads of Python on one CPU, in a pool that was made for four; every result has the bits of a run alone.
CROWDED = (
    CALLS
    + """
import os, sys, threading
from jax_nano._core import machine
operands = {kind: [x * 0.5 if x.dtype == np.float32 else x for x in calls[kind][1]] for kind in calls}
small = random(24, 24)
chain = jax_nano.accelerate(jax.jit(lambda x: jnp.tanh(x @ x) @ x))
def work(kind):
    return np.asarray(compiled[kind](*operands[kind])).tobytes(), np.asarray(chain(small)).tobytes()
want = {kind: work(kind) for kind in calls}
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), os.sched_getaffinity(0))
start, wrong = threading.Barrier(8), []
def repeat(kind):
    start.wait()
    for _ in range(10):
        if work(kind) != want[kind]:
            wrong.append(kind)
threads = [threading.Thread(target=repeat, args=(list(calls)[i % 3],)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong
"""
)


def test_more_threads_than_cpus() -> None:
    run_python(CROWDED, env={"NPROC": "4"}, timeout=300)


def test_more_processes_than_cpus() -> None:
    """Each with a pool as large as the machine's and a thread more."""
    env = fresh_environment({"NPROC": "3", "PYTHONWARNINGS": "error"})
    command = [sys.executable, "-c", textwrap.dedent(CROWDED)]
    started = [subprocess.Popen(command, env=env, cwd="/", stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_a_share_of_a_cpu(tmp_path: Path) -> None:
    """A container that may use half a CPU: a call has one thread, though the pool has four."""
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (group / "cpu.max").write_text("50000 100000")
    program = f"""
import pathlib
from jax_nano._core import machine
quota = machine.quota
machine.quota = lambda: quota(pathlib.Path({str(tmp_path)!r}))
import jax_nano
assert jax_nano.info().thread_limit == 1
"""
    run_python(program + CROWDED, env={"NPROC": "4"}, timeout=300)
