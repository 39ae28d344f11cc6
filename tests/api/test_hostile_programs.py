"""Exported programs that somebody has changed: an error that says what is wrong, or what the program says; no crash.

`hostile_programs` makes and runs them, in a process for each kind. JAX_NANO_HOSTILE_PROGRAMS says how many of each
(`make soak`).
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import hostile_programs
import pytest
from programs import fresh_environment

from jax_nano import _runtime
from jax_nano._core import custom_calls

if not _runtime.supports("float32", "float32", "float32"):
    pytest.skip("no float32 kernel runs on this CPU", allow_module_level=True)

TRIES = int(os.environ.get("JAX_NANO_HOSTILE_PROGRAMS", "25"))
BEGIN = int(os.environ.get("JAX_NANO_HOSTILE_SEED", "0"))

CHECKED_HEAP = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")
"""glibc's allocator that notices writes behind an array's end, when the array is freed."""


@pytest.mark.parametrize("kind", hostile_programs.KINDS)
def test_hostile_programs(kind: str) -> None:
    if kind.startswith("untyped") and not custom_calls.UNTYPED:
        pytest.skip("this jaxlib takes typed calls only")
    env = {}
    if CHECKED_HEAP.exists() and "LD_PRELOAD" not in os.environ:
        env |= {"LD_PRELOAD": str(CHECKED_HEAP), "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    environment = fresh_environment(env, modules=Path(__file__).parents[1])
    command = [sys.executable, "-P", "-m", "hostile_programs", kind, str(BEGIN), str(BEGIN + TRIES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(x) for x in done.stdout.splitlines()]
    assert done.returncode == 0, f"seed {lines[-1:]} of {kind!r} ended the process: {done.returncode}\n{done.stderr}"
    outcomes = [x for x in lines if "outcome" in x]
    assert [x["seed"] for x in outcomes] == [-1, *range(BEGIN, BEGIN + TRIES)]
    assert outcomes[0]["outcome"] == "right", outcomes[0]  # the program before it was changed
    for x in outcomes:
        assert x["outcome"] in ("right", "error"), f"seed {x['seed']}: {x['outcome']}: {x['text']}\n{x['program']}"
    counts = collections.Counter(x["outcome"] for x in outcomes[1:])
    assert counts["error"] > TRIES / 4
    assert len({x["program"] for x in outcomes}) > TRIES / 2
