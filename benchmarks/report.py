"""What a run found: as JSON to keep, as Markdown to read."""

from __future__ import annotations

import dataclasses
import datetime
import gzip
import json
import pathlib
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.cases import Case
from benchmarks.peers import OUR_KERNELS, OURS, PEERS

_TRUST = 1.03  # nothing computes faster than the units' peak; past this the measurement is wrong


@dataclasses.dataclass(frozen=True)
class Row:
    """Samples of one peer on one case: seconds a product, one sample a round."""

    case: str
    group: str
    dtype: str
    flops: int
    bytes: int
    peer: str
    cores: int
    cache: str
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, case: Case, peer: str, cores: int, cache: str, seconds: Iterable[float]) -> Row:
        return cls(case.key, case.group, case.dtype, case.flops, case.bytes, peer, cores, cache, tuple(seconds))

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    @property
    def gflops(self) -> float:
        return self.flops / self.median / 1e9

    def times_faster_than(self, other: Row) -> float:
        """The median over the rounds, in each of which the two ran seconds apart."""
        rounds = zip(self.seconds, other.seconds, strict=False)
        return statistics.median(theirs / ours for ours, theirs in rounds)


@dataclasses.dataclass(frozen=True)
class Group:
    """Everyone who computed one case in one setting."""

    rows: dict[str, Row]

    @property
    def ours(self) -> Row | None:
        return self.rows.get(OURS)

    @property
    def any(self) -> Row:
        return next(iter(self.rows.values()))

    @property
    def best_peer(self) -> Row | None:
        peers = [row for name, row in self.rows.items() if PEERS[name].is_rival]
        return min(peers, key=lambda row: row.median, default=None)

    @property
    def best_library(self) -> Row | None:
        """The best of those that are called from C, as our kernels are."""
        peers = [row for name, row in self.rows.items() if PEERS[name].is_rival and PEERS[name].is_called_from_c]
        return min(peers, key=lambda row: row.median, default=None)

    @property
    def kernels_to_best_library(self) -> float | None:
        ours, best = self.rows.get(OUR_KERNELS), self.best_library
        return ours.times_faster_than(best) if ours and best else None

    def share_of(self, roof: str) -> float | None:
        """How much of a limit of the machine we reach."""
        if self.ours is None or roof not in self.rows:
            return None
        return self.ours.times_faster_than(self.rows[roof])

    def ratio_to(self, peer: str) -> float | None:
        if self.ours is None or peer not in self.rows:
            return None
        return self.ours.times_faster_than(self.rows[peer])


@dataclasses.dataclass(frozen=True)
class Section:
    """A table of something measured in addition to the products' times."""

    title: str
    note: str  # what the numbers are of, in a sentence or two
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        return f"## {self.title}\n\n{self.note}\n\n{table(self.header, self.rows)}"


@dataclasses.dataclass
class Results:
    """One run."""

    machine: dict[str, Any]
    started: str
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)
    skipped: list[dict[str, object]] = dataclasses.field(default_factory=list)
    sections: list[Section] = dataclasses.field(default_factory=list)

    @classmethod
    def begin(cls, machine: dict[str, Any]) -> Results:
        return cls(machine, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def has(self, case: str, cache: str) -> bool:
        """Whether the case was measured."""
        return any((row.case, row.cache) == (case, cache) for row in self.rows)

    def skip(self, case: str, peer: str, cores: int, why: str) -> None:
        entry = {"case": case, "peer": peer, "cores": cores, "why": why}
        if entry not in self.skipped:
            self.skipped.append(entry)

    @property
    def wrong(self) -> list[dict[str, object]]:
        """Where a peer computed something else than the product."""
        return [entry for entry in self.skipped if "WRONG RESULT" in str(entry["why"])]

    def settings(self) -> list[tuple[int, str]]:
        """The (cores, cache) that were measured, in order."""
        return list(dict.fromkeys((row.cores, row.cache) for row in self.rows))

    def groups(self, cores: int, cache: str) -> Iterator[Group]:
        """The cases of one setting, in the order of the run."""
        cases: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            if (row.cores, row.cache) == (cores, cache):
                cases.setdefault(row.case, {})[row.peer] = row
        yield from (Group(rows) for rows in cases.values())

    def save(self, path: pathlib.Path) -> None:
        """Replaces the file atomically: a run that is stopped between two cases leaves a complete one.

        A name that ends with .gz is compressed, the same bytes for the same results.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".part")
        data = (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()
        written.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
        written.replace(path)

    @classmethod
    def load(cls, path: pathlib.Path) -> Results:
        stored = path.read_bytes()
        data = json.loads(gzip.decompress(stored) if path.suffix == ".gz" else stored)
        rows = [Row(**row | {"seconds": tuple(row["seconds"])}) for row in data.pop("rows")]
        sections = [
            Section(part["title"], part["note"], tuple(part["header"]), tuple(map(tuple, part["rows"])))
            for part in data.pop("sections", ())
        ]
        return cls(**data, rows=rows, sections=sections)


def markdown(results: Results) -> str:
    """The whole report."""
    parts = [_head(results)]
    for cores, cache in results.settings():
        groups = list(results.groups(cores, cache))
        plural = "core" if cores == 1 else "cores"
        parts.append(f"## {cores} {plural}, caches {cache}\n")
        parts.append(_table(results, groups))
        parts.append(_summary(groups))
        parts.append(_dtypes(groups))
    parts.append(_scaling(results))
    parts += [_growth(results, cores) for cores, cache in results.settings() if cache == "warm"]
    parts += [section.markdown() for section in results.sections]
    parts.append(_skipped(results))
    return "\n".join(part for part in parts if part)


def _head(results: Results) -> str:
    machine = results.machine
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in machine["caches"].items())
    where = (machine["cpu"], f"{machine['cpus']} CPUs", caches, machine["system"], f"Python {machine['python']}")
    load = f"load average before the run {machine['load']}"
    lines = [
        "# jax_nano and its peers\n",
        f"{results.started}, {', '.join((*where, load))}.\n",
        "Peers ran in turn, one at a time, round after round; numbers are medians over the rounds, ± half the",
        "distance between the quartiles. The result of every peer was checked, every element, before it was",
        "timed. A ratio is how many times faster jax_nano is; peak and bandwidth were measured in the same",
        "rounds, bandwidth on a working set of the same size (an operand in a cache can beat memory). Columns of",
        "`kernels` are the same plans and kernels from a loop in C++, as the libraries are called: the rest of",
        "jax_nano's time is XLA's loop and call.\n",
        table(
            ("peer", "what", "version"),
            [(name, PEERS[name].what, version) for name, version in results.versions.items()],
        ),
    ]
    return "\n".join(lines)


def _table(results: Results, groups: Sequence[Group]) -> str:
    present = {name for group in groups for name in group.rows}
    peers = [name for name in PEERS if name in present and PEERS[name].is_rival]
    in_c = OUR_KERNELS in present
    header = ("product", "GFLOP/s", "±", "of peak", "of bandwidth", *peers, "best peer", "vs best")
    header += ("kernels GFLOP/s", "best library", "kernels vs it") * in_c
    body = []
    for group in groups:
        ours, best = group.ours, group.best_peer
        body.append(
            (
                group.any.case,
                f"{ours.gflops:.1f}{_doubt(group)}" if ours else "-",
                f"{ours.spread:.0%}" if ours else "-",
                percent(group.share_of("peak")),
                percent(group.share_of("bandwidth")),
                *(ratio(group.ratio_to(peer)) for peer in peers),
                f"{best.peer} {best.gflops:.1f}" if best else "-",
                ratio(group.ratio_to(best.peer) if best else None),
                *_in_c(group) * in_c,
            )
        )
    doubted = any(_doubt(group) for group in groups)
    return table(header, body) + ("\n(!) above the measured peak: not to be trusted.\n" if doubted else "")


def _in_c(group: Group) -> tuple[str, ...]:
    kernels, library = group.rows.get(OUR_KERNELS), group.best_library
    return (
        f"{kernels.gflops:.1f}" if kernels else "-",
        f"{library.peer} {library.gflops:.1f}" if library else "-",
        ratio(group.kernels_to_best_library),
    )


def _doubt(group: Group) -> str:
    share = group.share_of("peak")
    return " (!)" if share is not None and share > _TRUST else ""


def _summary(groups: Sequence[Group]) -> str:
    to_best = [r for g in groups if g.best_peer and (r := g.ratio_to(g.best_peer.peer)) is not None]
    to_jnp = [r for g in groups if (r := g.ratio_to("jnp")) is not None]
    if not to_best:
        return ""
    text = (
        f"Geometric mean {statistics.geometric_mean(to_best):.2f} of the best peer; at least 1.00 of it on "
        f"{sum(r >= 1 for r in to_best)} of {len(to_best)} products, lowest {min(to_best):.2f}."
    )
    in_c = [r for g in groups if (r := g.kernels_to_best_library) is not None]
    if in_c:
        text += (
            f" Called from C as the libraries are: {statistics.geometric_mean(in_c):.2f} of the best of them, at least "
            f"1.00 on {sum(r >= 1 for r in in_c)} of {len(in_c)}, lowest {min(in_c):.2f}."
        )
    if to_jnp:
        text += f" Geometric mean {statistics.geometric_mean(to_jnp):.2f} of jnp, lowest {min(to_jnp):.2f}."
    return text + "\n"


def _dtypes(groups: Sequence[Group]) -> str:
    """Each dtype's rate over our own f32 rate for the same product, where both were measured."""
    f32 = {_product(group): group.ours for group in groups if group.any.dtype == "f32" and group.ours}
    body = [
        (group.any.case, f"{group.ours.gflops / single.gflops:.2f}", ratio(group.ratio_to("jnp")))
        for group in groups
        if group.ours and group.any.dtype != "f32" and (single := f32.get(_product(group)))
    ]
    if not body:
        return ""
    return "Rates beside jax_nano's own f32, and times faster than jnp in the same dtype:\n\n" + table(
        ("product", "of our f32", "of jnp"), body
    )


def _product(group: Group) -> str:
    """A case's name without its dtype."""
    return group.any.case.removesuffix(group.any.dtype)


def _scaling(results: Results) -> str:
    settings = results.settings()
    most = max((cores for cores, _ in settings), default=1)
    body = []
    for cache in dict.fromkeys(cache for _, cache in settings):
        if (1, cache) not in settings or (most, cache) not in settings or most == 1:
            continue
        one = {group.any.case: group for group in results.groups(1, cache)}
        for group in results.groups(most, cache):
            single = one.get(group.any.case)
            if single is None:
                continue
            ratios = [
                ratio(group.rows[name].times_faster_than(single.rows[name]))
                if name in group.rows and name in single.rows
                else "-"
                for name in (OURS, "jnp")
            ]
            long = single.ours is not None and single.ours.median > 100e-6
            body.append((group.any.case, cache, "yes" if long else "no", *ratios))
    if not body:
        return ""
    header = ("product", "caches", "over 100 µs", OURS, "jnp")
    return f"## {most} cores over one\n\n" + table(header, body)


def _growth(results: Results, cores: int) -> str:
    """How rates go with the size of a square, so that a cliff at a power of two would show."""
    squares = {}
    for group in results.groups(cores, "warm"):
        if (size := _square_size(group)) and group.ours:
            squares[size] = group
    sizes = sorted(size for size in squares if size >= _GROWTH_FROM)
    if not any(size & (size - 1) and (size - 1) & (size - 2) == 0 for size in sizes):  # a neighbour of a power of two
        return ""
    body = []
    for before, size, after in zip([0, *sizes], sizes, [*sizes[1:], 0], strict=False):
        near = [squares[other] for other in (before, after) if other]
        row = [f"{size}x{size}x{size}"]
        for peer in (OURS, "jnp"):
            rate, *others = (
                group.rows[peer].gflops if peer in group.rows else None for group in (squares[size], *near)
            )
            best = max((other for other in others if other), default=None)
            row += [f"{rate:.1f}" if rate else "-", ratio(rate / best if rate and best else None)]
        body.append(row)
    header = ("product", OURS, "over the better neighbour", "jnp", "over the better neighbour")
    return f"## Growth with size, {cores} core{'s' * (cores > 1)}, GFLOP/s\n\n" + table(header, body)


_GROWTH_FROM = 128  # smaller ones change with every step of a tile


def _square_size(group: Group) -> int:
    """n for a row-major float32 product nxnxn, else 0."""
    match = re.fullmatch(r"(\d+)x\1x\1 f32", group.any.case)
    return int(match[1]) if match else 0


def _skipped(results: Results) -> str:
    if not results.skipped:
        return ""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in results.skipped:
        where = f"{entry['peer'] or 'all'}" + (f", {entry['cores']} core(s)" if entry["cores"] else "")
        reasons.setdefault((where, str(entry["why"])), []).append(str(entry["case"] or "everything"))
    body = [
        (who, why, ", ".join(cases[:4]) + (f" and {len(cases) - 4} more" if len(cases) > 4 else ""))
        for (who, why), cases in reasons.items()
    ]
    return "## Left out\n\n" + table(("who", "why", "where"), body)


def percent(value: float | None) -> str:
    """A share, as a table has it."""
    return "-" if value is None else f"{value:.0%}"


def ratio(value: float | None) -> str:
    """A ratio, as a table has it."""
    return "-" if value is None else f"{value:.2f}"


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source is aligned as well."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *body)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines) + "\n"
