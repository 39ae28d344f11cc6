"""What the README shows is so: its snippets run, one after the other, and print what it says."""

from __future__ import annotations

import re
from pathlib import Path

from programs import run_python

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_snippets_run_and_print_what_they_say() -> None:
    snippets = [code for language, code in BLOCKS if language == "python"]
    assert len(snippets) >= 5
    assert any("export_checks()" in code for code in snippets)
    printed = run_python("\n".join(snippets)).splitlines()
    (shown,) = (text for language, text in BLOCKS if not language)
    assert printed[: len(shown.splitlines())] == shown.splitlines()
    said = [x for code in snippets for x in re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)]
    rest = printed[len(shown.splitlines()) :]
    assert len(said) == 3
    for text in said:
        found = next((i for i, line in enumerate(rest) if line.startswith(text.removesuffix(" ..."))), None)
        assert found is not None, (text, rest)
        rest = rest[found + 1 :]
