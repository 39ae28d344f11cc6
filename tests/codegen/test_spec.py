"""The facts stand in jax_nano/_core/spec.py alone: what is added there reaches generator, C++ and Python package."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import epilogues
import numpy as np
import pytest
import reference

import jax_nano
from jax_nano import _runtime
from jax_nano._core import activations, signatures, spec
from jax_nano.codegen import activation, header
from jax_nano.codegen.target import CORES
from jax_nano.codegen.toolchain import Toolchain, ToolchainError

pytestmark = pytest.mark.xdist_group("spec")

PACKAGE = Path(jax_nano.__file__).parent
CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = [shutil.which("c++") or "c++", "-std=c++20", "-Wall", "-Wextra", "-Wconversion", "-Werror"]

try:
    Toolchain.find()
except ToolchainError as error:
    pytest.skip(str(error), allow_module_level=True)


def imports(path: Path) -> set[str]:
    """The modules that a file imports by absolute names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_spec_needs_the_standard_library_alone():
    """A build has nothing else yet. Who may import it and the generator: tests/test_architecture.py."""
    roots = {name.partition(".")[0] for name in imports(PACKAGE / "_core" / "spec.py")}
    assert roots <= sys.stdlib_module_names
    assert not imports(PACKAGE / "_core" / "__init__.py")


class TestTotality:
    """Whatever stands for a fact by its name stands for all of them."""

    def test_activations(self):
        for implemented in (activation.FUNCTIONS, activations.FUNCTIONS):
            assert tuple(implemented) == spec.ACTIVATIONS
        for name in epilogues.NAMES:
            epilogues.exact(name, np.zeros(1))

    def test_algorithms(self):
        for name, pairs in spec.ALGORITHMS.items():
            assert sorted(reference._PARTS[name]) == sorted(pairs)
        assert {spec.DEFAULT_ALGORITHM, *spec.ALGORITHMS} == set(signatures._ALGORITHMS.values())

    def test_names_within_the_spec(self):
        for dtype in spec.DTYPES.values():
            accumulator = spec.DTYPES[dtype.accumulator]
            assert accumulator.adds_as
            assert accumulator.accumulator == accumulator.name
            assert (accumulator.kind == "float") == (dtype.kind == "float")
        assert {x for s in spec.SIGNATURES for x in s} <= set(spec.DTYPES)
        for target in spec.TARGETS.values():
            assert {*target.requires, *target.shunned} <= set(spec.FEATURES)
            assert set(target.cores) <= set(CORES)

    def test_numbers_are_told_apart(self):
        for numbers in ([x.number for x in spec.DTYPES.values()], [x.short for x in spec.DTYPES.values()]):
            assert len(set(numbers)) == len(spec.DTYPES)


class TestExtension:
    """The compiled extension has the facts of the spec beside it."""

    def test_calls(self):
        attention = {spec.ATTENTION_CALL, spec.ATTENTION_GRADIENTS_CALL}
        products = {spec.DOT_GENERAL_CALL, spec.LINEAR_CALL, spec.QUANTIZED_CALL}
        assert set(_runtime.registrations()) == products | attention
        assert _runtime.ABI_VERSION == spec.FFI_ABI

    def test_targets_best_first(self):
        assert [t["name"] for t in _runtime.targets()] == list(reversed(spec.TARGETS))

    @pytest.mark.parametrize("target", spec.TARGETS.values(), ids=lambda t: t.name)
    def test_features(self, target):
        """A target is usable with what it requires, and not without any of it."""

        def status(features):
            return next(t for t in _runtime.targets(features) if t["name"] == target.name)

        assert status(list(target.requires))["why"] == ""
        for i in range(len(target.requires)):
            assert not status([*target.requires[:i], *target.requires[i + 1 :]])["supported"]
        for feature in target.shunned:
            shunned = status([*target.requires, feature])
            assert shunned["supported"]
            assert shunned["why"]

    def test_kernels(self):
        fields = spec.names(spec.KERNEL_INFO)[:-1]
        stub = ast.parse((PACKAGE / "_runtime.pyi").read_text())
        (declared,) = (x for x in stub.body if isinstance(x, ast.ClassDef) and x.name == "_Kernel")
        assert sorted(x.target.id for x in declared.body) == sorted(fields)
        for kernel in _runtime.kernels():
            assert tuple(kernel) == fields
            assert (kernel["lhs"], kernel["rhs"], kernel["out"]) in spec.SIGNATURES
            assert kernel["acc"] == spec.DTYPES[kernel["out"]].accumulator
            assert kernel["algorithm"] in (spec.DEFAULT_ALGORITHM, *spec.ALGORITHMS)

    def test_attentions(self):
        fields = tuple(x.name for x in spec.ATTENTION_INFO if not x.c_type.endswith("Fn"))
        stub = ast.parse((PACKAGE / "_runtime.pyi").read_text())
        (declared,) = (x for x in stub.body if isinstance(x, ast.ClassDef) and x.name == "_Attention")
        assert sorted(x.target.id for x in declared.body) == sorted(fields)
        for found in _runtime.attentions():
            assert tuple(found) == fields
        lowest, *_ = spec.TARGETS
        assert {(x["q"], x["kv"]) for x in _runtime.attentions() if x["target"] == lowest} == set(
            spec.ATTENTION_SIGNATURES
        )

    def test_every_signature_has_a_kernel_on_every_cpu(self):
        built = {(k["target"], k["lhs"], k["rhs"], k["out"]) for k in _runtime.kernels()}
        (lowest, *_) = spec.TARGETS
        assert {(lowest, *x) for x in spec.SIGNATURES} <= built

    @pytest.mark.parametrize("name", [*spec.DTYPES, "bool", "float8_e5m2"])
    def test_dtypes(self, name):
        why = "no kernel" if name in spec.DTYPES else f"dtype {name} is not supported"
        with pytest.raises(ValueError, match=why):
            _runtime.plan([2, 3], [3, 4], [0, 1], [1, 2], [0, 2], name, "float32", "int8", 1)


def test_header(tmp_path):
    """It stands by itself, and its structs are laid out as the kernels read them."""
    (tmp_path / "alone.cc").write_text(header.text())
    done = subprocess.run([*COMPILER, "-fsyntax-only", str(tmp_path / "alone.cc")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- a dtype, a target, a feature and an activation that do not exist -----------------------------------------

ADDED = {
    "DTYPES: ": 'DType("int64", "i64", "S64", 5, "int", 8, "i64", "int64", adds_as="uint64_t"),',
    "SIGNATURES: ": 'Signature("int64", "int64", "int64"),',
    "ACTIVATIONS: ": '"square",',
    "FEATURES: ": 'Feature("made_up", 7, 2, "edx", 4),',
    "TARGETS: ": """
        Target(
            name="imaginary",
            mcpu="x86-64-v3",
            features=(),
            vector_bits=256,
            vector_registers=16,
            fma_per_cycle=2,
            loads_per_cycle=2,
            masked_bytes=4,
            cores=(),
            nanokernels=("int64_product",),
            requires=(*_V3, "made_up"),
        ),
        """,
}
NANOKERNEL = '''
"""Products of int64 that wrap around."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jax_nano._core.spec import Target, signatures

from .. import ir
from . import Served, VectorFamily


@dataclass(frozen=True)
class Int64Product(VectorFamily):
    acc: str = "int64"
    a_elem: str = "int64"
    b_elem: str = "int64"
    unit: str = "int64"
    kr: int = 1
    instructions: tuple[str, int] = ("vpmuludq$", 3)

    def prepare_a(self, v: ir.Value, source: str, part: int) -> ir.Value:
        return ir.convert(v, source, "int64")

    prepare_b = prepare_a

    def product(self, a: ir.Value, b: ir.Value, acc: ir.Value) -> ir.Value:
        return ir.multiply_add(a, b, acc)


def kernels(target: Target) -> Iterator[Served]:
    for signature in signatures("int64"):
        yield Served(signature, Int64Product(), "three products of halves")
'''


def _insert(path: Path, table: str, closing: str, text: str) -> None:
    """Adds a last entry to a table of a file."""
    lines = path.read_text().splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith(table))
    end = next(i for i in range(start, len(lines)) if lines[i].strip() == closing)
    lines.insert(end, f"{text}\n")
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, to which the above was added: in the spec, and where it is implemented."""
    folder = tmp_path_factory.mktemp("grown")
    package = folder / "jax_nano"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for extension in PACKAGE.glob("_runtime*.so"):
        (package / extension.name).symlink_to(extension)
    for name, text in ADDED.items():
        _insert(package / "_core" / "spec.py", name, ")", text)
    (package / "codegen" / "nanokernel" / "int64_product.py").write_text(NANOKERNEL)
    for file, function in (("codegen/activation.py", "ir.multiply(x, x)"), ("_core/activations.py", "x * x")):
        _insert(package / file, "FUNCTIONS: ", "}", f'    "square": lambda x: {function},')
    return folder


def run(grown: Path, program: str) -> str:
    """A program of the grown package; what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (grown, CSRC.parent / "tests")))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program), str(grown)],
        capture_output=True,
        text=True,
        cwd=grown,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_generator_takes_up_what_is_added(grown):
    """The kernel of the new dtype on the new target follows, and gives the right numbers by every path."""
    run(
        grown,
        """
        import ctypes, sys
        from pathlib import Path
        import emulated, numpy as np
        from jax_nano.codegen import emulate, manifest
        from jax_nano.codegen.catalog import find

        kernel = find("gemm_i64_i64_i64_i64_6x8_imaginary")
        library = Path(sys.argv[1], "imaginary.so")
        emulate.build([kernel], library, 1)
        function = emulated._function(ctypes.CDLL(str(library)), kernel.symbol)
        called = emulated.Kernel(manifest.entry(kernel), function)
        rng = np.random.default_rng(0)
        a, b = (rng.integers(-2**63, 2**63 - 1, shape, np.int64, endpoint=True) for shape in ((13, 37), (37, 21)))
        for way in ({}, {"pack_a": 1, "pack_b": 1}, {"inner": 1, "pack_b": 1}, {"sweep": 1}):
            c = np.full((13, 21), 7, np.int64)
            called.call(a, b, c, **way)
            assert (c == a @ b).all(), way
        """,
    )


def test_cpp_takes_up_what_is_added(grown):
    """With the new header the runtime finds the new target, on a CPU that has the new feature and on no other."""
    out = grown / "kernels"
    out.mkdir()
    symbol = run(
        grown,
        """
        import sys
        from pathlib import Path
        from jax_nano.codegen import manifest
        from jax_nano.codegen.catalog import find

        kernel = find("gemm_i64_i64_i64_i64_6x8_imaginary")
        manifest.write([kernel], [], [], [], Path(sys.argv[1], "kernels"))
        print(kernel.symbol)
        """,
    ).strip()
    (out / "main.cc").write_text(
        """
        #include <cstdio>
        #include "plan/registry.h"
        #include "plan/select.h"
        using namespace jax_nano;

        extern "C" void SYMBOL(const GemmArgs*) {}

        const char* Chosen(uint32_t made_up) {
          CpuQueries cpu;
          cpu.cpuid = [&](uint32_t leaf, uint32_t subleaf) {
            const uint32_t edx = leaf == 7 && subleaf == 2 ? made_up << 4 : ~0u;
            return std::array<uint32_t, 4>{~0u, ~0u, ~0u, edx};
          };
          cpu.xcr0 = [] { return ~uint64_t{0}; };
          cpu.request_amx = [] { return true; };
          const auto targets = SelectTargets(DetectFeatures(cpu), "");
          const KernelInfo* kernel = SelectKernel(targets, "int64", "int64", "int64", "default");
          return kernel == nullptr ? "none" : kernel->name;
        }

        int main() {
          const auto bytes = WithAdderOf("int64", [](auto zero) { return sizeof(zero); });
          std::printf("%s %s %d %d", Chosen(1), Chosen(0), int(ElementBytes("int64")), int(bytes));
          for (const auto& x : kActivations) {
            if (x.activation == Activation::kSquare) std::printf(" %s", x.name.data());
          }
        }
        """.replace("SYMBOL", symbol)
    )
    used = ("plan/registry", "plan/select", "machine/features", "machine/cpuid")
    sources = [str(out / "main.cc"), *(str(CSRC / f"{x}.cc") for x in used)]
    command = [*COMPILER, "-O0", f"-I{out}", f"-I{CSRC}", "-o", str(out / "main"), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([out / "main"], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["gemm_i64_i64_i64_i64_6x8_imaginary", "none", "8", "8", "square"]


def test_the_package_takes_up_what_is_added(grown):
    run(
        grown,
        """
        import numpy as np
        from jax_nano._core import activations
        from jax_nano._tools import explain
        from jax_nano._core import hlo

        assert hlo.DTYPES[5] == np.int64 and hlo.ELEMENT_TYPES[np.dtype(np.int64)] == 5
        assert explain.parse_dtypes("i64") == ("int64", "int64", "int64")
        assert activations.name_of("square") == "square"
        """,
    )
