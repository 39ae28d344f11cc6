"""What the check of a rewritten module finds, and that XLA's own modules pass it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_nano
from jax_nano._core import custom_calls, hlo, native
from jax_nano._core.hlo import Module
from jax_nano._programs import accelerate, verify
from jax_nano._programs import rewrite as _rewrite

A = np.arange(48 * 48, dtype=np.float32).reshape(48, 48) % 7 - 3


def program(a: jax.Array) -> Any:
    """A loop, a branch, fusions, tuples, converts and bitcasts, and products among them."""

    def step(carry: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        h, w = carry
        h = jnp.tanh((h.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32) / 48 + x)
        return (h, w), h.reshape(3, 16, 48).sum(1)

    (h, _), sums = lax.scan(step, (a, a), a[:3])
    h = lax.cond(h.sum() > 0, lambda h: h @ a.T, lambda h: h - 1, h)
    return h, sums, lax.sort(h[0])


def instruction(module: Module, opcode: str) -> Any:
    return next(x for c in reversed(module.computations) for x in c.instructions if x.opcode == opcode)


def computation_of(module: Module, opcode: str) -> Any:
    return next(c for c in reversed(module.computations) if any(x.opcode == opcode for x in c.instructions))


def call_before_its_operands(module: Module) -> None:
    computation = computation_of(module, "custom-call")
    computation.instructions.sort(key=lambda x: x.opcode != "custom-call")


def missing_operand(module: Module) -> None:
    instruction(module, "custom-call").operand_ids[0] += 12345


def same_id_twice(module: Module) -> None:
    computation = module.computations[-1]
    computation.instructions[1].id = computation.instructions[0].id


def name_of_an_instruction_elsewhere(module: Module) -> None:
    first, last = module.computations[0].instructions[0], instruction(module, "fusion")
    last.name = first.name


def fusion_of_another_shape(module: Module) -> None:
    instruction(module, "fusion").shape.element_type = 2


def fusion_with_another_operand(module: Module) -> None:
    fusion = instruction(module, "fusion")
    fusion.operand_ids.append(fusion.operand_ids[0])


def call_with_another_layout(module: Module) -> None:
    instruction(module, "custom-call").operand_shapes_with_layout[0].element_type = 12


def untyped_call_of_other_arrays(module: Module) -> None:
    call = instruction(module, "custom-call")
    assert b"[48,48]" in call.backend_config
    call.backend_config = call.backend_config.replace(b"[48,48]", b"[48,24]", 1)


def element_of_another_shape(module: Module) -> None:
    element = instruction(module, "get-tuple-element")
    element.shape.element_type = 8 if element.shape.element_type != 8 else 4


def tuple_of_other_elements(module: Module) -> None:
    x = instruction(module, "tuple")
    del x.operand_ids[-1]


def body_after_its_loop(module: Module) -> None:
    module.computations.sort(key=lambda c: c.id != module.entry_id)


def program_without_a_parameter(module: Module) -> None:
    instruction_ = next(x for x in module.computation(module.entry_id).instructions if x.opcode == "parameter")
    instruction_.parameter_number = 5


def program_with_another_result(module: Module) -> None:
    entry = module.computation(module.entry_id)
    entry.root_id = next(x.id for x in entry.instructions if x.opcode == "parameter")


def call_in_a_small_function(module: Module) -> None:
    computation = computation_of(module, "while")
    loop = instruction(module, "while")
    callee = computation_of(module, "custom-call")
    call = computation.instructions.add(id=loop.id + 1000, name="small", opcode="call")
    call.shape.CopyFrom(next(x for x in callee.instructions if x.id == callee.root_id).shape)
    call.operand_ids.append(next(x for x in loop.operand_ids))
    call.called_computation_ids.append(callee.id)
    call.frontend_attributes.map.add(key="xla_cpu_small_call", value="true")


BREACHES: list[Callable[[Module], None]] = [
    call_before_its_operands,
    missing_operand,
    same_id_twice,
    name_of_an_instruction_elsewhere,
    fusion_of_another_shape,
    fusion_with_another_operand,
    call_with_another_layout,
    *[untyped_call_of_other_arrays] * custom_calls.UNTYPED,
    element_of_another_shape,
    tuple_of_other_elements,
    body_after_its_loop,
    program_without_a_parameter,
    program_with_another_result,
    call_in_a_small_function,
]


def test_modules_before_and_after_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    rewrite = _rewrite.rewrite

    def checking(module: Module, policy: Any) -> Any:
        shape = module.program_shape()
        verify.check(module, shape)
        products = rewrite(module, policy)
        verify.check(module, shape)
        checked.append(module)
        return products

    monkeypatch.setattr(_rewrite, "rewrite", checking)
    with jax_nano.accelerate():
        jax.jit(program)(A)
    assert checked


@pytest.mark.expects_failure
@pytest.mark.parametrize("breach", BREACHES, ids=lambda x: x.__name__)
def test_a_breach_is_found_and_the_program_runs(
    breach: Callable[[Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite = _rewrite.rewrite

    def broken(module: Module, policy: Any) -> Any:
        products = rewrite(module, policy)
        breach(module)
        return products

    monkeypatch.setattr(_rewrite, "rewrite", broken)
    want = jax.jit(program)(A)
    jax_nano.clear_report()
    with warnings.catch_warnings(), jax_nano.accelerate():
        warnings.simplefilter("ignore")
        got = jax.jit(lambda a: program(a))(A)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    (failure,) = accelerate._hook.failures
    assert "Invalid(" in failure
    assert " 0 run on kernels" in jax_nano.report()


@pytest.mark.expects_failure
def test_what_xla_cannot_compile_is_compiled_without_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that no check foresees: XLA knows no handler of this name."""
    monkeypatch.setattr(native, "TARGET_NAME", "no such target")
    jax_nano.clear_report()
    with warnings.catch_warnings(record=True) as caught, jax_nano.accelerate():
        warnings.simplefilter("always")

        def named(a: jax.Array) -> jax.Array:
            return a @ a

        got = jax.jit(named)(A)
        again = jax.jit(named).lower(A).compile()(A)  # JAX's own caches do not know about it
    np.testing.assert_array_equal(got, A @ A)
    np.testing.assert_array_equal(again, A @ A)
    (text,) = {str(x.message) for x in caught}
    assert "XLA did not compile jit_named with our calls" in text
    report = str(jax_nano.report())
    assert " 0 run on kernels" in report
    assert "left to XLA: XLA did not compile the program with our calls" in report


@pytest.mark.expects_failure
def test_an_error_of_the_program_itself_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    call = jax.ffi.ffi_call("nobody_registered_this", jax.ShapeDtypeStruct((2,), jnp.float32))
    with jax_nano.accelerate(), pytest.raises(jax.errors.JaxRuntimeError, match="nobody_registered_this"):
        jax.jit(lambda a: call(a @ a))(A)
    assert not accelerate._hook.failures


def test_the_shapes_that_must_agree() -> None:
    shape, other = hlo._Shape(), hlo._Shape()
    hlo.set_array(shape, np.dtype(np.float32), (3, 4))
    hlo.set_array(other, np.dtype(np.float32), (3, 4))
    assert hlo.same_shape(shape, other)
    other.layout.minor_to_major[:] = (0, 1)
    assert not hlo.same_shape(shape, other)
    pair = hlo._Shape()
    pair.tuple_shapes.add().CopyFrom(shape)
    assert not hlo.same_shape(pair, shape)
    assert not hlo.same_shape(pair, hlo._Shape())
