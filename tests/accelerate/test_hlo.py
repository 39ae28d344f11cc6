"""Modules survive the way through the parser: every field of every kind, declared in hlo.py or not.

Compared is what is on the wire, field by field in each message, and what XLA prints of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib import hlo
from jax.extend import xla
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_nano._core import hlo as _hlo
from jax_nano._dispatch import decision
from jax_nano._programs import rewrite

Wire = dict[int, list[tuple[int, Any]]]
"""Of a message: by field number, wire type and value of each occurrence; messages that are declared, in turn."""


def wire(message: bytes, name: str = "Module") -> Wire:
    kinds = {number: kind.removeprefix("*") for number, kind in _hlo._MESSAGES[name].values()}
    found: Wire = {}
    for number, kind, value in fields(message):
        inner = kinds.get(number)
        found.setdefault(number, []).append((kind, wire(value, inner) if inner in _hlo._MESSAGES else value))
    return found


def fields(message: bytes) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value) of a message's fields, as protobuf's encoding has them."""
    i = 0
    while i < len(message):
        tag, i = varint(message, i)
        kind = tag & 7
        if kind == 0:
            value, i = varint(message, i)
        else:
            size, i = {1: (8, i), 5: (4, i)}.get(kind) or varint(message, i)
            value, i = message[i : i + size], i + size
        yield tag >> 3, kind, value


def varint(message: bytes, i: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, i = message[i], i + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, i


def encoded(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + encoded(high) if high else bytes([low])


def encode(message: Wire) -> bytes:
    """What `wire` was made of, in order of the fields' numbers."""
    parts = []
    for number, values in sorted(message.items()):
        for kind, value in values:
            raw = encode(value) if isinstance(value, dict) else value
            size = encoded(len(raw)) if kind == 2 else b""
            parts.append(encoded(number << 3 | kind) + (encoded(raw) if kind == 0 else size + raw))
    return b"".join(parts)


def with_unknown_fields(message: Wire) -> Wire:
    """A number, a string and eight bytes more in every message, as of a later release."""
    more: Wire = {9001: [(0, 300)], 9002: [(2, b"later"), (2, b"twice")], 9003: [(1, b"8 bytes.")]}
    inner = {
        number: [(kind, with_unknown_fields(x) if isinstance(x, dict) else x) for kind, x in values]
        for number, values in message.items()
    }
    return inner | more


def text(module: bytes) -> str:
    options = hlo.HloPrintOptions()
    options.print_metadata = options.print_backend_config = options.print_large_constants = True
    return hlo.HloModule.from_serialized_hlo_module_proto(module).to_string(options)


def check(module: bytes) -> None:
    again = _hlo.Module(module).serialized()
    assert wire(again) == wire(module)
    assert text(again) == text(module)


RARE = """
HloModule rare, input_output_alias={ {1}: (0, {}, may-alias) }, buffer_donor={ (1, {}) }, is_scheduled=false,
  frontend_attributes={a="1",b={"x": 2}}, num_partitions=2, replica_count=1

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%cond (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8,8]) tuple(%j, %x)
}

%wrapped (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %e = f32[8,8]{1,0} exponential(%x)
}

%less (l: f32[], r: f32[]) -> pred[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %c = pred[] compare(%l, %r), direction=LT
}

ENTRY %main (a: f32[8,8], b: f32[8,8], d: f32[<=8,4], k: u32[2]) -> (f32[8,8], f32[8,8], f32[<=8,4], f32[8,8]) {
  %a = f32[8,8]{1,0} parameter(0), sharding={devices=[2,1]<=[2]}
  %b = f32[8,8]{0,1} parameter(1), sharding={replicated}, metadata={op_name="b" source_file="f.py" source_line=3}
  %d = f32[<=8,4]{1,0} parameter(2), parameter_replication={true}
  %k = u32[2]{0} parameter(3)
  %zero = s32[] constant(0)
  %table = f32[2,2]{1,0} constant({ { 1, 2 }, { 3, 4 } })
  %two = f32[] constant(2)
  %big = f32[8,8]{1,0} broadcast(%two), dimensions={}
  %init = (s32[], f32[8,8]) tuple(%zero, %a)
  %loop = (s32[], f32[8,8]) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %y = f32[8,8]{1,0} get-tuple-element(%loop), index=1
  %all = f32[8,8]{1,0} all-reduce(%y), channel_id=1, replica_groups={{0,1}}, use_global_device_ids=true, to_apply=%sum
  %start = ((f32[8,8]), f32[8,8], s32[]) async-start(%all), async_execution_thread="host", calls=%wrapped
  %done = f32[8,8]{1,0} async-done(%start)
  %dot = f32[8,8]{1,0} dot(%done, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0},
    frontend_attributes={mine="kept"}, metadata={op_name="jit(f)/dot_general"}
  %half = f32[8,8]{1,0} multiply(%dot, %big), control-predecessors={%all}, sharding={devices=[2,1]<=[2]}
  %twice = f32[<=8,4]{1,0} add(%d, %d)
  %own = f32[8,8]{1,0} custom-call(%half, %a), custom_call_target="theirs", called_computations={%sum},
    custom_call_has_side_effect=true, output_to_operand_aliasing={{}: (0, {})}, backend_config="opaque\\"bytes"
  %start0 = f32[] constant(0)
  %window = f32[4,4]{1,0} reduce-window(%half, %start0), window={size=2x2 stride=2x2}, to_apply=%sum
  %rng = u32[2]{0} rng-get-and-update-state(), delta=1
  %sorted = f32[8,8]{1,0} sort(%half), dimensions={1}, is_stable=true, to_apply=%less
  ROOT %out = (f32[8,8], f32[8,8], f32[<=8,4], f32[8,8]) tuple(%half, %own, %twice, %sorted)
}
"""


def rare() -> bytes:
    return hlo.hlo_module_from_text(RARE).as_serialized_hlo_module_proto()


def test_every_kind_of_field() -> None:
    check(rare())


def test_fields_of_a_later_release() -> None:
    """In every message, and in the middle of what is rewritten."""
    module = with_unknown_fields(wire(rare()))
    assert wire(_hlo.Module(encode(module)).serialized()) == module
    assert text(encode(module)) == text(rare())


def test_rewriting_changes_nothing_else() -> None:
    """Of a module with fields of a later release: the instructions that are no dots stay as they were."""
    number = {name: number for name, (number, _) in _hlo._MESSAGES["Instruction"].items()}
    computations, instructions = 3, 2

    def others(module: Wire) -> dict[bytes, Wire]:
        found = [x for _, c in module[computations] for _, x in c[instructions]]
        return {x[number["name"]][0][1]: x for x in found if x[number["opcode"]][0][1] not in (b"dot", b"custom-call")}

    before = with_unknown_fields(wire(rare()))
    module = _hlo.Module(encode(before))
    (product,) = rewrite.rewrite(module, decision.Policy(declines=False))
    assert product.declined is None
    after = wire(module.serialized())
    assert {x: v for x, v in after.items() if x != computations} == {
        x: v for x, v in before.items() if x != computations
    }
    kept, changed = others(before), others(after)
    assert len(kept) > 30
    assert {name: changed[name] for name in kept} == kept
    assert set(changed) - set(kept) == {name for name in changed if b".jax_nano." in name}
    printed = text(encode(after))
    for field in ('mine="kept"', 'op_name="jit(f)/dot_general"', "jax_nano_dot_general"):
        assert field in printed
    assert "dot(" not in printed


def programs(mesh: jax.sharding.Mesh) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    x = jnp.ones((16, 16))
    placed = jax.device_put(x, NamedSharding(mesh, P("x")))
    image = jnp.ones((1, 8, 8, 3))
    return {
        "collectives": (lambda a: jnp.sin(a @ a.T).sum(), [placed]),
        "control flow": (lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a, lambda: jnp.sort(a)), [x]),
        "loops": (lambda a: jax.lax.scan(lambda c, _: (jnp.tanh(c @ a), c[0]), a, None, length=3), [x]),
        "linear algebra": (lambda a: jnp.linalg.eigh(a + a.T), [x]),
        "random numbers": (lambda k: jax.random.normal(k, (4, 4)), [jax.random.key(0)]),
        "convolution": (
            lambda a: jax.lax.conv(a.transpose(0, 3, 1, 2), jnp.ones((2, 3, 3, 3)), (1, 1), "SAME"),
            [image],
        ),
        "callback": (
            lambda a: jax.pure_callback(lambda v: np.asarray(v) * 2, jax.ShapeDtypeStruct(a.shape, a.dtype), a),
            [x],
        ),
        "scatter and gather": (lambda a: a.at[jnp.array([1, 2])].add(a[jnp.array([3, 4])]), [x]),
        "many dtypes": (lambda a: [a.astype(d) for d in ("int4", "float8_e4m3fn", "complex64", "bool")], [x]),
    }


@pytest.mark.parametrize("name", programs(jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))))
@pytest.mark.parametrize("donate", [(), (0,)], ids=["", "donated"])
@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_modules_of_real_programs(name: str, donate: tuple[int, ...]) -> None:
    """As XLA hands them over."""
    fun, args = programs(jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)))[name]
    modules: list[bytes] = []
    stage = xla.PipelineStage.PRE_SCHEDULER
    lowered = jax.jit(fun, donate_argnums=donate).lower(*args)
    xla.register_hlo_module_transformation(modules.append, name="collect", stage=stage, platforms="cpu")
    try:
        lowered.compile()
    finally:
        xla.clear_hlo_module_transformation("collect", stage, platforms="cpu")
    assert modules
    for module in modules:
        check(module)
