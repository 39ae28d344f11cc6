"""The facts that the kernels' generator, the C++ runtime and the Python package share, each stated here alone.

Dtypes, activations, algorithms, CPU features, targets, signatures, and the contract between generated kernels, runtime
and XLA. The package and `jax_nano.codegen` import this module; what C++ needs of it the build writes into `spec.h`
(codegen/header.py). It is plain Python and not generated itself, so it can be read, type-checked and imported from the
source tree as it is, and no copy of it can be out of date. To be importable everywhere it imports nothing but the
standard library, and no part of jax_nano.

Functions that stand for a fact (the arithmetic of an activation, the instructions of a nanokernel) are found by its
name where they are implemented.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, TypeAlias

# --- dtypes ---------------------------------------------------------------------------------------------------


class DType(NamedTuple):
    """A dtype that operands, results or sums of kernels may have.

    Attributes:
      name: NumPy's or ml_dtypes' name for it.
      short: the name in names of kernels and on the command line.
      xla: the name in XLA's PrimitiveType and in the FFI's DataType.
      number: its number in both.
      kind: whether it holds real numbers, integers, or integers without sign.
      bytes: of one element.
      mlir: the MLIR type of an element in memory. bfloat16 is moved as bits: x86-64-v3 has no instruction for it.
      accumulator: the dtype in which products with results of this dtype are summed.
      adds_as: for accumulators, the C++ type in which the runtime adds sums: integers wrap around.
    """

    name: str
    short: str
    xla: str
    number: int
    kind: Literal["float", "int", "uint"]
    bytes: int
    mlir: str
    accumulator: str
    adds_as: str = ""


DTYPES: Final[dict[str, DType]] = {
    x.name: x
    for x in (
        DType("float32", "f32", "F32", 11, "float", 4, "f32", "float32", adds_as="float"),
        DType("float64", "f64", "F64", 12, "float", 8, "f64", "float64", adds_as="double"),
        DType("float16", "f16", "F16", 10, "float", 2, "f16", "float32"),
        DType("bfloat16", "bf16", "BF16", 16, "float", 2, "i16", "float32"),
        DType("int8", "i8", "S8", 2, "int", 1, "i8", "int32"),
        DType("int16", "i16", "S16", 3, "int", 2, "i16", "int32"),
        DType("int32", "i32", "S32", 4, "int", 4, "i32", "int32", adds_as="uint32_t"),
        DType("uint8", "u8", "U8", 6, "uint", 1, "i8", "int32"),
        DType("uint16", "u16", "U16", 7, "uint", 2, "i16", "int32"),
        DType("uint32", "u32", "U32", 8, "uint", 4, "i32", "int32"),
    )
}


def of_other_sign(dtype: DType) -> DType | None:
    """The integer dtype of the same size with a sign if this one has none, without if it has; None for others.

    Integers wrap around, so a result has the same bits whichever of the two its dtype is.
    """
    other = {"int": "uint", "uint": "int"}.get(dtype.kind)
    return next((x for x in DTYPES.values() if x.kind == other and x.bytes == dtype.bytes), None)


class Signature(NamedTuple):
    """Names of the dtypes of A, B and C."""

    a: str
    b: str
    out: str


SIGNATURES: Final = (
    Signature("float32", "float32", "float32"),
    Signature("bfloat16", "bfloat16", "float32"),
    Signature("bfloat16", "bfloat16", "bfloat16"),
    Signature("float16", "float16", "float32"),
    Signature("float16", "float16", "float16"),
    Signature("float32", "bfloat16", "float32"),
    Signature("bfloat16", "float32", "float32"),
    Signature("float32", "float16", "float32"),
    Signature("float16", "float32", "float32"),
    Signature("float64", "float64", "float64"),
    # Exact in int32; a narrower C takes the low bits, as jnp does.
    Signature("int8", "int8", "int32"),
    Signature("int8", "int8", "int8"),
    Signature("uint8", "uint8", "int32"),
    Signature("uint8", "uint8", "uint8"),
    Signature("int8", "uint8", "int32"),
    Signature("int8", "uint8", "int16"),
    Signature("uint8", "int8", "int32"),
    Signature("uint8", "int8", "int16"),
)
"""The products that kernels compute, on every CPU; those of dtypes between them convert on the way."""


def signatures(*accumulators: str) -> list[Signature]:
    """Those that are summed in one of these dtypes."""
    return [x for x in SIGNATURES if DTYPES[x.out].accumulator in accumulators]


# --- algorithms -----------------------------------------------------------------------------------------------

DEFAULT_ALGORITHM: Final = "default"
"""No DotAlgorithm: operands as they are, summed in their accumulator."""

ALGORITHMS: Final[dict[str, tuple[tuple[int, int], ...]]] = {
    "BF16_BF16_F32": ((0, 0),),
    "BF16_BF16_F32_X3": ((1, 0), (0, 1), (0, 0)),
    "BF16_BF16_F32_X6": ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1), (0, 0)),
}
"""By the names of DotAlgorithmPreset: which bfloat16 parts of float32 operands are multiplied, in the order in which
the products are summed. Part 0 is the operand rounded, part 1 its rest rounded, part 2 what is left then."""

# --- activations ----------------------------------------------------------------------------------------------

ACTIVATIONS: Final = (
    "none",
    "relu",
    "gelu_tanh",
    "gelu_erf",
    "silu",
    "tanh",
    "sigmoid",
)
"""What an epilogue may apply, by the names that calls have for them."""


def activation_code(name: str) -> int:
    """Its number in `Epilogue`; 0 stands for no epilogue at all."""
    return 1 + ACTIVATIONS.index(name)


# --- CPU features and targets ---------------------------------------------------------------------------------


class Feature(NamedTuple):
    """Something that a target may ask of a CPU.

    Attributes:
      name: the public name.
      leaf, subleaf, register, bit: where CPUID announces it; no register: csrc/machine/features.cc finds out in another
        way.
      state: the registers that the operating system must save for it to be usable.
      linux: its name in /proc/cpuinfo, if that is another one.
    """

    name: str
    leaf: int = 0
    subleaf: int = 0
    register: Literal["", "eax", "ebx", "ecx", "edx"] = ""
    bit: int = 0
    state: Literal["avx", "avx512", "amx"] = "avx"
    linux: str = ""


FEATURES: Final[dict[str, Feature]] = {
    x.name: x
    for x in (
        Feature("avx", 1, 0, "ecx", 28),
        Feature("avx2", 7, 0, "ebx", 5),
        Feature("bmi1", 7, 0, "ebx", 3),
        Feature("bmi2", 7, 0, "ebx", 8),
        Feature("f16c", 1, 0, "ecx", 29),
        Feature("fma", 1, 0, "ecx", 12),
        Feature("lzcnt", 0x80000001, 0, "ecx", 5, linux="abm"),
        Feature("movbe", 1, 0, "ecx", 22),
        Feature("avx512f", 7, 0, "ebx", 16, "avx512"),
        Feature("avx512bw", 7, 0, "ebx", 30, "avx512"),
        Feature("avx512cd", 7, 0, "ebx", 28, "avx512"),
        Feature("avx512dq", 7, 0, "ebx", 17, "avx512"),
        Feature("avx512vl", 7, 0, "ebx", 31, "avx512"),
        Feature("avx512_bf16", 7, 1, "eax", 5, "avx512"),
        Feature("avx512_vnni", 7, 0, "ecx", 11, "avx512"),
        Feature("avx512_fp16", 7, 0, "edx", 23, "avx512"),
        Feature("avx_vnni", 7, 1, "eax", 4),
        Feature("amx_tile", 7, 0, "edx", 24, "amx"),
        Feature("amx_bf16", 7, 0, "edx", 22, "amx"),
        Feature("amx_int8", 7, 0, "edx", 25, "amx"),
        Feature("amx_permission"),  # the operating system lets this process use the tile registers
        Feature("microcoded_vdpbf16ps"),  # it is there, but slower than widening to float32 (Xeons)
    )
}


@dataclass(frozen=True)
class Target:
    """One instruction-set level that kernels are compiled for.

    Objects are cached under a kernel's repr, its target's included (codegen/cache.py): what does not decide machine
    code stays out of it.

    Attributes:
      name: the public name, also the suffix of every kernel of this target.
      mcpu: LLVM's CPU name.
      features: LLVM features on top of ``mcpu``.
      vector_bits: width of a vector register.
      vector_registers: architectural vector registers.
      fma_per_cycle, loads_per_cycle: full-width issue rates that the tile model weighs against each other; the
        smallest among the CPUs that the target serves well.
      masked_bytes: the smallest element of which masked vectors can be loaded and stored.
      cores: the CPU cores for which ``report`` judges its loops (codegen/target.py).
      nanokernels: the files of codegen/nanokernel/ that serve it.
      requires: the CPU features without which it cannot run.
      shunned: with one of these features the CPU runs the target, but lower ones are faster.
      tiles: whether products are of AMX tiles instead of vectors.
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
    nanokernels: tuple[str, ...] = field(repr=False)
    requires: tuple[str, ...] = field(repr=False)
    shunned: tuple[str, ...] = field(default=(), repr=False)
    tiles: bool = field(default=False, repr=False)

    def lanes(self, elem_bytes: int) -> int:
        """Vector lanes of an element size in bytes."""
        return self.vector_bits // 8 // elem_bytes

    def masks(self, elem_bytes: int) -> bool:
        """Whether vectors of elements of this size can be masked."""
        return elem_bytes >= self.masked_bytes


# The levels as the psABI defines them: LLVM may use every instruction of the level, so all are required.
_V3: Final = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4: Final = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

TARGETS: Final[dict[str, Target]] = {
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
            nanokernels=("fma", "int8_dot"),
            requires=_V3,
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
            nanokernels=("int8_dot",),
            requires=(*_V3, "avx_vnni"),
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
            nanokernels=("fma", "int8_dot"),
            requires=_V4,
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
            nanokernels=("int8_dot",),
            requires=(*_V4, "avx512_vnni"),
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
            nanokernels=("bf16_dot",),
            requires=(*_V4, "avx512_bf16"),
            shunned=("microcoded_vdpbf16ps",),
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
            nanokernels=("amx",),
            requires=(*_V4, "amx_tile", "amx_bf16", "amx_int8", "amx_permission"),
            tiles=True,
        ),
    )
}
"""By name. Of those that a CPU can run the last one that has a kernel for a signature computes it."""

# --- the contract with XLA ------------------------------------------------------------------------------------

FFI_ABI: Final = 2
"""The version of the custom calls' attributes: part of every exported program and of compilation caches."""

DOT_GENERAL_CALL: Final = "jax_nano_dot_general"
LINEAR_CALL: Final = "jax_nano_linear"
ATTENTION_CALL: Final = "jax_nano_attention"
ATTENTION_GRADIENTS_CALL: Final = "jax_nano_attention_gradients"
QUANTIZED_CALL: Final = "jax_nano_quantized"
"""The names under which XLA finds the calls (csrc/xla)."""

# --- the contract between kernels and runtime -----------------------------------------------------------------

# fmt: off
CType: TypeAlias = Literal[
    "bool", "double", "int32_t", "int64_t", "Activation", "GemmFn", "AttentionFn", "GradientFn", "QuantizedFn",
    "void*", "const void*", "const char*", "float*", "const float*",
    "const Epilogue*", "const AttentionRow*", "const GradientRow*",
]
# fmt: on


class Field(NamedTuple):
    """One of a struct's fields, which stand in memory in the order of their tuple."""

    c_type: CType
    name: str
    comment: str = ""


WORD_BYTES: Final = 8
"""What each field of these structs takes: kernels read them by position."""

GEMM_ARGS: Final = (
    Field("const void*", "a"),
    Field("const void*", "b"),
    Field("void*", "c"),
    Field("void*", "a_pack", "workspace for packed A, 64-byte aligned, PackedABytes(); unused unless pack_a"),
    Field("void*", "b_pack", "workspace for packed B, 64-byte aligned, PackedBBytes(); unused unless pack_b"),
    Field("void*", "partial", "partial sums, if narrow_out, else unused: m rows of accumulators, rs_partial apart"),
    Field("int64_t", "m", "m, n, k: any may be 0; k == 0 stores zeros (or leaves C alone when accumulating)"),
    Field("int64_t", "n"),
    Field("int64_t", "k"),
    Field("int64_t", "rsa", "A: stride between rows (m)"),
    Field("int64_t", "csa", "A: stride between columns (k)"),
    Field("int64_t", "rsb", "B: stride between rows (k)"),
    Field("int64_t", "csb", "B: stride between columns (n); 1 unless pack_b"),
    Field("int64_t", "rsc", "C: stride between rows (m)"),
    Field("int64_t", "rs_partial", "partial: stride between rows, at least n rounded up to nr"),
    Field("int64_t", "batch", "number of products, at least 1"),
    Field("int64_t", "bsa", "bsa, bsb, bsc: strides between products"),
    Field("int64_t", "bsb"),
    Field("int64_t", "bsc"),
    Field("int64_t", "accumulate", "1: add to the sums in C, or in `partial` if narrow_out; 0: neither is read"),
    Field(
        "int64_t", "more", "1: a later call continues these sums: no rounding (narrow_out: in `partial`), no epilogue"
    ),
    Field("int64_t", "pack_a", "1: copy blocks of A into the workspace (required unless ReadsA of plan/schedule.h)"),
    Field("int64_t", "pack_b", "1: copy blocks of B into the workspace (required unless direct_b and csb == 1)"),
    Field(
        "int64_t",
        "inner",
        "1: the inner-product path (KernelInfo::inner; k whole, csa == 1 and rsb == 1 unless pack_a, pack_b: then a "
        "copy along k of the operand goes to the workspace)",
    ),
    Field("int64_t", "sweep", "1: the sweep path (KernelInfo::sweep; csb == 1, nothing packed; narrow_out: `partial`)"),
    Field("int64_t", "prefetch", "1: these two paths prefetch what they read next: it lies in memory, not in a cache"),
    Field("int64_t", "mc", "cache blocking; a multiple of tile_rows or below it"),
    Field("int64_t", "kc", "a multiple of kr"),
    Field("int64_t", "nc", "a multiple of nr"),
    Field("int64_t", "tile_rows", "rows of a register tile that are used, at most mr; mr if pack_a, unless csa == 1"),
    Field("const Epilogue*", "epilogue", "applied when the sum over k is finished; null: C is the sum"),
)
"""The argument of a generated kernel (csrc/plan/kernel_abi.h)."""

EPILOGUE: Final = (
    Field("Activation", "activation"),
    Field("double", "scale", "rounded to the accumulator's type"),
    Field("const void*", "bias", "n elements; null: none"),
    Field("int64_t", "has_residual", "1: there is a residual"),
    Field(
        "int64_t", "residual_offset", "bytes from an element of C to that of the residual, which has the same strides"
    ),
)
"""What becomes of finished sums (csrc/plan/kernel_abi.h)."""

KERNEL_INFO: Final = (
    Field("const char*", "name", 'e.g. "gemm_f32_f32_f32_f32_14x32_x86-64-v4"'),
    Field("const char*", "target", 'e.g. "x86-64-v4"'),
    Field("const char*", "lhs", "lhs, rhs, acc, out: dtypes by name"),
    Field("const char*", "rhs"),
    Field("const char*", "acc"),
    Field("const char*", "out"),
    Field("const char*", "algorithm", 'DotAlgorithm preset that it computes, or "default"'),
    Field("int32_t", "mr", "mr x nr: register tile"),
    Field("int32_t", "nr"),
    Field("int32_t", "kr", "K values that are packed side by side"),
    Field("int32_t", "a_panel_bytes", "bytes of packed A for one element of A"),
    Field("int32_t", "b_panel_bytes", "and of packed B"),
    Field("int32_t", "b_header_bytes", "bytes in front of each packed column of B"),
    Field(
        "bool", "direct_a", "whether A can be read where it lies; if kr > 1, where csa is 1 and kr divides k and rsa"
    ),
    Field("bool", "direct_b", "whether B can, if its columns are 1 apart"),
    Field(
        "int32_t",
        "pairs_most",
        "the largest m, n and k of products of which it takes A's and B's rows as they lie though it packs others' B, "
        "where csa and csb are 1; 0: it packs every B, or none",
    ),
    Field("bool", "inner", "whether it has an inner-product path"),
    Field("bool", "sweep", "whether it has a path for few rows of A and a row-major B"),
    Field("bool", "narrow_out", "whether C's type is too narrow for partial sums: these live in GemmArgs::partial"),
    Field("bool", "epilogue", "whether it takes GemmArgs::epilogue"),
    Field("int32_t", "lanes", "elements of a vector of sums: divides nr"),
    Field(
        "const char*",
        "direct_vectors",
        "for tiles of 1, 2 ... mr rows against a B where it lies a digit each: how many vectors wide they are",
    ),
    Field("GemmFn", "fn"),
)
"""One generated GEMM: a target and a signature, with every microkernel behind it. The manifest gives all but `fn`."""

ATTENTION_ROW: Final = (
    Field("const void*", "q", "the query"),
    Field("void*", "out", "its result: as many elements as a value has, side by side"),
    Field("const float*", "bias", "added to the scaled scores: that of key 0, others side by side; null: none"),
    Field("const void*", "mask", "a byte a key, 0: the score is AttentionArgs::masked; null: none"),
    Field("int64_t", "lo", "only keys lo <= s < hi exist for this query"),
    Field("int64_t", "hi"),
)
"""One query of an attention (csrc/attention.h)."""

ATTENTION_ARGS: Final = (
    Field("const AttentionRow*", "rows"),
    Field("const void*", "k"),
    Field("const void*", "v"),
    Field("void*", "q_pack", "workspace for packed queries, as all workspace 64-byte aligned"),
    Field("void*", "k_pack", "for a block of keys"),
    Field("void*", "v_pack", "for a block of values"),
    Field("float*", "scores", "for those of a tile of queries and a block of keys"),
    Field("void*", "weights", "for their exponentials, where products do not take float32; else `scores`"),
    Field("float*", "sums", "a row of rs_sums elements for each query: the weighted values"),
    Field("float*", "maxima", "one for each query: what is subtracted from its scores, in base 2 unless `general`"),
    Field("float*", "totals", "a vector for each query: the sums of its weights; `finish` leaves the sum in its first"),
    Field("int64_t", "count", "queries"),
    Field("int64_t", "depth", "elements of a query and of a key"),
    Field("int64_t", "width", "elements of a value"),
    Field("int64_t", "begin", "keys begin <= s < end are looked at"),
    Field("int64_t", "end"),
    Field("int64_t", "csq", "strides: of queries between elements"),
    Field("int64_t", "rsk", "of keys between keys, and between elements"),
    Field("int64_t", "csk"),
    Field("int64_t", "rsv", "of values between values, and between elements"),
    Field("int64_t", "csv"),
    Field("int64_t", "block", "keys that are packed at once: a multiple of AttentionInfo::unit"),
    Field("int64_t", "rs_scores", "elements between rows of scores"),
    Field("int64_t", "rs_sums", "elements between rows of sums: at least width, a multiple of nr"),
    Field("double", "scale", "of scores; times the logarithm of e to base 2 unless `general`"),
    Field("double", "masked", "the score of a key that a mask excludes"),
    Field("int64_t", "general", "1: there is a bias or a mask, or the scale is not above 0"),
    Field("int64_t", "few", "1: keys and values are read where they lie (AttentionInfo::few)"),
    Field("int64_t", "first", "1: sums, maxima and totals begin; 0: they go on"),
    Field("int64_t", "finish", "1: results are written"),
)
"""The argument of a generated attention (csrc/attention.h)."""

GRADIENT_ROW: Final = (
    Field("const void*", "q", "the query"),
    Field("const void*", "dout", "the cotangent of its result"),
    Field("const float*", "bias", "as AttentionRow's"),
    Field("const void*", "mask", "as AttentionRow's"),
    Field("float*", "dbias", "the cotangents of its scores are added to these, side by side; null: not wanted"),
    Field("int64_t", "lo", "only keys lo <= s < hi exist for this query"),
    Field("int64_t", "hi"),
    Field("double", "maximum", "what is subtracted from its scores, in base 2 unless there is a bias or a mask"),
    Field("double", "log", "the logarithm to base 2 of the sum of exponentials of what is left"),
    Field("double", "delta", "the sum of its cotangents times its results"),
)
"""One query of an attention's gradients (csrc/run/attention_gradients.h)."""

GRADIENT_ARGS: Final = (
    Field("int64_t", "step", "0 packs a block of keys, 1 packs rows, 2 computes them, 3 writes queries, 4 writes keys"),
    Field("const GradientRow*", "rows"),
    Field("const void*", "k", "the first of a block of keys, of values"),
    Field("const void*", "v"),
    Field("void*", "q_pack", "workspace, 64-byte aligned, for `count` packed queries and cotangents: as rows"),
    Field("void*", "dout_pack"),
    Field("void*", "q_panels", "and as columns, where products take several K values at once; else unused"),
    Field("void*", "dout_panels"),
    Field("void*", "kt_pack", "for a block of keys and of values, packed along their elements"),
    Field("void*", "vt_pack"),
    Field("void*", "k_pack", "and of keys, along the keys"),
    Field("float*", "weights", "for `count` rows of scores"),
    Field("float*", "dscores", "and of their cotangents"),
    Field("void*", "turned", "for one of both with rows and columns exchanged, where products do not take float32"),
    Field("float*", "dq", "sums: a row for each query, for each key, for each value"),
    Field("float*", "dk"),
    Field("float*", "dv"),
    Field("int64_t", "count", "queries, or rows to write"),
    Field("int64_t", "cols", "keys of the block"),
    Field("int64_t", "s0", "the first of them"),
    Field("int64_t", "depth", "elements of a query and of a key, or of a row to write"),
    Field("int64_t", "width", "elements of a value"),
    Field("int64_t", "csq", "strides: of queries and of cotangents between elements"),
    Field("int64_t", "cso"),
    Field("int64_t", "rsk", "of keys between keys, and between elements"),
    Field("int64_t", "csk"),
    Field("int64_t", "rsv", "of values between values, and between elements"),
    Field("int64_t", "csv"),
    Field("int64_t", "rs_scores", "elements between rows of weights and dscores"),
    Field("int64_t", "rs_dq", "and of sums: at least depth or width, multiples of nr"),
    Field("int64_t", "rs_dk"),
    Field("int64_t", "rs_dv"),
    Field("double", "scale", "of scores; or what sums are multiplied by"),
    Field("double", "scale2", "of scores, times the logarithm of e to base 2"),
    Field("double", "masked", "the score of a key that a mask excludes"),
    Field("int64_t", "general", "1: there is a bias or a mask, or the scale is not above 0"),
    Field("void*", "out", "where to write `dq`, a row of `depth` elements each rs_out elements"),
    Field("int64_t", "rs_out"),
)
"""The argument of an attention's generated gradients (csrc/run/attention_gradients.h)."""

ATTENTION_INFO: Final = (
    Field("const char*", "name", 'e.g. "attention_f32_f32_6x16_x86-64-v3"'),
    Field("const char*", "target"),
    Field("const char*", "q", "dtype of queries and results"),
    Field("const char*", "kv", "of keys and values"),
    Field("int32_t", "mr", "mr x nr: register tile"),
    Field("int32_t", "nr"),
    Field("int32_t", "kr", "values of K that are packed side by side"),
    Field("int32_t", "unit", "what blocks of keys are multiples of"),
    Field("int32_t", "lanes", "elements of a vector of sums"),
    Field("int32_t", "pack_bytes", "bytes of a packed element"),
    Field("bool", "few", "whether up to kFewQueries can read keys and values where they lie, if csk and csv are 1"),
    Field("bool", "converts", "whether weights are converted from float32, to memory of their own"),
    Field("AttentionFn", "fn"),
    Field("GradientFn", "gradients"),
)
"""One generated attention: a target and two dtypes."""

ATTENTION_SIGNATURES: Final = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "bfloat16"),
    ("float32", "float16"),
)
"""The dtypes of queries and results, and of keys and values, that attentions are generated for."""

FEW_QUERIES: Final = 8
"""So many are computed without packing keys and values, which memory delivers no faster than they are multiplied."""

# --- quantised weights ----------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """A dtype of quantised weights.

    Attributes:
      name: NumPy's or ml_dtypes' name for it.
      number: its number in XLA's PrimitiveType and in the FFI's DataType.
      form: what kernels take for it, by the names in codegen/quantized/formats.py.
      bits: of one weight; two of 4 bits share a byte, the first one in its lower half.
      flip: what is added to stored integers to make them unsigned.
    """

    name: str
    number: int
    form: str
    bits: int
    flip: int


WEIGHTS: Final[dict[str, Weight]] = {
    x.name: x
    for x in (
        Weight("int8", 2, "i8", 8, 128),
        Weight("uint8", 6, "u8", 8, 0),
        Weight("int4", 21, "i4", 4, 8),
        Weight("uint4", 22, "u4", 4, 0),
        Weight("float8_e4m3fn", 20, "f8e4m3", 8, 0),
        Weight("float8_e5m2", 19, "f8e5m2", 8, 0),
    )
}

QUANTIZED_ROWS: Final = ("float32", "bfloat16", "float16", "int8", "uint8")
"""What x, scales and results (the first three) and zero points (the last two) may be; kernels know them by number."""

QUANTIZED_GROUP: Final = 16
"""What sizes of groups are multiples of, unless one group is all of K."""

QUANTIZED_TASKS: Final = (
    *("columns", "inner", "dequantize_columns", "dequantize_along_k"),
    *("bfloat16_columns", "bfloat16_along_k"),
    *("finish", "add_scaled"),
)
"""What a kernel for quantised weights can be asked for, by number. The last two are of the kernels of no format. Only
those with AVX-512 make bfloat16 of weights, and add sums times scales to others.
"""

QUANTIZED_ARGS: Final = (
    Field("int64_t", "task", "a place in QUANTIZED_TASKS"),
    Field("int64_t", "m", "rows of x, 1 to 4"),
    Field("int64_t", "n"),
    Field("int64_t", "k"),
    Field("int64_t", "group", "values of K that share a scale; k if all do"),
    Field("int64_t", "first", "to dequantise: values of K of its first group that come before the block"),
    Field("const void*", "x"),
    Field("int64_t", "rsx", "elements between rows of x, or to add_scaled of sums"),
    Field("int64_t", "x_dtype", "dtypes of rows: places in QUANTIZED_ROWS"),
    Field("const void*", "q", "weights: rows of columns, or for along K and inner a row along K for each column"),
    Field("int64_t", "rsq", "BYTES between them"),
    Field("const void*", "scale", "a row for each group, or for along K and inner one for each column"),
    Field("int64_t", "rs_scale", "elements between them; to add_scaled between the scales of two columns"),
    Field("int64_t", "scale_dtype"),
    Field("const void*", "zero", "zero points like the scales; null: none"),
    Field("int64_t", "rs_zero"),
    Field("int64_t", "zero_dtype"),
    Field("void*", "y", "float32: sums (columns adds to them), whole registers; or weights, float32 or bfloat16"),
    Field("int64_t", "nc", "elements between rows of y"),
    Field("void*", "x_pack", "workspace: m + 1 rows of k rounded up to 128 float32"),
    Field("int64_t", "keep_x", "1: inner finds x there from its last call; to add_scaled 1: y holds nothing yet"),
    Field("void*", "sums", "workspace: m * (n rounded up to 128) float32, at least 512; to add_scaled the sums"),
    Field("void*", "zeros", "workspace: n rounded up to 128 float32, for inner 4 * (groups + 32)"),
    Field("void*", "scales", "workspace: the same"),
    Field("void*", "out", "to finish: the result"),
    Field("int64_t", "rs_out", "elements between its rows"),
    Field("int64_t", "out_dtype"),
    Field("const Epilogue*", "epilogue", "null: none"),
)
"""The argument of a generated kernel for quantised weights (csrc/quantized.h)."""

QUANTIZED_INFO: Final = (
    Field("const char*", "name"),
    Field("const char*", "target"),
    Field("const char*", "form"),
    Field("int32_t", "bits"),
    Field("int32_t", "block", "weights in a register"),
    Field("int32_t", "pairs", "1: only for x of bfloat16, an even k, and no zero points; it dequantises nothing"),
    Field("QuantizedFn", "fn"),
)

PACK_SLACK_BYTES: Final = 8192
"""Packing stores whole vectors, so a packed block may be overrun by less than this."""


CACHE_LEVELS: Final = ("l1", "l2", "near", "far", "memory")
"""Where data lies. L3 is two of them: a hypervisor's other guests, and its distance, make the last of it slower."""

COST_TERMS: Final = {
    "call": ("a call", 1),
    "product": ("each further product of a batch", 1),
    "slice": ("a slice of split-K", 1),
    "slice_element": ("an element of a slice's sums", 1),
    # The blocked path: loops
    "row_of_tiles": ("a row of register tiles", 1),
    "plain_row_of_tiles": ("the same where one block is all and nothing is packed", 1),
    "block_of_k": ("a block of k, for each block of m", 1),
    "block_of_n": ("a block of n, for each of these", 1),
    # products
    "packed_step": ("a cycle of K steps of tiles against packed B", 1),
    "direct_step": ("of whole vectors of a B where it lies", 1),
    "masked_step": ("of its last, partial vector", 1),
    # C
    "c_vector": ("a vector of C stored", 1),
    "c_masked": ("a partial vector stored", 1),
    "c_add": ("a vector of earlier sums added", 1),
    "c_add_masked": ("a partial one", 1),
    "c_line": ("a cache line of C, by where C lies", 5),
    "c_high_tile_line": ("and of tiles of more than 8 rows, which write so many rows of C at a time", 5),
    "c_segment": ("a row of a tile of C, by where C lies", 5),
    "c_page": ("a row of a tile of C whose rows are a page apart", 1),
    "partial_line": ("a line of partial sums", 5),
    # A
    "a_line": ("a line of rows of A where they lie, the first time", 5),
    "a_line_again": ("and once more", 5),
    "a_aliased_line": ("of rows that share their sets in L1", 1),
    "a_column_line": ("a line of an A whose columns are contiguous, where they lie, the first time", 5),
    "a_step_line": ("and for each panel, by where the lines of a panel stay", 5),
    "a_far_step_line": ("the same where columns are far apart", 5),
    "a_packed_line": ("a line of packed A", 5),
    "pack_a_rows": ("an element of A packed from rows", 5),
    "pack_a_columns": ("from columns", 5),
    "pack_a_step_line": ("a line of columns for each panel, by where the lines of a panel stay", 5),
    "pack_a_row_panel": ("a panel of such rows", 1),
    "pack_a_column_panel": ("of columns", 1),
    "pack_a_aliased": ("an element of rows that share their sets in L1", 1),
    "pack_a_page": ("a column of a panel on a page of its own", 1),
    # B
    "b_line": ("a line of B where it lies, the first time", 5),
    "b_exposed_line": ("the part of it that the products of a tile of few rows do not hide", 5),
    "b_line_again": ("and once more", 5),
    "b_late_line": ("a line that has left L2 between its prefetch and its use, in L3 or beyond", 2),
    "b_conflict_line": ("a line of a tile whose lines do not fit into L1 together", 1),
    "b_unaligned_line": ("a line of rows that do not begin with one", 1),
    "b_page": ("a row of a tile on a page of its own, beyond the reach of the L1 TLB", 1),
    "b_packed_line": ("a line of packed B", 5),
    "pack_b_rows": ("an element of B packed from rows", 5),
    "pack_b_columns": ("from columns", 5),
    "pack_b_row": ("a row of a block of B", 1),
    "pack_b_column": ("a column of a block", 1),
    "pack_b_panel": ("a panel of packed B", 1),
    "pack_b_page": ("a row of a panel on a page of its own", 1),
    # Inner products
    "inner_step": ("a cycle of their steps", 1),
    "inner_unaligned": ("a vector of operands that do not begin with a whole one", 1),
    "inner_tile": ("a tile", 1),
    "inner_lanes": ("an accumulator whose lanes are added", 1),
    "inner_rest": ("an element of a tile with a rest of k", 1),
    "inner_copy_a": ("an element of A copied along k", 1),
    "inner_copy_b": ("of B", 1),
    "inner_line": ("a line of the longer operand", 5),
    "inner_prefetched_line": ("the same, prefetched", 5),
    "inner_again_line": ("a line of the other one, each time", 5),
    # Sweeps
    "sweep": ("a sweep over a block of columns", 1),
    "sweep_vector": ("a cycle of a sweep's vectors with 1, 2, 3, 4 rows of A", 4),
    "sweep_masked": ("a row of sums of a partial vector", 1),
    "sweep_line": ("a line of B", 5),
    "sweep_prefetched_line": ("the same, prefetched", 5),
    "sweep_a": ("an element of A", 1),
    "sweep_page": ("a row of B a page apart from the last", 1),
    "sweep_unaligned_line": ("a line of rows of B that do not begin with one", 1),
    "sweep_sums_line": ("a line of C", 5),
}
"""What the predicted time of a plan is made of (csrc/plan/cost.h): what is counted, and how many costs the term has:
one, one for each of CACHE_LEVELS, or others. A CPU's profile gives the nanoseconds of each."""


def cost_names() -> tuple[str, ...]:
    """Each cost by its name in profiles, in order: terms of several costs are followed by a level or a number."""
    out: list[str] = []
    for term, (_, count) in COST_TERMS.items():
        levels = CACHE_LEVELS if count == len(CACHE_LEVELS) else tuple(map(str, range(1, count + 1)))
        out += [f"{term}.{level}" for level in levels] if count > 1 else [term]
    return tuple(out)


def names(fields: tuple[Field, ...]) -> tuple[str, ...]:
    """The names of a struct's fields in their order."""
    return tuple(x.name for x in fields)
