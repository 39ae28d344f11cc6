"""Loops and branches of the generator that are written as Python loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jax_nano.codegen import ir
from jax_nano.codegen.arguments import Arguments, Given
from jax_nano.codegen.ir import I64, Ptr


def emitted(body: Callable[[Ptr, I64], None]) -> str:
    """The module of a function ``f(p, n)`` of bytes and a size."""
    with ir.new_module() as module:
        module.function("f", ["int8", "i64"], body, internal=False)
        return module.text()


def store(p: Ptr, i: ir.Size) -> None:
    p.at(i).store(ir.scalar_constant(1, "int8"))


def test_a_python_loop_is_the_loop_of_a_function():
    def as_function(p: Ptr, n: I64) -> None:
        ir.loop(0, n, 2, [], lambda i: ir.loop(i, n, 1, [], lambda j: store(p, j)) and None)

    def as_python_loop(p: Ptr, n: I64) -> None:
        for i in ir.range_(0, n, 2):
            for j in ir.range_(i, n):
                store(p, j)

    assert emitted(as_function) == emitted(as_python_loop)
    assert emitted(as_python_loop).count("scf.for") == 2


def test_what_follows_a_loop_is_outside_of_it():
    def body(p: Ptr, n: I64) -> None:
        for i in ir.range_(0, n):
            store(p, i)
        store(p, n)

    text = emitted(body)
    assert text.index("scf.for") < text.index("llvm.store") < text.index("    }\n") < text.rindex("llvm.store")


def test_branches_are_those_of_functions():
    def as_functions(p: Ptr, n: I64) -> None:
        ir.if_(ir.less(n, 4), lambda: store(p, 0), lambda: store(p, 1))
        ir.if_(ir.less(n, 2), lambda: store(p, 2))

    def as_python_loops(p: Ptr, n: I64) -> None:
        for few in ir.branches(ir.less(n, 4)):
            store(p, 0 if few else 1)
        for _ in ir.when(ir.less(n, 2)):
            store(p, 2)

    assert emitted(as_functions) == emitted(as_python_loops)


def test_blocks_of_sizes_that_are_not_known():
    def by_hand(p: Ptr, n: I64) -> None:
        for i in ir.range_(0, n, 8):
            size = ir.minimum(n - i, 8)
            store(p.at(i), size)

    def as_blocks(p: Ptr, n: I64) -> None:
        for i, size in ir.blocks(n, 8):
            store(p.at(i), size)

    assert emitted(by_hand) == emitted(as_blocks)


@pytest.mark.parametrize(
    ("total", "sizes", "loops"), [(24, [8], 1), (27, [8, 3], 1), (8, [8], 0), (11, [8, 3], 0), (5, [5], 0), (0, [], 0)]
)
def test_blocks_of_known_sizes(total, sizes, loops):
    """Of equal ones a loop with one body; what is left for itself; a single one without a loop."""
    seen = []

    def body(p: Ptr, n: I64) -> None:
        for i, size in ir.blocks(total, 8):
            seen.append(size)
            store(p.at(i), size)

    assert emitted(body).count("scf.for") == loops
    assert seen == sizes


def test_a_single_time_needs_no_loop():
    assert emitted(lambda p, n: [store(p, i) for i in ir.each(1)] and None).count("scf.for") == 0
    assert emitted(lambda p, n: [store(p, i) for i in ir.each(2)] and None).count("scf.for") == 1
    assert emitted(lambda p, n: [store(p, i) for i in ir.each(n)] and None).count("scf.for") == 1


@pytest.mark.parametrize("known", [False, True])
def test_what_is_known_needs_no_branch(known):
    """A Python bool decides while the kernel is generated."""
    assert list(ir.branches(known)) == [known]
    assert list(ir.when(known)) == [None] * known


def test_sizes_known_while_generating():
    assert (ir.ceil_div(7, 4), ir.ceil_div(8, 4), ir.round_up(7, 4), ir.round_up(0, 4)) == (2, 2, 8, 0)
    assert (ir.at_least(2, 2), ir.at_least(1, 2), ir.is_set(0), ir.is_set(3)) == (True, False, False, True)


def test_fields_are_loaded_by_name_where_they_are_named():
    def by_hand(p: Ptr, n: I64) -> None:
        words = p.as_type("int64")
        store(Ptr(words.at(1).as_type("ptr").load(), "int8"), I64(words.load()))

    def by_name(p: Ptr, n: I64) -> None:
        args = Arguments(p.as_type("int64"), ("size", "place"), {"place": "int8"})
        store(args.place, args.size)

    assert emitted(by_hand) == emitted(by_name)


def test_unknown_fields_are_errors():
    with pytest.raises(AttributeError, match="no field c among a, b"):
        _ = Arguments(None, ("a", "b"), {}).c
    given = Given({"a": 1, "b": 2})
    with pytest.raises(AttributeError, match="no c among a, b"):
        _ = given.c
    assert (given.but(b=3, c=4).values, given.values) == ({"a": 1, "b": 3, "c": 4}, {"a": 1, "b": 2})


def test_calls_by_the_names_of_parameters():
    def both(*, by_name: bool) -> str:
        with ir.new_module() as module:
            module.function("callee", {"p": "int8", "n": "i64"}, lambda p, n: store(p, n), internal=True)

            def caller(p: Ptr, n: I64) -> None:
                if by_name:
                    module.call_by_name("callee", {"n": n, "unused": 0, "p": p})
                else:
                    module.call("callee", [p, n])

            module.function("caller", ["int8", "i64"], caller, internal=False)
            return module.text()

    assert both(by_name=True) == both(by_name=False)
