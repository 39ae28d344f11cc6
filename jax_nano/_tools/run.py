"""`python -m jax_nano run`: a program as `python` runs it, accelerated, and the report when it ends.

The program is accelerated by JAX_NANO_ACCELERATE, as any other: jax_nano must not be imported before the program
imports JAX, as the program may set JAX's environment variables first.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType


def run(program: Sequence[str]) -> int:
    """Runs `SCRIPT ARGUMENTS` or `-m MODULE ARGUMENTS`.

    Returns:
      The exit status.

    Raises:
      ValueError: no program is named.
      SystemExit, KeyboardInterrupt: as from the program.
    """
    as_module = list(program[:1]) == ["-m"]
    program = program[1:] if as_module else program
    if not program:
        raise ValueError("run: expected a script, or -m and a module")
    os.environ["JAX_NANO_ACCELERATE"] = "1"
    atexit.register(_print_report)  # first, and so called last
    sys.argv[:] = program
    first = Path.cwd() if as_module else Path(program[0]).resolve().parent
    # Without the current folder on the path, sys.path[0] is not ours to replace.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(first)]
    try:
        if as_module:
            runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    except Exception as error:
        error.__traceback__ = _of_program(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _of_program(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames that started the program."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename in (
        __file__,
        runpy.__file__,
        "<frozen runpy>",
    ):
        traceback = traceback.tb_next
    return traceback


def _print_report() -> None:
    if "jax" not in sys.modules:
        print("jax_nano: the program did not use JAX", file=sys.stderr)
        return
    from jax_nano._tools import report

    with suppress(OSError, ValueError):  # closed, by the program or by its reader
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        print(report.report(), file=sys.stderr, flush=True)
