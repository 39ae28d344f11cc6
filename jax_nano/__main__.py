"""``python -m jax_nano``: what runs on this machine, how a product would be computed, and programs accelerated."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Final

from jax_nano._core import machine
from jax_nano._tools import explain as _explain
from jax_nano._tools import run as _run

_ENVIRONMENT: Final = ("JAX_NANO_", "JAX_", "XLA_FLAGS", "NPROC", "PJRT_NPROC", "PYTHONPATH")
_PACKAGES: Final = ("jax_nano", "jax", "jaxlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["run"] and argv[1:2] not in (["-h"], ["--help"]):  # the rest is the program's
            return _run.run(argv[1:])
        try:
            args = _parser().parse_args(argv)
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="this machine, the targets, and which one serves what, and why")
    info.set_defaults(command=_info)

    explain = commands.add_parser("explain", help="the plan of a product: kernel, packing, blocking, threads, cost")
    explain.set_defaults(command=_explain_product)
    explain.add_argument(
        "sizes", nargs="+", metavar="SIZES", help="MxNxK, e.g. 4x4096x1024; or the two operands: 4x1024 1024x4096"
    )
    explain.add_argument(
        "--dtype", default="f32", help="of the operands, or LHSxRHS, and -RESULT: bf16, bf16-f32, f32xbf16, i8xu8-i32"
    )
    explain.add_argument("--layout", default="NN", choices=_explain.LAYOUTS, help="T: the operand is stored transposed")
    explain.add_argument("--batch", metavar="SIZES", help="batch dimensions in front, e.g. 64 or 8x12")
    explain.add_argument("--algorithm", default="default", metavar="PRESET", help="a lax.DotAlgorithmPreset")
    explain.add_argument("--threads", type=int, default=machine.threads(), help="(default: all, here %(default)s)")
    explain.add_argument("--target", help="as on a CPU that has this target")

    tune = commands.add_parser(
        "tune", help="measure this CPU for about a minute, for faster plans with the same results"
    )
    tune.set_defaults(command=_tune)
    tune.add_argument("--seconds", type=float, default=60, help="how long it measures (default: 60)")
    tune.add_argument(
        "--dtype", nargs="+", default=[], metavar="DTYPE", help="kernels of these, such as f32 bf16 f64 i8"
    )
    tune.add_argument("--output", type=Path, metavar="FILE", help="keep it here (default: in your cache folder)")
    tune.add_argument("--show", action="store_true", help="tell where it is kept, and measure nothing")

    run = commands.add_parser("run", help="a Python program with its products on kernels, and a report at its end")
    run.add_argument("program", nargs=argparse.REMAINDER, metavar="SCRIPT | -m MODULE, ARGUMENTS", help="as for python")
    return parser


def _runtime() -> Any:
    """The extension module, or ImportError with a remedy; None on a platform without kernels."""
    from jax_nano._core import native

    return native.runtime()


# --- explain ------------------------------------------------------------------------------------


def _explain_product(runtime: Any, args: argparse.Namespace) -> int:
    from jax_nano._dispatch import decision

    if runtime is None:
        raise ValueError("this platform has no kernels; XLA computes every product")
    if args.threads < 1:
        raise ValueError(f"--threads {args.threads}: expected at least 1")
    asked = _explain.request(args.sizes, args.dtype, args.layout, args.batch)
    machine = decision.this_machine()
    if args.target:
        machine = machine._replace(target=args.target)
    text = _explain.explain(
        runtime,
        asked,
        threads=args.threads,
        algorithm=args.algorithm,
        target=args.target,
        decided=_explain.decided(asked, args.algorithm, machine, decision.policy),
    )
    print(text)
    return 0


# --- tune ---------------------------------------------------------------------------------------


def _tune(runtime: Any, args: argparse.Namespace) -> int:
    if runtime is None:
        raise ValueError("this platform has no kernels; XLA computes every product")
    from jax_nano._tools import tune

    return tune.tune(runtime, seconds=args.seconds, dtypes=args.dtype, output=args.output, show=args.show)


# --- info ---------------------------------------------------------------------------------------


def _info(runtime: Any, args: argparse.Namespace) -> int:
    del args
    error = None
    sections = [("machine", _machine_lines(runtime))]
    if runtime is None:
        sections.append(("targets", ["none: this platform has no kernels, XLA computes every product"]))
    else:
        sections.append(("targets", _target_lines(runtime)))
        try:
            sections.append(("signatures", _signature_lines(runtime)))
        except ValueError as wrong:  # JAX_NANO_TARGET
            error = wrong
    sections.append(("versions", _version_lines()))
    sections.append(("environment", _environment_lines()))
    for title, lines in sections:
        print(title, *(f"  {line}" for line in lines), "", sep="\n")
    if error is not None:
        raise error
    return 0


def _machine_lines(runtime: Any) -> list[str]:
    lines = [
        f"CPU     {machine.cpu_name()}",
        f"cores   {machine.cores()} that this process may use",
        f"threads {machine.threads()} in XLA's pool, or one for each device if there are more",
    ]
    if runtime is not None:
        caches = runtime.caches()
        names = (("L1", "l1d"), ("L2", "l2"), ("L3", "l3"))
        lines.append("caches  " + ", ".join(f"{level} {_explain.size(caches[key])}" for level, key in names))
        lines.append("has     " + " ".join(runtime.features()))
    return lines


def _target_lines(runtime: Any) -> list[str]:
    kernels = runtime.kernels()
    rows = []
    for target in runtime.targets():
        count = sum(kernel["target"] == target["name"] for kernel in kernels)
        usable = "usable" if not target["why"] else "not usable: " + target["why"]
        rows.append((target["name"], f"{count} kernels", usable))
    return _table([("target, best first", "in this build", "here"), *rows])


def _signature_lines(runtime: Any) -> list[str]:
    """A row for each signature that some kernel of the build has; ValueError if JAX_NANO_TARGET is wrong."""
    if not runtime.selected_target():
        return ["none: this CPU has none of the targets, XLA computes every product"]
    by_name = {kernel["name"]: kernel for kernel in runtime.kernels()}
    rows = []
    for lhs, rhs, out, algorithm in dict.fromkeys(
        (kernel["lhs"], kernel["rhs"], kernel["out"], kernel["algorithm"]) for kernel in by_name.values()
    ):
        named = "" if algorithm == "default" else f" ({algorithm})"
        signature = f"{lhs} x {rhs} -> {out}{named}"
        try:
            labels = (0, 1), (1, 2), (0, 2)
            plan = runtime.plan((64, 64), (64, 64), *labels, lhs, rhs, out, 1, algorithm=algorithm)
        except ValueError:
            rows.append((signature, "XLA", "no usable target has a kernel for it"))
            continue
        kernel = by_name[plan["kernel"]]
        passed = [f"{name}: {why}" for name, why in _explain.passed_over(runtime, kernel)]
        rows.append((signature, kernel["target"], "; ".join(passed) or "none has a kernel for it"))
    return _table([("signature", "served by", "better ones, and why not"), *rows])


def _version_lines() -> list[str]:
    from importlib import metadata

    lines = []
    for name in _PACKAGES:
        try:
            lines.append(f"{name:9} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name:9} not installed as a package")
    return [*lines, f"{'Python':9} {sys.version.split()[0]}"]


def _environment_lines() -> list[str]:
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)]
    return found or ["none of the variables that matter is set"]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


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
