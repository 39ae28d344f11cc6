"""``python -m jax_nano.codegen``: lists, builds, dumps and reports on the generated kernels."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeAlias

from . import checks, emulate, manifest, report, specialized
from .cache import Cache
from .catalog import AttentionKernel, Kernel, attentions, find, kernels
from .quantized import checks as quantized_checks
from .quantized.kernel import QuantizedKernel
from .quantized.kernel import kernels as quantized_kernels
from .target import TARGETS
from .toolchain import LLC_FLAGS, STAGES, Toolchain, ToolchainError

_AnyKernel: TypeAlias = Kernel | AttentionKernel | QuantizedKernel


def build(out: Path, jobs: int, cached: Path | None = None) -> None:
    """Generates every kernel's object file into ``out``, checks its machine code and writes the manifest."""
    tools = Toolchain.find()
    out.mkdir(parents=True, exist_ok=True)
    cache = Cache(cached, tools)
    products, others, quantized = list(kernels()), list(attentions()), list(quantized_kernels())
    every: list[_AnyKernel] = [*quantized, *products, *others]
    progress = _Progress(len(every))
    with ThreadPoolExecutor(jobs) as pool:
        # The bindings' contexts stay in this thread; the tools run side by side.
        work: list[Future[Path]] = []
        for kernel in every:
            name = cache.composed(kernel)
            if name is None:
                work.append(pool.submit(_object, tools, cache, out, kernel, kernel.mlir()))
            else:
                work.append(pool.submit(_fetched, cache, out, kernel, name))
            work[-1].add_done_callback(progress)
        objects = [w.result() for w in work]
    cache.drop_the_unused()
    manifest.write(products, others, quantized, objects, out)
    print(f"{len(objects)} kernels in {out}")


class _Progress:
    """Prints a line for each kernel that is finished; `make` draws a bar from them."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._lock = threading.Lock()
        self._done = 0

    def __call__(self, finished: Future[Path]) -> None:
        if finished.exception() is None:
            with self._lock:
                self._done += 1
                print(f"kernel {self._done}/{self._total}: {finished.result().stem}", flush=True)


def _fetched(cache: Cache, out: Path, kernel: _AnyKernel, name: str) -> Path:
    """A kernel's object file in ``out``, from the cache, which has it."""
    path = out / f"{kernel.symbol}.o"
    if not cache.fetch(name, path):
        raise FileNotFoundError(f"{name}: removed from the cache while it was read")
    cache.remember(kernel, name)
    return path


def _object(tools: Toolchain, cache: Cache, out: Path, kernel: _AnyKernel, mlir: str) -> Path:
    """A kernel's checked object file in ``out``, compiled or from the cache."""
    path = out / f"{kernel.symbol}.o"
    name = cache.name(kernel, mlir)
    cache.remember(kernel, name)
    if cache.fetch(name, path):
        return path
    scratch = path.with_suffix(".part.o")
    flags = kernel.flags if isinstance(kernel, QuantizedKernel) else LLC_FLAGS
    tools.compile(mlir, kernel.target, scratch, flags)
    if isinstance(kernel, QuantizedKernel):
        quantized_checks.loops(kernel, tools.disassemble(scratch))
    else:
        checks.k_loops(kernel, tools.disassemble(scratch))
    scratch.replace(path)
    cache.keep(name, path)
    return path


def _report(jobs: int, cached: Path | None, *, markdown: bool) -> str:
    """The table of all kernels; with the build's cache nothing is compiled for it."""
    tools = Toolchain.find()
    cache = Cache(cached, tools)
    with tempfile.TemporaryDirectory() as folder:
        objects = partial(_object, tools, cache, Path(folder))
        return report.table(tools, objects, jobs, markdown=markdown)


def show(name: str, stage: str, function: str | None) -> str:
    """One kernel at one stage of the pipeline, as text."""
    known = {k.name: k for k in quantized_kernels()}
    kernel = known.get(name) or find(name)
    mlir = kernel.mlir()
    if stage == "mlir":
        return mlir
    tools = Toolchain.find()
    if stage == "llvm-dialect":
        return tools.llvm_dialect(mlir)
    llvm_ir = tools.llvm_ir(mlir)
    if stage == "llvm-ir":
        return llvm_ir
    optimized = tools.optimized(llvm_ir, kernel.target)
    if stage == "optimized":
        return optimized
    if stage == "asm":
        return tools.asm(optimized, kernel.target, kernel.flags if isinstance(kernel, QuantizedKernel) else LLC_FLAGS)
    if isinstance(kernel, QuantizedKernel):
        raise KeyError("mca reports are of plain kernels")
    return report.mca_text(kernel, tools, optimized, function)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_nano.codegen", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="targets, signatures and kernels")
    b = commands.add_parser("build", help="generate all object files and the manifest")
    b.add_argument("--out", type=Path, required=True)
    b.add_argument("--emulate", action="store_true", help="all kernels as one library for any x86-64-v3 CPU, for tests")
    d = commands.add_parser("dump", help="one kernel at one stage of the pipeline")
    d.add_argument("kernel", help="a name from `list`")
    d.add_argument("--stage", choices=STAGES, default="mlir")
    d.add_argument("--function", help="for mca: a microkernel, e.g. 6x16 (default: the full register tile)")
    r = commands.add_parser("report", help="inner loops, spills and share of the peak, from the machine code")
    r.add_argument("--markdown", action="store_true", help="as a Markdown table")
    c = commands.add_parser("compose", help="kernels for given products, from recipes on the standard input")
    c.add_argument("--out", type=Path, required=True)
    c.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    for command in (b, r):
        command.add_argument("--cache", type=Path, help="a folder that keeps objects from one build to the next")
        command.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    try:
        try:
            _run(parser.parse_args(argv))
        finally:
            sys.stdout.flush()
    except (ToolchainError, checks.SpillError, KeyError) as error:
        print(error.args[0], file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.command == "list":
        print("targets: " + ", ".join(TARGETS))
        listed: list[_AnyKernel] = [*kernels(), *attentions(), *quantized_kernels()]
        for kernel in listed:
            print(f"{kernel.name:48} {kernel.signature:28} {kernel.why}")
    elif args.command == "build":
        if args.emulate:
            emulate.build([*kernels(), *attentions()], args.out / "emulated.so", args.jobs)
        else:
            build(args.out, args.jobs, args.cache)
    elif args.command == "compose":
        specialized.compose(sys.stdin, args.out, args.jobs)
    elif args.command == "dump":
        print(show(args.kernel, args.stage, args.function))
    elif args.command == "report":
        print(_report(args.jobs, args.cache, markdown=args.markdown))


if __name__ == "__main__":
    raise SystemExit(main())
