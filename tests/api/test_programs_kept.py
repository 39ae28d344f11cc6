"""Programs that outlive a trace: AOT compilation, donation, jax.export, the persistent compilation cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import export
from programs import run_python

import jax_nano
from jax_nano._core import native

F32 = jnp.float32
LOAD = """
import sys
import jax, jax.numpy as jnp, numpy as np, jax_nano
from jax import export
exported = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
data = np.load(sys.argv[2])
a, b = data["a"], data["b"]
"""


def arrays(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [reference.random(rng, shape) for shape in shapes]


def test_lower_and_compile_ahead(rng: np.random.Generator) -> None:
    a, b = arrays(rng, (9, 17), (17, 25))
    spec = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (a, b)]
    compiled = jax.jit(jax_nano.matmul).lower(*spec).compile()
    reference.expected("mk,kn->mn", a, b).check(compiled(a, b))
    with pytest.raises(TypeError):
        compiled(a, a)
    traced = jax.jit(jax_nano.matmul).trace(*spec)
    assert traced.lower(lowering_platforms=("cpu",)).as_text().count("jax_nano_dot_general") == 1
    assert "dot_general" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donation(rng: np.random.Generator) -> None:
    """A donated operand may hold another result, never the product that still reads it."""
    a, b = arrays(rng, (16, 16), (16, 16))
    step = jax.jit(lambda a, b: (jax_nano.matmul(a, b), a + 1), donate_argnums=0)
    donated = jnp.asarray(a)
    product, other = step(donated, b)
    assert donated.is_deleted()
    reference.expected("mk,kn->mn", a, b).check(product)
    np.testing.assert_array_equal(other, a + 1)
    alone = jax.jit(jax_nano.matmul, donate_argnums=0)(jnp.asarray(a), b)
    reference.expected("mk,kn->mn", a, b).check(alone)


def save(tmp_path: Path, exported: Any, a: np.ndarray, b: np.ndarray, vjp_order: int = 0) -> list[str]:
    (tmp_path / "program").write_bytes(exported.serialize(vjp_order=vjp_order))
    np.savez(tmp_path / "data.npz", a=a, b=b)
    return [str(tmp_path / "program"), str(tmp_path / "data.npz")]


def specs(*shapes: str) -> list[jax.ShapeDtypeStruct]:
    scope = export.SymbolicScope()
    return [jax.ShapeDtypeStruct(export.symbolic_shape(x, scope=scope), F32) for x in shapes]


def test_export_needs_the_check_to_be_disabled() -> None:
    with pytest.raises(ValueError, match="jax_nano_dot_general"):
        export.export(jax.jit(jax_nano.matmul))(*specs("8, 8", "8, 8"))


def test_export_with_gradients_and_symbolic_shapes(tmp_path: Path, rng: np.random.Generator) -> None:
    exported = export.export(jax.jit(jax_nano.matmul), disabled_checks=jax_nano.export_checks())(
        *specs("m, k", "k, 25")
    )
    a, b = arrays(rng, (9, 17), (17, 25))
    reference.expected("mk,kn->mn", a, b).check(exported.call(a, b))
    files = save(tmp_path, exported, a, b, vjp_order=2)
    run_python(
        LOAD
        + """
fun = lambda a, b: jnp.sin(exported.call(a, b)).sum()
want = lambda a, b: jnp.sin(a @ b).sum()
for shape in ((9, 17), (1, 17), (40, 17)):
    x = np.resize(a, shape)
    np.testing.assert_allclose(exported.call(x, b), x @ b, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(jax.grad(fun, (0, 1))(x, b), jax.grad(want, (0, 1))(x, b), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
second = lambda f: jax.grad(lambda a: (jax.grad(f)(a, b) ** 2).sum())(a)
np.testing.assert_allclose(second(fun), second(want), rtol=1e-3, atol=1e-3)
assert "jax_nano_dot_general" in jax.jit(exported.call).lower(a, b).compile().as_text()
""",
        *files,
    )


def test_export_of_symbolic_batches(rng: np.random.Generator) -> None:
    exported = export.export(
        jax.jit(partial(jax_nano.einsum, "bqhd,bkhd->bhqk")), disabled_checks=jax_nano.export_checks()
    )(*specs("b, q, h, 8", "b, k, h, 8"))
    a, b = arrays(rng, (2, 5, 3, 8), (2, 7, 3, 8))
    reference.expected("bqhd,bkhd->bhqk", a, b).check(exported.call(a, b))
    matmul = export.export(jax.jit(jax_nano.matmul), disabled_checks=jax_nano.export_checks())
    a, b = arrays(rng, (4, 5, 6), (4, 6, 7))
    reference.expected("bmk,bkn->bmn", a, b).check(matmul(*specs("b, m, k", "b, k, n")).call(a, b))


def test_export_for_several_platforms(tmp_path: Path, rng: np.random.Generator) -> None:
    def fun(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax_nano.matmul(jnp.sin(a).T, b)

    exported = export.export(jax.jit(fun), platforms=("cpu", "tpu"), disabled_checks=jax_nano.export_checks())(
        *specs("17, m", "17, n")
    )
    a, b = arrays(rng, (17, 9), (17, 25))
    run_python(
        LOAD
        + """
np.testing.assert_allclose(exported.call(a, b), np.sin(a).T @ b, rtol=1e-4, atol=1e-4)
jax.grad(lambda a: exported.call(a, b).sum())(a)
assert "jax_nano_dot_general" in jax.jit(exported.call).lower(a, b).compile().as_text()
""",
        *save(tmp_path, exported, a, b, vjp_order=1),
    )
    tpu = export.export(jax.jit(fun), platforms=("tpu",))(*specs("17, m", "17, n"))
    assert "@jax_nano_dot_general" not in tpu.mlir_module()


def test_export_of_sharded_programs_is_left_to_xla(tmp_path: Path, rng: np.random.Generator) -> None:
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    a, b = arrays(rng, (16, 32), (32, 24))
    x = jax.device_put(a, NamedSharding(mesh, P("x")))
    y = jax.device_put(b, NamedSharding(mesh, P()))
    exported = export.export(jax.jit(jax_nano.matmul))(x, y)
    reference.expected("mk,kn->mn", a, b).check(jax.jit(exported.call)(x, y))


def test_without_the_package_a_program_says_what_is_missing(tmp_path: Path, rng: np.random.Generator) -> None:
    exported = export.export(jax.jit(jax_nano.matmul), disabled_checks=jax_nano.export_checks())(
        *specs("9, 17", "17, 25")
    )
    run_python(
        # Where the package is installed, JAX calls its plugin, and with that knows the calls.
        LOAD.replace(", jax_nano", "").replace("import sys", "import sys; sys.modules['jax_nano'] = None", 1)
        + """
try:
    exported.call(a, b)
except jax.errors.JaxRuntimeError as error:
    assert "jax_nano_dot_general" in str(error), error
else:
    raise AssertionError
""",
        *save(tmp_path, exported, *arrays(rng, (9, 17), (17, 25))),
    )


def test_a_pickled_or_exported_program_needs_the_import_only(tmp_path: Path, rng: np.random.Generator) -> None:
    """Before JAX or after it, and no function of jax_nano."""
    exported = export.export(jax.jit(jax_nano.matmul), disabled_checks=jax_nano.export_checks())(
        *specs("9, 17", "17, 25")
    )
    files = save(tmp_path, exported, *arrays(rng, (9, 17), (17, 25)))
    for order in ("import jax_nano, jax", "import jax; import jax.numpy; import jax_nano"):
        run_python(
            order
            + LOAD.replace(", jax_nano", "")
            + """
assert not jax._src.xla_bridge.backends_are_initialized()
np.testing.assert_allclose(exported.call(a, b), a @ b, rtol=1e-4, atol=1e-4)
assert "jax_nano.api" not in sys.modules
""",
            *files,
        )


CACHED = """
import sys
import jax, jax.numpy as jnp, numpy as np, jax_nano
from jax_nano._core import native
if len(sys.argv) > 2:  # as another build would say
    native.build = lambda: sys.argv[2]
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
a, b = np.arange(9 * 170, dtype=np.float32).reshape(9, 170) % 7, np.ones((170, 25), np.float32)
programs = [
    lambda a, b: jnp.sin(jax_nano.matmul(a, b)),
    lambda a, b: jnp.sin(jax_nano.linear(a, b)),
    jax_nano.accelerate(lambda a, b: jnp.sin(a @ b)),
]
for i, program in enumerate(programs):
    hits.clear()
    call = jax_nano.accelerate(i == 2)(jax.jit(program))
    np.testing.assert_allclose(call(a, b), np.sin(a @ b), rtol=1e-4, atol=1e-4)
    print(len(hits), end=" ")
"""


def test_persistent_cache_across_processes(tmp_path: Path) -> None:
    assert run_python(CACHED, str(tmp_path)).split() == ["0"] * 3
    assert run_python(CACHED, str(tmp_path)).split() == ["1"] * 3


def test_builds_share_no_entry_of_the_persistent_cache(tmp_path: Path) -> None:
    first, second = "0.1.0 0123456789ab", "0.1.0 ba9876543210"
    assert run_python(CACHED, str(tmp_path), first).split() == ["0"] * 3
    assert run_python(CACHED, str(tmp_path), second).split() == ["0"] * 3
    assert run_python(CACHED, str(tmp_path), first).split() == ["1"] * 3


def test_the_build_is_told_from_what_it_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version, digest = native.build().split()
    assert version == jax_nano.__version__
    assert len(digest) == 12
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    texts = ["", "a = 1", "a = 2"]
    found = []
    for text in texts:
        (tmp_path / "native.py").write_text(text)
        found.append(native.build.__wrapped__())
    assert len({*found, native.build()}) == 4
    assert native.build.__wrapped__() == found[-1]


def test_another_build_runs_what_one_exported(tmp_path: Path, rng: np.random.Generator) -> None:
    """The name of the build is in the program, and is not looked at."""
    exported = export.export(jax.jit(jax_nano.matmul), disabled_checks=jax_nano.export_checks())(
        *specs("9, 17", "17, 25")
    )
    assert native.build() in exported.mlir_module()
    a, b = arrays(rng, (9, 17), (17, 25))
    run_python(
        LOAD
        + """
from jax_nano._core import native
native.build = lambda: "99.9 000000000000"
both = jax.jit(lambda a, b: exported.call(a, b) + jax_nano.matmul(a, b))
np.testing.assert_allclose(both(a, b), 2 * (a @ b), rtol=1e-4, atol=1e-4)
""",
        *save(tmp_path, exported, a, b),
    )


def test_pickled_executable(tmp_path: Path) -> None:
    """In processes with one device: JAX 0.10 cannot load one that uses fewer than there are."""
    run_python(
        """
        import pickle, sys
        import jax, numpy as np, jax_nano
        from jax.experimental import serialize_executable
        a, b = np.ones((9, 17), np.float32), np.ones((17, 25), np.float32)
        compiled = jax.jit(jax_nano.matmul).lower(a, b).compile()
        with open(sys.argv[1], "wb") as file:
            pickle.dump(serialize_executable.serialize(compiled), file)
        """,
        str(tmp_path / "executable"),
    )
    run_python(
        """
        import pickle, sys
        import jax, numpy as np, jax_nano
        from jax.experimental import serialize_executable
        jax_nano.register()
        with open(sys.argv[1], "rb") as file:
            loaded = serialize_executable.deserialize_and_load(*pickle.load(file))
        a, b = np.ones((9, 17), np.float32), np.ones((17, 25), np.float32)
        np.testing.assert_array_equal(loaded(a, b), a @ b)
        """,
        str(tmp_path / "executable"),
    )
