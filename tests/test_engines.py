"""The decision between a kernel and XLA, on recorded times of both engines (benchmarks/data/engines-*); no clock."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_nano._core import contraction, spec
from jax_nano._dispatch import decision, xla_times
from jax_nano._dispatch.xla_times import Form, Work

engines = pytest.importorskip("benchmarks.engines")

DATA = Path(__file__).parents[1] / "benchmarks/data"
FILES = dict(
    zip(xla_times.VERSIONS, ("engines-zen3-jaxlib-0.10.json.gz", "engines-zen3-jaxlib-0.12.json.gz"), strict=True)
)
# By version: the regret in geometric mean and in 95 % of cases.
MOST_REGRET = {"before 0.12": (1.05, 1.35), "0.12": (1.06, 1.5)}


def rows_of(version: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = engines.load(DATA / FILES[version])["rows"]
    return found


@pytest.mark.parametrize("version", xla_times.VERSIONS)
class TestRegret:
    def test_the_faster_engine_is_nearly_always_chosen(self, version: str) -> None:
        ratios = [ratio for ratio, _ in engines.regret(rows_of(version), version, *decision.REFERENCE)]
        mean, most = MOST_REGRET[version]
        assert len(ratios) > 600
        assert statistics.geometric_mean(ratios) <= mean
        assert np.quantile(ratios, 0.95) <= most

    @pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64", "i8"])
    def test_it_is_chosen_more_often_than_by_the_thresholds_before(self, version: str, dtype: str) -> None:
        """A row tells whether these left its product to XLA."""
        rows = [row for row in rows_of(version) if row["dtype"] == dtype]
        by_times = statistics.geometric_mean(x for x, _ in engines.regret(rows, version, *decision.REFERENCE))
        by_thresholds = statistics.geometric_mean(
            row["xla_us" if row["thresholds"] else "kernel_us"] / min(row["xla_us"], row["kernel_us"]) for row in rows
        )
        assert by_times <= by_thresholds

    def test_costs_of_other_products_choose_nearly_as_well(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Costs are fitted to nine tenths of the products, and choose for the other tenth."""
        rows = rows_of(version)
        random.Random(0).shuffle(rows)  # they come in patterns of layouts
        ratios: list[float] = []
        cpu = decision.REFERENCE[0]
        for part in range(10):
            fitted = {cpu: {version: engines.fit([x for i, x in enumerate(rows) if i % 10 != part], version)}}
            monkeypatch.setattr(xla_times, "costs", lambda fitted=fitted: fitted)
            ratios += [x for x, _ in engines.regret(rows[part::10], version, *decision.REFERENCE)]
        assert statistics.geometric_mean(ratios) <= MOST_REGRET[version][0] + 0.02

    def test_every_form_of_every_dtype_has_costs(self, version: str) -> None:
        for cpu, versions in xla_times.costs().items():
            for form in xla_times.COUNTED:
                costs = versions[version][form.name]
                for dtype in spec.DTYPES:
                    work = Work(8, 8, 8, 1, lhs_along_k=True, rhs_along_k=False)
                    assert costs[xla_times.kind_of(work, (dtype, dtype))], (cpu, form, dtype)

    def test_more_work_takes_longer(self, version: str) -> None:
        for dtype in ("float32", "bfloat16", "float16", "float64", "int8"):
            for m, n, k, batch in ((64, 64, 64, 1), (1, 512, 512, 1), (512, 1, 300, 1), (8, 8, 8, 64), (1, 64, 64, 16)):
                for along in ((True, False), (False, False), (True, True), (False, True)):
                    small, large = (
                        xla_times.predict(
                            Work(m, n, k * x, batch, *along),
                            (dtype, dtype),
                            "AMD Zen 3",
                            in_function=False,
                            version=version,
                        ).ns
                        for x in (1, 16)
                    )
                    assert large > 1.5 * small > 0, (dtype, m, n, k, batch, along)


def test_forms() -> None:
    def form(m: int, n: int, k: int, batch: int = 1, dtype: str = "float32", *, in_function: bool = False) -> Form:
        work = Work(m, n, k, batch, lhs_along_k=True, rhs_along_k=False)
        return xla_times.form_of(work, (dtype, dtype), in_function=in_function)

    assert form(3, 3, 3) is Form.INLINE
    assert form(3, 3, 3, in_function=True) is Form.IN_FUNCTION
    assert form(3, 3, 7) is Form.INLINE
    assert form(4, 4, 4) is Form.PRODUCT
    assert form(6, 6, 6, in_function=True) is Form.IN_FUNCTION
    assert form(6, 6, 6, dtype="float64", in_function=True) is Form.PRODUCT
    assert form(4, 4, 4, 64, in_function=True) is Form.BATCH
    assert form(1, 9, 9) is form(9, 1, 9) is form(1, 9, 9, 5) is Form.VECTOR


def test_what_xla_computes_at_no_cost() -> None:
    def why(m: int, n: int, k: int, batch: int = 1) -> str | None:
        return xla_times.never_slower(Work(m, n, k, batch, lhs_along_k=True, rhs_along_k=False))

    assert why(0, 3, 3) == why(3, 3, 0) == why(3, 3, 3, 0) == why(-1, 0, 3) == "empty"
    assert "outer product" in (why(3, 3, 1) or "")
    assert why(3, 3, 3) is why(-1, 3, 3) is None


def test_operands_of_two_dtypes_cost_what_the_larger_one_does() -> None:
    matrix = Work(1, 64, 64, 1, lhs_along_k=True, rhs_along_k=False)
    assert xla_times.kind_of(matrix, ("float32", "bfloat16")) == "bfloat16"
    assert xla_times.kind_of(matrix, ("bfloat16", "float32")) == "float32"
    assert xla_times.kind_of(matrix, ("uint8", "uint8")) == "int8"


@pytest.mark.parametrize("version", xla_times.VERSIONS)
@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8192, 768), (1, 768, 768), (8, 1024, 1024)])
def test_a_narrower_operand_is_not_predicted_to_be_read_faster(
    version: str, narrow: str, m: int, n: int, k: int
) -> None:
    """XLA widens weights that do not change in front of a loop, and reads all of float32 in each of its trips."""

    def ns(rhs: str) -> float:
        work = Work(m, n, k, 1, lhs_along_k=True, rhs_along_k=True)
        return xla_times.predict(work, ("float32", rhs), "AMD Zen 3", in_function=False, version=version).ns

    assert ns(narrow) >= ns("float32")


def test_only_what_was_timed_is_decided_by_times_of_that_cpu() -> None:
    """For any other CPU both engines are predicted on the reference."""
    assert decision.REFERENCE[0] in xla_times.costs()
    here = decision.this_machine()
    labels = contraction.labels_of((((1,), (0,)), ((), ())), None, 2, 2)
    product = decision.Product(labels, (64, 64), (64, 64), (np.dtype(np.float32),) * 3, None)
    for cpu in {"", "a CPU of tomorrow", here.cpu}:
        times = decision.dispatch(product, here._replace(cpu=cpu), decision.Policy()).times
        assert times is not None
        assert times.cpu == (cpu if cpu in xla_times.costs() else decision.REFERENCE[0])


def test_the_command_tells_of_recorded_times() -> None:
    text = engines.told([DATA / name for name in FILES.values()], None)
    assert [line.split(",")[0] for line in text.splitlines() if line.startswith("jaxlib")] == [
        f"jaxlib {version}: {len(rows_of(version))} products" for version in xla_times.VERSIONS
    ]


def test_costs_that_are_fitted_are_written_to_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_times, "FOLDER", tmp_path)
    profile = tmp_path / "zen3.json"
    profile.write_text('{"name": "AMD Zen 3", "source": "somewhere", "versions": {}}')
    xla_times.costs.cache_clear()
    try:
        engines.told([DATA / FILES["0.12"]], profile)
        (fitted,) = xla_times.costs()["AMD Zen 3"].values()
        assert set(fitted) == {form.name for form in xla_times.COUNTED}
        assert all(ns > 0 for forms in fitted.values() for costs in forms.values() for ns in costs.values())
    finally:
        monkeypatch.undo()
        xla_times.costs.cache_clear()
