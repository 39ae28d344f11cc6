"""Costs measured on this machine: the file that keeps them, what reads it, and what they may change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from jax_nano import _runtime
from jax_nano._core import spec, tuned

KERNELS = {x["name"] for x in _runtime.kernels()}
F32 = next(x for x in sorted(KERNELS) if x.startswith("gemm_f32_f32_f32_f32_6x16_"))
CORE = (32 << 10, 512 << 10, 5 << 20, 14 << 20, 0)
COSTS = tuned.Costs(CORE, {F32: [1.0] * len(spec.cost_names())})


@pytest.fixture
def file(tmp_path):
    """Costs as `tune` keeps them."""
    file = tmp_path / "folder" / "costs.json"
    tuned.save(COSTS, file, {"cpu": "a CPU"})
    return file


class TestFile:
    def test_what_is_saved_is_loaded(self, file):
        assert tuned.load(file, KERNELS) == COSTS
        assert json.loads(file.read_text())["cpu"] == "a CPU"

    def test_costs_of_unknown_kernels_are_left_out(self, file):
        assert tuned.load(file, set()).kernels == {}

    def test_nothing_else_lies_beside_it(self, file):
        tuned.save(COSTS, file, {})
        assert [x.name for x in file.parent.iterdir()] == [file.name]

    @pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
    def test_others_must_not_be_able_to_write_to_it(self, file, mode):
        file.chmod(mode)
        with pytest.raises(ValueError, match="other users may write to it"):
            tuned.load(file, KERNELS)

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: x.update(version=tuned.VERSION + 1),
            lambda x: x.pop("version"),
            lambda x: x.update(core=[1, 2, 3]),
            lambda x: x.update(core="no"),
            lambda x: x.pop("kernels"),
            lambda x: x.update(kernels=[]),
            lambda x: x.update(core=[float("inf")] * 5),
            lambda x: x.update(core=[1 << 70] * 5),
            lambda x: x["kernels"].update({F32: {}}),
            lambda x: x["kernels"].update({F32: 3}),
            lambda x: x["kernels"][F32].update(call=-1.0),
            lambda x: x["kernels"][F32].update(call=float("nan")),
            lambda x: x["kernels"][F32].update(call=float("inf")),
            lambda x: x["kernels"][F32].update(call="dear"),
            lambda x: x["kernels"][F32].update(call=None),
        ],
    )
    def test_damage_is_told(self, file, change):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r".+"):
            tuned.load(file, KERNELS)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "\0", "[" * 100_000, '{"version": 1e999}'])
    def test_what_is_no_such_file_is_told(self, file, text):
        file.write_text(text)
        with pytest.raises(ValueError, match=r".+"):
            tuned.load(file, KERNELS)


class TestWhere:
    def test_in_the_cache_folder_by_kind_of_cpu(self, monkeypatch, tmp_path):
        monkeypatch.delenv(tuned.ENVIRONMENT, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        found = tuned.path(_runtime)
        assert found.parent == tmp_path / "jax_nano"
        assert _runtime.cpu_signature() in found.name
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # as the specification says, to be ignored
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert tuned.path(_runtime).parent == tmp_path / "home/.cache/jax_nano"

    def test_where_one_is_told(self, monkeypatch):
        monkeypatch.setenv(tuned.ENVIRONMENT, "/some/file")
        assert tuned.path(_runtime) == Path("/some/file")
        monkeypatch.setenv(tuned.ENVIRONMENT, "off")
        assert tuned.path(_runtime) is None

    def test_a_missing_file_is_told_only_if_it_was_named(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.delenv(tuned.ENVIRONMENT, raising=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tuned.use(_runtime)
        monkeypatch.setenv(tuned.ENVIRONMENT, str(tmp_path / "none.json"))
        with pytest.warns(UserWarning, match="none.json"):
            tuned.use(_runtime)


def test_the_extension_refuses_another_number_of_costs():
    with pytest.raises(ValueError, match="not as many costs"):
        _runtime.tuning.use_costs(CORE, {F32: [1.0]})


PLANS = """
import json
import numpy as np
from jax_nano import _runtime
from jax_nano._core import native
native.runtime()
rng = np.random.default_rng(0)
for m, n, k in ((64, 64, 64), (300, 500, 700), (8, 2048, 512), (513, 129, 1023), (1, 512, 512)):
    labels = [[ord(x) for x in term] for term in ("mk", "kn", "mn")]
    product = ((m, k), (k, n), *labels, *["float32"] * 3)
    a, b, c = (rng.standard_normal(x, np.float32) for x in ((m, k), (k, n), (m, n)))
    _runtime.testing.dot(*(x.ctypes.data for x in (a, b, c)), *product, 2)
    print(json.dumps([_runtime.plan(*product, 2, target="x86-64-v3"), c.tobytes().hex()]))
"""


def run(*arguments, **environment):
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-P", *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_costs_change_where_data_lies_and_never_a_bit(tmp_path):
    """Packing and small blocks cost nothing here, and everything else a lot: other blocks, the same order of sums."""
    names = spec.cost_names()
    strange = [0.0 if x.startswith(("pack_a", "block")) else 7.0 for x in names]
    file = tmp_path / "costs.json"
    tuned.save(tuned.Costs((4096, 16384, 1 << 20, 2 << 20, 0), {F32: strange}), file, {})
    plain, other = (
        [json.loads(line) for line in run("-c", PLANS, JAX_NANO_TUNED=where).splitlines()]
        for where in ("off", str(file))
    )
    numeric = ("kernel", "inner", "sweep", "pack_b", "kc", "split_k")
    assert [[x[name] for name in numeric] for x, _ in plain] == [[x[name] for name in numeric] for x, _ in other]
    assert [x for x, _ in plain] != [x for x, _ in other]
    assert [bits for _, bits in plain] == [bits for _, bits in other]


class TestCommand:
    def test_measures_and_is_used(self, tmp_path):
        """A second is too short to keep anything, so that it says so; the file is only written if something is kept."""
        file = tmp_path / "costs.json"
        told = run("-m", "jax_nano", "tune", "--seconds", "1", "--dtype", "f32", "--output", str(file))
        assert "products" in told
        assert file.exists() == (str(file) in told)

    @pytest.mark.parametrize("better", [True, False])
    def test_another_run_adds_to_the_file(self, file, better, monkeypatch, capsys):
        """What it keeps replaces what was kept; costs of other kernels stay, and take no part in what it measures."""
        from jax_nano._tools import tune

        other = next(x for x in sorted(KERNELS) if x.startswith("gemm_f64_f64_f64_f64_"))
        new = [2.0] * len(spec.cost_names())
        monkeypatch.setattr(tune, "_core", lambda runtime: CORE)
        used = []

        def measured(dtypes, seconds, core):
            used.append(seen[-1])
            yield tune.Timed(other, {}, np.empty(0), [])

        seen = []
        real = _runtime.tuning.use_costs
        monkeypatch.setattr(
            _runtime.tuning, "use_costs", lambda core, kernels: seen.append(kernels) or real(core, kernels)
        )
        monkeypatch.setattr(tune, "_timed", measured)
        monkeypatch.setattr(
            tune, "_fitted", lambda runtime, kernel, timed: tune.Found(kernel, 20, 1.1, 1.0 if better else 1.2, new)
        )
        assert tune.tune(_runtime, seconds=1, dtypes=["f64"], output=file) == 0
        assert used == [{}]
        kept = tuned.load(file, KERNELS)
        assert kept.kernels == COSTS.kernels | ({other: new} if better else {})
        told = capsys.readouterr().out
        assert f"costs of an earlier run stay for: {F32}" in told
        assert ("kept in" in told) == better

    def test_costs_for_other_caches_are_not_added_to(self, file, monkeypatch):
        from jax_nano._tools import tune

        assert tune._earlier(_runtime, file, CORE) == COSTS.kernels
        assert tune._earlier(_runtime, file, (*CORE[:-1], 1)) == {}
        assert tune._earlier(_runtime, file.with_name("none.json"), CORE) == {}
        file.write_text("{")
        assert tune._earlier(_runtime, file, CORE) == {}

    def test_shows_where(self, tmp_path):
        told = run("-m", "jax_nano", "tune", "--show", XDG_CACHE_HOME=str(tmp_path), JAX_NANO_TUNED="")
        assert told.startswith(f"{tmp_path}/jax_nano/tuned-")
        assert "nothing there" in told

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--seconds", "0"), "expected more than 0"),
            (("--seconds", "nan"), "expected more than 0"),
            (("--dtype", "f31"), "expected some of f32"),
        ],
    )
    def test_refuses(self, arguments, message, tmp_path):
        command = [sys.executable, "-P", "-m", "jax_nano", "tune", "--output", str(tmp_path / "x"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr

    def test_costs_are_fitted_to_times(self):
        """Times that are made of known costs give these costs back."""
        from jax_nano._tools import fitting
        from jax_nano._tools.tune import _products

        rng = np.random.default_rng(0)
        true = np.array(_runtime.tuning.profile_costs("AMD Zen 3")[F32])
        rows, tables = [], []
        products = _products(["f32"])
        for _ in range(60):
            product = next(products)
            found = _runtime.tuning.candidates(*product.arguments, 1, target="x86-64-v3")
            chosen = [found[i] for i in rng.permutation(len(found))[:20]]
            table = fitting.counts(product, chosen, CORE)
            tables.append(table)
            rows.append({"us": table @ true / 1e3, "samples": [30] * len(chosen)})
        costs = fitting.fit(rows, tables)
        errors = np.concatenate(
            [table @ costs / (row["us"] * 1e3) - 1 for row, table in zip(rows, tables, strict=True)]
        )
        assert np.quantile(abs(errors), 0.9) < 0.05
        ratios = [fitting.chosen(row, table, costs) for row, table in zip(rows, tables, strict=True)]
        assert np.mean(ratios) < 1.02
