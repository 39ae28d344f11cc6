"""What Validate (csrc/plan/schedule.h) accepts is right, and what it refuses never runs.

Random calls of single kernels, and random choices for whole products, legal ones and such as break one rule. Operands
and results lie beside pages that may not be touched.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import reference
from contraction import Contraction, random_contraction
from guarded import Region

from jax_nano import _runtime


def rounded_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def draw_blocks(kernel: Any, rng: np.random.Generator, m: int, n: int, k: int) -> dict[str, int]:
    """Cache blocks that keep the rules, but perhaps for what needs contiguous columns of A."""
    tile_rows = int(rng.choice([kernel["mr"], int(rng.integers(1, kernel["mr"] + 1))]))
    return {
        "tile_rows": tile_rows,
        "mc": int(rng.choice([tile_rows * int(rng.integers(1, 4)), int(rng.integers(1, tile_rows + 1))])),
        "nc": kernel["nr"] * int(rng.integers(1, 4)),
        "kc": kernel["kr"] * int(rng.integers(1, 1 + -(-max(k, 1) // kernel["kr"]))),
    }


def draw_path(kernel: Any, rng: np.random.Generator) -> dict[str, int]:
    paths = [{"inner": 0, "sweep": 0}] * 3
    if kernel["inner"]:
        paths += [{"inner": 1, "sweep": 0}]
    if kernel["sweep"]:
        paths += [{"inner": 0, "sweep": 1}]
    return dict(rng.choice(paths))


def path_of(fields: dict[str, Any]) -> str:
    return "inner" if fields["inner"] else "sweep" if fields["sweep"] else "blocked"


def draw_call(kernel: Any, rng: np.random.Generator) -> dict[str, int]:
    """Sizes, layout and schedule of a call, at most a few of whose fields break a rule."""
    m, n, k = int(rng.integers(1, 45)), int(rng.integers(1, 75)), int(rng.integers(0, 90))
    if rng.random() < 0.5:
        k = rounded_up(k, kernel["kr"])
    by_rows_a, by_rows_b = rng.random(2) < 0.6
    fields = {
        **dict(zip(("m", "n", "k"), (m, n, k), strict=True)),
        **dict(zip(("rsa", "csa"), (k, 1) if by_rows_a else (1, m), strict=True)),
        **dict(zip(("rsb", "csb"), (n, 1) if by_rows_b else (1, k), strict=True)),
        **draw_path(kernel, rng),
        **draw_blocks(kernel, rng, m, n, k),
        "pack_a": int(rng.random() < (0.5 if kernel["direct_a"] else 0.9)),
        "pack_b": int(rng.random() < (0.5 if kernel["direct_b"] else 0.9)),
        "accumulate": int(rng.random() < 0.2),
        "more": int(rng.random() < 0.1),
    }
    if path_of(fields) != "blocked":
        fields |= {"mc": 0, "kc": 0, "nc": 0, "tile_rows": 0, "prefetch": int(rng.random() < 0.5)}
    if fields["sweep"] and rng.random() < 0.9:
        fields |= {"pack_a": 0, "pack_b": 0}
    if kernel["narrow_out"]:  # sums so far would lie in `partial`
        fields |= {"accumulate": 0}
        fields["more"] &= fields["inner"]
    if rng.random() < 0.3:
        name = str(rng.choice([x for x in ("mc", "kc", "nc", "tile_rows") if fields[x]] or ["csb"]))
        fields[name] += int(rng.choice([-1, 1, kernel["mr"]]))
        fields |= {"rsb": fields["rsb"] + 2} if name == "csb" else {}
    if rng.random() < 0.05:
        fields |= {"inner": 1, "sweep": 1}
    return fields


def test_random_calls(kernel, rng):
    """A kernel's own fields, straight to it: the right C, or the reason why not, and then C is not touched."""
    accepted: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for _ in range(150):
        fields = draw_call(kernel.info, rng)
        m, n, k = (fields[x] for x in "mnk")
        if fields["csb"] not in (1, k) or fields["rsb"] not in (1, n):
            k_extent = (max(k, 1) - 1) * fields["rsb"] + (n - 1) * fields["csb"] + 1
        else:
            k_extent = k * n
        before = reference.random(rng, (m, n), kernel.out) if fields["accumulate"] else None
        with (
            Region(m * k * 8 + 8) as a_region,
            Region(k_extent * 8 + 8) as b_region,
            Region(m * n * 8) as c_region,
        ):
            at = str(rng.choice(["begin", "end"]))
            flat_a = a_region.array((m * k,), kernel.lhs, at=at)
            flat_b = b_region.array((k_extent,), kernel.rhs, at=at)
            c = c_region.array((m, n), kernel.out, at=at)
            flat_a[...] = reference.random(rng, flat_a.shape, kernel.lhs)
            flat_b[...] = reference.random(rng, flat_b.shape, kernel.rhs)
            c[...] = reference.poison(kernel.out) if before is None else before
            untouched = c.tobytes()
            addresses = {"a": flat_a.ctypes.data, "b": flat_b.ctypes.data, "c": c.ctypes.data}
            why = _runtime.testing.why_illegal(kernel.name, fields)
            if why:
                with pytest.raises(ValueError, match=f"^{re.escape(why)}$"):
                    _runtime.testing.call(kernel.name, {**addresses, **fields})
                assert c.tobytes() == untouched
                refused[why] += 1
                continue
            _runtime.testing.call(kernel.name, {**addresses, **fields})
            a, b = (
                np.lib.stride_tricks.as_strided(
                    flat, shape, [fields[r] * flat.itemsize, fields[s] * flat.itemsize], writeable=False
                )
                for flat, shape, r, s in ((flat_a, (m, k), "rsa", "csa"), (flat_b, (k, n), "rsb", "csb"))
            )
            initial = {} if before is None else {"initial": before}
            kernel.check(a, b, c.copy(), fields, **initial)
            accepted[path_of(fields)] += 1
    assert accepted["blocked"] >= 15
    assert not kernel.has_inner or accepted["inner"] >= 3
    assert not kernel.has_sweep or accepted["sweep"] >= 3
    assert len(refused) >= 3


DTYPES = [
    *[("float32",) * 3, ("float64",) * 3, ("bfloat16",) * 3, ("float16", "float16", "float32")],
    *[("int8", "int8", "int32"), ("int8", "uint8", "int16")],
]
ACC = {"float64": "float64", "int32": "int32", "int16": "int32"}
KERNELS = {x["name"]: x for x in _runtime.kernels()}


def draw_choice(plan: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Another way to compute a planned product, of which a part may break a rule."""
    kernel = KERNELS[plan["kernel"]]
    m, n, k = (plan[x] for x in "mnk")
    most = (plan["products"], -(-m // kernel["mr"]), -(-n // kernel["nr"]))
    choice = {
        "kernel": plan["kernel"],
        **{x: bool(v) for x, v in draw_path(kernel, rng).items()},
        **draw_blocks(kernel, rng, m, n, k),
        "pack_a": bool(rng.random() < (0.6 if kernel["direct_a"] and kernel["kr"] == 1 else 0.9)),
        "pack_b": bool(rng.random() < (0.6 if kernel["direct_b"] else 0.9)),
        "prefetch": False,
        "split": tuple(int(rng.integers(1, x + 1)) for x in most),
        "split_k": 1,
    }
    if rng.random() < 0.3:
        unit = choice["kc"] if path_of(choice) == "blocked" else 64
        choice["split_k"] = int(rng.integers(1, 2 + -(-max(k, 1) // unit)))
    if path_of(choice) != "blocked":
        choice["prefetch"] = bool(rng.random() < 0.5)
    if choice["sweep"]:
        choice |= {"pack_a": False, "pack_b": False}
    if rng.random() < 0.2:
        name = str(rng.choice(["mc", "kc", "nc", "tile_rows", "split", "split_k"]))
        wrong: dict[str, Any] = {"split": (most[0], most[1] + 1, most[2]), "split_k": k + 2}
        choice[name] = wrong[name] if name in wrong else choice[name] * int(rng.choice([-1, 0, 2])) + 1
    return choice


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_random_choices(dtypes):
    """Plans forced from Python, on one thread and on two: right, with the same bits, or refused before they run."""
    if not _runtime.supports(*dtypes):
        pytest.skip("no kernel")
    accepted: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    rng = np.random.default_rng(list("".join(dtypes).encode()))
    for trial in range(200):
        c = random_contraction(rng)
        if trial % 4 == 0:
            sizes = dict(zip("bmnk", (int(rng.integers(1, x)) for x in (4, 60, 90, 700)), strict=True))
            c = Contraction(str(rng.choice(["bmk,bkn->bmn", "bkm,bnk->bmn", "bmk,kn->bmn"])), **sizes)
        given = (*c.shapes[:2], *c.labels, *dtypes)
        plan = c.plan(dtypes=dtypes)
        if plan["empty"]:
            continue
        choice = draw_choice(plan, rng)
        lhs, rhs = (reference.random(rng, shape, x) for shape, x in zip(c.shapes[:2], dtypes[:2], strict=True))
        with Region(lhs.nbytes) as left, Region(rhs.nbytes) as right, Region(int(np.prod(c.shapes[2])) * 8) as result:
            at = str(rng.choice(["begin", "end"]))
            placed = (left.array(lhs.shape, lhs.dtype, at=at), right.array(rhs.shape, rhs.dtype, at=at))
            placed[0][...], placed[1][...] = lhs, rhs
            out = result.array(c.shapes[2], dtypes[2], at=at)
            out[...] = reference.poison(dtypes[2])
            addresses = tuple(x.ctypes.data for x in (*placed, out))
            try:
                forced = _runtime.testing.plan_by(*given, choice)
            except ValueError as why:
                with pytest.raises(ValueError, match=f"^{re.escape(str(why))}$"):
                    _runtime.testing.dot(*addresses, *given, 2, choice=choice)
                assert out.tobytes() == reference.poisoned(out.shape, out.dtype).tobytes()
                refused[str(why)] += 1
                continue
            assert {x: forced[x] for x in ("inner", "sweep", "split", "split_k")} == {
                x: choice[x] for x in ("inner", "sweep", "split", "split_k")
            }
            want = reference.expected(c.subscripts, lhs, rhs, out=dtypes[2], acc=ACC.get(dtypes[2], "float32"))
            bits = set()
            for threads in (1, 2):
                out[...] = reference.poison(dtypes[2])
                _runtime.testing.dot(*addresses, *given, threads, choice=choice)
                want.check(out.copy(), (c, choice))
                bits.add(out.tobytes())
            assert len(bits) == 1, (c, choice)
            accepted["split_k" if choice["split_k"] > 1 else path_of(choice)] += 1
    assert min(accepted[x] for x in ("blocked", "inner", "sweep", "split_k")) >= 3, accepted
    assert len(refused) >= 4, refused


@pytest.mark.parametrize("target", [t["name"] for t in _runtime.targets() if t["compiled"] and not t["supported"]])
def test_kernels_of_other_cpus_are_planned_but_never_run(target):
    c = Contraction("mk,kn->mn", m=30, n=40, k=50)
    for dtype in ("float32", "bfloat16", "int8"):
        dtypes = (dtype, dtype, "int32" if dtype == "int8" else dtype)
        try:
            plan = c.plan(dtypes=dtypes, target=target)
        except ValueError:
            continue  # no kernel for these
        assert _runtime.testing.plan_by(*c.shapes[:2], *c.labels, *dtypes, plan) == plan
        with pytest.raises(ValueError, match=f"this CPU cannot run {plan['kernel']}"):
            _runtime.testing.dot(0, 0, 0, *c.shapes[:2], *c.labels, *dtypes, 1, choice=plan)


def test_choices_that_do_not_fit_the_product():
    c = Contraction("mk,kn->mn", m=30, n=40, k=50)
    given = (*c.shapes[:2], *c.labels, *["float32"] * 3)
    plan = c.plan(target="x86-64-v3")
    other = next(x["name"] for x in _runtime.kernels() if x["target"] == "x86-64-v3" and x["lhs"] == "float64")
    for change, why in (
        ({"kernel": other}, f"{other} does not compute this product"),
        ({"kernel": "gemm"}, "no such kernel"),
        ({"inner": True, "sweep": True}, "inner and sweep exclude each other"),
        ({"prefetch": True}, "the blocked path has no prefetch"),
        ({"mc": 6 << 40, "kc": 1 << 40, "pack_a": True}, "larger than the address space"),
        ({"mc": 6 << 20, "pack_a": True}, "more workspace"),
    ):
        with pytest.raises(ValueError, match=re.escape(why)):
            _runtime.testing.plan_by(*given, {**plan, **change})
    for name in ("kernel", "inner", "mc", "split", "split_k"):
        with pytest.raises(ValueError, match=f"a choice needs {name}"):
            _runtime.testing.plan_by(*given, {x: v for x, v in plan.items() if x != name})


def test_every_plan_is_a_choice():
    """The planner's own decisions, given back as a choice, make the same plan."""
    rng = np.random.default_rng(0)
    for kernel in KERNELS.values():
        dtypes, where = (kernel["lhs"], kernel["rhs"], kernel["out"]), {"target": kernel["target"]}
        for _ in range(10):
            sizes = {x: int(10 ** rng.uniform(0, 4)) for x in "mnk"}
            c = Contraction(str(rng.choice(["mk,kn->mn", "km,nk->mn", "bmk,bkn->bmn"])), b=3, **sizes)
            plan = c.plan(dtypes=dtypes, algorithm=kernel["algorithm"], threads=int(rng.choice([1, 2, 16])), **where)
            given = (*c.shapes[:2], *c.labels, *dtypes)
            assert _runtime.testing.plan_by(*given, plan, algorithm=kernel["algorithm"]) == plan


@pytest.mark.parametrize("target", [t["name"] for t in _runtime.targets() if t["compiled"]])
def test_candidates(target):
    """All are legal, each once, the planner's first; every path that the kernel has is among them."""
    paths = Counter()
    for kernel in KERNELS.values():
        if kernel["target"] != target:
            continue
        dtypes = (kernel["lhs"], kernel["rhs"], kernel["out"])
        for c in (
            Contraction("mk,kn->mn", m=3, n=100, k=9000),
            Contraction("mk,nk->mn", m=200, n=60, k=130),
            Contraction("bmk,bkn->bmn", b=7, m=24, n=100, k=70),
            Contraction("mij,jin->mn", m=40, n=50, i=8, j=40),
        ):
            given = (*c.shapes[:2], *c.labels, *dtypes)
            where = {"algorithm": kernel["algorithm"], "target": target}
            for threads in (1, 2):
                plans = _runtime.tuning.candidates(*given, threads, **where)
                assert plans[0] == _runtime.plan(*given, threads, **where)
                assert len(plans) == len({repr(p) for p in plans})
                for p in (plans[0], *plans[1::17]):
                    assert _runtime.testing.plan_by(*given, p, algorithm=kernel["algorithm"]) == p
                for p in plans:
                    chosen = KERNELS[p["kernel"]]
                    paths[path_of(p), "split_k" if p["split_k"] > 1 else "", chosen["name"] == kernel["name"]] += 1
    assert paths["blocked", "", True]
    assert paths["blocked", "split_k", True]
    assert not any(KERNELS[k]["sweep"] and KERNELS[k]["target"] == target for k in KERNELS) or paths["sweep", "", True]


def test_an_empty_result_has_no_candidates_but_its_plan():
    given = ([3, 4], [4, 0], [0, 1], [1, 2], [0, 2], *["float32"] * 3)
    assert _runtime.tuning.candidates(*given, 2, target="x86-64-v3") == [_runtime.plan(*given, 2, target="x86-64-v3")]
