"""`python -m jax_nano`, and the cost model behind `explain`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jax_nano
from jax_nano import _runtime
from jax_nano.__main__ import main
from jax_nano._core import cost as _cost
from jax_nano._core import jax_compat as compat
from jax_nano._core import machine, spec
from jax_nano._dispatch import decision
from jax_nano._tools import explain

CACHES = {"l1d": 32 << 10, "l2": 1 << 20, "l3": 32 << 20}


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_NANO_")}
    command = [sys.executable, "-P", "-m", "jax_nano", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=clean | env)


@pytest.mark.parametrize(
    "command", ["jax_nano info", "jax_nano explain 8x8x8", "jax_nano --help", "jax_nano.codegen list"]
)
def test_a_reader_that_has_seen_enough(command: str) -> None:
    """As `| head -1` does, but the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-P", "-m", *command.split()],
            stdout=stdout,
            stderr=subprocess.PIPE,
            check=False,
            timeout=120,
        )
    assert done.stderr == b""
    assert done.returncode == (0 if command.endswith("--help") else 1)  # argparse does not mind


def test_the_threads_of_xlas_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    for value, threads in {"3": 3, " +5 ": 5, "0": 1, "-2": 1, "x": machine.cores(), "": machine.cores()}.items():
        monkeypatch.setenv("NPROC", value)
        assert machine.threads() == threads
        assert machine.threads(devices=64) == 64
    monkeypatch.setenv("NPROC", "3")
    monkeypatch.setenv("PJRT_NPROC", "7")
    assert machine.threads() == 7
    monkeypatch.delenv("PJRT_NPROC")
    assert "threads 5 in XLA's pool" in run("info", NPROC="5").stdout


# --- info ---------------------------------------------------------------------------------------


def test_info_names_every_target_and_signature() -> None:
    done = run("info")
    assert done.returncode == 0, done.stderr
    for target in _runtime.targets():
        assert target["name"] in done.stdout
        assert target["why"] in done.stdout
    for kernel in _runtime.kernels():
        assert f"{kernel['lhs']} x {kernel['rhs']} -> {kernel['out']}" in done.stdout
    for title in ("machine", "targets", "signatures", "versions", "environment"):
        assert f"\n{title}\n" in "\n" + done.stdout
    assert "jaxlib" in done.stdout


def test_info_reports_an_unknown_target_in_the_environment() -> None:
    done = run("info", JAX_NANO_TARGET="pentium")
    assert done.returncode == 1
    assert "JAX_NANO_TARGET=pentium: unknown target; known: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "JAX_NANO_TARGET=pentium" in done.stdout  # among the variables
    assert "machine" in done.stdout


def test_info_says_which_variables_are_set() -> None:
    lowest = next(t["name"] for t in reversed(_runtime.targets()) if not t["why"])
    done = run("info", JAX_NANO_TARGET=lowest)
    assert done.returncode == 0, done.stderr
    assert f"JAX_NANO_TARGET={lowest}" in done.stdout
    best = next(t["name"] for t in _runtime.targets() if not t["why"])
    assert ("above what JAX_NANO_TARGET allows" in done.stdout) == (best != lowest)


def test_info_is_an_object() -> None:
    found = jax_nano.info()
    assert str(found) == repr(found)
    assert [x.name for x in found.targets] == [x["name"] for x in _runtime.targets()]
    assert {x.target for x in found.signatures} <= {x.name for x in found.targets if not x.why_not} | {None}
    assert json.loads(json.dumps(found.to_dict()))["versions"]["jax"] == jax.__version__
    assert found.costs in str(found)


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("jax_nano ")


class FakeRuntime:
    """A machine with tile units that the operating system keeps to itself."""

    def __init__(self, selected: str) -> None:
        self.selected = selected

    def targets(self) -> list[dict[str, object]]:
        why = {"amx": "the operating system does not permit AMX", "avx512_bf16": "", "x86-64-v4": ""}
        return [{"name": name, "why": text} for name, text in why.items()]

    def selected_target(self) -> str:
        return self.selected

    def kernels(self) -> list[dict[str, object]]:
        signature = {"lhs": "bfloat16", "rhs": "bfloat16", "out": "float32", "algorithm": "default"}
        return [{**signature, "target": name} for name in ("amx", "avx512_bf16", "x86-64-v4")]


def test_a_better_target_is_named_with_the_reason_that_it_is_not_used() -> None:
    runtime = FakeRuntime(selected="avx512_bf16")
    _, bf16, v4 = runtime.kernels()
    denied = ("amx", "the operating system does not permit AMX")
    assert explain.passed_over(runtime, bf16) == [denied]
    assert explain.passed_over(runtime, v4) == [denied, ("avx512_bf16", "slower for these dtypes on this CPU")]
    runtime = FakeRuntime(selected="x86-64-v4")
    assert explain.passed_over(runtime, v4) == [denied, ("avx512_bf16", "above what JAX_NANO_TARGET allows")]


# --- explain ------------------------------------------------------------------------------------


def test_explain_prints_the_plan_of_the_runtime() -> None:
    done = run("explain", "33x500x257", "--layout", "TN", "--batch", "3x2", "--threads", "2")
    assert done.returncode == 0, done.stderr
    asked = explain.request(["33x500x257"], "f32", "TN", "3x2")
    plan = _runtime.plan(*asked.shapes, *asked.labels, *asked.dtypes, 2)
    assert "float32[3,2,257,33] x float32[3,2,257,500] -> float32[3,2,33,500]" in done.stdout
    assert plan["kernel"] in done.stdout
    for name in ("M", "N", "K"):
        assert f"{name} by {plan[name.lower() + 'c']} " in done.stdout
    assert "flop" in done.stdout


def test_explain_tells_of_split_k() -> None:
    text = run("explain", "16x16x65536", "--threads", "1").stdout
    assert "split-K: 16 slices" in text
    assert "16 items (16 of K)" in text


@pytest.mark.parametrize("sizes", ["1x1x1", "1x4096x1024", "4x4096x1024", "2048x2048x2048", "0x3x4", "5x6x0"])
@pytest.mark.parametrize("layout", explain.LAYOUTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_any_product_can_be_explained(sizes: str, layout: str, threads: int) -> None:
    asked = explain.request([sizes], "f32", layout, "4" if layout == "NT" else None)
    decided = explain.decided(asked, "default", decision.this_machine(), decision.Policy(declines=True))
    text = explain.explain(_runtime, asked, threads=threads, algorithm="default", target=None, decided=decided)
    assert str(asked) in text
    assert ("left to XLA" in text) == (decided.declined is not None)
    assert (str(decided.times) in text) == (decided.times is not None)


def test_every_kernel_of_the_build_can_be_explained() -> None:
    short = {name: text for text, name in explain.SHORT.items()}
    for kernel in _runtime.kernels():
        dtype = f"{short[kernel['lhs']]}x{short[kernel['rhs']]}-{short[kernel['out']]}"
        asked = explain.request(["300x200x100"], dtype, "NN", None)
        where = {"algorithm": kernel["algorithm"], "target": kernel["target"]}
        machine = decision.Machine(kernel["target"], frozenset())
        decided = explain.decided(asked, kernel["algorithm"], machine, decision.Policy(declines=True))
        text = explain.explain(_runtime, asked, threads=1, **where, decided=decided)
        assert kernel["name"] in text
        assert f"register tile {kernel['mr']} x {kernel['nr']}" in text


def test_explain_shows_which_engine_is_chosen_and_why(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """In this process: that the environment is heeded is for one run of the command to show."""
    assert "engine      a kernel" in run("explain", "2x2x2", JAX_NANO_GATE="off").stdout
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))

    def explained(*args: str) -> str:
        assert main(["explain", *args]) == 0
        return str(capsys.readouterr().out)

    small = explained("2x2x2")
    if compat.INLINES_SMALL_PRODUCTS:
        assert "left to XLA: a small product inside of a loop" in small
    else:
        assert "left to XLA: too small" in small
    assert "by a kernel" in small
    assert "by XLA" in small
    # XLA would not round the operands.
    assert "engine      a kernel" in explained("2x2x2", "--algorithm", "BF16_BF16_F32")
    assert "left to XLA: an outer product" in explained("1024x1024x1")
    assert "left to XLA: a product with a vector" in explained("4096x1x4")
    large = explained("512x512x512")
    assert "engine      a kernel" in large
    assert "predicted for a program on one core of AMD Zen 3: " in large


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("12x34",), "expected MxNxK"),
        (("12x34x5", "5x6"), "expected MxNxK"),
        (("12x34", "33x5"), "the first has 34 columns and the second 33 rows"),
        (("12x34xq",), "expected numbers"),
        (("-1x3x4",), ""),
        (("8x8x8", "--dtype", "f31"), "'f31' is none of float32"),
        (("8x8x8", "--dtype", "f32-u8"), "no kernel"),
        (("8x8x8", "--batch", "axb"), "expected numbers"),
        (("8x8x8", "--threads", "0"), "at least 1"),
        (("8x8x8", "--target", "pentium"), "'pentium' is none of x86-64-v3"),
        (("8x8x8", "--algorithm", "NO_SUCH"), "no kernel"),
        (("8x8x8", "--layout", "XX"), "invalid choice"),
        ((), "required"),
    ],
)
def test_explain_refuses_what_has_no_meaning(args: tuple[str, ...], message: str, capsys) -> None:
    try:
        status = main(["explain", *args])
    except SystemExit as left:  # argparse's way
        status = left.code
    assert status not in (0, None)
    assert message in capsys.readouterr().err


def test_sizes_are_those_of_the_benchmarks_or_of_the_operands() -> None:
    assert explain.parse_product(["4x4096x1024"]) == (4, 4096, 1024)
    assert explain.parse_product(["4x1024", "1024x4096"]) == (4, 4096, 1024)
    assert "M = 4, N = 4096, K = 1024" in run("explain", "4x1024", "1024x4096", "--dtype", "bf16").stdout
    assert "float32[4,1024] x float32[1024,4096]" in run("explain", "4x4096x1024").stdout


def test_dtypes_are_read_like_the_names_of_the_benchmark() -> None:
    assert explain.parse_dtypes("bf16") == ("bfloat16", "bfloat16", "bfloat16")
    assert explain.parse_dtypes("bf16-f32") == ("bfloat16", "bfloat16", "float32")
    assert explain.parse_dtypes("f32xbf16") == ("float32", "bfloat16", "float32")
    assert explain.parse_dtypes("bf16xf32") == ("bfloat16", "float32", "float32")
    assert explain.parse_dtypes("i8") == ("int8", "int8", "int32")
    assert explain.parse_dtypes("i8xu8-i16") == ("int8", "uint8", "int16")


# --- the cost model -----------------------------------------------------------------------------


def cost_of(m: int, n: int, k: int, dtype: str = "float32", *, halves: bool = False) -> _cost.Cost:
    product = _cost.Product(m, n, k, 1, dtype, dtype, dtype)
    return _cost.cost(product, "x86-64-v3", "float32", 1, CACHES, halves=halves)


def test_work_and_bytes_are_counted_once() -> None:
    product = _cost.Product(2, 3, 5, 7, "int8", "bfloat16", "float64")
    assert product.multiply_adds == 7 * 2 * 3 * 5
    assert product.bytes == 7 * (2 * 5 * 1 + 5 * 3 * 2 + 2 * 3 * 8)


def test_large_squares_are_bound_by_the_units_and_vectors_by_memory() -> None:
    square = cost_of(2048, 2048, 2048)
    assert square.bound == "multiply-adds"
    assert square.share_of_peak == 1
    vector = cost_of(1, 8192, 8192)
    assert vector.bound == "memory"
    # 8192 columns of 8192 floats at 13 bytes a cycle, 16 multiply-adds a cycle
    assert vector.share_of_peak == pytest.approx(13 / 4 / 16, rel=1e-3)
    assert cost_of(1, 8192, 8192, "bfloat16").share_of_peak == pytest.approx(2 * vector.share_of_peak, rel=1e-3)


@pytest.mark.parametrize(
    ("target", "acc", "kr", "operand", "per_cycle"),
    [
        ("x86-64-v3", "float32", 1, "float32", 16),
        ("x86-64-v3", "float64", 1, "float64", 8),
        ("x86-64-v3", "int32", 2, "int8", 32),
        ("x86-64-v4", "float32", 1, "float16", 32),
        ("avx512_vnni", "int32", 4, "int8", 128),
        ("avx512_bf16", "float32", 2, "bfloat16", 64),
        ("amx", "float32", 2, "bfloat16", 512),
        ("amx", "int32", 4, "int8", 1024),
    ],
)
def test_peaks(target: str, acc: str, kr: int, operand: str, per_cycle: int) -> None:
    assert _cost.multiply_adds_per_cycle(target, acc, kr, operand, halves=False) == per_cycle
    split = 2 if spec.TARGETS[target].vector_bits == 512 and not spec.TARGETS[target].tiles else 1
    assert _cost.multiply_adds_per_cycle(target, acc, kr, operand, halves=True) == per_cycle / split


def test_every_target_and_dtype_of_the_build_has_a_peak() -> None:
    for kernel in _runtime.kernels():
        for dtype in (kernel["lhs"], kernel["rhs"], kernel["out"]):
            assert _cost.element_bytes(dtype)
        peak = _cost.multiply_adds_per_cycle(kernel["target"], kernel["acc"], kernel["kr"], kernel["lhs"], halves=False)
        assert peak > 0


def test_levels_follow_the_caches() -> None:
    sizes = (0, 32 << 10, (32 << 10) + 1, 1 << 20, (1 << 20) + 1, 32 << 20, (32 << 20) + 1)
    levels = [_cost.level_of(size, CACHES) for size in sizes]
    assert levels == ["L1", "L1", "L2", "L2", "L3", "L3", "memory"]


def test_an_algorithm_of_several_parts_costs_as_many_products() -> None:
    plain = _cost.Product(512, 512, 512, 1, "float32", "float32", "float32")
    parts = _cost.Product(512, 512, 512, 1, "float32", "float32", "float32", "BF16_BF16_F32_X6")
    one, six = (_cost.cost(p, "x86-64-v3", "float32", 1, CACHES, halves=False) for p in (plain, parts))
    assert six.compute_cycles == 6 * one.compute_cycles


def test_an_empty_product_costs_nothing() -> None:
    cost = cost_of(0, 0, 4)
    assert cost.share_of_peak == 1
    assert cost.flops_per_byte == 0


def test_numbers_and_sizes_have_units() -> None:
    assert [explain.number(x) for x in (12, 1234, 33.6e6, 2e9)] == ["12 ", "1.2 k", "33.6 M", "2.0 G"]
    assert [explain.size(x) for x in (12, 2048, 3 << 20, 1 << 30)] == ["12 bytes", "2.0 KiB", "3.0 MiB", "1.0 GiB"]


def test_zen_4_splits_512_bit_instructions() -> None:
    assert machine.splits_512_bit({"vendor_id": "AuthenticAMD", "cpu family": "25"})
    assert not machine.splits_512_bit({"vendor_id": "AuthenticAMD", "cpu family": "26"})
    assert not machine.splits_512_bit({"vendor_id": "GenuineIntel", "cpu family": "6"})
    assert not machine.splits_512_bit({})


# --- jax_nano.explain ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", explain.LAYOUTS)
def test_explain_of_arrays_is_that_of_the_command_line(layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    lhs, rhs = ((3, 64, 32) if layout[0] == "N" else (3, 32, 64)), ((3, 32, 48) if layout[1] == "N" else (3, 48, 32))
    arrays = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (lhs, rhs))
    found = jax_nano.explain(*arrays, layout=layout, threads=2, preferred_element_type=jnp.float32)
    options = ("--layout", layout, "--batch", "3", "--threads", "2")
    for dtype in ("bfloat16-float32", "bf16-f32"):
        assert main(["explain", "64x48x32", "--dtype", dtype, *options]) == 0
        assert capsys.readouterr().out == f"{found}\n"
    assert repr(found) == str(found)
    assert found.kernel in str(found)
    assert found.target == found.plan["target"]
    assert found.plan["products"] == 3
    times = [x.seconds for x in found.candidates]
    assert times == sorted(times)


def test_explain_says_what_xla_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))
    found = jax_nano.explain(jnp.ones((2, 2)), jnp.ones((2, 2)))
    assert found.declined is not None
    assert found.declined in str(found)


def test_explain_of_what_does_not_fit() -> None:
    a = jnp.ones((4, 5))
    with pytest.raises(ValueError, match="do not fit"):
        jax_nano.explain(a, a)
    with pytest.raises(ValueError, match="layout 'XY' is none of NN, NT, TN, TT"):
        jax_nano.explain(a, a.T, layout="XY")
    with pytest.raises(ValueError, match=r"'complex64' is none of float32, "):
        jax_nano.explain(a.astype(jnp.complex64), a.T)
    with pytest.raises(ValueError, match="threads 0: expected at least 1"):
        jax_nano.explain(a, a.T, threads=0)


def test_an_unknown_target_lists_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "8x8x8", "--target", "nonsense"]) == 1
    said = capsys.readouterr().err
    assert "'nonsense' is none of " in said
    assert all(target in said for target in spec.TARGETS)
