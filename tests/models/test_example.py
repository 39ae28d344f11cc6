"""The examples run, and notice a wrong result."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jax
import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("tqdm")

pytest.importorskip("rich")

demo = importlib.import_module("demo")
transformer = importlib.import_module("transformer")
SMALL = ["--layers", "1", "--tokens", "16", "--vocabulary", "512", "--rounds", "1"]


def test_it_compares_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert transformer.main(SMALL) == 0
    text = capsys.readouterr().out
    for what in ("forward, 16 tokens", "training step, 16 tokens", "decoding a token, bfloat16"):
        assert what in text
    assert "run on kernels" in text
    assert "FAILED" not in text


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results, calls = transformer.Program.results, iter([True, *[False] * 5])  # the first of six is wrong

    def wrong(program: Any, steps: int) -> Any:
        found = results(program, steps)
        return jax.tree.map(lambda x: x * 1.01, found) if next(calls) else found

    monkeypatch.setattr(transformer.Program, "results", wrong)
    assert transformer.main(SMALL) == 1
    assert capsys.readouterr().out.count("FAILED") == 1


@pytest.mark.parametrize("wrong", [["--layers", "0"], ["--tokens", "1"], ["--rounds", "0"]])
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        transformer.main(wrong)
    assert "must be at least" in capsys.readouterr().err


LITTLE = ["--layers", "1", "--tokens", "16", "--vocabulary", "512", "--attended", "64", "--rounds", "1"]


def test_the_demo_ends_with_a_picture_and_five_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "demo.png"
    assert demo.main([*LITTLE, "--save", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = [x for x in capsys.readouterr().out.splitlines() if x.strip()]
    titles = ("what ran", "how much faster", "on what", "differences", "where to go on")
    for title, line in zip(titles, lines[-5:], strict=True):
        assert line.startswith(title)
    bars = [x for x in lines if "█" in x]
    assert len(bars) == 5
    assert not any("_x86-64-" in x for x in lines[:-5])  # the report is left out


def outcome(ratios: list[float], left: str = "") -> Any:
    case = demo.Case("a program", "", "float32", None, None)
    return demo.Outcome(case, 1.0, 1.0, ratios, 0.0, left)


def test_the_demo_says_why_something_is_not_faster() -> None:
    assert outcome([1.5, 1.6, 1.4]).note == ""
    assert outcome([0.9, 1.0, 1.1]).note == "no difference: rounds vary from 0.95 to 1.05"
    assert outcome([0.8, 0.9, 0.85], "no kernel for int32").note == "slower: no kernel for int32"
    assert outcome([0.8, 0.9, 0.85]).note == "slower, though all products run on kernels: rounds vary from 0.82 to 0.88"


def test_the_demo_fails_where_results_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = list(demo.cases(demo.parse_args(LITTLE)))[2]
    monkeypatch.setattr(demo, "cases", lambda _: [one])
    monkeypatch.setattr(demo, "apart", lambda *_: 0.1)
    assert demo.main([*LITTLE, "--save", str(tmp_path / "demo.png")]) == 1
    assert "FAILED: attention" in capsys.readouterr().out
