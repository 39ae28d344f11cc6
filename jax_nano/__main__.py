"""``python -m jax_nano``: what runs on this machine, how a product would be computed, and programs accelerated."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from jax_nano._core import spec
from jax_nano._tools import asked
from jax_nano._tools import explain as _explain
from jax_nano._tools import run as _run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["run"] and argv[1:2] not in (["-h"], ["--help"]):  # the rest is the program's
            return _run.run(argv[1:])
        program: list[str] = []
        if argv[:1] == ["specialize"]:
            argv, program = _program_of(list(argv))
        try:
            args = _parser().parse_args(argv, argparse.Namespace(program=program))
            return int(args.command(_runtime(), args))
        finally:
            sys.stdout.flush()
    except (ImportError, ValueError) as error:
        print(f"python -m jax_nano: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jax_nano", description=__doc__)
    parser.add_argument("--version", action="version", version=f"jax_nano {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="this machine, the targets, and which one serves what, and why")
    info.set_defaults(command=_info)

    explain = commands.add_parser("explain", help="the plan of a product: kernel, packing, blocking, threads, cost")
    explain.set_defaults(command=_explain_product)
    explain.add_argument(
        "sizes", nargs="+", metavar="SIZES", help="MxNxK, e.g. 4x4096x1024; or the two operands: 4x1024 1024x4096"
    )
    explain.add_argument(
        "--dtype",
        default="float32",
        help="NumPy's names, of the operands, or LHSxRHS, and -RESULT: bfloat16, float32xbfloat16, int8xuint8-int32; or"
        " in short bf16, bf16-f32, i8",
    )
    explain.add_argument("--layout", default="NN", choices=_explain.LAYOUTS, help="T: the operand is stored transposed")
    explain.add_argument("--batch", metavar="SIZES", help="batch dimensions in front, e.g. 64 or 8x12")
    explain.add_argument("--algorithm", default="default", metavar="PRESET", help="a lax.DotAlgorithmPreset")
    explain.add_argument("--threads", type=int, help="(default: as many as work for a call here)")
    explain.add_argument("--target", help=f"as on a CPU that has this target: {', '.join(spec.TARGETS)}")

    tune = commands.add_parser(
        "tune", help="measure this CPU for about a minute, for faster plans with the same results"
    )
    tune.set_defaults(command=_tune)
    tune.add_argument("--seconds", type=float, default=60, help="how long it measures (default: 60)")
    tune.add_argument(
        "--dtype",
        nargs="+",
        default=[],
        metavar="DTYPE",
        help="kernels of these, such as float32 bfloat16 float64 int8",
    )
    tune.add_argument("--output", type=Path, metavar="FILE", help="keep it here (default: in your cache folder)")
    tune.add_argument("--show", action="store_true", help="tell where it is kept, and measure nothing")

    specialize = commands.add_parser(
        "specialize",
        help="kernels for the products of your programs, kept where they are faster, with the same results",
        epilog="A script's arguments follow it; options stand before it.",
    )
    specialize.set_defaults(command=_specialize)
    specialize.add_argument(
        "sizes",
        nargs="*",
        metavar="SIZES | SCRIPT | -m MODULE",
        help="MxNxK; or a program, which is run for its products",
    )
    asked.add_options(specialize)
    specialize.add_argument(
        "--shapes", type=Path, metavar="FILE", help="a product on each line, as on the command line"
    )
    specialize.add_argument(
        "--budget", type=float, metavar="SECONDS", help="how long it may take (default: 12 a product)"
    )
    specialize.add_argument("--out", type=Path, metavar="FOLDER", help="keep them here (default: in your cache folder)")
    specialize.add_argument(
        "--generator",
        metavar="PYTHON",
        help="a Python with jaxlib 0.10, which kernels are composed with (default: this)",
    )
    specialize.add_argument("--list", action="store_true", help="what is kept, and measure nothing")
    specialize.add_argument("--remove", action="store_true", help="remove what is kept, and measure nothing")

    run = commands.add_parser("run", help="a Python program with its products on kernels, and a report at its end")
    run.add_argument("program", nargs=argparse.REMAINDER, metavar="SCRIPT | -m MODULE, ARGUMENTS", help="as for python")
    return parser


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("jax_nano")
    except metadata.PackageNotFoundError:
        return "of a source folder"


def _runtime() -> Any:
    """The extension module, or ImportError with a remedy; None on a platform without kernels."""
    from jax_nano._core import native

    return native.runtime()


# --- explain ------------------------------------------------------------------------------------


def _explain_product(runtime: Any, args: argparse.Namespace) -> int:
    del runtime
    from jax_nano._tools import explanation

    asked = _explain.request(args.sizes, args.dtype, args.layout, args.batch)
    print(explanation.of_request(asked, threads=args.threads, algorithm=args.algorithm, target=args.target))
    return 0


# --- tune ---------------------------------------------------------------------------------------


def _tune(runtime: Any, args: argparse.Namespace) -> int:
    if runtime is None:
        raise ValueError("this platform has no kernels; XLA computes every product")
    from jax_nano._tools import tune

    short = {x.name: x.short for x in spec.DTYPES.values()}
    dtypes = [short.get(name, name) for name in args.dtype]
    return tune.tune(runtime, seconds=args.seconds, dtypes=dtypes, output=args.output, show=args.show)


# --- specialize ---------------------------------------------------------------------------------


def _program_of(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command line without the program at its end, and that program; none if sizes are named."""
    takes_value = {"--dtype", "--layout", "--batch", "--algorithm", "--epilogue", "--shapes", "--budget", "--out"}
    takes_value.add("--generator")
    at = 1
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "-m":
        at += 2 if argv[at] in takes_value else 1
    if at >= len(argv) or asked.is_sizes(argv[at]):
        return argv, []
    return argv[:at], argv[at:]


def _specialize(runtime: Any, args: argparse.Namespace) -> int:
    try:
        return _specialized(runtime, args)
    except OSError as error:  # a file or a folder that is named
        raise ValueError(str(error)) from error


def _specialized(runtime: Any, args: argparse.Namespace) -> int:
    if runtime is None:
        raise ValueError("this platform has no kernels; XLA computes every product")
    from jax_nano._tools import kept, specialize

    if args.list or args.remove:
        return kept.show(runtime, args.out, remove=args.remove)
    products = [asked.of_options(args.sizes, args)] if args.sizes else []
    products += asked.of_file(args.shapes) if args.shapes else []
    products += asked.of_program(args.program) if args.program else []
    if not products:
        raise ValueError("specialize: no product; name sizes, a script, or a file with --shapes")
    found = specialize.specialize(runtime, products, budget=args.budget, out=args.out, generator=args.generator)
    print(*found, sep="\n")
    return kept.tell(found, args.out)


# --- info ---------------------------------------------------------------------------------------


def _info(runtime: Any, args: argparse.Namespace) -> int:
    del runtime, args
    from jax_nano._tools import info

    found = info.info()
    print(found)
    if found.error is not None:
        raise ValueError(found.error)
    return 0


def _leave_the_source_tree() -> None:
    """Starts over without the current folder on the path, if that made Python find uncompiled sources.

    So that the command works in a checkout, where `python -m` prefers them to the installed package.
    """
    here = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != here.parent]
    installed = PathFinder.find_spec("jax_nano", elsewhere)
    if not list(here.glob("_runtime*.so")) and installed is not None and not sys.flags.safe_path:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "jax_nano", *sys.argv[1:]])


if __name__ == "__main__":
    _leave_the_source_tree()
    sys.exit(main())
