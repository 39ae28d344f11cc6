"""Hooks of mkdocs: the README is the site's first page, and links out of docs/ become the names of what they lead to.

In a clone these links are relative. The project has no public home yet that pages could lead to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the README, as if it lay in docs/."""
    text = re.sub(r"(?<=\]\()docs/", "", (ROOT / "README.md").read_text())
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Of a link to a file that is no page, its text and the file's name are left."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def named(match: re.Match[str]) -> str:
        text, path, _ = match.groups()
        there = (folder / path).resolve()
        if there.is_relative_to(ROOT / "docs") and (there.suffix in (".md", ".png", ".svg") and there.exists()):
            return match[0]
        if page.file.src_uri == "index.md" and not there.exists():  # written from the root of the clone
            there = ROOT / path
        name = str(there.relative_to(ROOT))
        return f"`{name}`" if text.strip("`") in (name, path, there.name) else f"{text} (`{name}`)"

    return _LINK.sub(named, markdown)
