"""What the report, JAX_NANO_VERBOSE and `python -m jax_nano run` say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import fresh_environment, run_python

import jax_nano
from jax_nano._core import native as _native
from jax_nano._dispatch import decision


@pytest.fixture(autouse=True)
def _cleared() -> None:
    jax_nano.clear_report()


def test_nothing_compiled() -> None:
    assert str(jax_nano.report()) == "jax_nano: no product was compiled"


def test_accelerated_and_own_products() -> None:
    a, b = np.ones((40, 24), np.float32), np.ones((24, 56), np.float32)

    def model(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sin(a @ b) + jax_nano.matmul(jnp.cos(a), b)

    with jax_nano.accelerate():
        jax.jit(model).lower(a, b).compile()
    text = str(jax_nano.report())
    head, program, *lines = text.splitlines()
    assert head == "jax_nano: 2 products compiled, 2 run on kernels, 0 are left to XLA"
    assert program == "jit_model"
    native = _native.runtime()
    assert native is not None
    plan = native.plan((40, 24), (24, 56), (0, 1), (1, 2), (0, 2), "float32", "float32", "float32", 1)
    for line in lines:
        assert "1x ab,bc->ac  float32[40,24] x float32[24,56] -> float32[40,56]: " in line
        assert plan["kernel"] in line
        assert f" {plan['target']}, " in line
        assert f"blocks {plan['mc']} x {plan['nc']} x {plan['kc']} of 40 x 56 x 24" in line
        assert re.search(r"thread; predicted \S+ \S+ by a kernel, \S+ \S+ by XLA", line)
    assert sum("jit(model)/dot_general" in line for line in lines) == 1
    assert sum("jax_nano_dot_general]" in line for line in lines) == 1


def test_paths_without_blocks_are_named() -> None:
    few, square = np.ones((2, 1024), np.float32), np.ones((1024, 1024), np.float32)
    with jax_nano.accelerate():
        jax.jit(lambda a, b: a @ b).lower(few, square).compile()
        jax.jit(lambda a, b: a @ b.T).lower(few, square).compile()
    text = str(jax_nano.report())
    assert ", sweeps, " in text
    assert ", inner products, " in text
    assert "blocks 0 x" not in text


def test_what_is_declined_has_a_reason() -> None:
    with jax_nano.accelerate():
        for dtype in (np.int32, np.complex64):
            jax.jit(lambda a: a @ a).lower(np.ones((16, 16), dtype)).compile()
    text = str(jax_nano.report())
    assert "2 products compiled, 0 run on kernels, 2 are left to XLA" in text
    assert "left to XLA: no kernel for int32 x int32 -> int32" in text
    assert "left to XLA: no kernel reads this dtype or layout" in text


@pytest.mark.parametrize("function", ["matmul", "linear"])
def test_a_product_that_is_declined_is_listed_once(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """jax_nano.matmul says so when it is lowered; an accelerated program's dots are looked at when it is compiled."""
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))
    a = np.ones((2, 2), np.float32)
    for on in (True, False):
        jax_nano.clear_report()
        with jax_nano.accelerate(on):
            jax.jit(lambda a: getattr(jax_nano, function)(a, a) + 1).lower(a).compile()
        assert "1 products compiled, 0 run on kernels, 1 are left to XLA" in jax_nano.report()


@pytest.mark.parametrize(("env", "devices", "threads"), [({"NPROC": "3"}, 1, 3), ({"NPROC": "1"}, 4, 4), ({}, 1, 0)])
def test_the_number_of_threads_is_that_of_xlas_pool(env: dict[str, str], devices: int, threads: int) -> None:
    """Which has a name for each of its threads."""
    printed = run_python(
        f"""
        import glob, jax, jax.numpy as jnp, jax_nano
        jax.config.update("jax_num_cpu_devices", {devices})
        with jax_nano.accelerate():
            (jnp.ones((1024, 1024)) @ jnp.ones((1024, 1024))).block_until_ready()
        names = [open(path).read() for path in glob.glob("/proc/self/task/*/comm")]
        print(sum("XLAEigen" in name for name in names), jax_nano.report())
        """,
        env=env,
    )
    count = int(printed.split()[0])
    assert count == threads or not threads
    assert f"{count} thread" in printed


def test_epilogues() -> None:
    x, w, b = np.ones((24, 40), np.float32), np.ones((40, 56), np.float32), np.ones(56, np.float32)
    with jax_nano.accelerate():
        jax.jit(lambda x, w, b: jax.nn.relu(0.5 * (x @ w) + b)).lower(x, w, b).compile()
    jax.jit(lambda x, w, b: jax_nano.linear(x, w, b, activation="relu", scale=0.5)).lower(x, w, b)
    assert str(jax_nano.report()).count("-> float32[24,56], then scale 0.5, bias, relu: ") == 2


def test_layout_and_count() -> None:
    a = np.ones((24, 40), np.float32)
    with jax_nano.accelerate():
        for _ in range(2):
            jax.jit(lambda a: a.T @ a).lower(a).compile()
    assert "2x ab,ac->bc" in jax_nano.report()


def test_verbose() -> None:
    code = "import numpy as np, jax_nano; jax_nano.matmul(np.ones((64, 32), np.float32), np.ones((32, 16), np.float32))"
    for value, lines in (("1", 1), ("0", 0)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=fresh_environment({"JAX_NANO_VERBOSE": value}),
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        )
        found = [line for line in done.stderr.splitlines() if line.startswith("jax_nano: ab,bc->ac  float32[64,32]")]
        assert len(found) == lines, done.stderr


SCRIPT = """
import os, sys
os.environ["JAX_ENABLE_X64"] = "1"  # before JAX is imported, as programs do
import jax, jax.numpy as jnp

def main():
    assert __name__ == "__main__" and sys.modules["__main__"].main is main
    print(sys.argv[1:], sys.path[0], jax.config.jax_enable_x64)
    a = jnp.ones((64, 64), jnp.float32)
    print(float((a @ a).sum()))
    how = sys.argv[-1]
    if how == "raise":
        raise ArithmeticError("on purpose")
    if how.startswith("exit"):
        sys.exit(int(how[4:]))

main()
"""


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, "-P", "-m", "jax_nano", "run", *args],
        env=fresh_environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("named", [["program.py"], ["-m", "program"]], ids=["script", "module"])
@pytest.mark.parametrize(("how", "status"), [("return", 0), ("raise", 1), ("exit3", 3), ("exit0", 0)])
def test_run(named: list[str], how: str, status: int, tmp_path: Path) -> None:
    done = run(tmp_path, *named, "-x", "--help", how)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines() == [f"['-x', '--help', '{how}'] {tmp_path} True", "262144.0"]
    assert "jax_nano: 1 products compiled, 1 run on kernels, 0 are left to XLA" in done.stderr
    assert ("ArithmeticError: on purpose" in done.stderr) == (how == "raise")
    if how == "raise":  # as from python itself
        assert "_tools/run.py" not in done.stderr
        assert "runpy" not in done.stderr


def test_run_without_a_program(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "expected a script" in done.stderr


PROGRAMS = {
    "no such file": (["missing.py"], 1, "FileNotFoundError"),
    "no such module": (["-m", "missing"], 1, "No module named missing"),
    "not Python": (["words.py"], 1, "SyntaxError"),
    "a sentence": (["leaves.py"], 1, "on purpose, in words"),
    "a package": (["-m", "package", "one", "two"], 0, "jax_nano: 1 products compiled"),
    "a module of a package": (["-m", "package.inner"], 0, "jax_nano: the program did not use JAX"),
    "closed streams": (["closes.py"], 0, ""),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_run_of_odd_programs(name: str, tmp_path: Path) -> None:
    files = {
        "words.py": "these are words\n",
        "leaves.py": "import sys\nsys.exit('on purpose, in words')\n",
        "closes.py": "import sys, jax.numpy as jnp\njnp.ones((64, 64)) @ jnp.ones((64, 64))\nsys.stdout.close()\n",
        "package/__init__.py": "",
        "package/inner.py": "assert __name__ == '__main__' and __package__ == 'package'\n",
        "package/__main__.py": "import sys\nfrom . import inner2\nassert sys.argv[1:] == ['one', 'two'], sys.argv\n",
        "package/inner2.py": "import jax.numpy as jnp\nprint((jnp.ones((64, 64)) @ jnp.ones((64, 64))).sum())\n",
    }
    (tmp_path / "package").mkdir()
    for path, text in files.items():
        (tmp_path / path).write_text(text)
    arguments, status, message = PROGRAMS[name]
    done = run(tmp_path, *arguments)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "_tools/run.py" not in done.stderr


def test_a_program_that_never_imports_the_package() -> None:
    run_python(
        """
        import sys
        import jax, numpy as np
        a = np.ones((64, 64), np.float32)
        assert "jax_nano_dot_general" in jax.jit(lambda a: a @ a).lower(a).compile().as_text()
        """,
        env={"JAX_NANO_ACCELERATE": "1"},
    )


def compiled(how: str) -> jax_nano.Report:
    a = np.ones((24, 40), np.float32)
    if how == "own":
        jax.jit(lambda a: jax_nano.matmul(a.T, a)).lower(a)
    else:
        with jax_nano.accelerate():
            jax.jit(lambda a: jnp.dot(a.T, a)).lower(a).compile()
    return jax_nano.report()


@pytest.mark.parametrize("how", ["own", "accelerated"])
def test_a_report_is_an_object(how: str) -> None:
    report = compiled(how)
    (product,) = report.ran
    assert report.left == ()
    assert len(report) == 1
    assert list(report) == [product]
    assert (product.kind, product.count, product.reason) == ("product", 1, None)
    assert product.what == "ab,ac->bc"
    assert product.operands == ("float32[24,40]", "float32[24,40]")
    assert product.result == "float32[40,40]"
    assert product.flops == 2 * 24 * 40 * 40
    assert product.kernel is not None
    assert product.kernel in str(report)
    assert product.seconds is None or 0 < product.seconds < 1
    assert repr(report) == str(report)
    assert json.loads(json.dumps(report.to_dict()))["products"][0]["result"] == "float32[40,40]"
    assert "float32[24,40] x float32[24,40]" in report._repr_html_()


@pytest.mark.parametrize("how", ["own", "accelerated"])
def test_products_name_the_users_line(how: str) -> None:
    (product,) = compiled(how)
    assert product.file == __file__
    assert product.line is not None
    text = Path(__file__).read_text().splitlines()[product.line - 1]
    assert ("jax_nano.matmul(a.T, a)" if how == "own" else "jnp.dot(a.T, a)") in text


def test_a_library_is_not_the_users_line() -> None:
    nn = pytest.importorskip("flax.linen")
    layer = nn.Dense(64)
    x = np.ones((64, 64), np.float32)
    with jax_nano.accelerate():
        variables = layer.init(jax.random.key(0), x)
        jax_nano.clear_report()
        jax.jit(lambda v, x: layer.apply(v, x)).lower(variables, x).compile()
    (product,) = jax_nano.report()
    assert product.file == __file__


def test_what_is_left_has_a_line_and_a_reason() -> None:
    with jax_nano.accelerate():
        jax.jit(lambda a: a @ a).lower(np.ones((16, 16), np.int32)).compile()
    (product,) = jax_nano.report().left
    assert product.kernel is None
    assert product.reason is not None
    assert "no kernel for int32" in product.reason
    assert product.file == __file__


def test_a_report_as_pandas() -> None:
    pytest.importorskip("pandas")
    table = compiled("own").to_pandas()
    assert list(table["result"]) == ["float32[40,40]"]
