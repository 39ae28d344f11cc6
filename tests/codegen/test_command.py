"""``python -m jax_nano.codegen`` as people and CMake call it: without the extension, and outside any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jax_nano
from jax_nano.codegen import checks, inspect_asm, measure, report
from jax_nano.codegen.catalog import attentions, find, kernels
from jax_nano.codegen.quantized.kernel import kernels as quantized_kernels
from jax_nano.codegen.target import TARGETS
from jax_nano.codegen.toolchain import STAGES, Toolchain, ToolchainError

SMALLEST = "gemm_f64_f64_f64_f64_6x8_x86-64-v3"

try:
    TOOLS = Toolchain.find()
except ToolchainError as error:
    TOOLS, WHY = None, str(error)
needs_llvm = pytest.mark.skipif(TOOLS is None, reason="there is no LLVM 22")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the generator: what a build has before there is an extension."""
    folder = tmp_path_factory.mktemp("generator")
    source = Path(jax_nano.__file__).parent
    shutil.copytree(source / "codegen", folder / "jax_nano" / "codegen", ignore=shutil.ignore_patterns("__pycache__"))
    # What the package itself is made of before anything is asked of it.
    (folder / "jax_nano" / "_core").mkdir()
    for name in ("__init__.py", "_core/__init__.py", "_core/imports.py", "_core/spec.py"):
        shutil.copy(source / name, folder / "jax_nano" / name)
    return folder


def run(package: Path, *args: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    if path is not None:
        environment["PATH"] = path
    elsewhere = package / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-m", "jax_nano.codegen", *args]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=elsewhere, env=environment, timeout=300, check=False
    )


def test_help(package):
    done = run(package, "--help")
    assert done.returncode == 0, done.stderr
    for word in ("list", "build", "dump", "report"):
        assert word in done.stdout


def test_list(package):
    """It needs no LLVM: a person may look before installing anything."""
    done = run(package, "list", path="")
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == "targets: " + ", ".join(TARGETS)
    assert [line.split()[0] for line in rest] == [k.name for k in (*kernels(), *attentions(), *quantized_kernels())]


MARKS = {
    "mlir": "scf.for",
    "llvm-dialect": "llvm.func",
    "llvm-ir": "define void @",
    "optimized": "llvm.fma.v4f64",
    "asm": "vfmadd231pd",
    "mca": "### znver3",
}


@pytest.mark.parametrize("stage", STAGES)
def test_dump(package, stage):
    if stage != "mlir" and TOOLS is None:
        pytest.skip(WHY)
    done = run(package, "dump", SMALLEST, "--stage", stage)
    assert done.returncode == 0, done.stderr
    assert MARKS[stage] in done.stdout


@needs_llvm
def test_dump_mca_of_one_microkernel(package):
    done = run(package, "dump", SMALLEST, "--stage", "mca", "--function", "1x8")
    assert done.returncode == 0, done.stderr
    assert "Total Cycles" in done.stdout
    done = run(package, "dump", SMALLEST, "--stage", "mca", "--function", "99x99")
    assert done.returncode == 1
    assert "no microkernel" in done.stderr
    assert "_6x8" in done.stderr  # it names those that exist


def test_dump_of_an_unknown_kernel(package):
    done = run(package, "dump", "gemm_nonesuch")
    assert done.returncode == 1
    assert done.stderr.startswith("no kernel 'gemm_nonesuch'; known: ")
    assert SMALLEST in done.stderr
    assert "Traceback" not in done.stderr


SENTENCE = (
    "jax_nano's kernels are generated with LLVM 22, but mlir-opt-22 was not found: "
    "install the Debian packages mlir-22-tools and llvm-22."
)


def test_missing_llvm_is_one_sentence(package, tmp_path):
    for command in (["build", "--out", str(tmp_path)], ["report"], ["dump", SMALLEST, "--stage", "asm"]):
        done = run(package, *command, path=str(tmp_path))
        assert (done.returncode, done.stdout, done.stderr) == (1, "", SENTENCE + "\n"), command


@pytest.mark.parametrize("version", [19, 22])
def test_unversioned_tools_count_if_they_are_of_this_version(monkeypatch, tmp_path, version):
    """Distributions other than Debian install plain names; those of another LLVM would fail in ways hard to read."""
    for tool in ("mlir-opt", "mlir-translate", "opt", "llc", "llvm-mca", "llvm-objdump"):
        script = tmp_path / tool
        script.write_text(f"#!/bin/sh\necho 'LLVM version {version}.1.8'\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if version == 22:
        assert Toolchain.find().paths["llc"] == str(tmp_path / "llc")
    else:
        with pytest.raises(ToolchainError, match="install the Debian packages"):
            Toolchain.find()


@needs_llvm
def test_a_failing_tool_shows_what_it_said():
    with pytest.raises(ToolchainError, match=r"mlir-opt .*failed:\n(.|\n)*nonsense"):
        TOOLS.llvm_ir("nonsense")


def objects_in(folder):
    """What gives `report` its objects: compiled into this folder."""

    def make(kernel, mlir):
        path = folder / f"{kernel.symbol}.o"
        TOOLS.object_file(TOOLS.optimized(TOOLS.llvm_ir(mlir), kernel.target), kernel.target, path)
        return path

    return make


REPORTED = (SMALLEST, "gemm_i8_i8_i32_i32_14x32_avx512_vnni", "gemm_bf16_bf16_f32_f32_32x32_amx")


@needs_llvm
@pytest.mark.parametrize("name", REPORTED)
def test_report(monkeypatch, tmp_path, name):
    """A row for each core, of one kernel of each kind; what was measured stands in the row of this machine's core."""
    measured = []
    monkeypatch.setattr(report, "kernels", lambda: [find(name)])
    monkeypatch.setattr(report, "_measured_share", lambda *loop: measured.append(loop) or 0.875)
    monkeypatch.setattr(report.measure, "can_run", lambda target: True)
    monkeypatch.setattr(Toolchain, "host_cpu", lambda tools: "znver3")
    cores = find(name).target.cores
    head, line, *rows, blank, where = report.table(TOOLS, objects_in(tmp_path), 1, markdown=True).splitlines()
    assert set(line) <= set("| -")
    columns = [x.strip() for x in head.split("|")]
    assert len(rows) == len(cores)
    for row, core in zip(rows, cores, strict=True):
        entry = dict(zip(columns, (x.strip() for x in row.split("|")), strict=True))
        assert (entry["kernel"], entry["core"]) == (name, core)
        assert int(entry["spills"]) == 0
        assert 0.93 <= float(entry["ports"]) <= 1
        assert entry["llvm-mca"] == "" if name.endswith("amx") else 0.5 <= float(entry["llvm-mca"]) <= 1
        assert entry["measured"] == ("0.875" if core == "znver3" else "")
    assert len(measured) == cores.count("znver3")
    assert (blank, where.startswith("measured on: ")) == ("", bool(measured))


@needs_llvm
def test_a_loop_is_measured_as_it_is(tmp_path):
    """On this machine, a K loop of ours comes near its products alone, and one with twice the work does not."""
    kernel = find(SMALLEST)
    assert measure.can_run(kernel.target)  # the level that everything here asks for
    row = report._judged(kernel, TOOLS, objects_in(tmp_path)(kernel, kernel.mlir()))[0]
    products = row._products_alone()
    share = measure.share_of_peak(row.found.loop, row.steps, products)
    assert 0.6 <= share <= 1.15
    *body, counted, jump = row.found.loop.instructions
    double = inspect_asm.Loop("twice the products", (*body, *body, counted, jump))
    assert measure.share_of_peak(double, row.steps, products) < 0.75 * share


@needs_llvm
def test_tiles_are_configured_and_given_back_once(tmp_path):
    """In each function that multiplies tiles, outside of its loops; and in no other."""
    kernel = find("gemm_bf16_bf16_f32_f32_32x32_amx")
    code = dict(inspect_asm.functions(TOOLS.disassemble(objects_in(tmp_path)(kernel, kernel.mlir()))))
    assert set(kernel.microkernels()) < set(code)
    for name, body in code.items():
        whole = inspect_asm.Loop(name, tuple(body))
        uses = int(name in kernel.microkernels())
        assert (whole.count("ldtilecfg"), whole.count("tilerelease")) == (uses, uses), name
        for loop in inspect_asm.innermost_loops(name, body):
            assert not loop.count("ldtilecfg|tilerelease|sttilecfg"), name


def test_what_cannot_be_measured():
    """A loop that does not count up to zero is refused: nothing would stop it."""
    lines = [("vfmadd231ps", "%ymm1, %ymm2, %ymm3"), ("cmpq", "%rax, %rbx"), ("jne", "0x0")]
    loop = inspect_asm.Loop("odd", tuple(inspect_asm.Instruction(4 * n, *line) for n, line in enumerate(lines)))
    with pytest.raises(ToolchainError, match="odd: its K loop does not count"):
        measure.share_of_peak(loop, 1, "")
    assert not measure.can_run(TARGETS["amx"])


@needs_llvm
def test_what_is_built_is_checked(tmp_path):
    """The machine code of a kernel passes the build's own check, which finds every microkernel's loop."""
    kernel = find(SMALLEST)
    path = tmp_path / "kernel.o"
    TOOLS.object_file(TOOLS.optimized(TOOLS.llvm_ir(kernel.mlir()), kernel.target), kernel.target, path)
    found = checks.k_loops(kernel, TOOLS.disassemble(path))
    assert {x.microkernel for x in found} == set(kernel.microkernels())
