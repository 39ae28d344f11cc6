"""Hooks of mkdocs: the README is the site's first page, and links out of docs/ lead to the repository.

In a clone, and on the pages of the repository, these links are relative, so that they follow the branch that is read.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
REPOSITORY = f"{_URLS['Repository']}/blob/main"
_LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(#[^)\s]*)?(?=\))")


def on_files(files: Any, config: Any) -> Any:
    """Adds the README, as if it lay in docs/."""
    text = re.sub(r"(?<=\]\()docs/", "", (ROOT / "README.md").read_text())
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files that are no pages become links to the repository."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def absolute(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        there = (folder / path).resolve()
        if there.is_relative_to(ROOT / "docs") and (there.suffix in (".md", ".png", ".svg") and there.exists()):
            return match[0]
        if page.file.src_uri == "index.md" and not there.exists():  # written from the root of the repository
            there = ROOT / path
        return f"{REPOSITORY}/{there.relative_to(ROOT)}{anchor}"

    return _LINK.sub(absolute, markdown)
