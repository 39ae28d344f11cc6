"""What attention must be, in float64, and a way to call the generated kernels without XLA."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import reference
from guarded import Region

from jax_nano import _runtime
from jax_nano._core import spec

MASKED = float(np.float32(-0.7) * np.finfo(np.float32).max)
"""jax.nn's score of a masked key."""

HUGE = 1e8
"""Beside a bias of this size nothing is left of a score of up to 2, nor of its error."""

UNBOUNDED = 1 << 40


@dataclass(frozen=True)
class Case:
    """One attention: shapes in jax.nn's order (BTNH), and what restricts it."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None = None
    mask: np.ndarray | None = None
    q_lengths: np.ndarray | None = None
    kv_lengths: np.ndarray | None = None
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    scale: float = 0.125
    masked: float = MASKED

    @property
    def scores_shape(self) -> tuple[int, int, int, int]:
        return (self.q.shape[0], self.q.shape[2], self.q.shape[1], self.k.shape[1])


def visible(x: Case) -> np.ndarray:
    """Which scores lengths and window leave, [B, 1, T, S]."""
    b, _, t, s = x.scores_shape
    at_q, at_k = np.arange(t)[:, None], np.arange(s)[None, :]
    seen = np.ones((b, 1, t, s), bool)
    if x.left < UNBOUNDED:
        seen &= at_k >= at_q - x.left
    if x.right < UNBOUNDED:
        seen &= at_k <= at_q + x.right
    if x.q_lengths is not None:
        seen &= at_q < x.q_lengths[:, None, None, None]
    if x.kv_lengths is not None:
        seen &= at_k < x.kv_lengths[:, None, None, None]
    return seen


def einsum(subscripts: str, lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """np.einsum of arrays with the batch dimensions b and n and one contracted dimension, by NumPy's products."""
    of_lhs, of_rhs, of_out = subscripts.replace("->", ",").split(",")
    contracted = next(c for c in of_lhs if c not in of_out)
    free = [next(c for c in dims if c not in f"bn{contracted}") for dims in (of_lhs, of_rhs)]
    a = lhs.transpose([of_lhs.index(c) for c in f"bn{free[0]}{contracted}"])
    b = rhs.transpose([of_rhs.index(c) for c in f"bn{contracted}{free[1]}"])
    return (a @ b).transpose([f"bn{free[0]}{free[1]}".index(c) for c in of_out])


def allowed(x: Case) -> np.ndarray:
    """Which scores lengths, window and mask leave, [B, N, T, S]."""
    seen = np.broadcast_to(visible(x), x.scores_shape)
    return seen if x.mask is None else seen & x.mask


def operands(x: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values in float64, the latter two once for each head of queries."""
    group = x.q.shape[2] // x.k.shape[2]
    q, k, v = (a.astype(np.float64) for a in (x.q, x.k, x.v))
    return q, *(np.repeat(a, group, axis=2) for a in (k, v))


def scores_of(x: Case) -> tuple[np.ndarray, np.ndarray]:
    """Scores with bias, nothing masked, and the sums of the magnitudes of their terms; [B, N, T, S].

    With a bias they are float32 numbers, which is what they are where a bias is large.
    """
    q, k, _ = operands(x)
    scores = einsum("btnh,bsnh->bnts", q, k) * x.scale
    terms = einsum("btnh,bsnh->bnts", np.abs(q), np.abs(k)) * abs(x.scale)
    if x.bias is not None:
        scores = (scores + x.bias).astype(np.float32).astype(np.float64)
        terms = np.where(np.abs(x.bias) >= HUGE, 0, terms + np.abs(np.where(np.isfinite(x.bias), x.bias, 0)))
    return scores, terms


def expected(x: Case) -> tuple[reference.Expected, np.ndarray]:
    """The result, and the logarithms of the sums of exponentials [B, T, N], as jax.nn defines them; in float64.

    The bound: a score is off by what its product is; so is, relatively, its exponential, and with it the weight of a
    value; then comes the error of a sum over keys.
    """
    q, _, v = operands(x)
    with np.errstate(all="ignore"):
        scores, terms = scores_of(x)
        scores = np.where(allowed(x), scores, x.masked)
        top = scores.max(-1, keepdims=True)
        exps = np.exp(scores - top)
        total = exps.sum(-1, keepdims=True)
        weights = exps / total
        # A masked key has no part in a result but through its value times zero: of no one who is not seen.
        unseen = (~np.broadcast_to(visible(x), weights.shape)) & (weights == 0)
        products = np.where(unseen[..., None], 0.0, weights[..., None] * np.moveaxis(v, 1, 2)[:, :, None])
        value = np.moveaxis(products.sum(3), 1, 2)
        magnitude = np.moveaxis(np.abs(products).sum(3), 1, 2)
        errors = reference.relative_error(q.shape[-1], np.float32) * np.where(weights > 0, terms, 0)
        worst = np.moveaxis(errors.max(-1), 1, 2)[..., None]
        narrow = float(reference.finfo(x.k.dtype).eps) if x.k.dtype != np.float32 else 0.0
        per_weight = 2 * worst + 1e-6 + narrow
        bound = magnitude * (per_weight + reference.relative_error(x.k.shape[1], np.float32))
        lse = np.moveaxis((np.log(total) + top)[..., 0], 1, 2)
    if x.q_lengths is not None:
        here = np.arange(x.q.shape[1])[None, :, None, None] < x.q_lengths[:, None, None, None]
        value, bound = np.where(here, value, 0), np.where(here, bound, 0)
    info = reference.finfo(x.q.dtype)
    bound = bound + np.maximum(float(info.eps) * np.abs(value), float(info.smallest_subnormal))
    return reference.Expected(value, bound), lse


def address(x: np.ndarray | None) -> int:
    return 0 if x is None else int(x.ctypes.data)


def strides(x: np.ndarray) -> list[int]:
    return [s // x.itemsize for s in x.strides]


def broadcast(x: np.ndarray | None) -> list[int]:
    if x is None:
        return [0, 0, 0]
    assert x.shape[3] == 1 or x.strides[3] == x.itemsize
    return [0 if n == 1 else s // x.itemsize for n, s in zip(x.shape[:3], x.strides[:3], strict=True)]


def at_index(array: np.ndarray, index: tuple[int, ...]) -> int:
    """The address of an element, or of the row that leading indices give; dimensions of size 1 are for all."""
    steps = zip(index, array.strides, array.shape, strict=False)
    return address(array) + sum(0 if size == 1 else i * j for i, j, size in steps)


def round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def packed_row(info: dict[str, Any], elements: int) -> int:
    """Bytes of a packed row of A: an odd number of cache lines."""
    return (-(-round_up(elements, info["kr"]) * info["pack_bytes"] // 64) | 1) * 64


def packed_panels(info: dict[str, Any], k: int, cols: int) -> int:
    """Bytes of packed panels of B, and what packing may overrun."""
    return round_up(cols, info["nr"]) * round_up(k, info["kr"]) * info["pack_bytes"] + spec.PACK_SLACK_BYTES


def rs_scores_of(keys: int) -> int:
    """Floats between rows of scores: an odd number of cache lines."""
    return (-(-keys * 4 // 64) | 1) * 16


def rooms_of(sizes: dict[str, int], regions: contextlib.ExitStack, at: str) -> dict[str, int]:
    """Addresses of memory of these sizes, at the end or the beginning between guard pages, full of NaN; 0 for none."""
    rooms = {}
    for name, size in sizes.items():
        if size == 0:
            rooms[name] = 0
            continue
        region = regions.enter_context(Region(size))
        rooms[name] = (region.end - size) // 64 * 64 if at == "end" else region.begin
        ctypes.memset(region.begin, 0xFF, region.end - region.begin)
    return rooms


def bits(number: float) -> int:
    """Those of a float64, as the field of a struct."""
    return int(np.array(number, np.float64).view(np.int64))


def call_function(function: Any, names: tuple[str, ...], given: dict[str, int]) -> None:
    """Calls a generated function with the struct of these fields; those that are not given are zero."""
    function((ctypes.c_int64 * len(names))(*(given.get(name, 0) for name in names)))


def window(x: Case, t: int) -> dict[str, int]:
    """The keys lo <= s < hi that the window leaves to a query."""
    lo = max(0, t - x.left)
    return {"lo": lo, "hi": max(lo, min(x.k.shape[1], t + x.right + 1))}


def steps_of(x: Case) -> dict[str, int]:
    """The arguments of both generated functions that say how operands lie."""
    return {
        "depth": x.q.shape[3],
        "width": x.v.shape[3],
        "csq": x.q.strides[3] // x.q.itemsize,
        "rsk": x.k.strides[1] // x.k.itemsize,
        "csk": x.k.strides[3] // x.k.itemsize,
        "rsv": x.v.strides[1] // x.v.itemsize,
        "csv": x.v.strides[3] // x.v.itemsize,
    }


def fields(
    x: Case, out: np.ndarray, maxima: np.ndarray | None = None, logs: np.ndarray | None = None
) -> dict[str, Any]:
    """The arguments of `_runtime.attention` but for the kernel's name and the threads."""
    arrays = (x.q, x.k, x.v, out, x.bias, x.mask, x.q_lengths, x.kv_lengths, maxima, logs)
    b, t, n, h = x.q.shape
    return {
        "addresses": [address(a) for a in arrays],
        "sizes": [b, t, x.k.shape[1], n, x.k.shape[2], h, x.v.shape[3]],
        "strides": [strides(a) for a in (x.q, x.k, x.v, out)],
        "bias": broadcast(x.bias),
        "mask": broadcast(x.mask),
        "scale": x.scale,
        "masked": x.masked,
        "left": x.left,
        "right": x.right,
    }


def call(
    info: dict[str, Any],
    function: Any,
    x: Case,
    *,
    block: int,
    pieces: tuple[int, ...] = (),
    at: str = "end",
    few: bool = False,
) -> np.ndarray:
    """The result by a generated function itself, in memory full of NaN beforehand.

    One call for each batch and key head, or, with ``pieces``, one for the keys up to each of these, which go on where
    the last one ended. The workspace is exactly as large as csrc/attention.cc makes it, between guard pages.
    """
    (b, t, n, h), s, kv_heads, width = x.q.shape, x.k.shape[1], x.k.shape[2], x.v.shape[3]
    group = n // kv_heads
    out = np.full((b, t, n, width), np.nan, x.q.dtype)
    rows = group * t
    padded, rs_sums = round_up(rows, info["mr"]), round_up(width, info["nr"])
    tile_rows, rs_scores = max(info["mr"], spec.FEW_QUERIES), rs_scores_of(block)
    sizes = {
        "q_pack": padded * packed_row(info, h) + spec.PACK_SLACK_BYTES,
        "k_pack": packed_panels(info, h, block),
        "v_pack": packed_panels(info, block, width),
        "scores": tile_rows * rs_scores * 4,
        "sums": padded * rs_sums * 4,
        "maxima": rows * 4,
        "totals": rows * info["lanes"] * 4,
    }
    if info["converts"]:
        sizes["weights"] = tile_rows * packed_row(info, block)
    names, row_names = spec.names(spec.ATTENTION_ARGS), spec.names(spec.ATTENTION_ROW)
    general = x.bias is not None or x.mask is not None or not x.scale > 0
    scale, masked = (bits(number) for number in (x.scale * (1.0 if general else np.log2(np.e)), x.masked))
    with contextlib.ExitStack() as regions:
        rooms = rooms_of(sizes, regions, at)
        for batch in range(b):
            for head in range(kv_heads):
                table = np.zeros((rows, len(row_names)), np.int64)
                for r in range(rows):
                    position, which = divmod(r, group)
                    query = head * group + which
                    row = {
                        "q": at_index(x.q, (batch, position, query)),
                        "out": at_index(out, (batch, position, query)),
                        **window(x, position),
                    }
                    for name, array in (("bias", x.bias), ("mask", x.mask)):
                        if array is not None:
                            row[name] = at_index(array, (batch, query, position))
                    for name, value in row.items():
                        table[r, row_names.index(name)] = value
                ends = (*pieces, s)
                for i, end in enumerate(ends):
                    given = {
                        **rooms,
                        **steps_of(x),
                        "rows": table.ctypes.data,
                        "k": at_index(x.k, (batch, 0, head)),
                        "v": at_index(x.v, (batch, 0, head)),
                        "count": rows,
                        "begin": ends[i - 1] if i else 0,
                        "end": end,
                        "block": block,
                        "rs_scores": rs_scores,
                        "rs_sums": rs_sums,
                        "scale": scale,
                        "masked": masked,
                        "general": int(general),
                        "few": int(few),
                        "first": int(i == 0),
                        "finish": int(end == s),
                    }
                    given.setdefault("weights", given["scores"])
                    call_function(function, names, given)
    return out


def run(name: str, x: Case, threads: int = 1, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Result and statistics [2, B, T, N] (maxima, logarithms) by one kernel, in memory full of NaN beforehand."""
    b, t, n, _ = x.q.shape
    if out is None:
        out = np.full((b, t, n, x.v.shape[3]), np.nan, x.q.dtype)
    statistics = np.full((2, b, t, n), np.nan, np.float32)
    _runtime.attention(name, **fields(x, out, *statistics), threads=threads)
    return out, statistics
