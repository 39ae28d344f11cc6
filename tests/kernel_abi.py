"""csrc/kernel_abi.h, read as text: what the tests know of the contract comes from the header itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HEADER = (Path(__file__).parent.parent / "csrc" / "kernel_abi.h").read_text()


def _fields(struct: str) -> tuple[tuple[str, str], ...]:
    """(type, name) of each field of a struct, in order."""
    body = re.search(rf"struct {struct} {{\n(.*?)\n}};", _HEADER, re.DOTALL)
    assert body, struct
    declarations = re.sub(r"//.*", "", body[1]).split(";")
    found = []
    for declaration in declarations[:-1]:
        first, *more = declaration.split(",")
        kind, name = re.fullmatch(r"\s*(.*?)(\w+)\s*", first, re.DOTALL).groups()
        found += [(kind.strip(), x.strip()) for x in (name, *more)]
    return tuple(found)


GEMM_ARGS = _fields("GemmArgs")
EPILOGUE = _fields("Epilogue")
ACTIVATIONS = tuple(re.search(r"enum class Activation .*?{ kNone = 1, (.*?) }", _HEADER)[1].split(", "))
KERNEL_INFO = _fields("KernelInfo")
FIELDS = tuple(name for _, name in GEMM_ARGS)
PACK_SLACK_BYTES = int(re.search(r"kPackSlackBytes = (\d+);", _HEADER)[1])


def packed_a_row(nbytes: int) -> int:
    """Workspace that a row of packed A takes: an odd number of cache lines."""
    return (-(-nbytes // 64) | 1) * 64


def reads_a(kernel: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    """Whether a kernel of the manifest can read A with these k, rsa and csa where it lies: ReadsA of csrc/plan.h."""
    in_units = (fields["csa"] == 1) & (fields["k"] % kernel["kr"] == 0) & (fields["rsa"] % kernel["kr"] == 0)
    return kernel["direct_a"] & ((kernel["kr"] == 1) | in_units)
