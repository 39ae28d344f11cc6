"""A JAX newer than those that were tested: what is checked of it, what is said, and who computes then."""

from __future__ import annotations

import jax
import pytest
from programs import run_python

from jax_nano import _runtime
from jax_nano._core import jax_compat, tested_jax

# JAX as it is, under a number that no release has had.
NEWER = """
    import warnings, jax, jaxlib.version
    jax.__version__, jax.__version_info__ = "0.99.1", (0, 99, 1)
    warnings.simplefilter("always")
    import numpy as np, jax.numpy as jnp
    x = jnp.arange(128.0 * 128).reshape(128, 128) % 7
    def calls(fun):
        return "jax_nano_dot_general" in jax.jit(fun).lower(x, x).as_text()
    def said(use):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            use()
        return [str(w.message) for w in caught if "jax_nano" in str(w.message)]
"""

# A jaxlib whose headers tell another version of its FFI.
OTHER_FFI = """\
    import pathlib, sys, tempfile
    folder = pathlib.Path(tempfile.mkdtemp())
    header = folder / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text(f"#define XLA_FFI_API_MAJOR {sys.argv[1]}\\n#define XLA_FFI_API_MINOR {sys.argv[2]}\\n")
    jax.ffi.include_dir = lambda: str(folder)
"""


def test_this_jax_is_one_that_was_tested() -> None:
    """The numbers in tested_jax.py follow when a newer JAX is tested."""
    assert tested_jax.OLDEST <= jax.__version_info__[:2] <= tested_jax.NEWEST
    assert not tested_jax.IS_UNTESTED


def test_the_ffi_of_this_jaxlib_is_known_and_takes_our_calls() -> None:
    version = tested_jax.ffi_version()
    assert version is not None
    assert version >= (0, 3)
    assert tested_jax.ffi_fault(_runtime.FFI_API_VERSION) is None


@pytest.mark.parametrize(
    ("jaxlib", "fits"), [((0, 3), True), ((0, 9), True), ((0, 2), False), ((1, 3), False), (None, False)]
)
def test_ffi_versions(monkeypatch: pytest.MonkeyPatch, jaxlib: tuple[int, int] | None, fits: bool) -> None:
    monkeypatch.setattr(tested_jax, "ffi_version", lambda: jaxlib)
    assert (tested_jax.ffi_fault((0, 3)) is None) == fits


def test_a_newer_jax_is_used_with_one_warning() -> None:
    run_python(
        NEWER
        + """
    assert said(lambda: __import__("jax_nano")) == []  # an import alone is no use: JAX does it in every process
    import jax_nano
    (text,) = said(lambda: (jax_nano.matmul, jax_nano.einsum, jax_nano.accelerate))
    assert "0.10 to 0.12" in text and "JAX 0.99.1" in text and "products run on kernels" in text, text
    assert calls(jax_nano.matmul)
    np.testing.assert_array_equal(jax_nano.matmul(x, x), np.asarray(x) @ np.asarray(x))
        """
    )


@pytest.mark.parametrize("version", ["1 0", "0 2"])
def test_a_jaxlib_that_does_not_take_our_calls_computes_itself(version: str) -> None:
    run_python(
        NEWER.replace("    import numpy", OTHER_FFI + "    import numpy")  # before backends start, and JAX's plugins
        + """
    import jax_nano
    (text,) = said(lambda: (jax_nano.matmul, jax_nano.einsum))
    assert "XLA computes: its FFI has version " + ".".join(sys.argv[1:3]) in text, text
    assert not calls(jax_nano.matmul)
    np.testing.assert_array_equal(jax_nano.matmul(x, x), np.asarray(x) @ np.asarray(x))
    try:
        jax_nano.accelerate.enable()
    except RuntimeError as error:
        assert "its FFI has version" in str(error), error
    else:
        raise AssertionError
        """,
        *version.split(),
    )


def test_a_private_name_that_is_gone() -> None:
    """Functions of JAX's own stand in, and what has none says so."""
    run_python(
        NEWER
        + """
    from jax._src import dispatch
    import jax._src.numpy.util
    del jax._src.numpy.util.ensure_arraylike_tuple
    import jax_nano
    (text,) = said(lambda: (jax_nano.matmul, jax_nano.dot_general))
    assert "ensure_arraylike_tuple" in text, text
    assert jax_nano.matmul is jnp.matmul and jax_nano.dot_general is jax.lax.dot_general
    for use in (lambda: jax_nano.linear, lambda: jax_nano.accelerate):
        try:
            use()
        except ImportError as error:
            assert "JAX 0.99.1" in str(error) and "ensure_arraylike_tuple" in str(error), error
        else:
            raise AssertionError
        """
    )


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="older ones have no hook at all")
@pytest.mark.parametrize(
    ("owner", "name"), [("compiler", "backend_compile_and_load"), ("mlir", "lower_jaxpr_to_module")]
)
def test_acceleration_needs_hooks(monkeypatch: pytest.MonkeyPatch, owner: str, name: str) -> None:
    jax_compat.require_hlo_transformations()
    monkeypatch.setattr(getattr(jax_compat, owner), name, lambda module: module)  # of other parameters
    with pytest.raises(jax_compat.NoHook, match=f"which lacks {owner}.{name}"):
        jax_compat.require_hlo_transformations()
    monkeypatch.delattr(getattr(jax_compat, owner), name)
    with pytest.raises(jax_compat.NoHook, match=f"which lacks {owner}.{name}"):
        jax_compat.require_hlo_transformations()
