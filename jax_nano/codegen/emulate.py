"""Emulation: kernels of any target for any x86-64-v3 CPU, so that tests run all of them on every machine.

A kernel's LLVM IR stays as it is, except that intrinsics which x86-64-v3 has no instruction for become calls of
reference functions (``emulate.c``, one function per instruction). LLVM splits wide vectors for the smaller machine.
What is tested that way is everything but the instruction selection: order of operations, packing, edges, masks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .catalog import AttentionKernel, Kernel
from .quantized.kernel import QuantizedKernel
from .target import TARGETS
from .toolchain import Toolchain, ToolchainError

BASELINE = TARGETS["x86-64-v3"]
"""What emulated kernels are compiled for."""

REFERENCES = {
    "llvm.x86.avx512bf16.dpbf16ps": "jax_nano_vdpbf16ps",
    "llvm.x86.avx512bf16.cvtneps2bf16": "jax_nano_vcvtneps2bf16",
    "llvm.x86.avx512bf16.cvtne2ps2bf16": "jax_nano_vcvtne2ps2bf16",
    "llvm.x86.avx512.pmaddw.d": "jax_nano_vpmaddwd",
    "llvm.x86.avx512.pshuf.b": "jax_nano_vpshufb",
    "llvm.x86.avx512.permvar.sf": "jax_nano_vpermps",
    "llvm.x86.avx512.permvar.hi": "jax_nano_vpermw",
    "llvm.x86.avx512.vpermi2var.hi": "jax_nano_vpermi2w",
    "llvm.x86.avx512.vpdpwssd": "jax_nano_vpdpwssd",
    "llvm.x86.avx512.vpdpbusd": "jax_nano_vpdpbusd",
    "llvm.x86.tilezero": "jax_nano_tilezero",
    "llvm.x86.tileloadd64": "jax_nano_tileloadd",
    "llvm.x86.tilestored64": "jax_nano_tilestored",
    "llvm.x86.tdpbf16ps": "jax_nano_tdpbf16ps",
    "llvm.x86.tdpbssd": "jax_nano_tdpbssd",
    "llvm.x86.tdpbsud": "jax_nano_tdpbsud",
    "llvm.x86.tdpbusd": "jax_nano_tdpbusd",
    "llvm.x86.tdpbuud": "jax_nano_tdpbuud",
}
"""Reference function for each intrinsic, the end of its name left out: a width, or ``internal``."""

NATIVE = frozenset({"llvm.x86.avx2.pmadd.wd", "llvm.x86.avx2.pshuf.b"})
"""Target intrinsics that the baseline has."""

# Spilled 512-bit vectors around every call keep llc's optimizers busy: they would take twice as long as all the rest.
_LLC_FLAGS = ("-O0", "-relocation-model=pic")
_TILE = "<256 x i32>"  # in the place of LLVM's x86_amx
_SOURCE = Path(__file__).with_suffix(".c")
_DECLARATION = re.compile(r"^declare (?P<result>.+?) @(?P<name>llvm\.x86\.[\w.]+)\((?P<params>.*?)\).*$", re.MULTILINE)


def rewrite(llvm_ir: str) -> str:
    """LLVM IR for the baseline: target intrinsics replaced by calls of reference functions.

    Raises:
      KeyError: an intrinsic has no reference.
    """
    references: dict[str, str] = {}

    def wrap(declared: re.Match[str]) -> str:
        name = declared["name"]
        if name in NATIVE:
            return declared[0]
        reference = REFERENCES.get(name.rpartition(".")[0])
        if reference is None:
            raise KeyError(f"{name}: no reference function in emulate.py stands for this intrinsic")
        text, declaration = _wrapper(f"emulated.{name}", declared["result"], declared["params"], reference)
        references[reference] = declaration
        return text

    # Types that the baseline lacks too; bf16 numbers are bits to all but the intrinsics that take them.
    text = re.sub(r"\bx86_amx\b", _TILE, re.sub(r"\bbfloat\b", "i16", llvm_ir))
    text = _DECLARATION.sub(wrap, text)
    text = re.sub(r"@(llvm\.x86\.[\w.]+)\(", lambda m: m[0] if m[1] in NATIVE else f"@emulated.{m[1]}(", text)
    return "\n".join([text, *references.values()]) + "\n"


def _wrapper(name: str, result: str, params: str, reference: str) -> tuple[str, str]:
    """A function in the place of an intrinsic, and the declaration of the reference that it calls."""
    types = re.findall(r"<[^>]*>|[^,\s]+", params)
    lines, passed = [], []
    if result != "void":
        lines.append(f"  %r = alloca {result}")
        passed.append("ptr %r")
    for i, t in enumerate(types):
        if t.startswith("<"):
            lines += [f"  %p{i} = alloca {t}", f"  store {t} %{i}, ptr %p{i}"]
        passed.append(f"ptr %p{i}" if t.startswith("<") else f"{t} %{i}")
    if result != _TILE and (lanes := re.match(r"<(\d+) x", result)):
        passed.append(f"i64 {lanes[1]}")
    lines.append(f"  call void @{reference}({', '.join(passed)})")
    lines += ["  ret void"] if result == "void" else [f"  %value = load {result}, ptr %r", f"  ret {result} %value"]
    head = f"define internal {result} @{name}({', '.join(types)}) noinline {{"
    declaration = f"declare void @{reference}({', '.join(p.split()[0] for p in passed)})"
    return "\n".join([head, *lines, "}"]), declaration


def build(kernels: Iterable[Kernel | AttentionKernel | QuantizedKernel], library: Path, jobs: int) -> None:
    """Compiles kernels for the baseline into one shared library; their functions keep names and ABI."""
    tools = Toolchain.find()
    compiler = shutil.which("cc")
    if compiler is None:
        raise ToolchainError("emulated kernels need a C compiler, but there is no `cc`: install gcc or clang.")
    folder = library.parent
    folder.mkdir(parents=True, exist_ok=True)

    def make(kernel: Kernel | AttentionKernel | QuantizedKernel, mlir: str) -> Path:
        path = folder / f"{kernel.symbol}.o"
        tools.object_file(tools.optimized(rewrite(tools.llvm_ir(mlir)), BASELINE), BASELINE, path, _LLC_FLAGS)
        return path

    with ThreadPoolExecutor(jobs) as pool:
        # The bindings' contexts stay in this thread; the tools run side by side.
        work = [pool.submit(make, kernel, kernel.mlir()) for kernel in kernels]
        objects = [w.result() for w in work]
    scratch = library.with_suffix(".part")
    flags = ["-shared", "-fPIC", "-Wl,--no-undefined", "-O2", f"-march={BASELINE.mcpu}"]
    command = [compiler, *flags, "-o", str(scratch), str(_SOURCE), *map(str, objects), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolchainError(f"{compiler} failed:\n{done.stderr[-4000:]}")
    scratch.replace(library)
    for path in objects:
        path.unlink()
