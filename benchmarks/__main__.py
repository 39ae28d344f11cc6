"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from benchmarks import ROOT, machine
from benchmarks.cases import DTYPES, SUITES, Case, matmul, select
from benchmarks.peers import PEERS
from benchmarks.report import Results, Section

if TYPE_CHECKING:
    from benchmarks.accelerated import Row

# Measured beside the products, each by a module of its name with a function `report`.
_BESIDE = {
    "overheads": "calls, tracing, compilation and import, beside jnp's",
    "callers": "two threads that multiply at once, beside one",
    "footprint": "memory beyond the operands, first calls, size on disk",
    "gate": "tiny products, ours beside XLA's: where the decline gate belongs",
    "compile": "compile time of programs with 0, 1 and 100 products, accelerated and not",
}
_IN_A_RUN = ("overheads", "callers", "footprint")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the process's exit status."""
    args = _parser().parse_args(argv)
    return args.command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="jax_nano beside its peers")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="measure; write JSON, a Markdown table and plots")
    run.set_defaults(command=_run)
    run.add_argument("--suite", choices=SUITES, default="full", help="which products (default: full)")
    run.add_argument("--quick", action="store_true", help="the suite `quick`, warm, in under three minutes")
    run.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="products whose name has a TEXT")
    run.add_argument("--group", nargs="+", default=[], help="products of these groups, e.g. attention")
    run.add_argument("--dtype", nargs="+", default=[], choices=DTYPES, help="in these dtypes")
    run.add_argument("--peers", nargs="+", default=[], choices=PEERS, help="these peers (default: all)")
    run.add_argument("--cores", nargs="+", default=["1", "all"], metavar="N", help="(default: 1 all)")
    run.add_argument("--cache", nargs="+", choices=("warm", "cold"), help="(default: both)")
    run.add_argument("--rounds", type=int, default=9, help="samples of each peer (default: 9)")
    run.add_argument("--sample-ms", type=float, default=40, help="length of a sample (default: 40)")
    run.add_argument("--case-seconds", type=float, default=60, help="fewer rounds past this (default: 60)")
    run.add_argument(
        "--also", nargs="*", choices=_IN_A_RUN, help="measured after the products (default: all in the suite full)"
    )
    run.add_argument("--out", type=pathlib.Path, default=ROOT / "results", help="(default: results/)")
    run.add_argument("--resume", type=pathlib.Path, metavar="JSON", help="go on with a run that was stopped")
    run.add_argument("--pause-while", type=pathlib.Path, metavar="FILE", help="do nothing while this file exists")
    run.add_argument("--prepare-while", type=pathlib.Path, metavar="FILE", help="while it exists, measure nothing")

    compare = commands.add_parser("compare", help="what became slower between two runs; exit status 1 if any")
    compare.set_defaults(command=_compare)
    compare.add_argument("old", type=pathlib.Path)
    compare.add_argument("new", type=pathlib.Path)
    compare.add_argument("--threshold", type=float, default=0.05, help="(default: 0.05)")

    publish = commands.add_parser("publish", help="write the documents' comparison with peers again")
    publish.set_defaults(command=_publish)
    publish.add_argument("json", type=pathlib.Path, nargs="?", help="from this run, which is kept in benchmarks/data")

    report = commands.add_parser("report", help="write the table and plots of a JSON file again")
    report.set_defaults(command=_report)
    report.add_argument("json", type=pathlib.Path)

    for name, what in _BESIDE.items():
        beside = commands.add_parser(name, help=what)
        beside.set_defaults(command=_measure_beside, name=name)
        beside.add_argument("--quick", action="store_true", help="few repetitions: proves that it works")

    models = _program_parser(commands, "models", "steps of whole models, accelerated, beside plain XLA")
    models.set_defaults(command=_models)

    programs = _program_parser(commands, "programs", "small programs as users write them, beside plain XLA")
    programs.set_defaults(command=_programs)
    programs.add_argument("--cores", nargs="+", default=["1", "all"], metavar="N", help="(default: 1 all)")
    programs.add_argument(
        "--busy", nargs="+", choices=("no", "yes"), default=["no", "yes"], help="beside a busy process (default: both)"
    )

    linear = commands.add_parser("linear", help="layers with an epilogue, beside a product and XLA's operations")
    linear.set_defaults(command=_linear)
    linear.add_argument("--quick", action="store_true", help="few repetitions: proves that it works")

    regret = commands.add_parser("regret", help="how much slower the planner's plans are than the best candidates")
    regret.set_defaults(command=_regret)
    regret.add_argument("--shapes", nargs="+", default=[], metavar="MxNxK", help="these products")
    regret.add_argument("--suite", choices=SUITES, help="and those of this suite")
    regret.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="of the suite, whose name has a TEXT")
    regret.add_argument("--random", type=int, default=0, metavar="N", help="and N random ones in each dtype")
    regret.add_argument("--dtype", nargs="+", default=["f32"], choices=DTYPES, help="(default: f32)")
    regret.add_argument("--layout", nargs="+", default=["NN"], choices=("NN", "NT", "TN", "TT"), help="of --shapes")
    regret.add_argument("--cores", nargs="+", default=["1"], metavar="N", help="(default: 1)")
    regret.add_argument("--most-mflop", type=float, default=300, help="of a random product (default: 300)")
    regret.add_argument("--most", type=int, default=0, metavar="N", help="time N candidates drawn at random, not all")
    regret.add_argument("--cold", action="store_true", help="operands from memory instead of from a cache")
    regret.add_argument("--rounds", type=int, default=9, help="samples of candidates near the best (default: 9)")
    regret.add_argument("--sample-ms", type=float, default=2, help="length of a sample (default: 2)")
    regret.add_argument("--out", type=pathlib.Path, help="keep the times in this JSON file")
    regret.add_argument("--of", type=pathlib.Path, metavar="JSON", help="tell the regret of an earlier measurement")
    engines = commands.add_parser(
        "engines", help="kernels and XLA beside each other, and how good the choice between them"
    )
    engines.set_defaults(command=_engines)
    engines.add_argument("--dtype", nargs="+", default=["f32"], choices=DTYPES, help="(default: f32)")
    engines.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="products whose name has a TEXT")
    engines.add_argument("--out", type=pathlib.Path, metavar="JSON", help="keep the times in this file")
    engines.add_argument(
        "--of", nargs="+", type=pathlib.Path, metavar="JSON", help="of earlier times, by version of JAX"
    )
    engines.add_argument("--profile", type=pathlib.Path, metavar="JSON", help="write XLA's costs, fitted to them")
    fit = commands.add_parser("fit", help="the costs of a CPU's profile, from times that `regret` kept")
    fit.set_defaults(command=_fit)
    fit.add_argument("--profile", type=pathlib.Path, required=True, metavar="JSON", help="in jax_nano/profiles")
    fit.add_argument("--of", type=pathlib.Path, nargs="+", required=True, metavar="JSON", help="the times")
    floor = commands.add_parser("floor", help="ten products and five models, against what was recorded")
    floor.set_defaults(command=_floor)
    floor.add_argument("--save", type=pathlib.Path, metavar="JSON", help="keep the ratios in this file")
    floor.add_argument("--against", type=pathlib.Path, metavar="JSON", help="compare; exit status 1 if one was lost")
    floor.add_argument("--quick", action="store_true", help="few repetitions: proves that it works")
    quantized = commands.add_parser("quantized", help="layers with weights of 8 and 4 bits, beside reading their bytes")
    quantized.set_defaults(command=_quantized)
    quantized.add_argument("--quick", action="store_true", help="few repetitions: proves that it works")
    decode = commands.add_parser("decode", help="a whole model that decodes, by the bits of its weights")
    decode.set_defaults(command=_decode)
    decode.add_argument("--quick", action="store_true", help="a tiny model, few repetitions: proves that it works")
    attention = commands.add_parser("attention", help="attention in one pass, beside jax.nn's and PyTorch's")
    attention.set_defaults(command=_attention)
    attention.add_argument("--quick", action="store_true", help="few repetitions: proves that it works")

    shapes = commands.add_parser("list", help="list the products of a suite")
    shapes.set_defaults(command=_list)
    shapes.add_argument("--suite", choices=SUITES, default="full")
    return parser


def _program_parser(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    """A command that measures whole programs, accelerated and not."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what)
    parser.set_defaults(name=name)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repetitions: proves that it works")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="those whose name has a TEXT")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each (default: 9)")
    parser.add_argument("--merge", nargs="+", type=pathlib.Path, metavar="JSON", help="one table of earlier runs")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results", help="(default: results/)")
    return parser


def _cores(texts: Sequence[str]) -> tuple[int, ...] | None:
    """Numbers of cores, each once; None if this process may not use as many."""
    available = len(machine.cpus())
    cores = [available if text == "all" else int(text) for text in texts]
    return tuple(dict.fromkeys(cores)) if all(1 <= count <= available for count in cores) else None


def _no_such_cores() -> int:
    return _complain(f"--cores: this process may use 1 to {len(machine.cpus())}")


def _run(args: argparse.Namespace) -> int:
    from benchmarks import measure

    cores = _cores(args.cores)
    if cores is None:
        return _no_such_cores()
    suite = "quick" if args.quick else args.suite
    cases = select(suite, args.only, args.dtype, args.group)
    if not cases:
        return _complain(f"no product of the suite {suite!r} is called that; see: python -m benchmarks list")

    plan = measure.Plan(
        cases=tuple(cases),
        peers=measure.default_peers(args.peers),
        cores=cores,
        caches=tuple(args.cache or (["warm"] if args.quick else ["warm", "cold"])),
        rounds=min(args.rounds, 5) if args.quick else args.rounds,
        sample_seconds=min(args.sample_ms, 10) / 1e3 if args.quick else args.sample_ms / 1e3,
        case_seconds=args.case_seconds,
        pause_while=args.pause_while,
        prepare_while=args.prepare_while,
    )
    results = Results.load(args.resume) if args.resume else Results.begin(machine.describe())
    stamp = results.started.replace(":", "").partition("+")[0]
    path = args.resume or args.out / f"{stamp}-{suite}.json"
    also = args.also if args.also is not None else _IN_A_RUN if suite == "full" else ()
    with _stoppable() as stopped:
        measure.run(plan, results, keep=lambda so_far: so_far.save(path))
        for name in tqdm(also, disable=not also, unit="part"):
            results.sections.append(_beside(name, quick=args.quick))
            results.save(path)
    if stopped:
        return _complain(f"stopped; to go on: --resume {path}, to see what there is: report {path}")
    _write_report(path)
    for entry in results.wrong:
        print(f"{entry['peer']}: {entry['why']}", file=sys.stderr)
    return 1 if any(entry["peer"] == "jax_nano" for entry in results.wrong) else 0


@contextlib.contextmanager
def _stoppable() -> Iterator[list[str]]:
    """Ctrl-C and SIGTERM end the body; then the list that it gives is not empty."""
    stopped: list[str] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield stopped
    except KeyboardInterrupt:
        stopped.append("interrupted")
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(args: argparse.Namespace) -> int:
    _write_report(args.json)
    return 0


def _publish(args: argparse.Namespace) -> int:
    from benchmarks import publish

    if args.json:
        publish.keep(Results.load(args.json))
    print("written:", *(_relative(item) for item in publish.write()), sep="\n  ")
    return 0


def _write_report(path: pathlib.Path) -> None:
    from benchmarks import plots, report

    results = Results.load(path)
    text = report.markdown(results)
    table = path.with_suffix(".md")
    table.write_text(text)
    print(text)
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    pictures = plots.save(results, folder)
    print("written:", *(_relative(item) for item in (path, table, *pictures)), sep="\n  ")


def _relative(path: pathlib.Path) -> pathlib.Path:
    path = path.resolve()
    here = pathlib.Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _compare(args: argparse.Namespace) -> int:
    from benchmarks import compare

    old, new = Results.load(args.old), Results.load(args.new)
    text, slower = compare.regressions(old, new, args.threshold)
    print(text)
    return 1 if slower else 0


def _measure_beside(args: argparse.Namespace) -> int:
    print(f"{machine.describe()['cpu']}\n\n{_beside(args.name, quick=args.quick).markdown()}")
    return 0


def _beside(name: str, *, quick: bool) -> Section:
    section: Section = importlib.import_module(f"benchmarks.{name}").report(quick=quick)
    return section


def _models(args: argparse.Namespace) -> int:
    from benchmarks import models

    rounds = 2 if args.quick else args.rounds
    rows = models.run(args.only, rounds=rounds, quick=args.quick)
    return _measure_programs(args, rows, models.markdown, "no model is called that; see examples/zoo")


def _programs(args: argparse.Namespace) -> int:
    from benchmarks import suite

    cores = _cores(args.cores)
    if cores is None:
        return _no_such_cores()
    settings = [suite.Setting(count, busy == "yes") for count in cores for busy in dict.fromkeys(args.busy)]
    rows = suite.run(args.only, settings, rounds=2 if args.quick else args.rounds, quick=args.quick)
    return _measure_programs(args, rows, suite.markdown, "no program is called that; see benchmarks/programs")


def _measure_programs(
    args: argparse.Namespace, measured: Iterator[Row], markdown: Callable[[list[Row]], str], none: str
) -> int:
    """Keeps rows as they are measured, and writes a table of them; or one of earlier rows."""
    from benchmarks import accelerated

    if args.merge:
        print(markdown(accelerated.load(args.merge)))
        return 0
    path = args.out / f"{time.strftime('%Y-%m-%dT%H%M%S')}-{args.name}.json"
    rows = []
    for row in measured:
        rows.append(row)
        accelerated.save(rows, path)  # kept, whatever becomes of the rest
    if not rows:
        return _complain(none)
    text = markdown(rows)
    path.with_suffix(".md").write_text(text)
    print(text)
    print("written:", *(_relative(item) for item in (path, path.with_suffix(".md"))), sep="\n  ")
    return 0


def _linear(args: argparse.Namespace) -> int:
    from benchmarks import epilogues

    print(epilogues.report(quick=args.quick))
    return 0


def _product(shape: str, dtype: str, layout: str) -> Case:
    m, n, k = map(int, shape.split("x"))
    return matmul(m, n, k, dtype, layout=layout)


def _regret(args: argparse.Namespace) -> int:
    from benchmarks import regret
    from jax_nano._tools.timing import Settings

    if args.of:
        print(regret.Summary.of(regret.load(args.of)))
        return 0
    cores = _cores(args.cores)
    if cores is None:
        return _no_such_cores()
    cases = [_product(shape, dtype, layout) for dtype in args.dtype for layout in args.layout for shape in args.shapes]
    if args.suite:
        cases += select(args.suite, args.only, args.dtype)
    for dtype in args.dtype:
        cases += regret.random_cases(args.random, dtype, args.most_mflop * 1e6)
    if not cases:
        return _complain("no products: name some with --shapes, --suite or --random")
    cold_bytes = 3 * machine.last_level_cache() if args.cold else 0
    seconds = args.sample_ms / 1e3
    settings = [Settings(count, args.rounds, seconds, args.most, cold_bytes=cold_bytes) for count in cores]
    rows = []
    with _stoppable():
        for row in regret.measure(cases, settings):
            rows.append(row)
            if args.out:
                regret.save(rows, args.out)
    if rows:
        print(regret.Summary.of(rows))
    return 0


def _engines(args: argparse.Namespace) -> int:
    from benchmarks import engines

    if args.of:
        print(engines.told(args.of, args.profile))
        return 0
    rows = []
    with _stoppable():
        for row in engines.measure(args.dtype, only=args.only):
            rows.append(row)
            if args.out:
                engines.save(rows, args.out)
    if not rows:
        return _complain("no product is called that")
    print(engines.summary(rows))
    return 0


def _fit(args: argparse.Namespace) -> int:
    from benchmarks import fit, regret

    print(fit.profile(args.profile, [row for path in args.of for row in regret.load(path)]))
    return 0


def _floor(args: argparse.Namespace) -> int:
    from benchmarks import floor

    return floor.run(args)


def _quantized(args: argparse.Namespace) -> int:
    from benchmarks import quantized

    print(quantized.report(quick=args.quick))
    return 0


def _decode(args: argparse.Namespace) -> int:
    from benchmarks import decoding

    print(decoding.report(quick=args.quick))
    return 0


def _attention(args: argparse.Namespace) -> int:
    from benchmarks import attention

    print(attention.report(quick=args.quick))
    return 0


def _list(args: argparse.Namespace) -> int:
    for case in select(args.suite):
        print(f"{case.group:22} {case.key:40} {case.flops / 1e9:10.4f} GFLOP {case.bytes / 2**20:9.2f} MiB")
    return 0


def _complain(message: str) -> int:
    print(f"python -m benchmarks: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
