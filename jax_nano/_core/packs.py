"""Packs: kernels that `python -m jax_nano specialize` has composed for products of this machine's programs.

A pack is two files: a shared object with the kernels, and a description in JSON that says what each one computes and
what it was measured to gain. They lie in the user's cache folder, or in a folder that JAX_NANO_PACKS names, which may
also be "off". What a pack holds is used by the planner in the place of the kernel of the build that it was measured
against (csrc/plan/specialized.h), and only for exactly the product that it was composed for: results are the same.

A shared object is code, so a pack is refused unless nobody but its user, or root, can write to its files and to the
folders that lead to them; and unless it is whole, made for this CPU, and by the generator of this build.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from jax_nano._core import spec, tuned

ENVIRONMENT: Final = "JAX_NANO_PACKS"
VERSION: Final = 1
"""Of the format: part of the signature."""

SUFFIX: Final = ".json"
LIBRARY_SUFFIX: Final = ".so"


@dataclass(frozen=True)
class Pack:
    """What a description says.

    Attributes:
      file: the description.
      library: the shared object.
      sha256: of its bytes.
      kernels: what the runtime is told of each kernel (`_runtime.specialized`), its symbol in the library, and for
        people the product as text (`what`) and its time as a share of that of the kernel of the build (`share`).
      about: the CPU and the date.
    """

    file: Path
    library: Path
    sha256: str
    kernels: tuple[dict[str, Any], ...]
    about: dict[str, Any]

    @property
    def name(self) -> str:
        """As reports call it."""
        return self.file.name.removesuffix(SUFFIX)


@dataclass
class _Used:
    """What this process has loaded; all of it stays until the process ends."""

    packs: list[Pack] = field(default_factory=list)
    libraries: list[ctypes.CDLL] = field(default_factory=list)


_used: Final = _Used()


def used() -> Sequence[Pack]:
    """The packs that this process runs kernels of."""
    return tuple(_used.packs)


def signature(runtime: ModuleType) -> str:
    """This kind of CPU, what composed the kernels of the build, and how they are called: what a pack is good for."""
    structs = (spec.GEMM_ARGS, spec.EPILOGUE)
    facts = (VERSION, runtime.generator(), [spec.names(x) for x in structs])
    return f"{runtime.cpu_signature()}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"


def folder() -> Path | None:
    """Where the packs of this user are; None if JAX_NANO_PACKS is "off"."""
    if given := os.environ.get(ENVIRONMENT):
        return None if given.strip().lower() == "off" else Path(given)
    return tuned.cache_folder() / "packs"


def prefix(runtime: ModuleType) -> str:
    """Of the names of packs for this machine: others, as in a home folder that several machines share, are not read."""
    return f"pack-{signature(runtime)}-"


def found(where: Path, runtime: ModuleType) -> list[Path]:
    """The descriptions of a folder's packs for this machine, in the order of their names, which begin with a time."""
    return sorted(where.glob(f"{prefix(runtime)}*{SUFFIX}"))


# --- writing ------------------------------------------------------------------------------------


def save(file: Path, library: bytes, kernels: Sequence[dict[str, Any]], about: dict[str, Any], mine: str) -> None:
    """Writes a pack, readable for others and writable for the user alone.

    Args:
      file: of the description; its folder is made.
      library: the shared object.
      kernels, about: as in `Pack`.
      mine: the signature.
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    content = {
        "version": VERSION,
        "signature": mine,
        **about,
        "sha256": hashlib.sha256(library).hexdigest(),
        "kernels": list(kernels),
    }
    _replace(file.with_suffix(LIBRARY_SUFFIX), library, 0o755)
    text = json.dumps(content | {"check": _check(content)}, indent=1)
    _replace(file, f"{text}\n".encode(), 0o644)


def _replace(file: Path, content: bytes, mode: int) -> None:
    """So that another process reads the old file or the new one, and one that has mapped the old one keeps it."""
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_bytes(content)
    new.chmod(mode)
    new.replace(file)


def _check(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove(file: Path) -> None:
    """Deletes a pack. Processes that have loaded it keep it until they end."""
    file.unlink()
    file.with_suffix(LIBRARY_SUFFIX).unlink(missing_ok=True)


def drop(pack: Pack, symbols: set[str], mine: str) -> None:
    """Takes kernels out of a pack; one that holds no other is deleted."""
    kept = [x for x in pack.kernels if x["symbol"] not in symbols]
    if kept:
        save(pack.file, pack.library.read_bytes(), kept, pack.about, mine)
    else:
        remove(pack.file)


# --- reading ------------------------------------------------------------------------------------


def read(file: Path, mine: str) -> Pack:
    """What the description of a pack says.

    Args:
      file: the description.
      mine: the signature of this machine.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no such file, was made for something else, or others may write to it.
    """
    text = _read(file).decode()
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            raise ValueError(f"it has version {content['version']}, not {VERSION}")
        if content["signature"] != mine:
            raise ValueError(f"it was made for {content['signature']}, and this is {mine}")
        if content.pop("check") != _check(content):
            raise ValueError("its description is damaged")
        about = {name: content[name] for name in ("cpu", "measured")}
        kernels = tuple(dict(x) for x in content["kernels"])
        sha256 = str(content["sha256"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it lacks what a pack consists of ({type(error).__name__}: {error})") from error
    return Pack(file, file.with_suffix(LIBRARY_SUFFIX), sha256, kernels, about)


def load(pack: Pack, runtime: ModuleType, kernels: Any) -> None:
    """Adds the kernels of a pack to others.

    Args:
      pack: which.
      runtime: the extension.
      kernels: a `_runtime.specialized.Kernels`.

    Raises:
      OSError: the library cannot be read, or is none.
      ValueError: it is another one than the description's, others may write to it, or the runtime refuses a kernel.
    """
    library = _library(pack)
    for into in (runtime.specialized.Kernels(), kernels):  # all of them or none
        for x in pack.kernels:
            try:
                function = ctypes.cast(getattr(library, x["symbol"]), ctypes.c_void_p).value
                into.add(x, function, pack.name)
            except (AttributeError, KeyError, TypeError, RuntimeError) as error:
                raise ValueError(f"a kernel is damaged ({error})") from error
    _used.libraries.append(library)


def _library(pack: Pack) -> ctypes.CDLL:
    """The shared object, of the bytes that its description names."""
    file = pack.library.resolve()
    if hashlib.sha256(_read(pack.library)).hexdigest() != pack.sha256:
        raise ValueError(f"{file.name} is damaged")
    return ctypes.CDLL(str(file), mode=os.RTLD_NOW | os.RTLD_LOCAL)


def _read(file: Path) -> bytes:
    """What a file holds that nobody else can write to, nor exchange for another one."""
    with file.open("rb") as stream:
        _check_access(file, os.fstat(stream.fileno()))
        return stream.read()


def _check_access(file: Path, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{file} is not a file")
    if _is_open(state):
        raise ValueError(f"other users may write to {file}")
    for above in dict.fromkeys([*file.absolute().parents, *file.resolve().parents]):
        state = above.stat()
        # In a folder such as /tmp others may make files, but not exchange ours.
        if _is_open(state) and not (state.st_mode & stat.S_ISVTX and state.st_uid == 0):
            raise ValueError(f"other users may write to {above}")


def _is_open(state: os.stat_result) -> bool:
    return state.st_uid not in (0, os.getuid()) or bool(state.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


# --- using --------------------------------------------------------------------------------------


def use(runtime: ModuleType) -> None:
    """Gives the extension the packs that there are for this machine.

    One that is not usable is left alone, with a warning.
    """
    where = folder()
    if where is None or not where.is_dir():
        if where is not None and os.environ.get(ENVIRONMENT):
            warnings.warn(f"{ENVIRONMENT}={where}: there is no such folder", stacklevel=2)
        return
    kernels = runtime.specialized.Kernels()
    for pack in usable(where, runtime):
        try:
            load(pack, runtime, kernels)
        except (OSError, ValueError) as error:
            _warn(pack.file, error)
            continue
        _used.packs.append(pack)
    if _used.packs:
        runtime.specialized.use(kernels)


def usable(where: Path, runtime: ModuleType) -> Iterator[Pack]:
    """A folder's packs for this machine whose descriptions are in order; a warning for each of the others."""
    mine = signature(runtime)
    for file in found(where, runtime):
        try:
            yield read(file, mine)
        except (OSError, ValueError) as error:
            _warn(file, error)


def _warn(file: Path, error: Exception) -> None:
    warnings.warn(
        f"jax_nano does not use the kernels in {file}: {error}. `python -m jax_nano specialize --remove` removes them.",
        stacklevel=3,
    )
