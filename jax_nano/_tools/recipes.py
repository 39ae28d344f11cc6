"""What is worth composing for a product: register tiles and blocks, with the planner's order of sums.

A recipe is what the generator takes (`jax_nano/codegen/specialized.py`), and becomes a kernel of a pack
(`_core/packs.py`). Path, kc and split-K are the planner's, so every recipe's kernel gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from jax_nano._core import spec

SIZES: Final = ("m", "n", "k", "rsa", "csa", "rsb", "csb", "rsc", "batch", "bsa", "bsb", "bsc")
SCHEDULE: Final = ("inner", "sweep", "prefetch", "pack_a", "pack_b", "mc", "kc", "nc", "tile_rows")

_MOST_VECTORS: Final = 8  # in a row of a tile
_LARGEST_SMALL: Final = 64  # of m, n and k, for kernels that are one function
_LATENCY: Final = 4  # cycles from a multiply-add to the next one into the same accumulator
_PACKED_B_BYTES: Final = 256 << 10  # of a block, which stays in L2
_WORSE: Final = 1.08  # tiles that are expected to take more than the best of all by this factor are left out

Recipe = dict[str, Any]


def why_not(plan: Mapping[str, Any]) -> str | None:
    """Why nothing is composed for a product; None if something may be."""
    if plan["empty"] or plan["k"] == 0:
        return "it has nothing to compute"
    if plan["transposed"] or plan["split_k"] > 1 or plan["k_outer"]:
        return "its sums are taken in several pieces, by one function for all sizes"
    if spec.TARGETS[plan["target"]].tiles:
        return "AMX kernels are not composed for given products"
    return None


def of(plan: Mapping[str, Any], kernel: Mapping[str, Any], *, parts: bool, epilogue: bool) -> list[Recipe]:
    """Recipes with the planner's blocks, the most promising tiles first.

    Args:
      plan: the planner's, on one thread.
      kernel: its facts.
      parts: whether calls are of parts of m and n.
      epilogue: whether calls have one.
    """
    if plan["inner"] or plan["sweep"]:
        return [_recipe(plan, kernel, (kernel["mr"], kernel["nr"]), {}, parts=parts, epilogue=epilogue)]
    found = []
    if not (parts or epilogue) and _may_be_small(plan, kernel):
        small = _tiles(plan, kernel, small=True)[:4]
        found += [_recipe(plan, kernel, tile, {}, parts=False, epilogue=False, small=True) for tile in small]
    for tile in _tiles(plan, kernel, small=False):
        for way in ({}, *_packed_otherwise(plan, kernel, tile[1], bool(plan["pack_b"]))):
            found.append(_recipe(plan, kernel, tile, way, parts=parts, epilogue=epilogue))
    return found


def blocked_otherwise(recipe: Recipe, plan: Mapping[str, Any], kernel: Mapping[str, Any]) -> Iterator[Recipe]:
    """The same tile with other blocks of columns."""
    fields, nr = recipe["fields"], recipe["nr"]
    if fields["inner"] or fields["sweep"] or recipe["small"]:
        return
    n, parts, epilogue = plan["n"], "m" not in fields, "epilogue" not in fields
    widths = [_balanced(n, fields["nc"] // by, nr) for by in (2, 3, 4)] + [_balanced(n, 2 * fields["nc"], nr)]
    for width in dict.fromkeys(widths):
        if width != fields["nc"]:
            way = {"pack_b": fields["pack_b"], "nc": width}
            yield _recipe(plan, kernel, (recipe["mr"], nr), way, parts=parts, epilogue=epilogue)


def _packed_otherwise(
    plan: Mapping[str, Any], kernel: Mapping[str, Any], nr: int, packs_b: bool
) -> Iterator[Mapping[str, int]]:
    """B read where it lies instead of packed, or the other way round, if it may be."""
    if not kernel["direct_b"] or plan["csb"] != 1:
        return
    width = _balanced(plan["n"], plan["n"], nr)  # where it lies B is read by whole rows
    if not packs_b:
        width = _balanced(plan["n"], _PACKED_B_BYTES // (plan["kc"] * kernel["b_panel_bytes"]), nr)
    yield {"pack_b": int(not packs_b), "nc": width}


def entry(recipe: Recipe, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the runtime is told of the recipe's kernel (`_runtime.specialized`)."""
    schedule = {name: recipe["fields"][name] for name in SCHEDULE}
    flags = {x: bool(schedule[x]) for x in ("inner", "sweep", "prefetch", "pack_a", "pack_b")}
    return {
        "kernel": recipe["kernel"],
        "mr": recipe["mr"],
        "nr": recipe["nr"],
        **{name: plan[name] for name in SIZES},
        **schedule,
        **flags,
        "split": [1, 1, 1],
        "split_k": 1,
        "parts": "m" not in recipe["fields"],
        "epilogue": "epilogue" not in recipe["fields"],
    }


def _recipe(
    plan: Mapping[str, Any],
    kernel: Mapping[str, Any],
    tile: tuple[int, int],
    changed: Mapping[str, int],
    *,
    parts: bool,
    epilogue: bool,
    small: bool = False,
) -> Recipe:
    mr, nr = tile
    fields = {name: int(plan[name]) for name in (*SIZES, *SCHEDULE)} | {"accumulate": 0, "more": 0}
    if not (plan["inner"] or plan["sweep"]):
        fields["tile_rows"] = mr
        fields["mc"] = _balanced(plan["m"], plan["mc"], mr)
        fields["nc"] = _balanced(plan["n"], plan["nc"], nr)
    fields |= changed
    if not epilogue:
        fields["epilogue"] = 0
    if plan["batch"] > 1:  # a call may be of some of them
        del fields["batch"]
    if parts:
        del fields["m"], fields["n"]
    known = {"m": plan["m"], "n": plan["n"], "small": small}
    return {"kernel": kernel["name"], "mr": mr, "nr": nr, "fields": fields, **known}


def _may_be_small(plan: Mapping[str, Any], kernel: Mapping[str, Any]) -> bool:
    """Whether the path of small products can compute it: each sum at once, nothing packed or converted."""
    direct = kernel["direct_a"] and kernel["direct_b"] and not plan["pack_a"] and not plan["pack_b"]
    target = spec.TARGETS[kernel["target"]]
    least = kernel["lanes"] // 2 if target.vector_bits == 512 else kernel["lanes"]
    whole = plan["kc"] >= plan["k"]
    return direct and whole and plan["n"] >= least and max(plan["m"], plan["n"], plan["k"]) <= _LARGEST_SMALL


def _tiles(plan: Mapping[str, Any], kernel: Mapping[str, Any], *, small: bool) -> list[tuple[int, int]]:
    """Register tiles that fit, those of which the least is expected to be wasted first."""
    target, lanes = spec.TARGETS[kernel["target"]], kernel["lanes"]
    m, n = plan["m"], plan["n"]
    vectors = -(-n // lanes)
    scored = []
    for nv in range(1, min(_MOST_VECTORS, vectors) + 1):
        highest = max((mr for mr in range(1, 31) if _registers(mr, nv) <= target.vector_registers), default=0)
        heights = dict.fromkeys(-(-m // -(-m // mr)) for mr in range(highest, 0, -1))
        for mr in heights:
            scored.append((_expected(m, vectors, mr, nv, target), -mr * nv, (mr, nv * lanes)))
    scored.sort()
    best = scored[0][0]
    tiles = [tile for cycles, _, tile in scored if small or cycles <= best * _WORSE][:8]
    # Some instructions want more registers than is known here, and then the largest tiles do not exist.
    surely = [
        x for _, _, x in scored if _registers(x[0], x[1] // lanes) <= _registers(kernel["mr"], kernel["nr"] // lanes)
    ]
    return list(dict.fromkeys([*tiles, *surely[:2]]))


def _registers(mr: int, nv: int) -> int:
    """Those of a register tile (codegen/tile.py)."""
    return mr * nv + min(mr, nv) + 1


def _expected(m: int, vectors: int, mr: int, nv: int, target: Any) -> float:
    """Cycles of all K steps, in those of a core that runs one product of vectors at a time."""

    def tile(rows: int, wide: int) -> float:
        loads = (rows + wide) / target.loads_per_cycle * target.fma_per_cycle
        return max(rows * wide, loads, _LATENCY * target.fma_per_cycle) + 0.5

    rows = [(m // mr, mr), (1, m % mr)]
    columns = [(vectors // nv, nv), (1, vectors % nv)]
    return sum(a * b * tile(x, y) for a, x in rows for b, y in columns if x and y)


def _balanced(total: int, most: int, unit: int) -> int:
    """As BalancedBlock in csrc/plan/arithmetic.h."""
    most = max(unit, most // unit * unit)
    total = max(total, 1)
    blocks = math.ceil(total / most)
    return math.ceil(math.ceil(total / blocks) / unit) * unit
