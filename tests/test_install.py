"""What stands between a stranger and an installed package, without a network: scripts/wheels tests the rest."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from programs import fresh_environment

from jax_nano import _runtime

ROOT = Path(__file__).parents[1]
PACKAGING = ROOT / "scripts" / "packaging"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_a_release_has_a_wheel_for_every_python() -> None:
    """What cibuildwheel builds: a wheel of its own for Pythons before the stable ABI's, and that of its oldest."""
    builds = PROJECT["tool"]["cibuildwheel"]["build"]
    stable = PROJECT["tool"]["scikit-build"]["wheel"]["py-api"]
    minor = lambda python: int(re.fullmatch(r"cp3(\d+)", python)[1])  # noqa: E731
    built = [minor(x.split("-")[0]) for x in builds]
    assert all(x.endswith("-manylinux_x86_64") for x in builds)
    supported = re.findall(r":: Python :: 3\.(\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    for python in map(int, supported):
        assert python in built or (python > minor(stable) and minor(stable) in built)


def test_the_workflow_uses_what_there_is() -> None:
    """Without GitHub: it is YAML, its jobs need jobs, the scripts and targets of make that it names exist."""
    yaml = pytest.importorskip("yaml")
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in jobs.values():
        needs = job.get("needs", [])
        assert {needs} <= set(jobs) if isinstance(needs, str) else set(needs) <= set(jobs)
        commands = "\n".join(step.get("run", "") for step in job["steps"])
        assert set(re.findall(r"\bmake ([a-z-]+)", commands)) <= targets
        for path in re.findall(r"(?<![\w/])((?:scripts|\.github)/[\w./-]+)", commands):
            assert (ROOT / path).exists(), path


def test_the_readme_on_a_package_index() -> None:
    """There it has no files beside it: their names stand for links to them, and no link leads nowhere."""
    text = (ROOT / "README.md").read_text()
    assert re.search(r"\]\((docs|examples)/", text)  # relative where it is read in a clone
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))
    assert [x for x in links if not x.startswith(("https://", "#"))] == []
    named = re.findall(r"`((?:docs|examples)/[^`\s]+)`", text)
    assert named
    assert all((ROOT / x).exists() for x in named)


def test_nothing_pretends_to_have_an_address() -> None:
    """The project has no public home yet."""
    assert "urls" not in PROJECT["project"]
    for file in (ROOT / "README.md", ROOT / "pyproject.toml", ROOT / "mkdocs.yml", *ROOT.glob("docs/*.md")):
        assert not re.search(r"https?://[^\s)]*jax[-_]nano", file.read_text()), file


def test_builds_require_small_packages_only() -> None:
    """Before the backend has looked for LLVM."""
    names = {re.split(r"[<>=]", x)[0] for x in PROJECT["build-system"]["requires"]}
    assert names == {"scikit-build-core", "nanobind", "hatch-fancy-pypi-readme"}


STUB = """
def get_requires_for_build_wheel(config_settings=None):
    return ["what the backend wants"]
get_requires_for_build_editable = build_wheel = build_sdist = get_requires_for_build_wheel
"""


def ask_backend(tmp_path: Path, path: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What the build backend requires, with these programs on the path and scikit-build-core replaced by a stub."""
    stub = tmp_path / "stub" / "scikit_build_core"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / "build.py").write_text(STUB)
    code = "import backend; print(backend.get_requires_for_build_wheel())"
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PATH": path, "PYTHONPATH": f"{PACKAGING}:{stub.parent}", "PYTHONDONTWRITEBYTECODE": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def tools(folder: Path, *names: str) -> str:
    """A folder with programs of these names."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return str(folder)


LLVM = tuple(f"{x}-22" for x in ("mlir-opt", "mlir-translate", "opt", "llc", "llvm-mca", "llvm-objdump"))


def test_a_build_without_llvm_says_so_before_it_asks_for_jax(tmp_path: Path) -> None:
    done = ask_backend(tmp_path, tools(tmp_path / "bin", "c++"))
    assert done.returncode != 0
    assert "mlir-opt-22 was not found: install the Debian packages mlir-22-tools and llvm-22" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_build_without_a_compiler_says_so(tmp_path: Path) -> None:
    done = ask_backend(tmp_path, tools(tmp_path / "bin", *LLVM))
    assert done.returncode != 0
    assert "there is no c++" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_build_asks_for_jax_once_the_tools_are_there(tmp_path: Path) -> None:
    done = ask_backend(tmp_path, tools(tmp_path / "bin", "c++", *LLVM))
    assert done.stdout.strip() == "['jax==0.10.0', 'jaxlib==0.10.0', 'what the backend wants']", done.stderr


def test_a_build_with_kernels_from_elsewhere_needs_no_llvm(tmp_path: Path) -> None:
    done = ask_backend(tmp_path, tools(tmp_path / "bin", "c++"), JAX_NANO_KERNEL_DIR="/somewhere")
    assert "jaxlib==0.10.0" in done.stdout, done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The sources without an extension, and beside them a folder `site` where one made from them is installed."""
    folder = tmp_path / "clone"
    for name in ("jax_nano", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    site = tmp_path / "site"
    package = site / "jax_nano"
    shutil.copytree(folder / "jax_nano", package)
    extension = Path(_runtime.__file__)
    (package / extension.name).symlink_to(extension)
    information = site / "jax_nano-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-nano\nVersion: 0.1.0\n")
    (information / "RECORD").write_text("jax_nano/__init__.py,,\n")
    code = "from jax_nano._core import installed; print(installed.digest(installed.PACKAGE.parent))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    (package / "_built_from.txt").write_text(done.stdout)
    return folder


def use(clone: Path) -> subprocess.CompletedProcess[str]:
    """Computes a product in a clone's folder."""
    code = """
import pathlib, jax_nano, jax.numpy as jnp
x = jnp.ones((64, 64))
assert float(jax_nano.matmul(x, x)[0, 0]) == 64
from jax_nano import _runtime
print(pathlib.Path(jax_nano.__file__).parents[1].name, pathlib.Path(_runtime.__file__).parents[1].name)
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=clone,
        env=fresh_environment({"PYTHONPATH": str(clone.parent / "site")}),
        capture_output=True,
        text=True,
        check=False,
    )


def test_sources_of_a_clone_find_the_installed_extension(clone: Path) -> None:
    api = clone / "jax_nano" / "api.py"
    api.write_text(api.read_text() + "\n# edited\n")  # what the extension does not depend on
    done = use(clone)
    assert done.stdout.split() == ["clone", "site"], done.stderr


@pytest.mark.parametrize("name", ["csrc/plan/plan.cc", "jax_nano/codegen/tile.py"])
def test_sources_of_a_clone_refuse_an_extension_of_other_sources(clone: Path, name: str) -> None:
    edited = clone / name
    edited.write_text(edited.read_text() + "\n")
    done = use(clone)
    assert done.returncode != 0
    assert "was built from other sources than those in" in done.stderr
    assert "pip install ." in done.stderr


def progress() -> ModuleType:
    spec = importlib.util.spec_from_file_location("progress", PACKAGING / "progress.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_progress_of_a_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "output"
    output.write_text(
        "  Collecting jaxlib\n  kernel 1/2: a\n  kernel 2/2: b\n[1/1] Building CXX object x.o\nsome other line\n"
    )
    log = tmp_path / "log"
    assert progress().main(log, ["cat", str(output)]) == 0
    assert log.read_text() == output.read_text()
    shown = capsys.readouterr().out
    steps = ["getting what the build needs", "kernels .*1/2", "kernels .*2/2", "compiling .*1/1", "built in"]
    assert re.search(".*".join(steps), shown, re.DOTALL), shown
    assert "some other line" not in shown


def test_a_build_that_fails_shows_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert progress().main(tmp_path / "log", ["sh", "-c", "echo no LLVM here >&2; exit 3"]) == 3
    shown = capsys.readouterr().out
    assert "no LLVM here" in shown
    assert str(tmp_path / "log") in shown
