"""Where an operation stands in the user's code: the file and line that a report names.

JAX keeps the stack of each operation without its own frames. Of those left, the innermost that lies neither in an
installed library nor in jax_nano is the user's; if a library such as flax is all there is, its innermost is named.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple


class Place(NamedTuple):
    """A line of a source file."""

    file: str
    line: int

    def __str__(self) -> str:
        """As it is printed, relative to the current folder where it lies below."""
        path = Path(self.file)
        with suppress(ValueError, OSError):  # elsewhere, or the current folder is gone
            path = path.relative_to(Path.cwd())
        return f"{path}:{self.line}"


_PACKAGE: Final = str(Path(__file__).parent.parent) + "/"


def of_user(frames: Iterable[tuple[str, int]]) -> Place | None:
    """The place that a report names.

    Args:
      frames: file and line of each frame, innermost first.

    Returns:
      None if there are no frames.
    """
    first = None
    for file, line in frames:
        if file.startswith(_PACKAGE):
            continue
        if not file.startswith(_libraries()):
            return Place(file, line)
        first = first or Place(file, line)
    return first


@cache
def _libraries() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({str(Path(paths[name])) + "/" for name in ("stdlib", "platstdlib", "purelib", "platlib")})
