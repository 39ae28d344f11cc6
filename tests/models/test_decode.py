"""The example that decodes with quantised weights runs, and notices a wrong result."""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

import pytest

for name in ("flax", "matplotlib", "optax", "tqdm"):
    pytest.importorskip(name)

decode = importlib.import_module("decode")
SMALL = ["--quick", "--blocks", "1", "--prompt", "4", "--tokens", "8", "--vocabulary", "256"]


def test_it_compares_and_draws(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main([*SMALL, "--save", str(tmp_path / "speed.png")]) == 0
    text = capsys.readouterr().out
    lines = map(str.split, text.partition("...")[0].splitlines())
    rows = {words[0]: words for words in lines if len(words) == 7 and words[0] in decode.TOLERANCE}
    assert set(rows) == set(decode.TOLERANCE)
    megabytes, from_float32 = ({name: float(words[i]) for name, words in rows.items()} for i in (4, 5))
    assert megabytes["float32"] > 7 * megabytes["int4"]
    assert from_float32["float32"] == 0
    assert 0 < 4 * from_float32["int8"] < from_float32["int4"] < 0.5
    assert "FAILED" not in text
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    formats, scores = decode.formats, decode.Program.decode
    monkeypatch.setattr(decode, "formats", lambda model: formats(model)[3:4])  # int4

    def wrong(program: Any, count: int) -> Any:
        tokens, first = scores(program, count)
        return tokens, first * (1.001 if count == 1 else 1)  # only the plain program makes a single token

    monkeypatch.setattr(decode.Program, "decode", wrong)
    assert decode.main(SMALL) == 1
    assert capsys.readouterr().out.count("FAILED") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--blocks", "0"], "must be at least"),
        (["--vocabulary", "64"], "words of decode.txt"),
        (["--vocabulary", "301"], "must be even"),
        (["--tokens", "5000"], "must be fewer"),
    ],
)
def test_wrong_arguments(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        decode.parse_args(wrong)
    assert message in capsys.readouterr().err
