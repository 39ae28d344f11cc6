"""The benchmark runs, and notices what it must notice. Nothing here looks at how long anything took."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

# They share a run of the benchmark.
pytestmark = pytest.mark.xdist_group("benchmarks")

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks takes it off again, so that jax_nano is the installed one

from benchmarks import floor, machine, native, operands, publish, regret  # noqa: E402
from benchmarks.cases import DTYPES, KINDS, matmul, select  # noqa: E402
from benchmarks.measure import default_peers  # noqa: E402
from benchmarks.native import why_not  # noqa: E402
from benchmarks.peers.in_jax import loop_of, product  # noqa: E402
from benchmarks.report import Results, Row, Section, markdown  # noqa: E402
from benchmarks.worker import Failed, Setup, Worker, check  # noqa: E402
from jax_nano import _runtime  # noqa: E402


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)


TINY = ("--suite", "tiny", "--rounds", "2", "--sample-ms", "0.1", "--cores", "1", "--cache", "warm", "--also")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> pathlib.Path:
    """The JSON of a run that takes seconds; every peer's result was checked on the way."""
    out = tmp_path_factory.mktemp("results")
    done = run("run", *TINY, "--out", str(out))
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    return path


def test_a_run_measures_every_peer_and_finds_no_wrong_result(results):
    data = json.loads(results.read_text())
    cases = {case.key for case in select("tiny")}
    for peer in ("jax_nano", "jnp", "jnp-eigen"):
        assert {row["case"] for row in data["rows"] if row["peer"] == peer} == cases
    assert {row["case"] for row in data["rows"] if row["peer"] == "kernels"} == cases
    assert {"numpy", "peak"} <= {row["peer"] for row in data["rows"]}
    assert all(len(row["seconds"]) >= 2 and min(row["seconds"]) > 0 for row in data["rows"])
    assert not [entry for entry in data["skipped"] if "WRONG" in entry["why"]]
    assert not [entry for entry in data["skipped"] if entry["peer"] in ("jax_nano", "jnp", "jnp-eigen")]


def test_a_run_writes_table_and_plots(results):
    table = results.with_suffix(".md").read_text()
    assert "8x8x8 f32" in table
    assert "Geometric mean" in table
    pictures = {path.name for path in results.with_suffix("").iterdir()}
    assert pictures == {"roofline-1-core-warm.png", "ratios-1-core-warm.png"}


def test_a_run_goes_on_where_it_was_stopped(results, tmp_path):
    data = json.loads(results.read_text())
    kept = [row for row in data["rows"] if row["case"] != "8x8x8 f32"]
    lost = len(data["rows"]) - len(kept)
    stopped = tmp_path / "stopped.json"
    stopped.write_text(json.dumps(data | {"rows": kept}))
    done = run("run", *TINY, "--resume", str(stopped))
    assert done.returncode == 0, done.stderr
    rows = json.loads(stopped.read_text())["rows"]
    assert rows[: len(kept)] == kept
    assert [row["case"] for row in rows[len(kept) :]] == ["8x8x8 f32"] * lost


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "run", "--suite", "tiny", "--cores", "1", "--out", str(tmp_path)]
    command += ["--peers", "jax_nano", "jnp"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        errors = process.stderr.read()
    (path,) = tmp_path.glob("*.json")
    assert process.returncode == 2
    assert f"--resume {path}" in errors
    assert "Traceback" not in errors
    assert Results.load(path).rows


def test_what_is_measured_beside_the_products_is_kept_with_them(results, tmp_path):
    found = Results.load(results)
    found.sections.append(Section("Overheads", "Of calls.", ("", "jax_nano", "jnp"), (("a call, µs", "1.0", "2.0"),)))
    found.save(tmp_path / "more.json")
    again = Results.load(tmp_path / "more.json")
    assert again.sections == found.sections
    assert "## Overheads" in markdown(again)
    assert "| a call, µs |" in markdown(again)


def test_a_cliff_at_a_power_of_two_shows():
    results = Results.begin({"cpu": "", "cpus": 1, "caches": {}, "system": "", "python": "", "load": 0})
    for case in select("growth"):
        cliff = 4 if case.name == "1024x1024x1024" else 1
        results.rows.append(Row.of(case, "jax_nano", 1, "warm", [case.flops * cliff / 1e11]))
    growth = markdown(results).partition("## Growth with size, 1 core")[2].splitlines()
    ratios = {line.split("|")[1].strip(): float(line.split("|")[3]) for line in growth if line.startswith("| 10")}
    assert ratios == {"1023x1023x1023": 1.0, "1024x1024x1024": 0.25, "1025x1025x1025": 1.0}


def test_compare_finds_what_became_slower(results, tmp_path):
    data = json.loads(results.read_text())
    for row in data["rows"]:  # measured times would make the outcome a matter of the machine's mood
        row["seconds"] = [1e-3] * len(row["seconds"])
    before = tmp_path / "before.json"
    before.write_text(json.dumps(data))
    same = run("compare", str(before), str(before))
    assert same.returncode == 0
    assert "0 slower" in same.stdout

    for row in data["rows"]:
        if row["peer"] == "jax_nano" and row["case"] == "8x8x8 f32":
            row["seconds"] = [100 * seconds for seconds in row["seconds"]]
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(data))
    found = run("compare", str(before), str(slower))
    assert found.returncode == 1
    assert "8x8x8 f32" in found.stdout


_OTHERS = ("overheads", "callers", "gate", "compile", "footprint", "linear", "attention", "quantized", "decode")


@pytest.mark.parametrize("command", _OTHERS)
def test_the_other_measurements_run(command):
    done = run(command, "--quick")
    assert done.returncode == 0, done.stderr
    assert "jax_nano" in done.stdout


def test_what_no_release_may_lose(tmp_path):
    path = tmp_path / "floor.json"
    done = run("floor", "--quick", "--save", str(path))
    assert done.returncode == 0, done.stderr
    recorded = json.loads(path.read_text())
    assert len(recorded["of_jnp"]) == 10
    assert len(recorded["models"]) == 5
    found = floor.Found(recorded["of_jnp"], recorded["of_square"], recorded["models"])
    assert floor.losses(found, recorded) == []
    better = {**recorded, "models": {name: 2 * ratio for name, ratio in recorded["models"].items()}}
    assert len(floor.losses(found, better)) == 5


def test_both_engines_are_measured_beside_each_other(tmp_path):
    path = tmp_path / "times.json"
    done = run("engines", "--only", "64 x [3x3x3]", "--out", str(path))
    assert done.returncode == 0, done.stderr
    assert "1 products" in done.stdout
    (row,) = json.loads(path.read_text())["rows"]
    assert row["kernel_us"] > 0 < row["xla_us"]


def test_models_are_measured_in_every_setting(tmp_path):
    done = run("models", "--quick", "--only", "mlp", "kalman", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["setting"] for row in rows} == {"YNNPACK", "no YNNPACK"}
    assert {row["name"] for row in rows} == {"equinox mlp training", "kalman filter"}
    for row in rows:
        assert not row["skipped"]
        assert len(row["plain"]) == len(row["accelerated"]) == 2
    assert "equinox mlp training" in path.with_suffix(".md").read_text()

    again = run("models", "--merge", str(path), str(path))
    assert again.stdout.strip() == path.with_suffix(".md").read_text().strip()


@pytest.mark.parametrize("command", ["models", "programs"])
def test_names_that_nothing_has_are_refused(command):
    assert run(command, "--quick", "--only", "no such name").returncode == 2


def test_every_program_runs_accelerated_and_is_checked(tmp_path):
    from benchmarks.programs import PROGRAMS

    done = run("programs", "--quick", "--cores", "1", "--busy", "no", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == PROGRAMS.keys()
    for row in rows.values():
        assert not row["skipped"]
        assert row["products"] + row["left"] > 0
        assert len(row["plain"]) == len(row["accelerated"]) == 2
    text = path.with_suffix(".md").read_text()
    assert all(f"| {name} " in text for name in [*PROGRAMS, "lowest", "geometric mean"])


def test_programs_are_measured_in_every_setting(tmp_path):
    done = run("programs", "--quick", "--only", "nnls", "--cores", "1", "all", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    cores = {1: "1 core", len(machine.cpus()): f"{len(machine.cpus())} cores"}
    wanted = [f"{cores[count]}{busy}" for count in sorted(cores) for busy in ("", ", busy")]
    assert [row["setting"] for row in json.loads(path.read_text())["rows"]] == wanted


def test_a_wrong_result_of_a_program_is_found():
    from benchmarks.accelerated import check

    right = {"loss": np.float32(1), "weights": np.linspace(-1, 1, 100, dtype=np.float32)}
    wrong = {**right, "weights": right["weights"] * np.float32(1.001)}
    check("it", right, right, 4)
    with pytest.raises(RuntimeError, match="WRONG"):
        check("it", wrong, right, 4)
    check("it", wrong, right, 2)  # within bfloat16's rounding


@pytest.mark.parametrize("wrong", [["--only", "no such product"], ["--cores", "0"], ["--cores", "100000"]])
def test_a_run_refuses_what_it_cannot_do(wrong):
    done = run("run", "--suite", "tiny", *wrong)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "bf16-f32", "f16", "i8", "i8-i8"])
def test_the_check_finds_one_wrong_element(tmp_path, dtype):
    case = matmul(40, 30, 50, dtype)
    operands.write(case, tmp_path)
    for name, pair in ((operands.EXACT, case.exact_operands()), (operands.RANDOM, case.random_operands())):
        for read, made in zip(operands.read(case, tmp_path, name), pair, strict=True):
            assert read.dtype == made.dtype
            np.testing.assert_array_equal(read, made)
    reference = operands.read_result(case, tmp_path)
    exact = case.exact_result()
    check(case, exact, reference)

    wrong = exact.copy()
    wrong[7, 11] += np.asarray(1, wrong.dtype) if abs(float(wrong[7, 11])) < 64 else wrong[7, 11] / 8
    with pytest.raises(Failed, match=r"\[7, 11\]"):
        check(case, wrong, reference)
    if exact.dtype.kind != "i":
        wrong[7, 11] = np.nan
        with pytest.raises(Failed, match=r"\[7, 11\]"):
            check(case, wrong, reference)


def test_cases_describe_the_product_that_their_einsum_means():
    for case in select("tiny"):
        lhs, rhs = (operand.astype(np.float64) for operand in case.exact_operands())
        expected = np.einsum(case.spec, lhs, rhs)
        np.testing.assert_array_equal(case.exact_result().astype(np.float64), expected)

        # and so do the strides that the C interfaces get
        gemm, out = case.gemm, np.zeros(expected.size)
        batches = zip(*map(gemm.offsets, (gemm.a_batch, gemm.b_batch, gemm.c_batch)), strict=True)
        for a, b, c in batches:
            for i, j, p in np.ndindex(gemm.m, gemm.n, gemm.k):
                left = lhs.flat[a + i * gemm.a_strides[0] + p * gemm.a_strides[1]]
                right = rhs.flat[b + p * gemm.b_strides[0] + j * gemm.b_strides[1]]
                out[c + i * gemm.c_strides[0] + j * gemm.c_strides[1]] += left * right
        np.testing.assert_array_equal(out.reshape(expected.shape), expected)


def test_the_full_suite_holds_every_listed_shape_in_every_dtype():
    listed = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())
    keys = {case.key for case in select("full")}
    # Some shapes are listed in two groups (a square among the transposes); they are measured once.
    assert len(keys) <= len(listed["shapes"]) * len(listed["dtypes"]) + len(select("growth"))
    for dtype in listed["dtypes"]:
        assert f"512x512x512 {dtype}" in keys
        assert f"1x4096x1024 {dtype}" in keys


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("batch", [0, 8])
def test_each_product_in_the_timed_loop_waits_for_the_one_before(dtype, batch):
    """Nothing is hoisted out of the loop or dropped: one product in its body for each pair of operands."""
    case = matmul(24, 24, 24, dtype, batch=batch)
    element = DTYPES[dtype].operand_dtype
    stack = jax.ShapeDtypeStruct(case.shapes[0], element)
    first, trips = (jax.ShapeDtypeStruct((), element),) * 2, jax.ShapeDtypeStruct((), np.int32)
    for pairs in (1, 3):
        program = jax.jit(loop_of(product(case, ours=True)), donate_argnums=(3, 4, 5))
        hlo = program.lower(trips, first, first, *[(stack,) * pairs] * 3).compile().as_text()
        bodies = [part for part in hlo.split("\n\n") if part.lstrip().startswith("%") and "custom_call_target" in part]
        assert len(bodies) == 1
        assert bodies[0].count("custom_call_target") == pairs
        shape = ",".join(map(str, stack.shape))
        assert f" copy(f32[{shape}]" not in hlo
        assert " select(" not in hlo  # an element is written by a loop over all of them
        if pairs == 1:  # of several pairs XLA converts a bfloat16 array to write one element of it
            assert not re.search(rf"f32\[{shape}\]\S* convert", hlo)


def test_our_kernels_are_set_beside_libraries_that_are_called_from_c():
    case = matmul(10, 10, 10)
    results = Results.begin({"cpu": "", "cpus": 1, "caches": {}, "system": "", "python": "", "load": 0})
    times = {"jax_nano": 8e-6, "kernels": 4e-6, "jnp": 1e-6, "openblas": 2e-6, "onednn": 3e-6, "peak": 1e-7}
    results.rows += [Row.of(case, peer, 1, "warm", [seconds]) for peer, seconds in times.items()]
    (group,) = results.groups(1, "warm")
    assert group.best_peer.peer == "jnp"
    assert group.best_library.peer == "openblas"
    assert group.kernels_to_best_library == pytest.approx(0.5)
    assert "0.50 of the best of them" in markdown(results)


def test_each_dtype_is_set_beside_our_own_f32():
    cases = select("dtypes")
    assert {case.dtype for case in cases} == set(DTYPES)
    results = Results.begin({"cpu": "", "cpus": 1, "caches": {}, "system": "", "python": "", "load": 0})
    for case in cases[:2]:
        seconds = 2e-3 if case.dtype == "f32" else 4e-3
        results.rows += [Row.of(case, "jax_nano", 1, "warm", [seconds]), Row.of(case, "jnp", 1, "warm", [seconds * 3])]
    line = next(
        line for line in markdown(results).splitlines() if line.startswith("| 1024x1024x1024 f64") and "3.00" in line
    )
    assert "0.50" in markdown(results).partition("of our f32")[2], line


def test_a_peer_that_cannot_be_built_says_why():
    assert why_not("onednn", "onednn.c:3:10: fatal error: dnnl.h: No such file or directory").startswith(
        "not installed"
    )
    assert why_not("xsmm", "ld: cannot find -lxsmm: No such file or directory").startswith("not installed")
    other_version = 'onednn.c:9:2: error: #error "written for the C interfaces of oneDNN 2 and 3"'
    assert "written for the C interfaces of oneDNN 2 and 3" in why_not("onednn", other_version)
    assert why_not("onednn-sycl", "cannot find -l:libdnnl.so.3") == "not installed: make bench-peers"
    assert "does not compile" in why_not("onednn", "onednn.c:30: error: expected ';'")


def test_what_is_compiled_is_named_after_its_library():
    """Two libraries that one source is compiled for do not share a file."""
    names = {native._library(name) for name in native._BUILDS}
    assert len(names) == len(native._BUILDS)


def test_peers_that_must_be_named_are_not_measured_otherwise():
    assert "torch-compile" not in default_peers()
    assert {"jax_nano", "mkl", "onednn-sycl", "peak"} <= set(default_peers())
    assert default_peers(["torch-compile", "jnp"]) == ("jnp", "torch-compile", "peak", "bandwidth")


def test_a_run_waits_while_a_file_exists(tmp_path):
    pause = tmp_path / "pause"
    pause.touch()
    command = [sys.executable, "-m", "benchmarks", "run", *TINY, "--peers", "jnp", "--only", "8x8x8 f32"]
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*command, "--out", str(tmp_path), "--pause-while", str(pause)], cwd=ROOT, stdout=errors, stderr=errors
        ) as process,
    ):
        while "0/1" not in log.read_text():  # the workers are ready
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        assert process.poll() is None
        assert not list(tmp_path.glob("*.json"))
        pause.unlink()
        assert process.wait(timeout=300) == 0
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_worker_tells_how_long_its_threads_had_no_cpu(tmp_path):
    """Two threads of a worker that may use one CPU compute at once: one of them waits."""
    cpu = machine.cpus()[:1]
    worker = Worker(Setup(("peak",), 2, cpu))
    try:
        assert native.build("machine") == ""
        worker.ask("start", "peak")
        case = matmul(64, 64, 64)
        operands.write(case, tmp_path)
        worker.ask("prepare", "peak", "it", case, 1, tmp_path)
        seconds, waited = worker.ask("run", "peak", "it", 4000)
        assert seconds > 0
        assert waited > 0
    finally:
        worker.close()


class TestPublished:
    def test_documents_say_what_the_data_say(self):
        for path, text in publish.documents().items():
            assert path.read_text() == text, f"{path}: python -m benchmarks publish"

    def test_pictures_were_drawn_from_the_data(self):
        for path in publish.pictures():
            with Image.open(path) as picture:
                assert picture.info["Description"] == publish.digest(), f"{path}: python -m benchmarks publish"

    def test_the_data_are_of_float32_products(self):
        results = Results.load(publish.DATA)
        cases = {case.key for case in select("full", dtypes=["f32"])}
        assert len(cases) == 129
        for cores in (1, 2):
            groups = {group.any.case: group for group in results.groups(cores, "warm")}
            assert groups.keys() <= cases
            assert len(groups) > 30
            assert all({"jax_nano", "kernels", "jnp", "mkl"} <= group.rows.keys() for group in groups.values())

    def test_every_product_is_of_a_kind(self):
        cases = select("full", dtypes=["f32"])
        assert {case.kind for case in cases} == set(KINDS)
        kinds = {case.name: case.kind for case in cases}
        assert kinds["32x4096x4096"] == "2 to 64 rows"
        assert kinds["65536x64x64"] == "2 to 64 columns"
        assert kinds["2048x1x256"] == "products with a vector"
        assert kinds["513x513x513"] == "up to 513^3"

    def test_another_run_gives_other_documents(self, tmp_path, monkeypatch):
        """A product at half of the best peer's speed is told by kind, in the sum and among those that are behind."""
        results = Results.begin({"cpu": "a CPU", "cpus": 1, "caches": {}, "system": "", "python": "", "load": 0})
        results.versions.update({"mkl": "2026.2", "openblas": "OpenBLAS 0.3.34 Haswell"})
        for size, factor in ((512, 2.0), (1024, 0.8)):
            case = matmul(size, size, size)
            times = {"jax_nano": 1e-3 * factor, "kernels": 1e-3, "mkl": 1e-3, "jnp": 4e-3}
            results.rows += [Row.of(case, peer, 1, "warm", [seconds] * 3) for peer, seconds in times.items()]
        monkeypatch.setattr(publish, "DATA", tmp_path / "peers.json.gz")
        publish.keep(results)
        readme, performance = publish.documents().values()
        lines = {line.split("|")[1].strip(): line for line in readme.splitlines() if line.startswith("|")}
        assert "0.50 (0.50, 0 of 1)" in lines["up to 513^3"]
        assert "0.79 (0.50, 1 of 2)" in lines["all"]
        assert "1.25 (mkl)" in lines["1024^3"]
        assert "openblas 0.3.34" in readme
        assert "2 of the 129" in readme
        assert len(re.findall(r"\| up to 513\^3 +\| 512x512x512 +\| 0.50 \(mkl\) +\| 1.00 \(mkl\) ", performance)) == 1
        assert "1024x1024x1024" not in performance.partition("<!-- peers -->")[2].partition("<!-- end of peers -->")[0]


def test_select_filters_by_name_group_and_dtype():
    assert [case.key for case in select("tiny", only=["13x7x5"])] == ["13x7x5 f32"]
    assert {case.group for case in select("full", groups=["attention"])} == {"attention"}
    assert {case.dtype for case in select("squares", dtypes=["bf16-f32"])} == {"bf16-f32"}


def test_rows_give_medians_and_ratios_of_neighbouring_samples():
    ours = Row.of(matmul(10, 10, 10), "jax_nano", 1, "warm", (1e-6, 2e-6, 3e-6))
    theirs = dataclasses.replace(ours, peer="jnp", seconds=(2e-6, 4e-6, 30e-6))
    assert ours.gflops == pytest.approx(1.0)
    assert ours.times_faster_than(theirs) == pytest.approx(2.0)


class TestRegret:
    def test_every_candidate_is_checked_and_timed(self, tmp_path):
        """Of two products; the planner's own choice is the first, and what is kept is a choice that can be forced."""
        path = tmp_path / "regret.json"
        tiny = ("--shapes", "5x40x30", "33x20x70", "--layout", "NT", "--rounds", "1", "--sample-ms", "0.01")
        done = run("regret", *tiny, "--out", str(path))
        assert done.returncode == 0, done.stderr
        assert "2 products" in done.stdout
        data = json.loads(path.read_text())
        assert data["machine"]["cpu"]
        for row, sizes in zip(data["rows"], ((5, 40, 30), (33, 20, 70)), strict=True):
            assert tuple(row["dims"].values()) == sizes
            given = ([sizes[0], sizes[2]], [sizes[1], sizes[2]], [0, 2], [1, 2], [0, 1], *["float32"] * 3)
            listed = _runtime.tuning.candidates(*given, 1)
            choices = [dict(zip(data["choice"], choice, strict=True)) for choice in row["choices"]]
            assert len(choices) == len(listed) == len(row["us"]) > 5
            assert min(row["us"]) > 0
            assert row["planned"] == 0
            assert _runtime.testing.plan_by(*given, choices[0]) == _runtime.plan(*given, 1) == listed[0]
        again = run("regret", "--of", str(path))
        assert again.stdout == done.stdout

    def test_arithmetic(self):
        """The fastest is looked for among those that were timed as often as the planned one."""
        rows = [
            {"product": "x", "threads": 1, "planned": 0, "us": [2.0, 1.0, 0.5], "samples": [9, 9, 3]},
            {"product": "y", "threads": 2, "planned": 1, "us": [2.0, 1.0], "samples": [3, 9]},
        ]
        assert regret.ratios(rows) == [2.0, 1.0]
        summary = regret.Summary.of(rows)
        assert summary.mean == pytest.approx(2**0.5)
        assert summary.worst[0] == (2.0, "x, 1 threads")

    def test_random_products_are_the_same_each_time(self):
        cases = list(regret.random_cases(20, "bf16", 1e8))
        assert cases == list(regret.random_cases(20, "bf16", 1e8))
        assert len({case.key for case in cases}) == 20
        assert all(case.flops <= 1e8 for case in cases)

    def test_costs_are_fitted(self, tmp_path):
        """A profile's times give costs again that choose nearly the best plans.

        Not the same ones: costs of Zen 3 were fitted before the model had all terms of today.
        """
        profile = ROOT / "jax_nano/profiles/zen3.json"
        copy = tmp_path / "zen3.json"
        copy.write_text(profile.read_text())
        done = run("fit", "--profile", str(copy), "--of", str(ROOT / "benchmarks/data/zen3-avx2.json.gz"))
        assert done.returncode == 0, done.stderr
        before, after = (json.loads(path.read_text()) for path in (profile, copy))
        kernel = "gemm_f32_f32_f32_f32_6x16_x86-64-v3"
        assert done.stdout.startswith(f"{kernel}: 543 products")
        assert after["kernels"].keys() == before["kernels"].keys()
        assert after["kernels"][kernel].keys() == before["kernels"][kernel].keys()
        first, again = (x["kernels"][kernel]["direct_step"] for x in (before, after))
        assert again == pytest.approx(first, rel=0.1)
        regret = [float(x) for x in re.findall(r"by these costs (\S+) of the best", done.stdout)]
        assert len(regret) == 8
        assert max(regret) < 1.06

    def test_needs_products(self):
        done = run("regret")
        assert done.returncode == 2
        assert "no products" in done.stderr
