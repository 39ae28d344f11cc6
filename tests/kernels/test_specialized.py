"""Kernels for given products: the same bits as those of the build, beside pages that may not be touched."""

from __future__ import annotations

import composed
import ml_dtypes
import numpy as np
import pytest
from composed import asked
from guarded import Region

from jax_nano import _runtime
from jax_nano._tools import recipes
from jax_nano._tools.asked import Epilogue

if not _runtime.supports("float32", "float32", "float32"):
    pytest.skip("no float32 kernel runs on this CPU", allow_module_level=True)

WHY_NOT = composed.why_not()
needs_generator = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

BF16, F16, F64, I8 = (("bfloat16",) * 3, ("float16",) * 3, ("float64",) * 3, ("int8", "int8", "int32"))
MIXED = [("bfloat16", "bfloat16", "float32"), ("uint8", "int8", "int32"), ("int8", "int8", "int8")]

PRODUCTS = [
    asked("mk,kn->mn", m=8, n=8, k=8),
    asked("mk,kn->mn", m=17, n=33, k=65),
    asked("mk,kn->mn", m=23, n=23, k=23),
    asked("mk,kn->mn", m=61, n=63, k=64),
    asked("mk,kn->mn", m=13, n=50, k=9),
    asked("mk,kn->mn", m=100, n=203, k=700),
    asked("mk,nk->mn", m=100, n=203, k=301),
    asked("km,kn->mn", m=100, n=203, k=301),
    asked("km,nk->mn", m=45, n=67, k=431),
    asked("bmk,bkn->bmn", b=9, m=17, n=12, k=31),
    asked("bmk,bnk->bmn", b=5, m=33, n=70, k=21),
    asked("mk,kn->mn", m=1, n=300, k=500),
    asked("mk,nk->mn", m=3, n=300, k=500),
    asked("mk,kn->mn", m=5, n=1000, k=300),
    asked("mk,kn->nm", m=205, n=37, k=300),
    asked("bqhd,bkhd->bhqk", b=2, q=30, h=3, d=24, k=37),
    asked("mk,kn->mn", BF16, m=17, n=33, k=65),
    asked("mk,kn->mn", BF16, m=50, n=203, k=1100),
    asked("mk,nk->mn", BF16, m=40, n=48, k=64),
    asked("mk,kn->mn", F16, m=33, n=49, k=70),
    asked("mk,kn->mn", F64, m=33, n=49, k=70),
    asked("mk,kn->mn", F64, m=16, n=20, k=24),
    asked("mk,kn->mn", I8, m=33, n=49, k=71),
    *(asked("mk,kn->mn", dtypes, m=30, n=52, k=90) for dtypes in MIXED),
]
CUT = [
    asked("mk,kn->mn", m=411, n=500, k=700),
    asked("mk,nk->mn", m=301, n=410, k=403),
    asked("km,kn->mn", m=301, n=410, k=403),
    asked("mk,kn->mn", BF16, m=301, n=410, k=803),
    asked("mk,kn->mn", I8, m=301, n=410, k=803),
    asked("mk,kn->mn", m=50_000, n=3, k=3),
    asked("bmk,bkn->bmn", b=7, m=133, n=135, k=131),
]
"""Products that several threads share."""


def array(name, shape, rng, *, small=False):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if small or dtype.kind in "iu":
        return rng.integers(0 if dtype.kind == "u" else -4, 5, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


@pytest.fixture(scope="module")
def composer():
    with composed.Composer(jobs=2) as composer:
        yield composer


@needs_generator
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_the_same_bits_beside_guard_pages(product, composer, rng):
    operands = [array(name, shape, rng) for name, shape in zip(product.dtypes, product.shapes, strict=False)]
    shapes = [*product.shapes, product.out_shape]
    sizes = [int(np.prod(shape)) * 8 for shape in shapes]
    with Region(sizes[0]) as first, Region(sizes[1]) as second, Region(sizes[2]) as third:

        def run(at, table):
            dtypes = [np.dtype(getattr(ml_dtypes, x, x)) for x in product.dtypes]
            arrays = [x.array(s, d, at=at) for x, s, d in zip((first, second, third), shapes, dtypes, strict=True)]
            for to, values in zip(arrays, operands, strict=False):
                to[...] = values
            arrays[2].view(np.uint8)[...] = 0xFF
            addresses = [x.ctypes.data for x in arrays]
            _runtime.testing.dot(*addresses, *product.arguments, 1, specialized=table)
            return arrays[2].tobytes()

        expected = run("end", None)
        found = list(composed.made(composer, product, most=3))
        for x in found:
            assert _takes(product, x), x.recipe
            for at in ("begin", "end"):
                assert run(at, x.table) == expected, x.recipe
    assert found


def _takes(product, x, threads=1):
    """Whether the planner uses a kernel."""
    _runtime.specialized.use(x.table)
    finish = {"epilogue": product.epilogue is not None, "bias": bool(product.epilogue and product.epilogue.bias)}
    try:
        return _runtime.plan(*product.arguments, threads, **finish)["pack"] == "test"
    finally:
        _runtime.specialized.use(None)


@needs_generator
@pytest.mark.parametrize("product", CUT, ids=str)
def test_the_same_bits_on_any_number_of_threads(product, composer, rng):
    operands = [array(name, shape, rng) for name, shape in zip(product.dtypes, product.shapes, strict=False)]
    out = np.empty(product.out_shape, np.dtype(getattr(ml_dtypes, product.dtypes[2], product.dtypes[2])))
    addresses = [x.ctypes.data for x in (*operands, out)]

    def run(threads, table):
        out.view(np.uint8)[...] = 0xFF
        _runtime.testing.dot(*addresses, *product.arguments, threads, specialized=table)
        return out.tobytes()

    expected = run(1, None)
    assert np.prod(_runtime.plan(*product.arguments, 4)["split"]) > 1
    taken = 0
    for x in composed.made(composer, product, most=2):
        for threads in (1, 2, 3, 7):
            taken += _takes(product, x, threads)
            assert run(threads, x.table) == expected, (x.recipe, threads)
    assert taken > 1


@needs_generator
def test_small_integers_are_exact(composer, rng):
    product = asked("mk,kn->mn", m=45, n=77, k=130)
    lhs, rhs = (array("float32", shape, rng, small=True) for shape in product.shapes)
    out = np.full(product.out_shape, np.nan, np.float32)
    addresses = [x.ctypes.data for x in (lhs, rhs, out)]
    for x in composed.made(composer, product, most=4):
        _runtime.testing.dot(*addresses, *product.arguments, 1, specialized=x.table)
        np.testing.assert_array_equal(out, lhs.astype(np.int64) @ rhs.astype(np.int64))
        out[...] = np.nan


EPILOGUES = [
    Epilogue(bias=True),
    Epilogue("gelu_tanh", bias=True),
    Epilogue("relu", 0.5, bias=True, residual=True),
    Epilogue(residual=True),
]


@needs_generator
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
@pytest.mark.parametrize("dtypes", [("float32",) * 3, BF16], ids=str)
def test_epilogues(epilogue, dtypes, composer, rng):
    product = asked("mk,kn->mn", dtypes, epilogue, m=37, n=53, k=500)
    lhs, rhs = (array(name, shape, rng) for name, shape in zip(dtypes, product.shapes, strict=False))
    bias, residual = array(dtypes[2], (53,), rng), array(dtypes[2], (37, 53), rng)
    out = np.empty((37, 53), lhs.dtype)
    buffers = np.array([[x.ctypes.data for x in (lhs, rhs, out)]], np.uintp)
    more = {
        "activation": epilogue.activation,
        "scale": epilogue.scale,
        "bias": bias.ctypes.data if epilogue.bias else 0,
        "residual": residual.ctypes.data if epilogue.residual else 0,
    }

    def run(table):
        out.view(np.uint8)[...] = 0xFF
        _runtime.tuning.time_dot(buffers, 1, *product.arguments, 1, specialized=table, **more)
        return out.tobytes()

    expected = run(None)
    for x in composed.made(composer, product, most=3):
        assert _takes(product, x)
        assert run(x.table) == expected, x.recipe
        # A call without an epilogue is another product.
        _runtime.specialized.use(x.table)
        assert _runtime.plan(*product.arguments, 1)["pack"] == ""
        _runtime.specialized.use(None)


# --- the table, whose kernels are never called here ----------------------------------------------

PRODUCT = asked("mk,kn->mn", m=128, n=768, k=768)
NOWHERE = 1 << 20


def entry(product=PRODUCT, **changed):
    """What a pack would say of a kernel for a product, with the planner's blocks."""
    plan = _runtime.plan(*product.arguments, 1, specialized=False)
    assert not plan["inner"]
    assert not plan["sweep"]
    kernel = next(x for x in _runtime.kernels() if x["name"] == plan["kernel"])
    recipe = recipes.of(plan, kernel, parts=True, epilogue=False)[0]
    return {**recipes.entry(recipe, plan), **changed}


def packs_of_plans(*entries, threads=1, **where):
    """The packs that a plan of PRODUCT would take kernels of."""
    table = _runtime.specialized.Kernels()
    for i, x in enumerate(entries):
        table.add(x, NOWHERE, str(i))
    _runtime.specialized.use(table)
    try:
        return _runtime.plan(*PRODUCT.arguments, threads, **where)["pack"]
    finally:
        _runtime.specialized.use(None)


def test_exactly_its_product_is_taken():
    assert packs_of_plans(entry()) == "0"
    assert packs_of_plans(entry(), specialized=False) == ""
    assert packs_of_plans(entry(), epilogue=True) == ""
    assert packs_of_plans(entry(epilogue=True), epilogue=True) == "0"
    sizes = {x: entry()[x] + 1 for x in recipes.SIZES if x not in ("csa", "csb")}
    for name, value in sizes.items():
        assert packs_of_plans(entry(**{name: value})) == "", name


def test_the_order_of_sums_is_the_planners():
    x = entry()
    assert packs_of_plans(entry(kc=x["kc"] * 2)) == ""
    assert packs_of_plans(entry(nc=x["nc"] * 2)) == "0"


def test_the_last_one_is_taken():
    assert packs_of_plans(entry(), entry()) == "1"


def test_parts_only_where_it_takes_them():
    many = _runtime.plan(*PRODUCT.arguments, 8)["split"]
    assert max(many[1:]) > 1
    assert packs_of_plans(entry(), threads=8) == "0"
    assert packs_of_plans(entry(parts=False), threads=8) == ""
    assert packs_of_plans(entry(parts=False)) == "0"


def test_never_for_a_machine_that_is_not_this_one():
    assert packs_of_plans(entry(), caches=(1 << 15, 1 << 20, 1 << 25)) == ""
    assert packs_of_plans(entry(), cpu="") == ""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel": "none"}, "no such kernel"),
        ({"mr": 0}, "no register tile"),
        ({"mr": 33}, "no register tile"),
        ({"nr": 5}, "no register tile"),
        ({"nr": 1 << 20}, "no register tile"),
        ({"m": -1}, "negative"),
        ({"nc": 0}, "positive"),
        ({"nc": 1}, "multiples"),
        ({"tile_rows": 32}, "tile_rows"),
        ({"inner": True, "sweep": True}, "exclude"),
        ({"csb": 2, "pack_b": False}, "csb"),
    ],
)
def test_what_cannot_be_is_refused(changed, message):
    table = _runtime.specialized.Kernels()
    with pytest.raises(ValueError, match=message):
        table.add(entry(**changed), NOWHERE, "")
    with pytest.raises(ValueError, match="no function"):
        table.add(entry(), 0, "")
    assert len(table) == 0


@pytest.mark.parametrize("name", [*recipes.SIZES, *recipes.SCHEDULE, "kernel", "mr", "nr", "parts", "epilogue"])
def test_what_is_missing_is_told(name):
    x = entry()
    del x[name]
    with pytest.raises(ValueError, match=name):
        _runtime.specialized.Kernels().add(x, NOWHERE, "")


def test_what_no_kernel_is_composed_for():
    for product in (asked("mk,kn->mn", m=4, n=4, k=0), asked("mk,kn->mn", m=0, n=4, k=4)):
        assert recipes.why_not(_runtime.plan(*product.arguments, 1)) is not None
    several = asked("mij,jin->mn", m=20, n=21, i=17, j=40)
    assert recipes.why_not(_runtime.plan(*several.arguments, 1)) is not None
