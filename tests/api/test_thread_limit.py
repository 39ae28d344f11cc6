"""How many threads work for a call: `jax_nano.threads`, JAX_NANO_THREADS, containers' limits, threadpoolctl."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from programs import run_python

import jax_nano
from jax_nano._core import machine


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with jax_nano.threads(None):
        yield


def limit() -> int | None:
    return jax_nano.info().thread_limit


def test_a_setting_and_scopes() -> None:
    assert limit() is None
    jax_nano.threads(3)
    assert limit() == 3
    with jax_nano.threads(np.int64(1)):
        assert limit() == 1
        with jax_nano.threads(None):
            assert limit() is None
        assert limit() == 1
    assert limit() == 3
    with pytest.raises(KeyError), jax_nano.threads(2):
        raise KeyError
    assert limit() == 3


@pytest.mark.parametrize(("most", "error"), [(0, ValueError), (-2, ValueError), (1.5, TypeError), ("2", TypeError)])
def test_what_is_no_number_of_threads(most: Any, error: type[Exception]) -> None:
    jax_nano.threads(2)
    with pytest.raises(error):
        jax_nano.threads(most)
    assert limit() == 2


def test_the_limit_is_in_the_report() -> None:
    a = np.ones((512, 512), np.float32)
    jax_nano.clear_report()
    with jax_nano.threads(1):
        jax.jit(jax_nano.matmul).lower(a, a)
        assert re.search(r", 1 thread\b", str(jax_nano.report()))
        assert "one thread is asked for" in str(jax_nano.explain(a, a))


WORKED = """
import glob, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_enable_async_dispatch", False)  # so that the main thread runs programs
import jax_nano

def ticks():  # CPU time of each of the pool's threads
    found = {}
    for path in glob.glob("/proc/self/task/*/stat"):
        name, _, rest = open(path).read().partition(") ")
        if "XLAEigen" in name:
            fields = rest.split()
            found[path] = int(fields[11]) + int(fields[12])
    return found

def worked():
    a = np.ones((768, 768), np.float32)
    f = jax.jit(jax_nano.matmul)
    f(a, a)
    before = ticks()
    for _ in range(80):
        f(a, a).block_until_ready()
    after = ticks()
    return sum(after[x] - before.get(x, 0) for x in after)
"""


def test_threads_beyond_the_limit_do_not_work() -> None:
    printed = run_python(WORKED + "with jax_nano.threads(1): print(worked())\nprint(worked())", env={"NPROC": "3"})
    alone, together = map(int, printed.split())
    assert alone <= 2  # hundredths of a second
    assert together > alone


def test_the_environment() -> None:
    code = "import jax_nano; print(jax_nano.info().thread_limit)"
    assert run_python(code, env={"JAX_NANO_THREADS": "5"}).split()[-1] == "5"
    warns = "import warnings; warnings.simplefilter('error')\n"
    for value in ("0", "many", "-1", "2.5"):
        with pytest.raises(AssertionError, match=f"JAX_NANO_THREADS={value}: expected a number of threads"):
            run_python(warns + code, env={"JAX_NANO_THREADS": value})


def group(root: Path, version: int, path: str, **files: str) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    line = f"0::{path}\n" if version == 2 else f"4:cpu,cpuacct:{path}\n9:memory:/elsewhere\n"
    (root / "proc/self/cgroup").write_text(line)
    folder = root / "sys/fs/cgroup" / ("" if version == 2 else "cpu") / path.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("max 100000", None), ("100000 100000", 1), ("150000 100000", 2), ("5000 100000", 1), ("odd", None)],
)
def test_the_share_of_a_container(text: str, cpus: int | None, tmp_path: Path) -> None:
    group(tmp_path, 2, "/", **{"cpu.max": text})
    assert machine.quota(tmp_path) == cpus


def test_the_smallest_share_of_nested_groups_counts(tmp_path: Path) -> None:
    group(tmp_path, 2, "/a/b", **{"cpu.max": "400000 100000"})
    (tmp_path / "sys/fs/cgroup/a/cpu.max").write_text("300000 100000")
    assert machine.quota(tmp_path) == 3


def test_the_share_by_the_first_version_of_control_groups(tmp_path: Path) -> None:
    group(tmp_path, 1, "/docker/x", **{"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"})
    assert machine.quota(tmp_path) == 3
    (tmp_path / "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us").write_text("-1")
    assert machine.quota(tmp_path) is None


def test_no_control_groups(tmp_path: Path) -> None:
    assert machine.quota(tmp_path) is None


@pytest.mark.parametrize("first", ["threadpoolctl", "jax_nano"])
def test_threadpoolctl(first: str) -> None:
    pytest.importorskip("threadpoolctl")
    second = "jax_nano" if first == "threadpoolctl" else "threadpoolctl"
    printed = run_python(
        f"""
        import {first}, {second}, jax
        jax_nano.matmul(jax.numpy.ones((64, 64)), jax.numpy.ones((64, 64)))
        (found,) = [x for x in threadpoolctl.threadpool_info() if x["user_api"] == "jax_nano"]
        assert found["num_threads"] == 3 and "_runtime" in found["filepath"], found
        with threadpoolctl.threadpool_limits(1):
            print(jax_nano.info().thread_limit)
        with threadpoolctl.threadpool_limits(2, user_api="jax_nano"):
            print(jax_nano.info().thread_limit)
        print([x["num_threads"] for x in threadpoolctl.threadpool_info() if x["user_api"] == "jax_nano"])
        """,
        env={"NPROC": "3"},
    )
    assert printed.split() == ["1", "2", "[3]"]
