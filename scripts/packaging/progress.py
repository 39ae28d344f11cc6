"""Runs a build, keeps what it prints in a file, and shows how far it is: a line that is rewritten on a terminal, a few
lines elsewhere. A build that fails shows the end of its output.

Called as `python scripts/packaging/progress.py LOG COMMAND...`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

# What a line of output says about the phase of a build, and how much of it is done.
PHASES = (
    (re.compile(r"kernel (\d+)/(\d+): "), "composing kernels"),
    (re.compile(r"\[(\d+)/(\d+)\] "), "compiling the extension"),
    (re.compile(r"(?:Collecting|Downloading|Installing collected) "), "getting what the build needs"),
)
WIDTH = 30
LINES_OF_A_FAILURE = 60


def phase_of(line: str) -> tuple[str, int, int] | None:
    """(phase, steps done, steps in all), if a line of output tells it; 0 steps where they are not counted."""
    for pattern, name in PHASES:
        found = pattern.search(line)
        if found:
            done, total = (int(x) for x in found.groups()) if found.groups() else (0, 0)
            return name, done, total
    return None


def shown(phase: str, done: int, total: int, seconds: float) -> str:
    """One line about a phase."""
    if not total:
        return f"  {phase} ({seconds:.0f} s)"
    filled = WIDTH * done // total
    return f"  {phase:25} [{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{total} ({seconds:.0f} s)"


def main(log: Path, command: list[str]) -> int:
    """Runs the command; its exit status."""
    begin = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = sys.stdout.isatty()
    last: tuple[str, int] = ("", -1)
    lines: list[str] = []
    with (
        log.open("w") as kept,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        ) as running,
    ):
        assert running.stdout is not None
        for line in running.stdout:
            kept.write(line)
            lines = [*lines[1 - LINES_OF_A_FAILURE :], line]
            phase = phase_of(line)
            if phase is None:
                continue
            name, done, total = phase
            part = (name, 0 if not total else 100 * done // total if terminal else 4 * done // total)
            if part != last:
                last = part
                text = shown(name, done, total, time.monotonic() - begin)
                print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)
    if terminal:
        print("\r\x1b[K", end="")
    if running.returncode:
        print("".join(lines), end="")
        print(f"failed after {time.monotonic() - begin:.0f} s; all of its output is in {log}")
    else:
        print(f"  built in {time.monotonic() - begin:.0f} s")
    return running.returncode


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
