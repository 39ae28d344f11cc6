"""Reads the machine code back: the inner loops of a kernel, their instructions, and whether anything spills."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_FUNCTION = re.compile(r"^([0-9a-f]+) <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\s+(?:\{vex\}\s+)?(\S+)\s*([^#\n]*)")
_TARGET = re.compile(r"^0x([0-9a-f]+)")
_VECTOR = re.compile(r"%[xyz]mm|%tmm")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly; operands as objdump prints them."""

    address: int
    mnemonic: str
    operands: str

    @property
    def touches_stack(self) -> bool:
        return "(%rsp" in self.operands

    @property
    def is_vector(self) -> bool:
        return bool(_VECTOR.search(self.operands))


@dataclass(frozen=True)
class Loop:
    """An innermost loop: the instructions from a backward jump's target to the jump."""

    function: str
    instructions: tuple[Instruction, ...]

    @property
    def vector_spills(self) -> int:
        return sum(i.touches_stack and i.is_vector for i in self.instructions)

    @property
    def scalar_reloads(self) -> int:
        return sum(i.touches_stack and not i.is_vector for i in self.instructions)

    def count(self, pattern: str) -> int:
        """Instructions whose mnemonic matches a regular expression from its start."""
        return sum(bool(re.match(pattern, i.mnemonic)) for i in self.instructions)

    def asm(self) -> str:
        """The loop's body as assembly text for llvm-mca (the closing jump left out)."""
        return "\n".join(f"{i.mnemonic} {i.operands}" for i in self.instructions[:-1]) + "\n"


def functions(disassembly: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Each function of an objdump disassembly with its instructions."""
    name, body = "", list[Instruction]()
    for line in disassembly.splitlines():
        if head := _FUNCTION.match(line):
            if name:
                yield name, body
            name, body = head[2], []
        elif name and (item := _INSTRUCTION.match(line)):
            body.append(Instruction(int(item[1], 16), item[2], item[3].strip()))
    if name:
        yield name, body


def innermost_loops(name: str, body: list[Instruction]) -> list[Loop]:
    """The loops of a function that contain no other loop.

    A jump back over a return is none: it leads from a block that LLVM has moved out of the way to where it belongs.
    """
    position = {i.address: n for n, i in enumerate(body)}
    spans = []
    for n, i in enumerate(body):
        if i.mnemonic.startswith("j") and (hit := _TARGET.match(i.operands)):
            start = position.get(int(hit[1], 16))
            if start is not None and start <= n and not any(x.mnemonic.startswith("ret") for x in body[start:n]):
                spans.append((start, n))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [Loop(name, tuple(body[a : b + 1])) for a, b in inner]
