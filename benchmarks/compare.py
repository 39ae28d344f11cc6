"""What became slower between two runs."""

from __future__ import annotations

from benchmarks.report import Group, Results, Row, table


def regressions(old: Results, new: Results, threshold: float) -> tuple[str, int]:
    """A table of what changed by more than `threshold`, and how many products became slower.

    Times are compared as shares of the peak that was measured along with them, so that a machine that is
    slower today (or another one of its kind) does not look like a regression. A change counts when
    it is larger than the threshold and than the spread of both runs.
    """
    body, slower, common = [], 0, 0
    for setting in old.settings():
        before = {group.any.case: group for group in old.groups(*setting)}
        for group in new.groups(*setting):
            if group.any.case not in before:
                continue
            change = _change(before[group.any.case], group)
            if change is None:
                continue
            common += 1
            ratio, noise = change
            if abs(ratio - 1) <= max(threshold, noise):
                continue
            slower += ratio < 1
            cores, cache = setting
            verdict = "SLOWER" if ratio < 1 else "faster"
            body.append((group.any.case, str(cores), cache, f"{ratio:.2f}", f"{noise:.0%}", verdict))
    title = f"{common} products in both runs, {slower} slower and {len(body) - slower} faster than before\n"
    if not body:
        return title, slower
    return title + "\n" + table(("product", "cores", "caches", "new/old speed", "noise", ""), body), slower


def _change(old: Group, new: Group) -> tuple[float, float] | None:
    if old.ours is None or new.ours is None:
        return None
    ratio = _normal(old, old.ours) / _normal(new, new.ours)
    return ratio, old.ours.spread + new.ours.spread


def _normal(group: Group, row: Row) -> float:
    peak = group.rows.get("peak")
    return row.median / peak.median if peak else row.median
