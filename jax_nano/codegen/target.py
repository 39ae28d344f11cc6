"""An instruction-set level as data: what the generator and the toolchain need to know of a target.

A target is chosen at run time from CPUID (``csrc/select.cc``); the names here and there are the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Core:
    """What its vendor publishes of a CPU core: Intel's Optimization Reference Manual, AMD's Optimization Guides.

    Attributes:
      name: LLVM's name for it.
      slots: operations that enter the back end in a cycle.
      products, additions, loads: vector operations a cycle, by vector bits: multiplications of any kind, 32-bit integer
        additions (which share pipes with the products), and loads, broadcast ones too.
    """

    name: str
    slots: int
    products: dict[int, int]
    additions: dict[int, int]
    loads: dict[int, int]


CORES: dict[str, Core] = {
    c.name: c
    for c in (
        # Zen runs 512-bit operations in two halves.
        Core("znver3", 6, {256: 2}, {256: 4}, {256: 2}),
        Core("znver4", 6, {256: 2, 512: 1}, {256: 4, 512: 2}, {256: 2, 512: 1}),
        Core("skylake", 4, {256: 2}, {256: 3}, {256: 2}),
        # While 512-bit operations run, port 1 takes none of any width: ports 0 and 5 are left.
        Core("skylake-avx512", 4, {512: 2}, {512: 2}, {512: 2}),
        Core("icelake-server", 5, {512: 2}, {512: 2}, {512: 2}),
        Core("sapphirerapids", 6, {512: 2}, {512: 2}, {512: 2}),
        Core("alderlake", 6, {256: 2}, {256: 3}, {256: 3}),
    )
}


@dataclass(frozen=True)
class Target:
    """One instruction-set level that kernels are compiled for.

    Attributes:
      name: the public name, also the suffix of every kernel of this target.
      mcpu: LLVM's CPU name.
      features: LLVM features on top of ``mcpu``.
      vector_bits: width of a vector register.
      vector_registers: architectural vector registers.
      fma_per_cycle, loads_per_cycle: full-width issue rates that the tile model weighs against each other; the
        smallest among the CPUs that the target serves well.
      masked_bytes: the smallest element of which masked vectors can be loaded and stored.
      cores: the CPU cores for which ``report`` judges its loops.
    """

    name: str
    mcpu: str
    features: tuple[str, ...]
    vector_bits: int
    vector_registers: int
    fma_per_cycle: int
    loads_per_cycle: int
    masked_bytes: int
    cores: tuple[str, ...]

    def lanes(self, elem_bytes: int) -> int:
        """Vector lanes of an element size in bytes."""
        return self.vector_bits // 8 // elem_bytes

    def masks(self, elem_bytes: int) -> bool:
        """Whether vectors of elements of this size can be masked."""
        return elem_bytes >= self.masked_bytes


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            name="x86-64-v3",
            mcpu="x86-64-v3",
            features=(),
            vector_bits=256,
            vector_registers=16,
            fma_per_cycle=2,
            loads_per_cycle=2,
            masked_bytes=4,
            cores=("znver3", "znver4", "skylake"),
        ),
        Target(
            name="x86-64-v4",
            mcpu="x86-64-v4",
            # LLVM splits 512-bit code into 256-bit halves for generic x86-64-v4 unless told otherwise.
            features=("-prefer-256-bit",),
            vector_bits=512,
            vector_registers=32,
            fma_per_cycle=2,
            loads_per_cycle=2,
            masked_bytes=1,
            cores=("znver4", "skylake-avx512", "sapphirerapids"),
        ),
        Target(
            name="avx_vnni",
            mcpu="x86-64-v3",
            features=("+avxvnni",),
            vector_bits=256,
            vector_registers=16,
            fma_per_cycle=2,
            loads_per_cycle=2,
            masked_bytes=4,
            cores=("alderlake",),
        ),
        Target(
            name="avx512_vnni",
            mcpu="x86-64-v4",
            features=("+avx512vnni", "-prefer-256-bit"),
            vector_bits=512,
            vector_registers=32,
            fma_per_cycle=2,
            loads_per_cycle=2,
            masked_bytes=1,
            cores=("znver4", "icelake-server", "sapphirerapids"),
        ),
        Target(
            name="avx512_bf16",
            mcpu="x86-64-v4",
            features=("+avx512bf16", "-prefer-256-bit"),
            vector_bits=512,
            vector_registers=32,
            fma_per_cycle=2,
            loads_per_cycle=2,
            masked_bytes=1,
            cores=("znver4",),
        ),
        Target(
            name="amx",
            mcpu="x86-64-v4",
            features=("+amx-tile", "+amx-bf16", "+amx-int8", "-prefer-256-bit"),
            vector_bits=512,
            vector_registers=32,
            fma_per_cycle=2,
            loads_per_cycle=2,
            masked_bytes=1,
            cores=("sapphirerapids",),
        ),
    )
}
