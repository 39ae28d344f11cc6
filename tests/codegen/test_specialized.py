"""Kernels for given products, as composed: what they consist of, and what none is composed for."""

from __future__ import annotations

import re

import pytest

from jax_nano.codegen.specialized import SpecializedKernel, kernel_of

FIELDS = {
    "m": 128,
    "n": 768,
    "k": 768,
    "rsa": 768,
    "csa": 1,
    "rsb": 768,
    "csb": 1,
    "rsc": 768,
    "batch": 1,
    "bsa": 0,
    "bsb": 0,
    "bsc": 0,
    "accumulate": 0,
    "more": 0,
    "epilogue": 0,
    "pack_a": 0,
    "pack_b": 1,
    "inner": 0,
    "sweep": 0,
    "prefetch": 0,
    "mc": 128,
    "kc": 384,
    "nc": 192,
    "tile_rows": 4,
}


def kernel(name="gemm_f32_f32_f32_f32_6x16_x86-64-v3", mr=4, nr=24, *, small=False, m=128, n=768, **changed):
    fields = {x: y for x, y in {**FIELDS, **changed}.items() if y is not None}
    return kernel_of({"kernel": name, "mr": mr, "nr": nr, "m": m, "n": n, "small": small, "fields": fields})


def functions(x: SpecializedKernel) -> list[str]:
    """The names of its functions, without what they have in common."""
    return [name.removeprefix(x.symbol) for name in re.findall(r"func\.func @(\w+)", x.mlir())]


def test_it_consists_of_what_it_calls():
    """One tile, packed B: a row of tiles and a microkernel; no path, no tail, no epilogue."""
    assert sorted(functions(kernel())) == ["", "_4x24", "_pack_b", "_row4"]


def test_tails_and_what_an_epilogue_wants():
    found = functions(kernel(m=130, n=770, rsb=770, rsc=770, epilogue=None))
    assert {"_row4", "_row2", "_4x24", "_2x24", "_4x8_masked", "_2x8_masked", "_epilogue"} <= set(found)
    assert "_4x16" not in found


def test_a_small_one_is_one_function():
    sizes = dict.fromkeys(("rsa", "rsb", "rsc", "k", "kc", "mc"), 8)
    assert functions(kernel(mr=8, nr=8, small=True, m=8, n=8, nc=8, pack_b=0, tile_rows=8, **sizes)) == [""]


def test_parts_have_sizes_of_their_own():
    """All but m and n are constants, and the same functions are called."""
    fields = {name: value for name, value in FIELDS.items() if name not in ("m", "n")}
    product = {"m": 128, "n": 768, "small": False, "fields": fields}
    parts = kernel_of({"kernel": "gemm_f32_f32_f32_f32_6x16_x86-64-v3", "mr": 4, "nr": 24, **product})
    assert functions(parts) == functions(kernel())
    assert parts.mlir() != kernel().mlir()


def test_its_name_follows_from_its_constants():
    names = {kernel(**changed).symbol for changed in ({}, {"nc": 384}, {"k": 767}, {"small": True}, {"mr": 3})}
    assert len(names) == 5
    assert kernel().symbol == kernel().symbol


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"mr": 9}, ValueError),
        ({"nr": 20}, ValueError),
        ({"nr": 0}, ValueError),
        ({"nr": 80}, ValueError),
        ({"name": "none"}, KeyError),
        ({"what": 3}, ValueError),
        ({"name": "gemm_bf16_bf16_f32_f32_32x32_amx", "nr": 32}, ValueError),
        ({"name": "attention_f32_f32_6x16_x86-64-v3"}, ValueError),
    ],
)
def test_what_none_is_composed_for(changed, error):
    with pytest.raises(error, match=r".+"):
        kernel(**changed)
