"""Exported programs that somebody has changed: each of our calls with edits of its attributes, operands and types.

    python -P -m hostile_programs KIND BEGIN END

makes the programs of these seeds, runs each as `jax.export` would, and prints a line of JSON for each: an error, or
results, which are compared with what the attributes say. A line is printed before a program is made too, so that
whoever started the process knows which one killed it or hangs.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import attention
import attention_gradients
import epilogues
import guarded
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import quantized
import reference
from hostile_calls import CALLS, NUMBERS, TEXTS, changed_array, changed_numbers
from jax import export
from jax._src.export import _export
from jax._src.interpreters import mlir
from jax.extend.mlir import ir

import jax_nano
from jax_nano import _runtime
from jax_nano._core import spec

CLEAN = ("INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "INTERNAL: jax_nano")
"""An untyped call has no way to say which kind of error it is."""
LONGEST = 120  # seconds that one program may take, on a machine however busy

DTYPES: dict[str, Any] = {
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "i1": np.bool_,
    "i4": ml_dtypes.int4,
    "ui4": ml_dtypes.uint4,
    "i8": np.int8,
    "ui8": np.uint8,
    "i16": np.int16,
    "i32": np.int32,
    "ui32": np.uint32,
    "i64": np.int64,
    "f8E4M3FN": ml_dtypes.float8_e4m3fn,
    "f8E5M2": ml_dtypes.float8_e5m2,
}


@dataclass(frozen=True)
class Program:
    """One of our calls, as it is in an exported program.

    Attributes:
      target: of the call.
      arguments: the MLIR types of the program's arguments.
      operands: of the call: numbers of arguments.
      results: MLIR types.
      config: the `backend_config`: MLIR attributes by their names, or an untyped call's description.
      others: the call's other attributes.
    """

    target: str
    arguments: tuple[str, ...]
    operands: tuple[int, ...]
    results: tuple[str, ...]
    config: dict[str, str] | str
    others: dict[str, str]

    def text(self) -> str:
        """The program in StableHLO."""
        config = self.config
        if isinstance(config, dict):
            config = "{" + ", ".join(f"{name} = {value}" for name, value in config.items()) + "}"
        attributes = ", ".join(f"{k} = {v}" for k, v in {**self.others, "backend_config": config}.items())
        arguments = ", ".join(f"%arg{i}: {x}" for i, x in enumerate(self.arguments))
        operands = ", ".join(f"%arg{i}" for i in self.operands)
        types = ", ".join(self.arguments[i] for i in self.operands)
        results = ", ".join(self.results)
        count = len(self.results)
        returned = ", ".join(f"%0#{i}" if count > 1 else "%0" for i in range(count))
        return f"""module @changed attributes {{mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32}} {{
  func.func public @main({arguments}) -> ({results}) {{
    {f"%0:{count} = " if count > 1 else "%0 = " if count else ""}stablehlo.custom_call @{self.target}({operands}) {{{attributes}}} : ({types}) -> ({results})
    return {returned}{" : " if count else ""}{results}
  }}
}}
"""  # noqa: E501

    def value(self, name: str) -> Any:
        """An attribute of the call: a number, a text, or a list of numbers."""
        text = self.config[name]  # type: ignore[index]
        with mlir.make_ir_context():
            attribute = ir.Attribute.parse(text)
            if isinstance(attribute, ir.StringAttr):
                return attribute.value
            if isinstance(attribute, ir.IntegerAttr | ir.FloatAttr):
                return attribute.value
            return list(attribute)


def call_of(exported: export.Exported, target: str = "jax_nano") -> Program:
    """The call of ours in an exported program, alone: the one whose target's name has this in it."""
    with mlir.make_ir_context() as context:
        module = ir.Module.parse(exported.mlir_module(), context)
        found: list[Any] = []

        def visit(operation: Any) -> Any:
            if operation.name == "stablehlo.custom_call" and target in str(operation.attributes["call_target_name"]):
                found.append(operation)
            return ir.WalkResult.ADVANCE

        module.operation.walk(visit)
        (call,) = found
        attributes = {x.name: x.attr for x in named(call.attributes)}
        name = attributes.pop("call_target_name").value
        config = attributes.pop("mhlo.backend_config", None) or attributes.pop("backend_config")
        described = str(config) if isinstance(config, ir.StringAttr) else {x.name: str(x.attr) for x in named(config)}
        others = {"api_version": "4 : i32", **{name: str(value) for name, value in attributes.items()}}
        arguments = tuple(str(x.type) for x in call.operands)
        return Program(
            name, arguments, tuple(range(len(arguments))), tuple(str(x.type) for x in call.results), described, others
        )


def named(attributes: Any) -> list[Any]:
    return [attributes[i] for i in range(len(attributes))]


def exported_call(name: str) -> Program:
    """One of `hostile_calls`."""
    call = CALLS[name]
    outs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in call.results]
    attributes = {"abi": np.int64(_runtime.ABI_VERSION), **call.attributes}
    fun = jax.jit(lambda *operands: jax.ffi.ffi_call(call.target, outs)(*operands, **attributes))
    return exported_function(fun, *[jax.ShapeDtypeStruct(*x) for x in call.operands])


def exported_function(fun: Any, *specs: Any, target: str = "jax_nano") -> Program:
    return call_of(export.export(fun, disabled_checks=jax_nano.export_checks())(*specs), target)


def shaped(*shapes: tuple[int, ...], dtype: Any = jnp.float32) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x, dtype) for x in shapes]


def product(dtype: Any, out: Any = None) -> Callable[[], Program]:
    def make() -> Program:
        fun = jax.jit(lambda a, b: jax_nano.einsum("bmk,bkn->bmn", a, b, preferred_element_type=out))
        return exported_function(fun, *shaped((3, 8, 32), (3, 32, 16), dtype=dtype))

    return make


def linear(dtype: Any) -> Callable[[], Program]:
    def make() -> Program:
        fun = jax.jit(lambda x, w, b, r: jax_nano.linear(x, w, b, activation="gelu", scale=0.5, residual=r))
        return exported_function(fun, *shaped((8, 32), (32, 16), (16,), (8, 16), dtype=dtype))

    return make


def causal() -> Program:
    fun = jax.jit(lambda q, k, v: jax_nano.dot_product_attention(q, k, v, is_causal=True))
    return exported_function(fun, *shaped((2, 40, 4, 32), (2, 40, 2, 32), (2, 40, 2, 32), dtype=jnp.bfloat16))


def masked() -> Program:
    """Half precision, with a bias, a mask and lengths, in jax.nn's order of dimensions."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, mask: jax.Array, ends: jax.Array) -> Any:
        options = {"query_seq_lengths": ends, "key_value_seq_lengths": ends}
        return jax_nano.dot_product_attention(q, k, v, bias, mask, local_window_size=(5, 3), **options)

    half = shaped((2, 24, 2, 16), (2, 24, 2, 16), (2, 24, 2, 16), (1, 2, 24, 24), dtype=jnp.float16)
    return exported_function(jax.jit(attend), *half, *shaped((2, 1, 24, 24), dtype=bool), *shaped((2,), dtype=np.int32))


def gradients_of_attention() -> Program:
    """As `jax.grad` makes them."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jax_nano.dot_product_attention(q, k, v, is_causal=True).astype(jnp.float32) ** 2)

    fun = jax.jit(jax.grad(loss, (0, 1, 2)))
    arrays = shaped((1, 20, 4, 32), (1, 20, 2, 32), (1, 20, 2, 32), dtype=jnp.bfloat16)
    return exported_function(fun, *arrays, target=spec.ATTENTION_GRADIENTS_CALL)


def weights_of_4_bits() -> Program:
    """Stored along K, with a scale and a zero point for each 32 of them."""
    fun = jax.jit(lambda x, q, s, z: jax_nano.quantized_matmul(x, q, s, z, contracting=1, activation="silu"))
    arrays = shaped((2, 64), dtype=jnp.bfloat16), shaped((48, 64), dtype=jnp.uint4)
    return exported_function(
        fun, *arrays[0], *arrays[1], *shaped((48, 2), dtype=jnp.bfloat16), *shaped((48, 2), dtype=jnp.uint8)
    )


def weights_of_float8() -> Program:
    fun = jax.jit(jax_nano.quantized_matmul)
    return exported_function(fun, *shaped((4, 64)), *shaped((64, 48), dtype=jnp.float8_e4m3fn), *shaped((48,)))


def weights_of_8_bits() -> Program:
    fun = jax.jit(jax_nano.quantized_matmul)
    return exported_function(fun, *shaped((4, 64)), *shaped((64, 48), dtype=jnp.int8), *shaped((48,)))


def layers_of_weights() -> Program:
    """As an accelerated loop over layers makes them."""
    alone = exported_call("quantised")
    arguments = list(alone.arguments)
    for i in (1, 2, 3):
        arguments[i] = arguments[i].replace("tensor<", "tensor<3x")
    return replace(
        alone,
        arguments=(*arguments, "tensor<i32>"),
        operands=(*alone.operands, len(arguments)),
        config={**alone.config, "layers": "7 : i64"},  # type: ignore[dict-item]
        others={k: v for k, v in alone.others.items() if "layouts" not in k},
    )


def untyped(**epilogue: Any) -> Callable[[], Program]:
    """As programs that were not exported have them. Their types stay as they are: see docs/install.md.

    Only processes that run these have the functions of untyped calls.
    """

    def make() -> Program:
        arguments = (
            "tensor<8x32xf32>",
            "tensor<32x16xf32>",
            *(("tensor<16xf32>", "tensor<8x16xf32>") if epilogue else ()),
        )
        shapes, labels = ((8, 32), (32, 16), (8, 16)), ((0, 1), (1, 2), (0, 2))
        more = ("relu", np.float32(2).view(np.uint32).item(), True, True) if epilogue else ()
        description = _runtime.untyped_call(*shapes, *labels, *["float32"] * 3, "default", *more)
        assert description is not None
        target = spec.LINEAR_CALL if epilogue else spec.DOT_GENERAL_CALL
        return Program(
            target, arguments, tuple(range(len(arguments))), ("tensor<8x16xf32>",), f'"{description}"',
            {"api_version": "3 : i32"},
        )  # fmt: skip

    return make


KINDS: dict[str, Callable[[], Program]] = {
    **{name: lambda name=name: exported_call(name) for name in CALLS},
    "batch of bfloat16": product(jnp.bfloat16, jnp.float32),
    "batch of int8": product(jnp.int8, jnp.int32),
    "linear of float16": linear(jnp.float16),
    "causal": causal,
    "masked": masked,
    "gradients of attention": gradients_of_attention,
    "weights of 8 bits": weights_of_8_bits,
    "weights of 4 bits": weights_of_4_bits,
    "weights of float8": weights_of_float8,
    "layers of weights": layers_of_weights,
    "untyped product": untyped(),
    "untyped linear": untyped(epilogue=True),
}


# --- edits ------------------------------------------------------------------------------------------------------


def changed_type(text: str, rng: random.Random) -> str:
    *sizes, dtype = text.removeprefix("tensor<").removesuffix(">").split("x")
    shape, dtype = changed_array((tuple(map(int, sizes)), dtype), list(DTYPES), rng)
    return f"tensor<{'x'.join([*map(str, shape), dtype])}>"


def changed_text(text: str, rng: random.Random) -> str:
    """Characters added, taken or replaced; sometimes something else altogether."""
    if rng.random() < 0.3:
        return rng.choice(TEXTS)
    characters = list(text)
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(characters))
        match rng.randrange(3):
            case 0:
                characters.insert(at, chr(rng.randint(1, 126)))
            case 1:
                del characters[at : at + rng.randint(1, 4)]
            case _:
                characters[at : at + 1] = rng.choice("0123456789abcdef,[]{}= -")
    return "".join(characters)


def quoted(text: str) -> str:
    """As MLIR writes a string."""
    plain = lambda byte: 32 <= byte < 127 and chr(byte) not in '"\\'  # noqa: E731
    return '"' + "".join(chr(byte) if plain(byte) else f"\\{byte:02X}" for byte in text.encode()) + '"'


def changed_attribute(text: str, rng: random.Random) -> str:
    if rng.random() < 0.1:
        return rng.choice(
            ["1 : i64", "1 : i32", "1.0 : f32", '"text"', "array<i64: 1, 2>", "unit", "true", "{a = 1 : i64}"]
        )
    if text.startswith('"'):
        return quoted(changed_text(text[1:-1], rng))
    if text.startswith(("dense<", "array<")):
        numbers = [int(x) for x in re.findall(r"-?\d+", text.split(">")[0].replace("i64", ""))]
        numbers = changed_numbers(numbers, rng)
        return f"array<i64: {', '.join(map(str, numbers))}>" if numbers else "array<i64>"
    kind = text.partition(" : ")[2] or "i64"
    if kind.startswith("f"):
        not_finite = {"f32": ["0x7FC00000", "0xFF800000"], "f64": ["0x7FF8000000000000", "0x7FF0000000000000"]}[kind]
        return f"{rng.choice(['0.0', '-1.0', '1.0e30', '1.0e-30', '3.0', *not_finite])} : {kind}"
    return f"{rng.choice(NUMBERS)} : {kind}"


def edited(program: Program, rng: random.Random) -> Program:
    """The program with one to three edits."""
    described = isinstance(program.config, str)
    arguments, operands, results = list(program.arguments), list(program.operands), list(program.results)
    config: Any = program.config if described else dict(program.config)  # type: ignore[arg-type]
    target, others = program.target, dict(program.others)
    for _ in range(rng.randint(1, 3)):
        match rng.randrange(12):
            case 0 | 1 | 2 | 3:
                if described:
                    config = quoted(changed_text(config[1:-1], rng))
                elif config:
                    name = rng.choice(list(config))
                    config[name] = changed_attribute(config[name], rng)
            case 4 | 5 if not described:  # also where the call writes: the types of some are those of others
                at = rng.randrange(len(arguments))
                arguments[at] = changed_type(arguments[at], rng)
            case 6 if results and not described:
                at = rng.randrange(len(results))
                results[at] = changed_type(results[at], rng)
            case 7 if not described:
                if rng.random() < 0.5:
                    rng.shuffle(operands)
                elif rng.random() < 0.5 and operands:
                    del operands[rng.randrange(len(operands))]
                else:
                    operands.insert(rng.randint(0, len(operands)), rng.randrange(len(arguments)))
            case 8 if not described:
                if rng.random() < 0.5 and results:
                    del results[rng.randrange(len(results))]
                else:
                    results.insert(rng.randint(0, len(results)), rng.choice(program.results))
            case 9:
                if described:  # functions of versions 1 and 2 have other parameters, which only XLA could notice
                    others["api_version"] = f"{rng.choice([0, 3, 4, 5])} : i32"
                elif rng.random() < 0.5:
                    target = rng.choice([x.target for x in CALLS.values()])
                else:
                    others["api_version"] = f"{rng.choice([0, 1, 2, 3, 4, 5])} : i32"
                    if rng.random() < 0.7:  # a description of other arrays, which is valid
                        config, described = untyped()().config, True
            case 10:
                if described or rng.random() < 0.5:
                    others["has_side_effect"] = rng.choice(["true", "false"])
                elif config:
                    config.pop(rng.choice(list(config)))
            case _ if not described:
                others.update(hostile_layouts(arguments, operands, results, rng))
    if not results:
        others.pop("output_operand_aliases", None)  # StableHLO itself would read a type that is not there
    same = (tuple(arguments), tuple(operands), tuple(results)) == (program.arguments, program.operands, program.results)
    if not same and rng.random() < 0.9:  # or MLIR refuses nearly all of them
        others = {k: v for k, v in others.items() if "layouts" not in k}
    return Program(target, tuple(arguments), tuple(operands), tuple(results), config, others)


def hostile_layouts(
    arguments: Sequence[str], operands: Sequence[int], results: Sequence[str], rng: random.Random
) -> dict[str, str]:
    """Layouts that are not row-major, or a result that shares an operand's memory."""
    if rng.random() < 0.5 and operands and results:  # StableHLO itself reads a missing result's type
        place = f"[{rng.randrange(len(results))}]" if len(results) > 1 else "[]"
        operand = rng.randrange(len(operands))
        alias = f"output_tuple_indices = {place}, operand_index = {operand}, operand_tuple_indices = []"
        return {"output_operand_aliases": f"[#stablehlo.output_operand_alias<{alias}>]"}

    def layout(text: str) -> str:
        order = list(range(text.count("x")))
        rng.shuffle(order)
        return f"dense<{order}> : tensor<{len(order)}xindex>" if order else "dense<> : tensor<0xindex>"

    return {
        "operand_layouts": f"[{', '.join(layout(arguments[i]) for i in operands)}]",
        "result_layouts": f"[{', '.join(layout(x) for x in results)}]",
    }


# --- running ----------------------------------------------------------------------------------------------------


def array_of(text: str, rng: np.random.Generator) -> np.ndarray:
    """Random numbers beside a page that may not be touched, where JAX lets an array lie: at multiples of 64 bytes."""
    *sizes, name = text.removeprefix("tensor<").removesuffix(">").split("x")
    dtype, shape = np.dtype(DTYPES[name]), tuple(map(int, sizes))
    if dtype.kind == "f" or name == "bf16":
        values: Any = rng.standard_normal(shape)
    elif name == "i1":
        values = rng.random(shape) < 0.7
    elif name == "i32" and rng.random() < 0.3:
        values = rng.choice(np.array([-(1 << 31), -1, 0, 1, 5, 11, (1 << 31) - 1]), shape)
    else:
        values = rng.integers(0, 8, shape)
    size = int(np.prod(shape)) * dtype.itemsize
    region = guarded.Region(max(size, 1))
    out = region.array(shape, dtype, at="end" if size % 64 == 0 else "begin")
    out[...] = np.asarray(values).astype(dtype)
    return out


def run(program: Program, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the program gives as an exported one, after it was written and read again."""
    with mlir.make_ir_context() as context:
        serialized = _export._module_to_bytecode(ir.Module.parse(program.text(), context))

    def zeros(*_: Any) -> tuple[jax.Array, ...]:  # with the program's types: all but the module is right
        return tuple(jnp.zeros(x.shape, x.dtype) for x in map(aval_of, program.results))

    right = export.export(jax.jit(zeros, keep_unused=True))(*arrays)
    read = export.deserialize(bytearray(dataclasses.replace(right, mlir_module_serialized=serialized).serialize()))
    options = {"xla_backend_optimization_level": 0}
    found = jax.jit(read.call, compiler_options=options)(*[jax.device_put(x, may_alias=True) for x in arrays])
    return [np.asarray(x) for x in jax.block_until_ready(found)]


def aval_of(text: str) -> jax.core.ShapedArray:
    *sizes, dtype = text.removeprefix("tensor<").removesuffix(">").split("x")
    return jax.core.ShapedArray(tuple(map(int, sizes)), np.dtype(DTYPES[dtype]))


# --- what results must be -------------------------------------------------------------------------------------


def check(program: Program, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> None:
    """Raises AssertionError if the results are not what the attributes say.

    Not looked at: memory that a program says two arrays share, and arrays that it says lie in another order. Whoever
    writes that gets what is there.
    """
    if program.others.get("output_operand_aliases") or ("layouts" in str(program.others) and not _row_major(program)):
        return
    if not any(x.size for x in results):
        return  # XLA leaves such calls out, whatever they say
    given = [arrays[i] for i in program.operands]
    checks = {
        spec.DOT_GENERAL_CALL: check_product,
        spec.LINEAR_CALL: check_product,
        spec.ATTENTION_CALL: check_attention,
        spec.ATTENTION_GRADIENTS_CALL: check_gradients,
        spec.QUANTIZED_CALL: check_quantized,
    }
    with np.errstate(all="ignore"):
        checks[program.target](program, given, results)


def _row_major(program: Program) -> bool:
    for name, types in (
        ("operand_layouts", [program.arguments[i] for i in program.operands]),
        ("result_layouts", list(program.results)),
    ):
        found = re.findall(r"dense<\[?([\d, ]*)\]?>", program.others.get(name, ""))
        for order, text in zip(found, types, strict=False):
            sizes = text.removeprefix("tensor<").split("x")[:-1]
            wanted = list(reversed(range(len(sizes))))
            if [int(x) for x in order.split(",") if x.strip()] != wanted:
                return False
    return True


def epilogue_of(program: Program, scale: str, more: list[np.ndarray]) -> epilogues.Epilogue:
    bias = more.pop(0) if program.value("bias") else None
    residual = more.pop(0) if program.value("residual") else None
    return epilogues.Epilogue(program.value("activation"), program.value(scale), bias, residual)


def check_product(program: Program, given: list[np.ndarray], results: Sequence[np.ndarray]) -> None:
    lhs, rhs, *more = given
    if isinstance(program.config, str):  # it ran, so nobody has changed the description
        labels = [[0, 1], [1, 2], [0, 2]]
        epilogue = epilogues.Epilogue("relu", 2.0, *more) if more else None
    else:
        labels = [program.value(f"{x}_labels") for x in ("lhs", "rhs", "out")]
        if program.value("algorithm") != "default":
            return  # other bounds, which tests/kernels know
        epilogue = epilogue_of(program, "scale", more) if program.target == spec.LINEAR_CALL else None
    letters = {x: chr(ord("a") + i) for i, x in enumerate(dict.fromkeys(itertools.chain(*labels)))}
    lhs_term, rhs_term, out_term = ("".join(letters[x] for x in term) for term in labels)
    out = results[0]
    acc = spec.DTYPES[out.dtype.name].accumulator
    subscripts = f"{lhs_term},{rhs_term}->{out_term}"
    if epilogue is None:
        reference.expected(subscripts, lhs, rhs, out=out.dtype, acc=acc).check(out)
    else:
        expected = reference.expected(subscripts, lhs, rhs, out=np.float32)
        epilogue.expected(expected, out.dtype.name).check(out)


def case_of(program: Program, given: Sequence[np.ndarray], others: list[np.ndarray]) -> attention.Case:
    """q, k and v in jax.nn's order of dimensions, and what restricts them."""
    q, k, v = (in_order(x, program.value(f"{name}_dims")) for name, x in zip("qkv", given, strict=False))
    names = ("bias", "mask", "q_lengths", "kv_lengths")
    more = {name: others.pop(0) for name in names if program.value(name)}
    for name in ("q_lengths", "kv_lengths"):
        if name in more:
            more[name] = more[name].reshape(-1).astype(np.int64)
    window = {x: max(-attention.UNBOUNDED, min(attention.UNBOUNDED, program.value(x))) for x in ("left", "right")}
    masked = float(np.float32(program.value("masked")))
    return attention.Case(q, k, v, **more, **window, scale=program.value("scale"), masked=masked)


def in_order(x: np.ndarray, dims: Sequence[int]) -> np.ndarray:
    return x.transpose(np.argsort(dims))


def check_attention(program: Program, given: list[np.ndarray], results: Sequence[np.ndarray]) -> None:
    case = case_of(program, given[:3], given[3:])
    expected, lse = attention.expected(case)
    expected.check(in_order(results[0], program.value("out_dims")))
    if len(results) == 3 and case.q_lengths is None:
        found = results[1].astype(np.float64).reshape(-1) + results[2].reshape(-1)
        np.testing.assert_allclose(found.reshape(lse.shape), lse, rtol=1e-5, atol=1e-4)


def check_gradients(program: Program, given: list[np.ndarray], results: Sequence[np.ndarray]) -> None:
    case = case_of(program, given[:3], given[7:])
    dout = in_order(given[3], program.value("out_dims"))
    b, t, n, _ = case.q.shape
    statistics = [x.reshape(b, t, n) for x in given[4:7]]
    expected = attention_gradients.expected(case, attention_gradients.Given(dout, *statistics))
    names = ("dq", "dk", "dv", "dbias")[: 4 if program.value("dbias") else 3]
    for name, out in zip(names, results, strict=True):
        # Random statistics are nobody's maxima: where a weight overflows, infinities and NaNs follow in any order.
        sure = np.isfinite(expected[name].value) & np.isfinite(expected[name].bound)
        expected[name][sure].check(out.reshape(sure.shape)[sure], name)


def check_quantized(program: Program, given: list[np.ndarray], results: Sequence[np.ndarray]) -> None:
    x, q, scale, *more = given
    along_k, layers = bool(program.value("along_k")), program.value("layers")
    zero = more.pop(0) if program.value("zero") else None
    if layers:
        layer = int(np.clip(more.pop(), 0, q.shape[0] - 1))
        q = q[layer]
        scale = scale[layer] if layers & 2 else scale
        zero = zero[layer] if zero is not None and layers & 4 else zero
    if along_k:
        q, scale, zero = q.T, scale.T, None if zero is None else zero.T
    out = results[0]
    case = quantized.Case(x, q, scale, zero, "int8", "float32", along_k)
    product = reference.expected("mk,kn->mn", x, case.weights_in_float64(), out=np.float32)
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(case.weights_in_float64())
    product = reference.Expected(product.value, product.bound + 2 * np.finfo(np.float32).eps * magnitude)
    epilogue_of(program, "factor", more).expected(product, out.dtype.name).check(out)


# --- the process ----------------------------------------------------------------------------------------------


def outcome(kind: str, seed: int) -> dict[str, str]:
    """What became of a program: "right", "error", "unclear" (an error that says nothing) or "wrong"."""
    rng = random.Random(f"{kind} {seed}")
    program = KINDS[kind]() if seed < 0 else edited(KINDS[kind](), rng)
    values = np.random.default_rng(abs(seed))
    try:
        arrays = [array_of(x, values) for x in program.arguments]
        results = run(program, arrays)
    except jax.errors.JaxRuntimeError as error:
        clear = any(x in str(error) for x in CLEAN)
        return {"outcome": "error" if clear else "unclear", "text": str(error), "program": program.text()}
    except (ValueError, TypeError, OverflowError, NotImplementedError, KeyError, ir.MLIRError) as error:
        return {"outcome": "error", "text": f"{type(error).__name__}: {error}", "program": program.text()}
    try:
        check(program, arrays, results)
    except Exception as error:
        return {"outcome": "wrong", "text": f"{type(error).__name__}: {error}", "program": program.text()}
    return {"outcome": "right", "text": "", "program": program.text()}


def main(kind: str, begin: int, end: int) -> None:
    jax.config.update("jax_enable_x64", True)
    if isinstance(KINDS[kind]().config, str):
        jax_nano.register()
    for seed in [-1, *range(begin, end)]:
        print(json.dumps({"seed": seed}), flush=True)
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        print(json.dumps({"seed": seed, **outcome(kind, seed)}), flush=True)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
