"""Makes a program that fails smaller, as long as it fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from .program import Argument, Block, Program, Statement, Value


def shrink(program: Program, fails: Callable[[Program], bool], tries: int = 120) -> Program:
    """The smallest program found.

    Args:
      program: one that fails.
      fails: whether another one does, in the same way.
      tries: the most programs to try.
    """
    left = tries
    changed = True
    while changed and left > 0:
        changed = False
        for candidate in _smaller(program):
            if left <= 0:
                break
            left -= 1
            if fails(candidate):
                program, changed = candidate, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    """Programs with a little less each, the largest steps first."""
    results = program.results
    for i in range(len(results)):
        if len(results) > 1:
            yield replace(program, results=(results[i],)).without_dead_code()
    for i in range(len(results)):
        if len(results) > 1:
            yield replace(program, results=results[:i] + results[i + 1 :]).without_dead_code()
    if len(results) == 1:
        for x in program.statements:
            if results[0] not in x.targets:
                yield replace(program, results=x.targets[:1]).without_dead_code()
    if any(x.donated for x in program.arguments):
        yield replace(program, arguments=tuple(replace(x, donated=False) for x in program.arguments))
        if sum(x.donated for x in program.arguments) > 1:
            for i, x in enumerate(program.arguments):
                if x.donated:
                    kept = (*program.arguments[:i], replace(x, donated=False), *program.arguments[i + 1 :])
                    yield replace(program, arguments=kept)
    if program.mode != "jit":
        yield replace(program, mode="jit")
    for statement in program.statements:
        if statement.bodies:
            yield from _inlined(program, statement)
    # What a statement computes is an argument instead.
    for statement in reversed(program.statements):
        yield _given(program, statement)
    # The result of one with operands of that type is the operand.
    for statement in _all(program.statements):
        for target in statement.targets:
            for operand in statement.operands:
                if operand.type == target.type:
                    yield _renamed(program, target, operand).without_dead_code()
    for statement in _all(program.statements):
        if statement.bodies:
            for inner in _all([s for b in statement.bodies for s in b.statements]):
                yield _given(program, inner)


def _all(statements: Sequence[Statement]) -> list[Statement]:
    return [y for x in statements for y in (x, *_all([s for b in x.bodies for s in b.statements]))]


def _mapped(
    statements: Sequence[Statement],
    change: Callable[[Statement], Sequence[Statement]],
    rename: Callable[[Value], Value],
) -> tuple[Statement, ...]:
    """Statements in all depths, changed, and their operands renamed."""
    found = []
    for x in statements:
        for y in change(x):
            bodies = tuple(
                replace(
                    b, statements=_mapped(b.statements, change, rename), results=tuple(rename(v) for v in b.results)
                )
                for b in y.bodies
            )
            found.append(replace(y, operands=tuple(rename(v) for v in y.operands), bodies=bodies))
    return tuple(found)


def _given(program: Program, statement: Statement) -> Program:
    """With arguments in the place of what a statement computes."""
    number = 1 + max((x.number for x in program.arguments), default=0)
    arguments = list(program.arguments)
    for i, x in enumerate(statement.targets):
        size = min(max(x.size, 0.01), 10.0)
        arguments.append(Argument(replace(x, size=size), number + i))
    statements = _mapped(program.statements, lambda x: () if x == statement else (x,), lambda x: x)
    return replace(program, arguments=tuple(arguments), statements=statements).without_dead_code()


def _renamed(program: Program, old: Value, new: Value) -> Program:
    def rename(x: Value) -> Value:
        return new if x.name == old.name else x

    statements = _mapped(program.statements, lambda x: (x,), rename)
    return replace(program, statements=statements, results=tuple(rename(x) for x in program.results))


def _inlined(program: Program, statement: Statement) -> Iterator[Program]:
    """What one call of a body computes, in the place of a loop or a function of it."""
    for body in statement.bodies:
        flat = [y for x in body.params for y in ([x] if isinstance(x, Value) else x)]
        if statement not in program.statements or not _fits(statement, body):
            continue
        number = 1 + max((x.number for x in program.arguments), default=0)
        # Parameters become arguments; those that begin as operands of the same type are these.
        names = {}
        for p, o in zip([x for x in flat if x.dtype != "int32"], statement.operands, strict=False):
            if p.type == o.type:
                names[p.name] = o
        missing = [x for x in flat if x.name not in names]
        arguments = [*program.arguments, *(Argument(x, number + i) for i, x in enumerate(missing))]
        results = iter([x for x in body.results if x.dtype != "int32" or x.shape])
        for target in statement.targets:
            result = next(results, None)
            if result is not None and result.type == target.type:
                names[target.name] = result

        def rename(x: Value, names: dict[str, Value] = names) -> Value:
            while x.name in names:
                x = names[x.name]
            return x

        def change(x: Statement, body: Block = body) -> Sequence[Statement]:
            return body.statements if x == statement else (x,)

        yield replace(
            program,
            arguments=tuple(arguments),
            statements=_mapped(program.statements, change, rename),
            results=tuple(rename(x) for x in program.results),
        ).without_dead_code()


def _fits(statement: Statement, body: Block) -> bool:
    return len([x for x in body.results if x.dtype != "int32"]) >= 1 and bool(statement.targets)
