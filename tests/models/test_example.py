"""The example of a transformer runs, and notices a wrong result."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("tqdm")

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
