"""Which attention kernels there are to test, and cases that they and their gradients are tested with."""

from __future__ import annotations

import os
from typing import Any

import emulated
import numpy as np
import pytest
import reference
from attention import Case

from jax_nano import _runtime
from jax_nano.codegen import catalog, emulate
from jax_nano.codegen.toolchain import ToolchainError

SUPPORTED = {t["name"] for t in _runtime.targets() if t["supported"]}
REQUIRED = {name for name in os.environ.get("JAX_NANO_REQUIRE_TARGET", "").split(",") if name}
INFOS = {a["name"]: a for a in _runtime.attentions()}
EMULATED = [k for k in catalog.attentions() if k.target != emulate.BASELINE]


def native(name: str) -> dict[str, Any]:
    """What the extension says of a kernel; skips the test if this CPU cannot run it."""
    found = INFOS[name]
    if found["target"] not in SUPPORTED:
        if found["target"] in REQUIRED:
            pytest.fail(f"JAX_NANO_REQUIRE_TARGET: {found['target']}")
        pytest.skip(f"this CPU is no {found['target']}")
    return found


def emulated_kernels(suffix: str = "") -> dict[str, tuple[dict[str, Any], Any]]:
    """Facts and function of every kernel of other targets; ``suffix`` is that of the functions' symbols."""
    if emulate.BASELINE.name not in SUPPORTED:
        pytest.skip(f"this CPU is no {emulate.BASELINE.name}")
    try:
        return emulated.load_attentions(EMULATED, suffix)
    except ToolchainError as error:
        message = str(error)
    if "emulated" in REQUIRED:
        pytest.fail(message)
    pytest.skip(message)


def array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return reference.random(rng, shape, dtype)


def case(
    rng: np.random.Generator,
    info: dict[str, Any],
    b: int = 1,
    t: int = 7,
    s: int = 19,
    n: int = 2,
    kv_heads: int = 2,
    h: int = 16,
    width: int | None = None,
    **restrictions: Any,
) -> Case:
    q = array(rng, (b, t, n, h), info["q"])
    k, v = (array(rng, (b, s, kv_heads, size), info["kv"]) for size in (h, width or h))
    return Case(q, k, v, **{"scale": h**-0.5, **restrictions})


SIZES = ((23, 41, 4, 2, 24), (61, 61, 3, 1, 16), (1, 70, 8, 2, 40))
"""Queries, keys, heads, heads of keys and depth for ``restrictions``."""


def restrictions(
    rng: np.random.Generator, b: int, t: int, s: int, n: int, *, sees_a_key: bool
) -> dict[str, dict[str, Any]]:
    """By name. With ``sees_a_key`` masks take the first key of every query."""
    bias = rng.standard_normal((b, n, t, s)).astype(np.float32)
    mask = rng.random((b, n, t, s)) < 0.6
    if sees_a_key:
        mask[..., 0] = True
    return {
        "none": {},
        "causal": {"right": 0},
        "window": {"left": 3, "right": 2},
        "window behind": {"left": 5, "right": -2},
        "bias": {"bias": bias},
        "one bias for all": {"bias": bias[:1, :1, :1]},
        "one bias for all heads": {"bias": bias[:, :1], "right": 0},
        "one bias for all batches": {"bias": bias[:1]},
        "one bias for all queries": {"bias": bias[:, :, :1]},
        "mask": {"mask": mask},
        "mask of keys": {"mask": mask[:, :1, :1], "right": 0},
        "bias and mask": {"bias": bias[:, :1], "mask": mask[:1], "left": 9},
        "lengths": {
            "q_lengths": rng.integers(0, t + 1, b).astype(np.int32),
            "kv_lengths": rng.integers(1, s + 1, b).astype(np.int32),
        },
        "all at once": {
            "bias": bias[:, :, :1],
            "mask": mask[:, :1],
            "right": 1,
            "kv_lengths": rng.integers(1, s + 1, b).astype(np.int32),
        },
        "another scale": {"scale": -0.3},
        "no scale": {"scale": 0.0},
    }


def huge_biases(rng: np.random.Generator, b: int, t: int, s: int, n: int, excluded: float) -> dict[str, dict[str, Any]]:
    """Biases that exclude all keys of a query, some of another, and none of others; by name."""
    bias = np.zeros((b, n, t, s), np.float32)
    bias[..., t // 8, :] = excluded
    bias[..., t // 4, : s // 2] = excluded
    bias[..., t // 2, :] = excluded * rng.uniform(0.1, 1, s)
    mask = rng.random((b, n, t, s)) < 0.6
    return {
        "bias": {"bias": bias},
        "one for all heads": {"bias": bias[:, :1]},
        "and a mask": {"bias": bias, "mask": mask},
        "and a window": {"bias": bias, "left": 20, "right": 20},
        "all": {"bias": bias, "mask": mask[:, :1], "right": s - t},
    }


def around_tiles(info: dict[str, Any]) -> list[tuple[int, int]]:
    """Numbers of queries and keys: fewest, around a register tile's, and several tiles'."""
    queries, keys = (1, 2, info["mr"] - 1, info["mr"] + 1, 70), (1, 2, info["nr"] - 1, info["nr"] + 1, 67)
    return [(t, s) for t in queries for s in keys]


LAYOUTS = ("BNTH", "BTHN", "spare")


def stored(a: np.ndarray, layout: str) -> np.ndarray:
    """An array in jax.nn's order (BTNH) that lies in memory in another, or between spare rows and elements of NaN."""
    if layout == "spare":
        room = np.full([2 * size for size in a.shape[:2]] + [a.shape[2], a.shape[3] + 5], np.nan, a.dtype)
        view = room[: a.shape[0], : a.shape[1], :, : a.shape[3]]
        view[...] = a
        return view
    order = [layout.index(c) for c in "BTNH"]
    return np.ascontiguousarray(np.transpose(a, np.argsort(order))).transpose(order)


LARGE = tuple(sign * size for size in (1e4, 3e7, 3e9, 1e30, 1e38) for sign in (1, -1))
"""Scores of ``large_scores``."""


def large_scores(rng: np.random.Generator, info: dict[str, Any], t: int, s: int, score: float, **given: Any) -> Case:
    """Scores of about this number, of products exact in float32: a key's is one of two, a quarter apart. Depending on
    its sign one key or several of the same score take all the weight. Beyond float16 for |score| > 1e9.
    """
    root = 2.0 ** round(np.log2(abs(score)) / 2)
    x = case(rng, info, 1, t, s, 2, 2, 17, **{"scale": 0.3, **given})
    x.q[...], x.k[...] = 0, 0
    x.q[..., 3] = root
    x.k[..., 3] = np.copysign(root, score) * rng.choice(np.array([1.0, 1.25]), x.k.shape[:3])
    return x
