"""What the documents say of the comparison with peers: tables and pictures, from one run that is kept.

`python -m benchmarks publish RUN.json` keeps a run in benchmarks/data and writes both again; without a run it writes
them from the one that is kept. A table stands between two marks in its document, and a picture names the data that it
was drawn from: tests compare.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import statistics
from collections.abc import Callable, Sequence

from benchmarks import ROOT, report
from benchmarks.cases import KINDS, Case, select
from benchmarks.peers import PEERS
from benchmarks.report import Group, Results, table

DATA = ROOT / "benchmarks" / "data" / "peers-zen3.json.gz"
PICTURES = ROOT / "docs" / "images"
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"

WORST = 0.95
"""Products below this share of the best peer are listed."""

_DIGITS = 4  # of a sample that is kept: a thousandth is less than samples differ by
_SQUARES = (256, 384, 512, 768, 1024, 1536, 2048)

Ratio = Callable[[Group], float | None]


def keep(results: Results) -> None:
    """Puts a run where the documents take it from."""
    rows = [
        dataclasses.replace(row, seconds=tuple(float(f"{x:.{_DIGITS}g}") for x in row.seconds)) for row in results.rows
    ]
    dataclasses.replace(results, rows=rows, sections=[]).save(DATA)


def digest() -> str:
    """Of the data that is kept: what pictures name."""
    return hashlib.sha256(DATA.read_bytes()).hexdigest()


def documents() -> dict[pathlib.Path, str]:
    """Each document as the data would have it."""
    results = Results.load(DATA)
    return {
        README: _placed(README.read_text(), "peers", _summary(results)),
        PERFORMANCE: _placed(PERFORMANCE.read_text(), "peers", _details(results)),
    }


def pictures() -> tuple[pathlib.Path, ...]:
    """Ratios by kind of product, and the roofline."""
    return PICTURES / "peers-kinds.png", PICTURES / "peers-roofline.png"


def write() -> list[pathlib.Path]:
    """Writes documents and pictures again; returns their paths."""
    from benchmarks import plots

    for path, text in documents().items():
        path.write_text(text)
    results = Results.load(DATA)
    kinds, roofline = pictures()
    plots.draw_kinds(
        [(label, by_kind(results, cores, ratio)) for label, cores, ratio in _columns(results)], kinds, digest()
    )
    plots.draw_roofline(list(results.groups(1, "warm")), "1 core, caches warm", roofline, digest())
    return [*documents(), *pictures()]


# --- numbers ------------------------------------------------------------------------------------


def in_jit(group: Group) -> float | None:
    """How many times faster than the best peer, each called as its users call it."""
    return group.ratio_to(group.best_peer.peer) if group.best_peer else None


def from_c(group: Group) -> float | None:
    """The same for the kernels called from C, and libraries that are."""
    return group.kernels_to_best_library


def by_kind(results: Results, cores: int, ratio: Ratio) -> dict[str, list[float]]:
    """Ratios of each kind of product; kinds of which there is none are left out."""
    cases = _cases(results)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for group in results.groups(cores, "warm"):
        if (value := ratio(group)) is not None:
            found[cases[group.any.case].kind].append(value)
    return {kind: values for kind, values in found.items() if values}


def _columns(results: Results) -> list[tuple[str, int, Ratio]]:
    """What is compared: a label, the cores, and the ratio."""
    cores = [cores for cores, cache in results.settings() if cache == "warm"]
    return [
        (f"{what}, {count} core{'s' * (count > 1)}", count, ratio)
        for what, ratio in (("inside `jit`", in_jit), ("from C", from_c))
        for count in cores
    ]


def _cases(results: Results) -> dict[str, Case]:
    dtypes = dict.fromkeys(row.dtype for row in results.rows)
    return {case.key: case for case in select("full", dtypes=dtypes)}


# --- text ---------------------------------------------------------------------------------------


def _placed(text: str, name: str, content: str) -> str:
    """The document with other content between its marks."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, found, rest = text.partition(start)
    _, ended, tail = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"no marks {start.strip()} and {end}")
    return f"{head}{start}\n{content.strip()}\n\n{end}{tail}"


def _where(results: Results) -> str:
    machine = results.machine
    return f"{results.started[:10]}, {machine['cpu']}, {machine['cpus']} CPUs"


def _versions(results: Results) -> str:
    shown = [(name, version) for name, version in results.versions.items() if PEERS[name].is_rival and version]
    return ", ".join(f"{name} {_short(name, version)}" for name, version in shown)


def _short(name: str, version: str) -> str:
    """OpenBLAS tells its build options as well, and its name."""
    return " ".join(version.split()[1:2]) if name == "openblas" else f"({version})" if " " in version else version


def _summary(results: Results) -> str:
    measured, listed = len({row.case for row in results.rows}), len(select("full", dtypes=["f32"]))
    some = f"all {listed}" if measured == listed else f"{measured} of the {listed}"
    head = (
        f"Measured: {some} float32 products, caches warm ({_where(results)}). Times as fast as the best peer of each"
        " product: the geometric mean, and in parentheses the least and how many products were at least as fast. Peers:"
        f" {_versions(results)}."
    )
    return f"{_wrapped(head)}\n\n{_kinds(results)}\n{_squares(results)}"


def _kinds(results: Results) -> str:
    columns = [(label, by_kind(results, cores, ratio)) for label, cores, ratio in _columns(results)]
    body = [
        (kind, *(_cell(found.get(kind, ())) for _, found in columns))
        for kind in KINDS
        if any(kind in found for _, found in columns)
    ]
    body.append(("all", *(_cell([x for values in found.values() for x in values]) for _, found in columns)))
    return table(("product", *(label for label, _ in columns)), body)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    ahead = sum(value >= 1 for value in values)
    return f"{statistics.geometric_mean(values):.2f} ({min(values):.2f}, {ahead} of {len(values)})"


def _squares(results: Results) -> str:
    settings = [cores for cores, cache in results.settings() if cache == "warm"]
    groups = {(cores, group.any.case): group for cores in settings for group in results.groups(cores, "warm")}
    header = ["product"]
    for cores in settings:
        label = f"{cores} core{'s' * (cores > 1)}"
        header += [f"{label}, GFLOP/s", "of measured peak", "over jnp", "over the best peer"]
    body = []
    for size in _SQUARES:
        cells = [f"{size}^3"]
        for cores in settings:
            group = groups.get((cores, f"{size}x{size}x{size} f32"))
            if group is None or group.ours is None or group.best_peer is None:
                break
            cells += [
                f"{group.ours.gflops:.0f}",
                report.percent(group.share_of("peak")),
                report.ratio(group.ratio_to("jnp")),
                f"{report.ratio(in_jit(group))} ({group.best_peer.peer})",
            ]
        else:
            body.append(cells)
    return table(header, body) if body else ""


def _details(results: Results) -> str:
    parts = [_wrapped(f"Products below {WORST} of the best peer in one of four ways ({_where(results)}), by kind:")]
    columns = _columns(results)
    found: dict[str, dict[str, tuple[float, str]]] = {}  # by product and column
    for label, cores, ratio in columns:
        for group in results.groups(cores, "warm"):
            best = group.best_peer if ratio is in_jit else group.best_library
            if (value := ratio(group)) is not None and best is not None:
                found.setdefault(group.any.case, {})[label] = value, best.peer
    cases = _cases(results)
    behind = [name for name, cells in found.items() if min(value for value, _ in cells.values()) < WORST]
    behind.sort(key=lambda name: (KINDS.index(cases[name].kind), min(value for value, _ in found[name].values())))
    body = []
    for name in behind:
        cells = (found[name].get(label) for label, _, _ in columns)
        body.append((cases[name].kind, cases[name].name, *(f"{x[0]:.2f} ({x[1]})" if x else "-" for x in cells)))
    parts.append(table(("kind", "product", *(label for label, _, _ in columns)), body) if body else "None.")
    return "\n\n".join(parts)


def _wrapped(text: str, width: int = 120) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))
