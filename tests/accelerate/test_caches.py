"""Programs compiled with and without acceleration are never taken for each other, in a process or across processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from programs import run_python

# Compiles one program in a process with or without acceleration; prints what its product was and whether it was found
# in the cache.
PROGRAM = """
import sys
import jax, numpy as np, jax_nano
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
a = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) % 7
fun = jax.jit(lambda a: a @ a)
def look():
    hits.clear()
    compiled = fun.lower(a).compile()
    np.testing.assert_array_equal(compiled(a), a @ a)
    print("calls" if "jax_nano_dot_general" in compiled.as_text() else "dots", "hit" if hits else "miss")
for argument in sys.argv[2:]:
    with jax_nano.accelerate(argument == "on"):
        look()
"""


def run(folder: Path, *switches: str) -> list[str]:
    return run_python(PROGRAM, str(folder), *switches).splitlines()


def test_the_persistent_cache_across_processes(tmp_path: Path) -> None:
    assert run(tmp_path, "off") == ["dots miss"]
    assert run(tmp_path, "on") == ["calls miss"]
    assert run(tmp_path, "off") == ["dots hit"]
    assert run(tmp_path, "on") == ["calls hit"]


def test_the_persistent_cache_in_one_process(tmp_path: Path) -> None:
    found = run(tmp_path, "on", "off", "on", "off")
    assert found[:2] == ["calls miss", "dots miss"]
    assert [x.split()[0] for x in found[2:]] == ["calls", "dots"]  # from JAX's own memory


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"no executable",
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x40]) + data[len(data) // 2 + 1 :],
    ],
    ids=["other", "empty", "half", "a byte short", "a bit"],
)
def test_a_corrupted_cache(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    run(tmp_path, "on")
    entries = [x for x in tmp_path.iterdir() if x.name.endswith("-cache")]
    assert entries
    for entry in entries:
        entry.write_bytes(damage(entry.read_bytes()))
    program = PROGRAM.replace("import sys", "import sys, warnings; warnings.simplefilter('ignore')", 1)
    assert run_python(program, str(tmp_path), "on").splitlines() == ["calls miss"]


def test_entries_of_an_accelerated_program_for_another_target(tmp_path: Path) -> None:
    """As another machine that shares the folder would make."""
    run_python(PROGRAM, str(tmp_path), "on", env={"JAX_NANO_TARGET": "x86-64-v3"})
    assert run_python(PROGRAM, str(tmp_path), "on", env={"JAX_NANO_GATE": "off"}).splitlines() == ["calls miss"]


def test_in_process_caches() -> None:
    run_python(
        """
        import jax, jax.numpy as jnp, numpy as np, jax_nano
        from jax_nano._core import record

        a = np.arange(32 * 32, dtype=np.float32).reshape(32, 32) % 5
        fun = jax.jit(lambda a: a @ a)
        gradient = jax.jit(jax.grad(lambda a: fun(a).sum()))
        calls = []
        def count():
            fun(a), gradient(a), jnp.dot(a, a).block_until_ready()
            return sum(n for _, n in record.products())

        for _ in range(3):  # by Python, then by JAX's fast path
            assert count() == 0
        with jax_nano.accelerate():
            first = count()
            assert first > 0
            for _ in range(3):
                assert count() == first
        assert count() == first
        jax_nano.accelerate.enable()  # another thread's scope and the whole process share what was compiled
        assert count() == first
        jax_nano.accelerate.disable()
        assert count() == first
        lowered = fun.lower(a)
        jax_nano.accelerate.enable()
        assert "jax_nano" not in lowered.compile().as_text()  # it was lowered before
        """
    )


def test_threads_compile_at_the_same_time() -> None:
    run_python(
        """
        import threading
        import jax, jax.numpy as jnp, numpy as np, jax_nano

        a = np.arange(16 * 16, dtype=np.float32).reshape(16, 16) % 5
        start = threading.Barrier(6)
        wrong = []

        def work(on):
            try:
                start.wait()
                for i in range(8):
                    with jax_nano.accelerate(on):
                        fun = jax.jit(lambda a: jnp.sin(a @ a) + i)
                        text = fun.lower(a).compile().as_text()
                        np.testing.assert_allclose(fun(a), np.sin(a @ a) + i, rtol=1e-4, atol=1e-4)
                    if ("jax_nano_dot" in text) is not on:
                        wrong.append(on)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(6)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert not wrong, wrong
        """
    )


@pytest.mark.parametrize("kind", ["ValueError", "KeyError"])
def test_a_failure_leaves_the_program_alone_and_is_reported_once(kind: str) -> None:
    run_python(
        f"""
        import warnings
        import jax, numpy as np, jax_nano
        from jax_nano._programs import rewrite

        def fail(module, policy):
            raise {kind}("made by the test")
        rewrite.rewrite = fail
        a = np.ones((16, 16), np.float32)
        jax_nano.accelerate.enable()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i in range(3):
                np.testing.assert_array_equal(jax.jit(lambda a: a @ a + i)(a), a @ a + i)
        assert len(caught) == 1 and "made by the test" in str(caught[0].message), caught
        """
    )
