"""Documents do not rot: links, anchors and paths in them exist, and every document is reachable from the README."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
EXPERIMENTS: Final = ROOT / "docs" / "experiments"
DOCUMENTS: Final = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

# A path in a code span begins with one of these folders; those of the package may be named without it.
FOLDERS: Final = ("benchmarks", "csrc", "docs", "examples", "jax_nano", "scripts", "tests")
PARTS: Final = ("_core", "_dispatch", "_ops", "_programs", "_tools", "codegen")


def prose(text: str) -> str:
    """A document without its code blocks, in which brackets mean something else."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of a document's links, but for those that are only shown as code."""
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(text)))


def paths(text: str) -> list[str]:
    """Files and folders of the repository that a document names in code spans."""
    spans = re.findall(r"`([\w./-]+)`", prose(text))
    return [x for x in spans if "/" in x and x.split("/")[0] in FOLDERS + PARTS]


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@cache
def anchors(document: Path) -> set[str]:
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(document.read_text()), re.MULTILINE):
        anchor, count = anchor_of(heading), 1
        while anchor in found:
            anchor, count = f"{anchor_of(heading)}-{count}", count + 1
        found.add(anchor)
    return found


def faults(document: Path, text: str) -> Iterator[str]:
    """The links of a document, whose text may be another one than on disk, that lead nowhere."""
    for link in links(text):
        if re.match(r"[a-z]+:", link):  # the rest of the world is not checked
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists():
            yield f"{link}: no such file"
        elif ROOT not in (target, *target.parents):
            yield f"{link}: outside of the repository"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda x: str(x.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert list(faults(document, document.read_text())) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda x: str(x.relative_to(ROOT)))
def test_paths_exist(document: Path) -> None:
    known = (ROOT, ROOT / "jax_nano")
    assert [x for x in paths(document.read_text()) if not any((folder / x).exists() for folder in known)] == []


def test_every_document_is_reachable_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document in seen:
            continue
        seen.add(document)
        targets = [x.partition("#")[0] for x in links(document.read_text()) if not re.match(r"[a-z]+:", x)]
        waiting += [(document.parent / x).resolve() for x in targets if x.endswith(".md")]
    assert seen == set(DOCUMENTS)


def test_the_index_has_every_experiment_by_number_and_title() -> None:
    index = (EXPERIMENTS / "README.md").read_text()
    files = sorted(x for x in EXPERIMENTS.glob("*.md") if x.name != "README.md")
    assert [int(x.name[:4]) for x in files] == list(range(1, len(files) + 1))
    for file in files:
        text = file.read_text()
        number, title = re.findall(r"\A# (\d{4})\. (.*)$", text, re.MULTILINE)[0]
        assert file.name.startswith(f"{number}-")
        assert index.count(f"| {number} | [{title}]({file.name}) |") == 1, file.name
        assert "**Measurement.**" in text, file.name
        assert "**Decision.**" in text, file.name


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("[a](docs/planner.md), [b](CONTRIBUTING.md#rules), [c](#first), [d](https://example.org/x)", 0),
        ("[a](docs/planer.md)", 1),
        ("[a](CONTRIBUTING.md#rulez)", 1),
        ("[a](#nowhere) and [b](../elsewhere)", 2),
        ("`[a](shown.md)`\n\n```\n[b](shown.md)\n```\n", 0),
    ],
)
def test_a_broken_link_is_found(text: str, count: int, tmp_path: Path) -> None:
    document = ROOT / "README.md"
    text = text.replace("#first", f"#{sorted(anchors(document))[0]}")
    assert len(list(faults(document, text))) == count
