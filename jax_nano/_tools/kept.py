"""What packs hold: after `python -m jax_nano specialize`, and for `--list` and `--remove`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from jax_nano._core import packs

if TYPE_CHECKING:
    from jax_nano._tools.specialize import Found


def tell(found: Sequence[Found], out: Path | None) -> int:
    """Says what has become of products; returns the exit status."""
    kept = [x for x in found if x.kept]
    if not kept:
        print("nothing is kept: no kernel for a given product is faster than those of the build")
        return 0
    mean = math.exp(sum(math.log(x.share) for x in kept) / len(kept))
    print(f"{len(kept)} of {len(found)} products have a faster kernel, which takes {mean:.3f} of the time on average")
    print(f"kept in {out or packs.folder()}")
    if out:
        print(f"used where {packs.ENVIRONMENT}={out}")
    else:
        print("used by every process that starts from now on; `specialize --remove` removes it")
    return 0


def show(runtime: ModuleType, out: Path | None, *, remove: bool) -> int:
    """Lists the packs of a folder for this machine, and removes them if asked to; returns the exit status.

    Raises:
      ValueError: packs are off and no folder is named.
    """
    where = out or packs.folder()
    if where is None:
        raise ValueError(f"{packs.ENVIRONMENT} is off; name a folder with --out")
    files = packs.found(where, runtime)
    if not files:
        print(f"{where}: no pack for this machine")
    for file in files:
        if remove:
            packs.remove(file)
            print(f"{file}: removed")
            continue
        try:
            pack = packs.read(file, packs.signature(runtime))
        except (OSError, ValueError) as error:
            print(f"{file}: not usable: {error}")
            continue
        print(f"{file}: {len(pack.kernels)} kernels, measured {pack.about['measured']}")
        for x in pack.kernels:
            print(f"  {x['what']}: takes {x['share']:.3f} of the time")
    return 0
