"""What a test asks about a compiled program, and a way to run Python in a fresh process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_METADATA = re.compile(r",? *metadata=\{[^}]*\}")
_OPCODE = re.compile(r"= (?:\([^)]*\)|\S+) ([a-z][a-z0-9-]*)\(")


def ops(fun: Callable[..., Any], *args: Any) -> Counter[str]:
    """How often each HLO operation occurs in the program that XLA compiles for fun(*args).

    Our calls count as "product", "linear", "attention" and "quantized", other custom calls as "custom-call".
    """
    fun = fun if hasattr(fun, "lower") else jax.jit(fun)
    text = _METADATA.sub("", fun.lower(*args).compile().as_text())
    found = Counter(_OPCODE.findall(text))
    targets = {
        "product": "jax_nano_dot_general",
        "linear": "jax_nano_linear",
        "attention": "jax_nano_attention",
        "quantized": "jax_nano_quantized",
    }
    ours = Counter({name: text.count(f'custom_call_target="{target}"') for name, target in targets.items()})
    return found + ours - Counter({"custom-call": ours.total()})


def dots_of(text: str) -> int:
    """How many products XLA computes in a compiled program, those inside of fusions included."""
    return len(re.findall(r" dot\(", _METADATA.sub("", text)))


def outcome(fun: Callable[..., Any], *args: Any) -> tuple[Any, tuple[type, str] | None]:
    """(result, None), or (None, the error's type and text without what names the function)."""
    try:
        return fun(*args), None
    except Exception as error:
        return None, (type(error), re.sub(r" at 0x[0-9a-f]+", "", str(error)).replace("jax_nano", "jax"))


COPIES = ("transpose", "copy", "broadcast", "gather", "reverse")


def copies(counted: Counter[str]) -> list[str]:
    """The operations among them that could move an operand or a result."""
    return [name for name in COPIES if counted[name]]


def run_python(code: str, *args: str, env: dict[str, str] | None = None, timeout: float = 120) -> str:
    """Run code in a fresh process, outside of the source tree; its output. AssertionError if it fails."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *args],
        env=fresh_environment(env),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def fresh_environment(env: dict[str, str] | None = None, *, modules: Path | None = None) -> dict[str, str]:
    """The environment, without what earlier tests or the caller set for JAX, and with `env`.

    A process with it imports from the folder `modules` before all else. An empty entry of PYTHONPATH means the current
    folder, which holds the sources beside an installed package, so none is left in.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    entries = [str(modules or ""), *kept.pop("PYTHONPATH", "").split(os.pathsep)]
    if path := os.pathsep.join(x for x in entries if x):
        kept["PYTHONPATH"] = path
    return {**kept, "JAX_PLATFORMS": "cpu", **(env or {})}
