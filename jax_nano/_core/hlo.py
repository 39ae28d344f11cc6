"""The serialized HLO module that XLA hands to a transformation, as messages that can be read and changed.

The parser is protobuf's own, so a module survives the way through it: fields that are not declared here, of which
HLO has many and every release adds some, are kept byte for byte. Declared are only the fields that a rewriter reads or
writes, by the numbers of openxla/xla's hlo.proto and xla_data.proto, which never change: old modules must stay
readable. The declarations live in a descriptor pool of their own, made at run time: generated code would be tied to
one release of protobuf, and would clash with the same messages in TensorFlow. Enumerations are declared as int32 and
messages that are only passed on as bytes, which is the same on the wire.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from jax_nano._core import custom_calls, spec

Instruction: TypeAlias = Any
"""An HloInstructionProto."""
Computation: TypeAlias = Any
"""An HloComputationProto."""

_PACKAGE: Final = "jax_nano.hlo"

# Fields by message: name -> (number, type). A * stands for `repeated`; a capital begins the name of a message.
_MESSAGES: Final[dict[str, dict[str, tuple[int, str]]]] = {
    "Module": {
        "name": (1, "string"),
        "computations": (3, "*Computation"),
        "entry_computation_id": (6, "int64"),
        "schedule": (7, "bytes"),  # of compiled modules; never looked into
        "input_output_alias": (8, "Aliases"),
        "stack_frame_index": (17, "StackFrames"),
        "buffer_donor": (18, "Donors"),
        "frontend_attributes": (19, "FrontendAttributes"),
    },
    "Aliases": {"entries": (1, "*Alias")},
    "Alias": {
        "output_shape_index": (1, "*int64"),
        "parameter_number": (2, "int64"),
        "parameter_shape_index": (3, "*int64"),
    },
    "Donors": {"entries": (1, "*Donor")},
    "Donor": {"parameter_number": (1, "int64")},
    "Computation": {
        "name": (1, "string"),
        "instructions": (2, "*Instruction"),
        "program_shape": (4, "ProgramShape"),
        "id": (5, "int64"),
        "root_id": (6, "int64"),
    },
    "Instruction": {
        "name": (1, "string"),
        "opcode": (2, "string"),
        "shape": (3, "Shape"),
        "metadata": (7, "Metadata"),
        "literal": (8, "bytes"),  # parsed by itself where it is small: weights may be megabytes
        "parameter_number": (9, "int64"),
        "fusion_kind": (11, "string"),
        "tuple_index": (13, "int64"),
        "dimensions": (14, "*int64"),
        "window": (15, "Window"),
        "slice_dimensions": (17, "*SliceDimensions"),
        "dynamic_slice_sizes": (20, "*int64"),
        "custom_call_target": (28, "string"),
        "dot_dimension_numbers": (30, "DotDimensionNumbers"),
        "id": (35, "int64"),
        "operand_ids": (36, "*int64"),
        "control_predecessor_ids": (37, "*int64"),
        "called_computation_ids": (38, "*int64"),
        "backend_config": (43, "bytes"),
        "comparison_direction": (63, "string"),
        "precision_config": (51, "PrecisionConfig"),
        "constrain_layout": (56, "bool"),
        "frontend_attributes": (68, "FrontendAttributes"),
        "operand_shapes_with_layout": (57, "*Shape"),
        "output_operand_aliasing": (74, "*bytes"),
        "custom_call_api_version": (77, "int32"),
        "dot_sparsity": (86, "*bytes"),
    },
    "Window": {"dimensions": (1, "*WindowDimension")},
    "WindowDimension": {
        "size": (1, "int64"),
        "stride": (2, "int64"),
        "padding_low": (3, "int64"),
        "padding_high": (4, "int64"),
        "window_dilation": (5, "int64"),
        "base_dilation": (6, "int64"),
        "window_reversal": (7, "bool"),
    },
    "SliceDimensions": {"start": (1, "int64"), "limit": (2, "int64"), "stride": (3, "int64")},
    "ProgramShape": {"parameters": (1, "*Shape"), "result": (2, "Shape"), "parameter_names": (3, "*string")},
    "Shape": {
        "element_type": (2, "int32"),
        "dimensions": (3, "*int64"),
        "tuple_shapes": (4, "*Shape"),
        "layout": (5, "Layout"),
        "is_dynamic_dimension": (6, "*bool"),
    },
    "Layout": {
        "minor_to_major": (1, "*int64"),
        "tiles": (6, "*bytes"),
        "element_size_in_bits": (7, "int64"),
        "memory_space": (8, "int64"),
    },
    "DotDimensionNumbers": {
        "lhs_contracting_dimensions": (1, "*int64"),
        "rhs_contracting_dimensions": (2, "*int64"),
        "lhs_batch_dimensions": (3, "*int64"),
        "rhs_batch_dimensions": (4, "*int64"),
    },
    "PrecisionConfig": {"operand_precision": (1, "*int32"), "algorithm": (2, "int32")},
    "Metadata": {"op_name": (2, "string"), "stack_frame_id": (15, "int32")},
    # Frames, their parents and what they name are counted from 1; 0 is none.
    "StackFrames": {
        "file_names": (1, "*string"),
        "function_names": (2, "*string"),
        "file_locations": (3, "*FileLocation"),
        "stack_frames": (4, "*StackFrame"),
    },
    "FileLocation": {"file_name_id": (1, "int32"), "line": (3, "int32")},
    "StackFrame": {"file_location_id": (1, "int32"), "parent_frame_id": (2, "int32")},
    "Literal": {
        "shape": (1, "Shape"),
        "preds": (2, "bytes"),  # bools, packed: a byte each
        "u8s": (3, "bytes"),
        "s32s": (4, "*int32"),
        "u32s": (6, "*uint32"),
        "f32s": (8, "*float"),
        "f16s": (11, "bytes"),
        "bf16s": (13, "bytes"),
        "s8s": (15, "bytes"),
        "u16s": (16, "bytes"),
        "s16s": (17, "bytes"),
    },
    "FrontendAttributes": {"map": (1, "*Entry")},
    "Entry": {"key": (1, "string"), "value": (2, "string")},
}

DTYPES: Final = {x.number: np.dtype(getattr(jnp, x.name)) for x in spec.DTYPES.values()}
"""By PrimitiveType, as far as kernels or numbers around them need it."""
BFLOAT16: Final = np.dtype(jnp.bfloat16)
NAMES: Final = {dtype: dtype.name for dtype in DTYPES.values()}  # NumPy would build the string each time
_OTHER_NAMES: Final = {
    1: "bool",
    5: "int64",
    9: "uint64",
    15: "complex64",
    18: "complex128",
    19: "float8_e5m2",
    20: "float8_e4m3fn",
    21: "int4",
    22: "uint4",
    23: "float8_e4m3b11fnuz",
    24: "float8_e5m2fnuz",
    25: "float8_e4m3fnuz",
    26: "int2",
    27: "uint2",
    28: "float8_e4m3",
    29: "float8_e3m4",
    32: "float4_e2m1fn",
    33: "float8_e8m0fnu",
}
"""JAX's other dtypes by PrimitiveType, for messages."""
ELEMENT_TYPES: Final = {dtype: number for number, dtype in DTYPES.items()}

PRED: Final = 1
"""The PrimitiveType of bool."""
S32: Final = 4
"""The PrimitiveType of int32."""

_TUPLE: Final = 13

_PACKED_BITS: Final = {x.number: x.bits for x in spec.WEIGHTS.values() if x.bits < 8}
"""Of dtypes whose elements XLA:CPU packs into bytes; layouts say so."""

# Operations that are removed when nothing uses their result any more.
_PURE: Final = frozenset(
    (
        *(
            "bitcast",
            "broadcast",
            "compare",
            "constant",
            "convert",
            "copy",
            "dot",
            "dynamic-slice",
            "fusion",
            "get-tuple-element",
            "iota",
        ),
        *("reduce", "reduce-window", "select", "slice", "transpose"),
    )
)


def _declare() -> dict[str, type[Any]]:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="jax_nano/hlo.proto", package=_PACKAGE, syntax="proto3")
    for message, fields in _MESSAGES.items():
        declared = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            label = field.LABEL_REPEATED if kind.startswith("*") else field.LABEL_OPTIONAL
            kind = kind.removeprefix("*")
            if kind in _MESSAGES:
                declared.field.add(
                    name=name, number=number, label=label, type=field.TYPE_MESSAGE, type_name=f".{_PACKAGE}.{kind}"
                )
            else:
                declared.field.add(name=name, number=number, label=label, type=getattr(field, f"TYPE_{kind.upper()}"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {x: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{x}")) for x in _MESSAGES}


_CLASSES: Final = _declare()
_Module, _Instruction, _Literal, _Shape = (_CLASSES[name] for name in ("Module", "Instruction", "Literal", "Shape"))


class Array(NamedTuple):
    """What a Shape says of a dense array of static size."""

    dtype: np.dtype
    dims: tuple[int, ...]
    major_to_minor: tuple[int, ...]
    physical: tuple[int, ...]  # sizes in the order of memory
    is_row_major: bool


def dtype_of(instruction: Instruction) -> np.dtype:
    """The dtype of an instruction's result, which is an array of one of those in `DTYPES`."""
    return DTYPES[instruction.shape.element_type]


def dtype_name(shape: Any) -> str:
    """A shape's dtype, for messages."""
    dtype = DTYPES.get(shape.element_type)
    if dtype is not None:
        return NAMES[dtype]
    return _OTHER_NAMES.get(shape.element_type, f"XLA type {shape.element_type}")


def array_of(shape: Any) -> Array | None:
    """The array that a Shape describes; None for tuples, other dtypes, dynamic sizes and layouts with tiles."""
    return _array_of(shape.SerializeToString())


@lru_cache(maxsize=4096)  # a module has few shapes, and they are looked at often
def _array_of(serialized: bytes) -> Array | None:
    shape = _Shape.FromString(serialized)
    dtype = DTYPES.get(shape.element_type)
    layout = shape.layout
    if dtype is None or any(shape.is_dynamic_dimension) or layout.tiles or layout.memory_space:
        return None
    if layout.element_size_in_bits not in (0, 8 * dtype.itemsize):
        return None
    dims, major_to_minor = tuple(shape.dimensions), tuple(layout.minor_to_major)[::-1]
    if len(dims) != len(major_to_minor):
        return None
    physical = tuple(dims[i] for i in major_to_minor)
    return Array(dtype, dims, major_to_minor, physical, major_to_minor == tuple(range(len(dims))))


def same_shape(x: Any, y: Any) -> bool:
    """Whether two Shapes have the same dtype, sizes and order of dimensions in memory, element by element if tuples."""
    if x.tuple_shapes or y.tuple_shapes:
        pairs = zip(x.tuple_shapes, y.tuple_shapes, strict=False)
        return len(x.tuple_shapes) == len(y.tuple_shapes) and all(same_shape(*pair) for pair in pairs)
    if x.element_type != y.element_type or x.dimensions != y.dimensions:
        return False
    orders = x.layout.minor_to_major, y.layout.minor_to_major
    return not all(orders) or orders[0] == orders[1]


def set_array(shape: Any, dtype: np.dtype, dims: Sequence[int]) -> None:
    """Makes a Shape that of an array in row-major order."""
    set_shape(shape, ELEMENT_TYPES[dtype], dims)


def set_shape(shape: Any, element_type: int, dims: Sequence[int]) -> None:
    """As `set_array`, given the PrimitiveType."""
    shape.Clear()
    shape.element_type = element_type
    shape.dimensions.extend(dims)
    shape.is_dynamic_dimension.extend([False] * len(dims))
    shape.layout.minor_to_major.extend(range(len(dims) - 1, -1, -1))
    shape.layout.element_size_in_bits = _PACKED_BITS.get(element_type, 0)


def set_tuple(shape: Any, arrays: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Makes a Shape that of a tuple of arrays in row-major order, of these PrimitiveTypes and sizes."""
    shape.Clear()
    shape.element_type = _TUPLE
    for element_type, dims in arrays:
        set_shape(shape.tuple_shapes.add(), element_type, dims)


def new_instruction(opcode: str) -> Instruction:
    """An instruction of no computation."""
    return _Instruction(opcode=opcode)


def attribute(message: Any, key: str) -> str | None:
    """A frontend attribute of a module or an instruction."""
    return next((entry.value for entry in message.frontend_attributes.map if entry.key == key), None)


def is_one_function(instruction: Instruction) -> bool:
    """Whether XLA compiles all that an instruction calls, loops too, into a function that cannot hold custom calls."""
    return instruction.opcode == "call" and attribute(instruction, "xla_cpu_small_call") == "true"


def become_parameter(instruction: Instruction, parameter_number: int) -> None:
    """Makes an instruction of a fused computation a parameter of the same shape."""
    _become(instruction, "parameter")
    instruction.parameter_number = parameter_number


def become_bitcast(instruction: Instruction) -> None:
    """Makes an instruction a bitcast of its operand."""
    operands = list(instruction.operand_ids)
    _become(instruction, "bitcast")
    instruction.operand_ids.extend(operands)


def _become(instruction: Instruction, opcode: str) -> None:
    old = type(instruction)()
    old.CopyFrom(instruction)
    instruction.Clear()
    instruction.id, instruction.name, instruction.opcode = old.id, old.name, opcode
    instruction.shape.CopyFrom(old.shape)
    instruction.metadata.CopyFrom(old.metadata)
    instruction.control_predecessor_ids.extend(old.control_predecessor_ids)


def scalar(constant: Instruction) -> float:
    """The value of a constant without dimensions, of float32, bfloat16 or float16."""
    literal = _Literal.FromString(constant.literal)
    for stored, dtype in ((literal.bf16s, BFLOAT16), (literal.f16s, np.dtype(np.float16))):
        if stored:
            return float(np.frombuffer(stored, dtype)[0])
    return literal.f32s[0]


def number(constant: Instruction) -> float | None:
    """The value of a constant without dimensions, of any dtype that programs mask, scale and index with."""
    literal, element_type = _Literal.FromString(constant.literal), constant.shape.element_type
    if element_type == PRED:
        return float(literal.preds[0]) if literal.preds else None
    dtype = DTYPES.get(element_type)
    if dtype is None:
        return None
    if np.issubdtype(dtype, np.integer):
        return integer(constant)
    if dtype in (BFLOAT16, np.float16, np.float32):
        has_value = literal.bf16s or literal.f16s or literal.f32s
        return scalar(constant) if has_value else None
    return None


def first_of_range(constant: Instruction) -> int | None:
    """The first element of a constant of int32 with one dimension, if each of the others is one more."""
    if len(constant.shape.dimensions) != 1 or DTYPES.get(constant.shape.element_type) != np.int32:
        return None
    values = np.asarray(_Literal.FromString(constant.literal).s32s)
    if values.size != constant.shape.dimensions[0] or values.size == 0 or (np.diff(values) != 1).any():
        return None
    return int(values[0])


def values(constant: Instruction) -> np.ndarray | None:
    """The elements of a constant of bool, or of a dtype in `DTYPES`; None if they are not stored one by one."""
    literal, kind = _Literal.FromString(constant.literal), constant.shape.element_type
    dims = list(constant.shape.dimensions)
    dtype = np.dtype(bool) if kind == PRED else DTYPES.get(kind)
    if dtype is None:
        return None
    stored = getattr(literal, _literal_field(dtype), None)
    if stored is None:
        return None
    flat = np.frombuffer(stored, dtype) if isinstance(stored, bytes) else np.asarray(stored, dtype)
    if flat.size != math.prod(dims):
        return None
    order = list(constant.shape.layout.minor_to_major)[::-1]
    return flat.reshape([dims[i] for i in order]).transpose(np.argsort(order))


def set_number(constant: Instruction, value: float) -> None:
    """Gives a constant without dimensions, of bool or of a dtype in `DTYPES`, its value."""
    kind = constant.shape.element_type
    literal = _Literal()
    literal.shape.CopyFrom(constant.shape)
    dtype = np.dtype(bool) if kind == PRED else DTYPES[kind]
    name = _literal_field(dtype)
    if isinstance(getattr(literal, name), bytes):
        setattr(literal, name, np.asarray(value, dtype).tobytes())
    else:
        getattr(literal, name).append(np.asarray(value, dtype).item())
    constant.literal = literal.SerializeToString()


def _literal_field(dtype: np.dtype) -> str:
    """The field of a literal that holds elements of a dtype."""
    if dtype.kind == "b":
        return "preds"
    kind = {"i": "s", "V": "bf"}.get(dtype.kind, dtype.kind)
    return f"{kind}{8 * dtype.itemsize}s"


def integer(constant: Instruction) -> int | None:
    """The value of a constant without dimensions, of an integer dtype in `DTYPES`."""
    literal, dtype = _Literal.FromString(constant.literal), dtype_of(constant)
    stored = getattr(literal, f"{dtype.kind.replace('i', 's')}{8 * dtype.itemsize}s", None)
    if not stored:
        return None
    return int(np.frombuffer(stored, dtype)[0] if isinstance(stored, bytes) else stored[0])


class Module:
    """An HLO module that is being rewritten."""

    def __init__(self, serialized: bytes) -> None:
        self._proto = _Module.FromString(serialized)
        self._by_id = {computation.id: computation for computation in self._proto.computations}
        taken_over = (*self._proto.input_output_alias.entries, *self._proto.buffer_donor.entries)
        self.donated = frozenset(entry.parameter_number for entry in taken_over)
        """Numbers of the parameters in whose memory results may be stored."""
        self.is_changed = False
        """Whether computations were added."""
        self.only_read: dict[int, frozenset[int]] = {}
        """Of each loop, by its id, the elements of its state that nothing writes; see `_programs.carried`."""

    def copy(self) -> Module:
        """The same module once more, to try something on."""
        return Module(self._proto.SerializeToString())

    @property
    def name(self) -> str:
        return self._proto.name

    def results_in(self, parameter_number: int) -> list[tuple[int, ...]] | None:
        """Which results are stored in a parameter's memory, as paths into the program's result; None: any may be."""
        if any(entry.parameter_number == parameter_number for entry in self._proto.buffer_donor.entries):
            return None
        entries = [x for x in self._proto.input_output_alias.entries if x.parameter_number == parameter_number]
        if any(x.parameter_shape_index for x in entries):
            return None
        return [tuple(x.output_shape_index) for x in entries]

    def donated_bytes(self) -> int:
        """The size of the donated arrays of dtypes in `DTYPES`, as weights and optimizer state are."""
        parameters = [x for x in self.computation(self.entry_id).instructions if x.opcode == "parameter"]
        arrays = [array_of(x.shape) for x in parameters if x.parameter_number in self.donated]
        return sum(array.dtype.itemsize * math.prod(array.dims) for array in arrays if array is not None)

    @property
    def computations(self) -> Sequence[Computation]:
        return self._proto.computations

    @property
    def entry_id(self) -> int:
        return self._proto.entry_computation_id

    def computation(self, number: int) -> Computation:
        """The computation with this id."""
        return self._by_id[number]

    def frames(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """File and line of each frame of the Python stack that an instruction comes from, innermost first."""
        index = self._proto.stack_frame_index
        number = instruction.metadata.stack_frame_id
        while 0 < number <= len(index.stack_frames):
            frame = index.stack_frames[number - 1]
            location = index.file_locations[frame.file_location_id - 1]
            yield index.file_names[location.file_name_id - 1], location.line
            number = frame.parent_frame_id if frame.parent_frame_id != number else 0

    def program_shape(self) -> list[Any]:
        """Copies of the shapes of the program's result and of its parameters in order."""
        entry = self.computation(self.entry_id)
        parameters = sorted((x.parameter_number, x.id) for x in entry.instructions if x.opcode == "parameter")
        shapes = {x.id: x.shape for x in entry.instructions}
        numbers = (entry.root_id, *(number for _, number in parameters))
        return [_Shape.FromString(shapes[number].SerializeToString()) for number in numbers]

    def remove(self, computation: Computation) -> None:
        """Takes out a computation that nothing calls any more."""
        del self._by_id[computation.id]
        self._proto.computations.remove(computation)

    def called_from(self, is_caller: Callable[[Instruction], bool]) -> set[int]:
        """Ids of the computations that some instructions call, and of those that these call in turn."""
        found: set[int] = set()
        for computation in reversed(self._proto.computations):  # callers come after their callees
            for instruction in computation.instructions:
                if computation.id in found or is_caller(instruction):
                    found.update(instruction.called_computation_ids)
        return found

    def fused(self) -> frozenset[int]:
        """Ids of the computations that are bodies of fusions."""
        return frozenset(
            number
            for computation in self._proto.computations
            for instruction in computation.instructions
            if instruction.opcode == "fusion"
            for number in instruction.called_computation_ids
        )

    def bodies(self, *opcodes: str) -> Iterator[Body]:
        """The computations that hold an instruction of these kinds now, but for those of fusions."""
        fused = self.fused()
        for computation in list(self._proto.computations):
            if computation.id not in fused and any(x.opcode in opcodes for x in computation.instructions):
                yield Body(self, computation)

    def copy_of(
        self, computation: Computation, parts: Sequence[Instruction], root: Instruction
    ) -> tuple[Computation, dict[int, int]]:
        """A new fused computation of some of another one's instructions, and their new ids by the old ones.

        Its parameters are numbered in the order of `parts`.
        """
        computations = self._proto.computations
        number = 1 + max(x.id for x in computations)
        new = computations.add()
        new.CopyFrom(computation)
        del new.instructions[:]
        new.id, new.name = number, f"{computation.name}.jax_nano.{number}"
        ids: dict[int, int] = {}
        count = 0
        for i, x in enumerate(parts):
            copied = new.instructions.add()
            copied.CopyFrom(x)
            copied.id = ids[x.id] = number << 32 | i
            copied.name = f"{x.name}.jax_nano.{number}.{i}"
            copied.operand_ids[:] = [ids[operand] for operand in x.operand_ids]
            if x.opcode == "parameter":
                copied.parameter_number = count
                count += 1
        new.root_id = ids[root.id]
        self.set_parameters(new)
        self._by_id[number] = new
        self.is_changed = True
        # Like the original it must come after the computations that it calls and before its callers.
        place = {x.id: (i, 0) for i, x in enumerate(computations)}
        place[number] = (place[computation.id][0], 1)
        computations.sort(key=lambda x: place[x.id])
        return new, ids

    def add_fused(self, caller: Computation, parts: Sequence[Instruction]) -> Computation:
        """A new fused computation that `caller` may call, of instructions that name their operands by place.

        The last one is its root.
        """
        computations = self._proto.computations
        number = 1 + max(x.id for x in computations)
        new = computations.add(id=number, name=f"fused_computation.jax_nano.{number}")
        for i, x in enumerate(parts):
            added = new.instructions.add()
            added.CopyFrom(x)
            added.id, added.name = number << 32 | i, f"{x.opcode}.jax_nano.{number}.{i}"
            added.operand_ids[:] = [number << 32 | place for place in x.operand_ids]
        new.root_id = number << 32 | (len(parts) - 1)
        self.set_parameters(new)
        self._by_id[number] = new
        self.is_changed = True
        place = {x.id: (i, 1) for i, x in enumerate(computations)}
        place[number] = (place[caller.id][0], 0)
        computations.sort(key=lambda x: place[x.id])
        return new

    def copy_for(self, caller: Computation, computation: Computation) -> Computation:
        """A copy of a fused computation that `caller` may call."""
        place = {x.id: i for i, x in enumerate(computation.instructions)}
        parts = []
        for x in computation.instructions:
            part = type(x)()
            part.CopyFrom(x)
            part.operand_ids[:] = [place[number] for number in x.operand_ids]
            parts.append(part)
        new = self.add_fused(caller, parts)
        new.root_id = new.instructions[place[computation.root_id]].id
        self.set_parameters(new)
        return new

    def add_region(self, opcode: str, element_type: int, caller: Computation) -> Computation:
        """A new computation of two numbers, which a reduction in `caller` or in a fusion of it may call."""
        parts = [new_instruction(x) for x in ("parameter", "parameter", opcode)]
        for i, part in enumerate(parts):
            set_shape(part.shape, element_type, ())
            part.parameter_number = i if i < 2 else 0
        parts[2].operand_ids.extend((0, 1))
        return self.add_fused(caller, parts)

    def set_parameters(self, computation: Computation) -> None:
        """Updates a computation's program_shape after its parameters were changed."""
        parameters = sorted(
            (x for x in computation.instructions if x.opcode == "parameter"), key=lambda x: x.parameter_number
        )
        computation.ClearField("program_shape")
        shape = computation.program_shape
        shape.parameters.extend(x.shape for x in parameters)
        shape.parameter_names.extend(x.name for x in parameters)
        shape.result.CopyFrom(next(x.shape for x in computation.instructions if x.id == computation.root_id))

    def clear_schedule(self) -> None:
        """Forgets in which order XLA runs the instructions of a compiled module, after some were added."""
        self._proto.ClearField("schedule")

    def attribute(self, key: str) -> str | None:
        """A frontend attribute of the module."""
        return attribute(self._proto, key)

    def serialized(self) -> bytes:
        """The module, without the computations that nothing calls any more."""
        called = {self._proto.entry_computation_id}
        for computation in self._proto.computations:
            for instruction in computation.instructions:
                called.update(instruction.called_computation_ids)
        # A fusion calls no fusion, and a call that was rewritten was the only one of its computation: one pass.
        for i in reversed(range(len(self._proto.computations))):
            if self._proto.computations[i].id not in called:
                del self._proto.computations[i]
        self._name_calls()
        return self._proto.SerializeToString()

    def _name_calls(self) -> None:
        """Gives calls that stand in the place of something else names of their own: profilers show them."""
        ours = [
            x
            for computation in self._proto.computations
            for x in computation.instructions
            if x.opcode == "custom-call" and x.custom_call_target.startswith("jax_nano_")
        ]
        for number, x in enumerate(ours):
            if not x.name.startswith("jax_nano_"):
                first, second = x.operand_shapes_with_layout[:2]
                shapes = (first.dimensions, second.dimensions)
                x.name = f"{custom_calls.name_of(x.custom_call_target, dtype_name(first), shapes)}.accelerated.{number}"


class Body:
    """The instructions of one computation of a module, by id."""

    def __init__(self, module: Module, computation: Computation) -> None:
        self.module = module
        self.computation = computation
        self.is_entry = computation.id == module.entry_id
        self._by_id: dict[int, Instruction] = {x.id: x for x in computation.instructions}
        self.root: Instruction = self._by_id[computation.root_id]
        self._instructions = computation.instructions
        self._users: dict[int, list[int]] = {number: [] for number in self._by_id}
        for x in self._instructions:
            for number in x.operand_ids:
                self._users[number].append(x.id)
        self._awaited = {number for x in self._instructions for number in x.control_predecessor_ids}
        self._next = 1 + max(self._by_id)  # an id holds that of the computation in its upper half
        self._removed: set[int] = set()

    def __getitem__(self, number: int) -> Instruction:
        return self._by_id[number]

    @property
    def instructions(self) -> list[Instruction]:
        """Those that it holds now, in order."""
        return list(self._instructions)

    @property
    def parameters(self) -> list[Instruction]:
        return [x for x in self._instructions if x.opcode == "parameter"]

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self._by_id[x] for x in instruction.operand_ids]

    def users(self, instruction: Instruction) -> list[Instruction]:
        """Those that have the instruction as an operand, once for each time."""
        return [self._by_id[x] for x in self._users[instruction.id]]

    def is_awaited(self, instruction: Instruction) -> bool:
        """Whether something else than its users needs it: another instruction's control dependency, or the caller."""
        return instruction.id in self._awaited or instruction.id == self.root.id

    def bitcast(self, operand: Instruction, dtype: np.dtype, dims: Sequence[int]) -> Instruction:
        """A new instruction: the same memory as `operand`, seen as a row-major array."""
        new = self._add(operand, "bitcast")
        new.operand_ids.append(operand.id)
        self._users[operand.id].append(new.id)
        set_array(new.shape, dtype, dims)
        return new

    def reshaped(self, operand: Instruction, dims: Sequence[int]) -> Instruction:
        """As `bitcast`, of the same dtype, whatever it is."""
        new = self._add(operand, "bitcast")
        new.operand_ids.append(operand.id)
        self._users[operand.id].append(new.id)
        set_shape(new.shape, operand.shape.element_type, dims)
        return new

    def custom_call(self, near: Instruction, operands: Sequence[Instruction]) -> Instruction:
        """A new instruction named after another one, whose shape and target are still to be set."""
        new = self._add(near, "custom-call")
        new.metadata.CopyFrom(near.metadata)
        for x in operands:
            new.operand_ids.append(x.id)
            self._users[x.id].append(new.id)
        return new

    def get(self, source: Instruction, position: int) -> Instruction:
        """A new instruction: an element of a tuple."""
        new = self._add(source, "get-tuple-element")
        new.shape.CopyFrom(source.shape.tuple_shapes[position])
        new.tuple_index = position
        new.operand_ids.append(source.id)
        self._users[source.id].append(new.id)
        return new

    def loop(self, computation: Computation, operands: Sequence[Instruction], config: bytes) -> Instruction:
        """A new fusion that XLA compiles as a loop."""
        root = next(x for x in computation.instructions if x.id == computation.root_id)
        new = self.fusion(computation, operands, root)
        new.fusion_kind, new.backend_config = "kLoop", config
        return new

    def become_loop(
        self, instruction: Instruction, computation: Computation, operands: Sequence[Instruction], config: bytes
    ) -> None:
        """Makes an instruction such a fusion, of a result of the same shape."""
        self.set_operands(instruction, operands)
        operand_ids = list(instruction.operand_ids)
        _become(instruction, "fusion")
        instruction.operand_ids.extend(operand_ids)
        instruction.called_computation_ids.append(computation.id)
        instruction.fusion_kind, instruction.backend_config = "kLoop", config

    def become_bitcast(self, instruction: Instruction) -> None:
        """Makes an instruction of one operand the same memory as that, seen as an array of its shape."""
        operand_ids = list(instruction.operand_ids)
        _become(instruction, "bitcast")
        instruction.operand_ids.extend(operand_ids)

    def copy_result(self, instruction: Instruction) -> Instruction:
        """Gives all users of an instruction a copy of its result; returns the instruction, which is a new message."""
        return self._insert_result(instruction, "copy")

    def fusion(self, computation: Computation, operands: Sequence[Instruction], value: Instruction) -> Instruction:
        """A new fusion that computes what `value` is in another one; its kind must be set afterwards."""
        new = self._add(value, "fusion")
        new.shape.CopyFrom(value.shape)
        new.metadata.CopyFrom(value.metadata)
        new.called_computation_ids.append(computation.id)
        for x in operands:
            new.operand_ids.append(x.id)
            self._users[x.id].append(new.id)
        return new

    def converted(self, operand: Instruction, dtype: np.dtype) -> Instruction:
        """A new instruction: a row-major array, converted."""
        new = self.bitcast(operand, dtype, tuple(operand.shape.dimensions))
        new.opcode = "convert"
        return new

    def like(self, model: Instruction, operands: Sequence[Instruction], near: Instruction) -> Instruction:
        """A new instruction: what `model` does, which may stand in another computation, with operands of this one.

        `near` is one of this computation's, after which it is named: names are unique in a module.
        """
        new = self._add(near, model.opcode)
        number, name = new.id, new.name
        new.CopyFrom(model)
        new.id, new.name = number, name
        del new.control_predecessor_ids[:], new.operand_ids[:]
        for x in operands:
            new.operand_ids.append(x.id)
            self._users[x.id].append(number)
        return new

    def copy_operand(self, instruction: Instruction, position: int) -> None:
        """Replaces an operand of an instruction by a copy, in memory that nothing else uses."""
        operand = self.operands(instruction)[position]
        new = self._add(operand, "copy")
        new.operand_ids.append(operand.id)
        new.shape.CopyFrom(operand.shape)
        self._users[operand.id].append(new.id)
        instruction.operand_ids[position] = new.id
        self._users[operand.id].remove(instruction.id)
        self._users[new.id].append(instruction.id)

    def narrow(self, fusion: Instruction) -> Instruction:
        """Takes the conversion of its result out of a fusion, as `convert_result` does."""
        computation = self.module.computation(fusion.called_computation_ids[0])
        by_id = {x.id: i for i, x in enumerate(computation.instructions)}
        i = by_id[computation.root_id]
        (computation.root_id,) = computation.instructions[i].operand_ids
        dtype = dtype_of(computation.instructions[by_id[computation.root_id]])
        del computation.instructions[i]
        return self.convert_result(fusion, dtype)

    def convert_result(self, instruction: Instruction, dtype: np.dtype) -> Instruction:
        """Gives an instruction's result another dtype; all its users get it converted back, as in `bitcast_result`."""
        new = self._insert_result(instruction, "convert")
        new.shape.element_type = ELEMENT_TYPES[dtype]
        instruction.backend_config = new.backend_config  # how a loop is split over threads
        return new

    def bitcast_result(self, instruction: Instruction, dtype: np.dtype, dims: Sequence[int]) -> Instruction:
        """Gives an instruction's result a row-major shape of these sizes; its users get a bitcast to the old shape.

        The bitcast takes over name and id, so that users, and the root, need not change. Returned is the instruction,
        which is a new message.
        """
        new = self._insert_result(instruction, "bitcast")
        set_array(new.shape, dtype, dims)
        return new

    def _insert_result(self, instruction: Instruction, opcode: str) -> Instruction:
        """Puts an operation between an instruction and its users; the instruction, a new message, is returned.

        The operation takes over the old message, and with it the name and id that users refer to.
        """
        new = self._add(instruction, opcode)
        number, name = new.id, new.name
        new.CopyFrom(instruction)
        new.id, new.name = number, name
        shape = type(instruction.shape)()
        shape.CopyFrom(instruction.shape)
        number, name, metadata = instruction.id, instruction.name, new.metadata
        instruction.Clear()
        instruction.id, instruction.name, instruction.opcode = number, name, opcode
        instruction.shape.CopyFrom(shape)
        instruction.metadata.CopyFrom(metadata)
        for operand in new.operand_ids:
            self._users[operand] = [new.id if x == number else x for x in self._users[operand]]
        instruction.operand_ids.append(new.id)
        self._users[new.id].append(number)
        return new

    def _add(self, like: Instruction, opcode: str) -> Instruction:
        number = self._next
        self._next += 1
        new = self._instructions.add(id=number, name=f"{like.name}.jax_nano.{number & 0xFFFFFFFF}", opcode=opcode)
        self._by_id[number] = new
        self._users[number] = []
        return new

    def set_operands(self, instruction: Instruction, operands: Sequence[Instruction]) -> None:
        """Gives an instruction other operands; `commit` removes old ones without users, and what only they used."""
        old = list(instruction.operand_ids)
        del instruction.operand_ids[:]
        for x in operands:
            instruction.operand_ids.append(x.id)
            self._users[x.id].append(instruction.id)
        for number in old:
            self._release(number, instruction.id)

    def _release(self, number: int, user: int) -> None:
        self._users[number].remove(user)
        instruction = self._by_id[number]
        if not self._users[number] and instruction.opcode in _PURE and not self.is_awaited(instruction):
            self._removed.add(number)
            for operand in instruction.operand_ids:
                self._release(operand, number)

    def commit(self) -> None:
        """Removes what has no user any more, and brings the rest in an order in which operands come before users.

        The order is that of before, as far as that is possible: a new instruction stands before its first user.
        """
        place: dict[int, int] = {}
        expanded: set[int] = set()
        waiting = [x.id for x in reversed(self._instructions) if x.id not in self._removed]
        while waiting:
            x = self._by_id[waiting[-1]]
            first = [i for i in (*x.operand_ids, *x.control_predecessor_ids) if i not in place]
            if x.id in place or not first:
                place.setdefault(x.id, len(place))
                waiting.pop()
            elif not expanded.isdisjoint(first):
                raise ValueError(f"{x.name} needs its own result")
            else:
                expanded.add(x.id)
                waiting += reversed(first)
        instructions = self._instructions
        for i in reversed(range(len(instructions))):
            if instructions[i].id in self._removed:
                del instructions[i]
        instructions.sort(key=lambda x: place[x.id])
