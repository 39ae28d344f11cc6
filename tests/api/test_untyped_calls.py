"""Which products become calls that need no typed FFI, and that nothing but their cost is different."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import run_python

import jax_nano
from jax_nano._core import custom_calls, native

pytestmark = pytest.mark.skipif(not custom_calls.UNTYPED, reason="this jaxlib takes typed calls only")

DESCRIPTION = 'backend_config="jax_nano abi='


def calls(fun: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """How many calls of a compiled program are typed, and how many are not."""
    text = jax.jit(fun).lower(*args).compile().as_text()
    ours = [line for line in text.splitlines() if 'custom_call_target="jax_nano_' in line]
    typed = sum("api_version=API_VERSION_TYPED_FFI" in line for line in ours)
    untyped = sum("api_version=API_VERSION_STATUS_RETURNING_UNIFIED" in line and DESCRIPTION in line for line in ours)
    assert typed + untyped == len(ours)
    return typed, untyped


@pytest.fixture
def typed_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A function that makes every call that is lowered from then on a typed one."""

    def switch() -> None:
        monkeypatch.setattr(custom_calls, "UNTYPED", False)
        native.untyped_call.cache_clear()
        jax.clear_caches()

    yield switch
    monkeypatch.undo()
    native.untyped_call.cache_clear()
    jax.clear_caches()


def square(n: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((n, n), jnp.float32)


def test_what_one_thread_computes() -> None:
    assert calls(jax_nano.matmul, square(8), square(8)) == (0, 1)
    assert calls(jax_nano.matmul, square(48), square(48)) == (0, 1)
    assert calls(jax_nano.matmul, square(256), square(256)) == (1, 0)
    layer = partial(jax_nano.linear, activation="relu")
    assert calls(lambda x, w: layer(x, w, x[0], residual=x), square(8), square(8)) == (0, 1)
    assert calls(lambda x, w: layer(x, w, x[0], residual=x), square(256), square(256)) == (1, 0)
    assert calls(jax.grad(lambda a, b: jax_nano.matmul(a, b).sum(), (0, 1)), square(8), square(8)) == (0, 2)
    assert calls(jax.vmap(jax_nano.matmul), *[jax.ShapeDtypeStruct((5, 8, 8), jnp.float32)] * 2) == (0, 1)


def test_accelerated_programs() -> None:
    def dots(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.tanh(a @ b) @ b

    with jax_nano.accelerate():
        assert calls(dots, square(8), square(8)) == (0, 2)
        assert calls(lambda a, b: jax.nn.relu(a @ b), square(8), square(8)) == (0, 1)
        assert calls(lambda a, b: dots(a, b) * 1, square(256), square(256)) == (2, 0)


def test_symbolic_shapes_are_typed() -> None:
    """Also where only one of the sizes is symbolic: the description would not know it."""
    for shapes in ("m, 8", "8, 8"), ("8, k", "k, 8"), ("b, 8, 8", "b, 8, 8"):
        scope = export.SymbolicScope()
        specs = [jax.ShapeDtypeStruct(export.symbolic_shape(x, scope=scope), jnp.float32) for x in shapes]
        text = export.export(jax.jit(jax_nano.matmul), disabled_checks=jax_nano.export_checks())(*specs).mlir_module()
        assert text.count("@jax_nano_dot_general") == 1
        assert "jax_nano abi=" not in text


def test_a_jaxlib_that_takes_typed_calls_only(typed_only: Callable[[], None]) -> None:
    typed_only()
    assert calls(jax_nano.matmul, square(8), square(8)) == (1, 0)
    assert calls(jax_nano.linear, square(8), square(8)) == (1, 0)
    with jax_nano.accelerate():
        assert calls(lambda a, b: a @ b, square(8), square(8)) == (1, 0)
        assert calls(lambda a, b: jax.nn.relu(a @ b), square(8), square(8)) == (1, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("spec", ["mk,kn->mn", "bmk,bkn->bmn", "km,kn->nm", "mxk,xkn->mn", "mk,k->m"])
def test_bits_are_those_of_the_typed_call(
    spec: str, dtype: str, typed_only: Callable[[], None], rng: np.random.Generator
) -> None:
    sizes = {"m": 7, "n": 13, "k": 9, "b": 3, "x": 2}
    with jax.enable_x64(dtype == "float64"):
        operands = [
            jnp.asarray(np.round(4 * reference.random(rng, [sizes[x] for x in term])) if dtype == "int8" else
                        reference.random(rng, [sizes[x] for x in term]), dtype)
            for term in spec.split("->")[0].split(",")
        ]  # fmt: skip
        fun = partial(jax_nano.einsum, spec)
        assert calls(fun, *operands) == (0, 1)
        got = np.asarray(jax.jit(fun)(*operands))
        typed_only()
        assert calls(fun, *operands) == (1, 0)
        assert np.asarray(jax.jit(fun)(*operands)).tobytes() == got.tobytes()


@pytest.mark.parametrize("scale", [1.0, -0.0, 0.1, np.inf])
@pytest.mark.parametrize("activation", ["none", "gelu", "tanh"])
def test_bits_of_epilogues(
    activation: str, scale: float, typed_only: Callable[[], None], rng: np.random.Generator
) -> None:
    x, w, b, r = (jnp.asarray(reference.random(rng, shape)) for shape in ((7, 9), (9, 13), (13,), (7, 13)))

    def fun(x: Any, w: Any, b: Any, r: Any) -> Any:
        name = None if activation == "none" else activation
        return [
            jax_nano.linear(x, w, bias, activation=name, scale=scale, residual=residual)
            for bias in (None, b)
            for residual in (None, r)
        ]

    got = jax.jit(fun)(x, w, b, r)
    assert calls(fun, x, w, b, r) == (0, 4)
    typed_only()
    assert calls(fun, x, w, b, r) == (4, 0)
    for ours, typed in zip(got, jax.jit(fun)(x, w, b, r), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(typed).tobytes()


def test_the_cost_analysis_counts_it() -> None:
    n = 8
    ours = jax.jit(jax_nano.matmul).lower(square(n), square(n))
    assert ours.cost_analysis()["flops"] == 2 * n**3
    assert ours.compile().cost_analysis()["flops"] == 2 * n**3


def test_a_program_edited_by_hand(rng: np.random.Generator) -> None:
    """The text that JAX prints, with another description: an error of the run, and the next run is right."""
    a, b = (jnp.asarray(reference.random(rng, (8, 8))) for _ in range(2))
    text = jax.jit(jax_nano.matmul).lower(a, b).as_text()
    (description,) = re.findall(r'backend_config = "([^"]*)"', text)
    edits = {
        "": "damaged",
        description[:-1]: "damaged",
        description.replace("8,8", "8,9", 1): "damaged",
        description.replace("float32", "float64"): "damaged",
        description.replace("dot_general", "linear"): "damaged",
        "\\00" + description: "damaged",
        "{abi = 1 : i64}": "damaged",
        description.replace(f"abi={native.ABI}", "abi=99"): f"asks for ABI 99, the installed one is {native.ABI}",
    }
    for edit, message in edits.items():
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            run_text(text.replace(description, edit), a, b)
    np.testing.assert_array_equal(run_text(text, a, b), jax_nano.matmul(a, b))


def run_text(text: str, *args: jax.Array) -> Any:
    """What a StableHLO module gives on the first CPU device."""
    client, device = jax.devices("cpu")[0].client, jax.devices("cpu")[0]
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax.extend.mlir import ir

    with mlir.make_ir_context() as context:
        module = ir.Module.parse(text, context)
        devices = xla_client.DeviceList((device,))
        loaded = client.compile_and_load(module, devices, xla_client.CompileOptions())
    (out,) = loaded.execute_sharded([jax.device_put(x, device) for x in args]).disassemble_into_single_device_arrays()
    return np.asarray(out[0])


def test_exported_programs_have_typed_calls(tmp_path: Path, rng: np.random.Generator) -> None:
    """Also those that another process exported, whose cached executables are found; their gradients too."""
    a, b = (reference.random(rng, shape) for shape in ((9, 17), (17, 5)))
    exported = export.export(
        jax.jit(lambda a, b: jax_nano.linear(jnp.sin(a), b, activation="tanh")),
        disabled_checks=jax_nano.export_checks(),
    )(a, b)
    assert "@jax_nano_linear" in exported.mlir_module()
    assert "jax_nano abi=" not in exported.mlir_module()
    assert calls(lambda a, b: jax_nano.linear(jnp.sin(a), b, activation="tanh"), a, b) == (0, 1)
    assert calls(exported.call, a, b) == (1, 0)
    (tmp_path / "program").write_bytes(exported.serialize(vjp_order=1))
    np.savez(tmp_path / "data.npz", a=a, b=b, want=exported.call(a, b))
    for expected in ("0", "1"):
        hits = run_python(
            """
            import sys
            import jax, numpy as np, jax_nano
            from jax import export
            hits = []
            listen = lambda event, **_: hits.append(event) if "cache_hits" in event else None
            jax.monitoring.register_event_listener(listen)
            jax.config.update("jax_compilation_cache_dir", sys.argv[2])
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
            data = np.load(sys.argv[1] + "/data.npz")
            program = export.deserialize(bytearray(open(sys.argv[1] + "/program", "rb").read()))
            got = jax.jit(program.call)(data["a"], data["b"])
            assert np.asarray(got).tobytes() == data["want"].tobytes()
            print(len(hits))
            grads = jax.grad(lambda a: program.call(a, data["b"]).sum())(data["a"])
            assert np.isfinite(np.asarray(grads)).all()
            """,
            str(tmp_path),
            str(tmp_path / "cache"),
        )
        assert hits.strip() == expected


def test_many_threads_at_once(rng: np.random.Generator) -> None:
    """One executable with several calls, some of which are the same."""
    xs = [jnp.asarray(reference.random(rng, (n, n))) for n in (3, 8, 8, 16)]

    @jax.jit
    def fun(xs: list[jax.Array]) -> list[jax.Array]:
        return [jax_nano.matmul(jax_nano.matmul(x, x), x) for x in xs]

    want = [np.asarray(y).tobytes() for y in fun(xs)]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(100):
            wrong.extend(i for i, y in enumerate(fun(xs)) if np.asarray(y).tobytes() != want[i])

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_several_devices(rng: np.random.Generator) -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    a, b = reference.random(rng, (32, 8)), reference.random(rng, (8, 12))
    x, y = jax.device_put(a, NamedSharding(mesh, P("x"))), jax.device_put(b, NamedSharding(mesh, P()))
    text = jax.jit(jax_nano.matmul).lower(x, y).compile().as_text()
    assert "lhs=float32[8,8]" in text  # a shard's shape
    for _ in range(3):
        reference.expected("mk,kn->mn", a, b).check(jax.jit(jax_nano.matmul)(x, y))


def test_loops_and_branches(rng: np.random.Generator) -> None:
    a = jnp.asarray(reference.random(rng, (8, 8)))
    loop = jax.jit(lambda a: jax.lax.fori_loop(0, 5, lambda _, x: jax_nano.matmul(x, a) / 4, a))
    want = np.asarray(a, np.float64)
    for _ in range(5):
        want = want @ np.asarray(a, np.float64) / 4
    np.testing.assert_allclose(loop(a), want, rtol=1e-4, atol=1e-5)
    branch = jax.jit(lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: jax_nano.matmul(a, a), lambda a: a, a))
    reference.expected("mk,kn->mn", np.abs(a), np.abs(a)).check(branch(jnp.abs(a)))


def test_a_process_has_untyped_calls_once_it_writes_one(tmp_path: Path) -> None:
    """Not if it runs exported programs alone, which somebody may have changed into untyped ones."""
    a = jnp.ones((8, 8))
    exported = export.export(jax.jit(jax_nano.matmul), disabled_checks=jax_nano.export_checks())(a, a)
    (tmp_path / "program").write_bytes(exported.serialize())
    text = jax.jit(jax_nano.matmul).lower(a, a).as_text()
    (tmp_path / "text").write_text(text)
    run_python(
        """
        import pathlib, sys
        import jax, jax.numpy as jnp, jax_nano, numpy as np
        from jax import export
        from jax._src.interpreters import mlir
        from jax._src.lib import xla_client
        from jax.extend.mlir import ir

        folder = pathlib.Path(sys.argv[1])
        a = jnp.full((8, 8), 2.0)
        program = export.deserialize(bytearray((folder / "program").read_bytes()))
        np.testing.assert_array_equal(program.call(a, a), a @ a)
        device = jax.devices("cpu")[0]

        def compiled():
            with mlir.make_ir_context() as context:
                module = ir.Module.parse((folder / "text").read_text(), context)
                devices = xla_client.DeviceList((device,))
                return device.client.compile_and_load(module, devices, xla_client.CompileOptions())

        try:
            compiled().execute_sharded([a, a])
        except jax.errors.JaxRuntimeError as error:
            assert "jax_nano_dot_general" in str(error), error
        else:
            raise AssertionError
        jax_nano.matmul(a, a)
        (out,) = compiled().execute_sharded([a, a]).disassemble_into_single_device_arrays()
        np.testing.assert_array_equal(out[0], a @ a)
        """,
        str(tmp_path),
    )


def test_the_user_forbids_them() -> None:
    run_python(
        """
        import jax, jax.numpy as jnp, jax_nano
        a = jnp.ones((8, 8))
        with jax_nano.accelerate():
            text = jax.jit(lambda a: jax_nano.linear(jax_nano.matmul(a, a), a) @ a).lower(a).compile().as_text()
        assert text.count("API_VERSION_TYPED_FFI") == 3 and "jax_nano abi=" not in text, text
        """,
        env={"JAX_NANO_UNTYPED": "off"},
    )
