"""Pictures of a run: for each setting the roofline and the ratio to the best peer; for documents, ratios by kind."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers import OURS
from benchmarks.report import Group, Results, Row

mpl.use("Agg")

_COLORS = {"f32": "#0072b2", "f64": "#d55e00", "bf16": "#009e73", "f16": "#cc79a7", "i8": "#e69f00"}

_CYCLE = ("#56b4e9", "#0072b2", "#f0b37e", "#d55e00")


def save(results: Results, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the pictures; returns their paths."""
    paths = []
    for cores, cache in results.settings():
        groups = [group for group in results.groups(cores, cache) if group.ours is not None]
        if not groups:
            continue
        name = f"{cores}-{'core' if cores == 1 else 'cores'}-{cache}"
        title = f"{cores} {'core' if cores == 1 else 'cores'}, caches {cache}"
        paths += [
            _write(_roofline(groups, title), folder / f"roofline-{name}.png"),
            _write(_ratios(groups, title), folder / f"ratios-{name}.png"),
        ]
    return paths


def draw_kinds(columns: Sequence[tuple[str, dict[str, list[float]]]], path: pathlib.Path, data: str) -> pathlib.Path:
    """Bars of geometric means of ratios by kind of product, a color for each column; `data` is named in the file."""
    kinds = list(dict.fromkeys(kind for _, found in columns for kind in found))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(kinds) * len(columns)))
    height = 0.8 / len(columns)
    for at, (label, found) in enumerate(columns):
        own = [kind for kind in kinds if kind in found]
        y = np.array([-kinds.index(kind) - (at + 0.5) * height + 0.4 for kind in own])
        means = np.array([statistics.geometric_mean(found[kind]) for kind in own])
        color = _CYCLE[at % len(_CYCLE)]
        axes.barh(y, means - 1, left=1, height=0.9 * height, color=color, label=label.replace("`", ""))
        ends = np.array([[min(found[kind]), max(found[kind])] for kind in own])
        axes.hlines(y, ends[:, 0], ends[:, 1], color="black", lw=0.8)
        for position, mean in zip(y, means, strict=True):
            axes.text(
                0.995,
                position,
                f"{mean:.2f} ",
                transform=axes.get_yaxis_transform(),
                fontsize=7,
                va="center",
                ha="right",
            )
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks([-at for at in range(len(kinds))], kinds, fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.set(xlabel="times as fast as the best peer: geometric mean; line: lowest and highest product")
    axes.grid(axis="x", which="both", alpha=0.2)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return _write(figure, path, data)


def draw_roofline(groups: Sequence[Group], title: str, path: pathlib.Path, data: str) -> pathlib.Path:
    """The roofline of one setting; `data` is named in the file."""
    return _write(_roofline([group for group in groups if group.ours], title), path, data)


def _write(figure: Figure, path: pathlib.Path, data: str = "") -> pathlib.Path:
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Description": data} if data else None)
    plt.close(figure)
    return path


def _roofline(groups: Sequence[Group], title: str) -> Figure:
    figure, axes = plt.subplots(figsize=(9, 6))
    intensities = [group.any.flops / group.any.bytes for group in groups]
    x = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
    bandwidth = _memory_bandwidth(groups)
    for dtype in dict.fromkeys(group.any.dtype for group in groups):
        own = [group for group in groups if group.any.dtype == dtype]
        color = _COLORS.get(dtype.partition("-")[0], "black")
        _scatter(axes, [g.ours for g in own if g.ours], color, "o", f"{OURS} {dtype}")
        _scatter(axes, [g.best_peer for g in own if g.best_peer], color, "x", f"best peer {dtype}")
        peaks = [group.rows["peak"].gflops for group in own if "peak" in group.rows]
        if peaks and bandwidth:
            peak = statistics.median(peaks)
            axes.plot(x, np.minimum(peak, x * bandwidth), color=color, lw=1)
            axes.text(x[-1], peak, f" {dtype} peak {peak:.0f}", color=color, va="center", fontsize=8)
    if bandwidth:
        axes.text(x[0], x[0] * bandwidth, f"reads {bandwidth:.0f} GB/s ", fontsize=8, va="bottom")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte of operands and result",
        ylabel="GFLOP/s",
        title=f"Measured roofline, {title} (above the slope: operands came from a cache)",
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=7, loc="lower right", ncols=2)
    return figure


def _memory_bandwidth(groups: Sequence[Group]) -> float | None:
    """GB/s of the largest working set in the run: that of memory, if it is larger than the caches."""
    rows = [group.rows["bandwidth"] for group in groups if "bandwidth" in group.rows]
    if not rows:
        return None
    largest = max(rows, key=lambda row: row.bytes)
    return largest.bytes / largest.median / 1e9


def _scatter(axes: Axes, rows: Sequence[Row], color: str, marker: str, label: str) -> None:
    x = [row.flops / row.bytes for row in rows]
    axes.scatter(x, [row.gflops for row in rows], c=color, marker=marker, s=22, alpha=0.75, label=label, lw=1)


def _ratios(groups: Sequence[Group], title: str) -> Figure:
    compared = [
        (group, best, ratio)
        for group in groups
        if (best := group.best_peer) is not None and (ratio := group.ratio_to(best.peer)) is not None
    ]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.19 * len(compared)))
    y = np.arange(len(compared))[::-1]
    values = [ratio for _, _, ratio in compared]
    colors = [_COLORS.get(group.any.dtype.partition("-")[0], "black") for group, _, _ in compared]
    axes.barh(y, np.array(values) - 1, left=1, color=colors, height=0.7)
    axes.axvline(1, color="black", lw=1)
    for position, (_, best, ratio) in zip(y, compared, strict=True):
        axes.text(max(ratio, 1), position, f" {ratio:.2f}  {best.peer}", va="center", fontsize=7)
    axes.set_yticks(y, [f"{group.any.group}: {group.any.case}" for group, _, _ in compared], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(min([*values, 0.9]) * 0.95, max([*values, 1.1]) * 1.5)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.set_ylim(-0.7, len(compared) - 0.3)
    axes.set(xlabel="times as fast as the best peer, which is named", title=title)
    axes.grid(axis="x", which="both", alpha=0.2)
    return figure
