"""From MLIR to an object file with LLVM's own tools, one stage after the other, each of which can be dumped."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .target import Target

LLVM_VERSION = 22
DEBIAN_PACKAGES = (f"mlir-{LLVM_VERSION}-tools", f"llvm-{LLVM_VERSION}")
_TOOLS = ("mlir-opt", "mlir-translate", "opt", "llc", "llvm-mca", "llvm-objdump")

STAGES = ("mlir", "llvm-dialect", "llvm-ir", "optimized", "asm", "mca")
"""What ``Toolchain.stage`` can give, in the order of the pipeline."""

LOWERING = (
    "--convert-vector-to-llvm",
    "--convert-scf-to-cf",
    "--convert-to-llvm",
    "--reconcile-unrealized-casts",
)

# K loops carry as many independent sums as the tile holds already; unrolled by LLVM they run no faster and the smaller
# ones reload strides from the stack. What is to be a vector is one already.
OPT_FLAGS = (
    "-O3",
    "-disable-loop-unrolling",
    "-vectorize-loops=false",
    "-vectorize-slp=false",
    "-mtriple=x86_64-unknown-linux-gnu",
)

# Loop strength reduction undoes the microkernel's addressing: it derives all row pointers from one in a chain of
# additions, 61 instructions instead of 53 in the 14x32 loop, which a 4-wide core (Skylake-X) has no room for. The
# machine combiner takes vpdpwssd apart into a product and an addition, for a latency that the tile hides anyway.
LLC_FLAGS = ("-O3", "-disable-lsr", "-x86-machine-combiner=false", "-relocation-model=pic")


class ToolchainError(RuntimeError):
    """A tool is missing or failed; the message is for the person who builds."""


@dataclass(frozen=True, eq=False)
class Toolchain:
    """Paths of LLVM's tools by their plain names."""

    paths: dict[str, str]

    @classmethod
    def find(cls) -> Toolchain:
        """The tools of LLVM 22 on PATH, or ToolchainError with the sentence that says what to install."""
        paths = {}
        for tool in _TOOLS:
            path = shutil.which(f"{tool}-{LLVM_VERSION}") or _plain(tool)
            if path is None:
                raise ToolchainError(
                    f"jax_nano's kernels are generated with LLVM {LLVM_VERSION}, but {tool}-{LLVM_VERSION} was not "
                    f"found: install the Debian packages {' and '.join(DEBIAN_PACKAGES)}."
                )
            paths[tool] = path
        return cls(paths)

    def _run(self, tool: str, args: Sequence[str], text: str) -> str:
        return self._piped(tool, args, text.encode()).decode()

    def _piped(self, tool: str, args: Sequence[str], given: bytes) -> bytes:
        done = subprocess.run([self.paths[tool], *args], input=given, capture_output=True, check=False)
        if done.returncode:
            raise ToolchainError(f"{tool} {' '.join(args)} failed:\n{done.stderr.decode(errors='replace')[-4000:]}")
        return done.stdout

    @staticmethod
    def _machine(target: Target, cpu: str | None = None) -> list[str]:
        return [f"-mcpu={cpu or target.mcpu}", *(["-mattr=" + ",".join(target.features)] if target.features else [])]

    def llvm_dialect(self, mlir: str) -> str:
        return self._run("mlir-opt", LOWERING, mlir)

    def llvm_ir(self, mlir: str) -> str:
        return self._run("mlir-translate", ["--mlir-to-llvmir"], self.llvm_dialect(mlir))

    def optimized(self, llvm_ir: str, target: Target) -> str:
        return self._run("opt", ["-S", *OPT_FLAGS, *self._machine(target)], llvm_ir)

    def asm(self, optimized: str, target: Target, flags: Sequence[str] = LLC_FLAGS) -> str:
        return self._run("llc", [*flags, *self._machine(target)], optimized)

    def object_file(self, optimized: str, target: Target, path: Path, flags: Sequence[str] = LLC_FLAGS) -> None:
        self._run("llc", [*flags, *self._machine(target), "-filetype=obj", "-o", str(path)], optimized)

    def compile(self, mlir: str, target: Target, path: Path, flags: Sequence[str] = LLC_FLAGS) -> None:
        """The object file of a module, byte for byte that of the stages one after the other, in a tenth less time.

        Nothing is printed between the tools, and MLIR is verified when it is read, not again after each pass.
        """
        machine = self._machine(target)
        dialect = self._piped("mlir-opt", [*LOWERING, "--verify-each=0", "--emit-bytecode"], mlir.encode())
        llvm_ir = self._piped("mlir-translate", ["--mlir-to-llvmir"], dialect)
        optimized = self._piped("opt", [*OPT_FLAGS, *machine], llvm_ir)
        self._piped("llc", [*flags, *machine, "-filetype=obj", "-o", str(path)], optimized)

    def disassemble(self, path: Path) -> str:
        return self._run("llvm-objdump", ["-d", "--no-show-raw-insn", str(path)], "")

    def host_cpu(self) -> str:
        """LLVM's name for this machine's CPU."""
        found = re.search(r"Host CPU: (\S+)", self._run("llc", ["--version"], ""))
        return found[1] if found else ""

    def mca(self, asm: str, cpu: str) -> str:
        """llvm-mca's report for a piece of straight-line assembly."""
        return self._run("llvm-mca", ["-mtriple=x86_64-unknown-linux-gnu", f"-mcpu={cpu}", "-iterations=200"], asm)


def _plain(tool: str) -> str | None:
    """An unversioned tool, if it is of the right version."""
    path = shutil.which(tool)
    if path is None:
        return None
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return path if re.search(rf"version {LLVM_VERSION}\.", version) else None
