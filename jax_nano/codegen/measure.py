"""What a K loop reaches on this machine: its time beside that of its products alone, with operands in L1.

The loop is taken from the object file instruction by instruction and runs between two lines of set-up: its pointers
at the start of a small buffer, its strides zero. The difference between many and half as many iterations leaves the
set-up out of the time. The products alone are a loop of nothing else, all operands in registers. Both run in turns,
for many short samples, and the best of each counts: neighbours on the same core only ever make a loop slower.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jax_nano._core.spec import FEATURES

from .inspect_asm import Loop
from .target import Target
from .toolchain import ToolchainError

_ROUNDS = 100
_SAMPLE_SECONDS = 3e-4
_ITERATIONS = 32  # of a loop whose constant strides walk through at most 16 KiB meanwhile: half of L1 and less
_BUFFER_BYTES = 64 << 10
_PEAK_COPIES = 8  # of a step's products in the loop that runs nothing else


def cpu_name() -> str:
    """This machine's CPU, as it calls itself."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else "unknown CPU"


def can_run(target: Target) -> bool:
    """Whether this machine has the instructions of a target whose loops can be measured.

    Those of tiles cannot: the configuration of the tiles is not in the loop.
    """
    needed = {FEATURES[x].linux or x for x in target.requires}
    flags = re.search(r"^flags\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return not target.tiles and flags is not None and needed <= set(flags[1].split())


def share_of_peak(loop: Loop, steps: int, products: str) -> float:
    """The measured share of the products' own rate that a K loop reaches.

    Args:
      loop: it, from the object of a kernel whose target this machine ``can_run``.
      steps: the K steps in its body.
      products: the products of one step as assembly, operands in registers.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(_assembled(_loop_function(loop) + _peak_function(products), Path(folder))))
        library.jax_nano_loop.argtypes = [ctypes.c_int64] * 2
        library.jax_nano_peak.argtypes = [ctypes.c_int64]
        timed = [
            *(_Timed(partial(library.jax_nano_loop, n)) for n in (_ITERATIONS, _ITERATIONS // 2)),
            _Timed(library.jax_nano_peak),
        ]
        samples = [[t.seconds() for t in timed] for _ in range(_ROUNDS)]
    long, short, peak = map(min, zip(*samples, strict=True))
    step = (long - short) / (_ITERATIONS - _ITERATIONS // 2) / steps
    return peak / _PEAK_COPIES / step


class _Timed:
    """Seconds of one call among so many that they take a while; ``call`` takes how many."""

    def __init__(self, call: Callable[[int], None]):
        self._call, self._times = call, 1
        while self._once() < _SAMPLE_SECONDS:
            self._times *= 2

    def _once(self) -> float:
        start = time.perf_counter()
        self._call(self._times)
        return time.perf_counter() - start

    def seconds(self) -> float:
        return self._once() / self._times


_KEPT = ("rbx", "rbp", "r12", "r13", "r14", "r15")  # registers that a function must give back as they were


def _loop_function(loop: Loop) -> str:
    """``jax_nano_loop(iterations, times)``: the loop's own instructions, from the same pointers each time."""
    *body, _ = loop.instructions
    counter = re.match(r"%(\w+)$", body[-1].operands)
    if body[-1].mnemonic != "incq" or counter is None:
        raise ToolchainError(f"{loop.function}: its K loop does not count up to zero in a register: {body[-1]}")
    # Every pointer moves from step to step; what never changes is a stride. Either may be written first in an address.
    changed = {hit[1] for i in body if (hit := re.search(r"(%r\w+)$", i.operands))}
    pointers = changed - {counter[0]}
    strides = set(re.findall(r"%r\w+", " ".join(i.operands for i in body))) - changed
    lines = [
        ".globl jax_nano_loop",
        "jax_nano_loop:",
        *(f"push %{r}" for r in _KEPT),
        "mov %rsi, times(%rip)",
        "neg %rdi",
        "mov %rdi, iterations(%rip)",
        "vzeroall",
        ".p2align 6",
        "2:",
        *(f"lea buffer(%rip), {r}" for r in sorted(pointers)),
        *(f"xor {r}, {r}" for r in sorted(strides)),
        f"mov iterations(%rip), %{counter[1]}",
        ".p2align 4",
        "1:",
        *(f"{i.mnemonic} {i.operands}" for i in body),
        "jne 1b",
        "decq times(%rip)",
        "jne 2b",
        "vzeroupper",
        *(f"pop %{r}" for r in reversed(_KEPT)),
        "ret",
        ".local times, iterations, buffer",
        ".comm times, 8, 8",
        ".comm iterations, 8, 8",
        f".comm buffer, {_BUFFER_BYTES}, 64",
    ]
    return "\n".join(lines) + "\n"


def _peak_function(products: str) -> str:
    """``jax_nano_peak(times)``: copies of a step's products."""
    head = ".globl jax_nano_peak\njax_nano_peak:\nvzeroall\n.p2align 6\n1:\n"
    return head + products * _PEAK_COPIES + "dec %rdi\njne 1b\nvzeroupper\nret\n"


def _assembled(text: str, folder: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        raise ToolchainError("measuring needs `cc` to assemble and link: install gcc or clang.")
    source, library = folder / "measured.s", folder / "measured.so"
    source.write_text(f'.text\n{text}.section .note.GNU-stack, "", @progbits\n')
    done = subprocess.run(
        [compiler, "-shared", "-o", str(library), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ToolchainError(f"{compiler} failed:\n{done.stderr[-4000:]}")
    return library


def _cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text()
