"""What importing does, and what happens where there is no extension."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import run_python

import jax_nano
from jax_nano import _runtime


def test_public_names_resolve() -> None:
    for name in jax_nano.__all__:
        assert getattr(jax_nano, name) is not None
        assert name in dir(jax_nano)
    assert jax_nano.__version__
    with pytest.raises(AttributeError, match="no_such_name"):
        jax_nano.no_such_name()


def test_importing_does_no_work() -> None:
    run_python(
        """
        import sys
        import jax_nano
        assert "jax" not in sys.modules and "numpy" not in sys.modules
        import jax_nano.codegen
        assert "jax_nano._runtime" not in sys.modules
        """
    )


def test_importing_registers_the_calls_once_there_is_jax() -> None:
    for order in ("import jax_nano, jax", "import jax, jax_nano"):
        run_python(
            f"""
            import sys
            {order}
            assert "jax_nano._runtime" in sys.modules
            assert "jax_nano._ops.dot_general" not in sys.modules and "google.protobuf" not in sys.modules
            jax.config.update("jax_num_cpu_devices", 3)  # refused once there is a backend
            assert jax.device_count() == 3
            assert jax.__spec__.loader is jax.__loader__ and "jax_nano" not in type(jax.__loader__).__module__
            """
        )


def test_using_does_not_start_a_backend() -> None:
    run_python(
        """
        import jax, jax_nano
        jax_nano.matmul
        jax.config.update("jax_num_cpu_devices", 3)  # refused once there is a backend
        assert jax.device_count() == 3
        """
    )


HIDE = """
    import sys
    class Hide:
        def find_spec(self, name, path, target=None):
            if name == "jax_nano._runtime":
                raise ImportError("hidden by the test")
    sys.meta_path.insert(0, Hide())
"""


def test_missing_extension_is_an_error_with_a_remedy() -> None:
    run_python(
        HIDE
        + """
    import jax_nano, jax_nano.codegen
    for use in (lambda: jax_nano.matmul, jax_nano.register):
        try:
            use()
        except ImportError as error:
            assert "pip install" in str(error) and "hidden by the test" in str(error), error
        else:
            raise AssertionError("silently fell back")
        """
    )


def test_other_platforms_compute_with_lax() -> None:
    run_python(
        HIDE
        + """
    import platform
    platform.machine = lambda: "arm64"
    import jax, jax.numpy as jnp, jax_nano
    x = jnp.arange(12.0).reshape(3, 4)
    assert (jax_nano.matmul(x, x.T) == x @ x.T).all()
    assert "dot_general" in jax.jit(jax_nano.matmul).lower(x, x.T).as_text()
    assert "jax_nano" not in jax.jit(jax_nano.matmul).lower(x, x.T).as_text()
    jax.grad(lambda x: jax_nano.einsum("ij,kj->", x, x))(x)
        """
    )


def test_gate_switch_in_the_environment() -> None:
    program = """
        import jax, jax.numpy as jnp, jax_nano
        x = jnp.ones((2, 2), jnp.float32)
        print("jax_nano_dot_general" in jax.jit(jax_nano.matmul).lower(x, x).as_text())
    """
    assert run_python(program).strip() == "False"
    assert run_python(program, env={"JAX_NANO_GATE": "off"}).strip() == "True"


def test_bad_target_is_reported_when_tracing() -> None:
    run_python(
        """
        import jax, jax.numpy as jnp, jax_nano
        x = jnp.ones((64, 64), jnp.float32)
        try:
            jax.jit(jax_nano.matmul).lower(x, x)
        except ValueError as error:
            assert "JAX_NANO_TARGET=pentium" in str(error), error
        else:
            raise AssertionError
        """,
        env={"JAX_NANO_TARGET": "pentium"},
    )


def test_the_oldest_supported_jaxlib_accepts_the_extension() -> None:
    """It was compiled with headers no newer than those of jaxlib 0.10, whichever one runs it now."""
    assert _runtime.FFI_API_VERSION <= (0, 3)


def test_package_is_the_installed_one() -> None:
    """A source tree on the path would have shadowed the extension."""
    folder = Path(jax_nano.__file__).parent
    assert list(folder.glob("_runtime*.so"))
