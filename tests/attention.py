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

MASKED = -0.7 * float(np.finfo(np.float32).max)
"""jax.nn's score of a masked key."""

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


def expected(x: Case) -> tuple[reference.Expected, np.ndarray]:
    """The result, and the logarithms of the sums of exponentials [B, T, N], as jax.nn defines them; in float64.

    The bound: a score is off by what its product is; so is, relatively, its exponential, and with it the weight of a
    value; then comes the error of a sum over keys.
    """
    group = x.q.shape[2] // x.k.shape[2]
    q, k, v = (a.astype(np.float64) for a in (x.q, x.k, x.v))
    k, v = (np.repeat(a, group, axis=2) for a in (k, v))
    seen = visible(x)
    allowed = np.broadcast_to(seen, x.scores_shape)
    if x.mask is not None:
        allowed = allowed & x.mask
    with np.errstate(all="ignore"):
        scores = np.einsum("btnh,bsnh->bnts", q, k) * x.scale
        terms = np.einsum("btnh,bsnh->bnts", np.abs(q), np.abs(k)) * abs(x.scale)
        if x.bias is not None:
            scores, terms = scores + x.bias, terms + np.abs(np.where(np.isfinite(x.bias), x.bias, 0))
        scores = np.where(allowed, scores, MASKED)
        top = scores.max(-1, keepdims=True)
        exps = np.exp(scores - top)
        total = exps.sum(-1, keepdims=True)
        weights = exps / total
        # A masked key has no part in a result but through its value times zero: of no one who is not seen.
        unseen = (~np.broadcast_to(seen, weights.shape)) & (weights == 0)
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


def _address(x: np.ndarray | None) -> int:
    return 0 if x is None else int(x.ctypes.data)


def _strides(x: np.ndarray) -> list[int]:
    return [s // x.itemsize for s in x.strides]


def _broadcast(x: np.ndarray | None) -> list[int]:
    if x is None:
        return [0, 0, 0]
    assert x.shape[3] == 1 or x.strides[3] == x.itemsize
    return [0 if n == 1 else s // x.itemsize for n, s in zip(x.shape[:3], x.strides[:3], strict=True)]


def fields(x: Case, out: np.ndarray, lse: np.ndarray | None) -> dict[str, Any]:
    """The arguments of `_runtime.attention` but for the kernel's name and the threads."""
    arrays = (x.q, x.k, x.v, out, x.bias, x.mask, x.q_lengths, x.kv_lengths, lse)
    b, t, n, h = x.q.shape
    return {
        "addresses": [_address(a) for a in arrays],
        "sizes": [b, t, x.k.shape[1], n, x.k.shape[2], h, x.v.shape[3]],
        "strides": [_strides(a) for a in (x.q, x.k, x.v, out)],
        "bias": _broadcast(x.bias),
        "mask": _broadcast(x.mask),
        "scale": x.scale,
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
    group, q_size, kv_size = n // kv_heads, x.q.itemsize, x.k.itemsize
    out = np.full((b, t, n, width), np.nan, x.q.dtype)
    rows = group * t
    padded, rs_sums = _round_up(rows, info["mr"]), _round_up(width, info["nr"])
    packed = info["pack_bytes"]
    tile_rows = max(info["mr"], spec.FEW_QUERIES)

    def packed_row(elements: int) -> int:
        return (-(-_round_up(elements, info["kr"]) * packed // 64) | 1) * 64

    rs_scores = (-(-block * 4 // 64) | 1) * 16
    sizes = {
        "q_pack": padded * packed_row(h) + spec.PACK_SLACK_BYTES,
        "k_pack": _round_up(block, info["nr"]) * _round_up(h, info["kr"]) * packed + spec.PACK_SLACK_BYTES,
        "v_pack": _round_up(width, info["nr"]) * _round_up(block, info["kr"]) * packed + spec.PACK_SLACK_BYTES,
        "scores": tile_rows * rs_scores * 4,
        "sums": padded * rs_sums * 4,
        "maxima": rows * 4,
        "totals": rows * info["lanes"] * 4,
    }
    if info["converts"]:
        sizes["weights"] = tile_rows * packed_row(block)
    names, row_names = spec.names(spec.ATTENTION_ARGS), spec.names(spec.ATTENTION_ROW)
    scale = np.array(x.scale * np.log2(np.e)).view(np.int64)
    with contextlib.ExitStack() as regions:
        rooms = {}
        for name, size in sizes.items():
            region = regions.enter_context(Region(size))
            rooms[name] = (region.end - size) // 64 * 64 if at == "end" else region.begin
            ctypes.memset(region.begin, 0xFF, region.end - region.begin)
        for batch in range(b):
            for head in range(kv_heads):
                table = np.zeros((rows, len(row_names)), np.int64)
                for r in range(rows):
                    position, which = divmod(r, group)
                    here = (batch, position, head * group + which)
                    lo, hi = max(0, position - x.left), min(s, position + x.right + 1)
                    row = {
                        "q": _address(x.q) + sum(i * j for i, j in zip(here, x.q.strides, strict=False)),
                        "out": _address(out) + sum(i * j for i, j in zip(here, out.strides, strict=False)),
                        "lo": lo,
                        "hi": max(lo, hi),
                    }
                    for name, array in (("bias", x.bias), ("mask", x.mask)):
                        if array is not None:
                            offset = sum(
                                0 if size == 1 else i * j
                                for i, j, size in zip(
                                    (batch, here[2], position), array.strides, array.shape, strict=False
                                )
                            )
                            row[name] = _address(array) + offset
                    for name, value in row.items():
                        table[r, row_names.index(name)] = value
                ends = (*pieces, s)
                for i, end in enumerate(ends):
                    given = {
                        **rooms,
                        "rows": table.ctypes.data,
                        "k": _address(x.k) + batch * x.k.strides[0] + head * x.k.strides[2],
                        "v": _address(x.v) + batch * x.v.strides[0] + head * x.v.strides[2],
                        "count": rows,
                        "depth": h,
                        "width": width,
                        "begin": ends[i - 1] if i else 0,
                        "end": end,
                        "csq": x.q.strides[3] // q_size,
                        "rsk": x.k.strides[1] // kv_size,
                        "csk": x.k.strides[3] // kv_size,
                        "rsv": x.v.strides[1] // kv_size,
                        "csv": x.v.strides[3] // kv_size,
                        "block": block,
                        "rs_scores": rs_scores,
                        "rs_sums": rs_sums,
                        "scale": int(scale),
                        "general": int(x.bias is not None or x.mask is not None or not x.scale > 0),
                        "few": int(few),
                        "first": int(i == 0),
                        "finish": int(end == s),
                    }
                    given.setdefault("weights", given["scores"])
                    function((ctypes.c_int64 * len(names))(*(given[name] for name in names)))
    return out


def _round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def run(name: str, x: Case, threads: int = 1, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Result and logarithms by one kernel, in memory full of NaN beforehand."""
    b, t, n, _ = x.q.shape
    if out is None:
        out = np.full((b, t, n, x.v.shape[3]), np.nan, x.q.dtype)
    lse = np.full((b, t, n), np.nan, np.float32)
    _runtime.attention(name, **fields(x, out, lse), threads=threads)
    return out, lse
