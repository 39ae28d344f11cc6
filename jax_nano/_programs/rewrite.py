"""From dots in an HLO module to calls of our kernels.

XLA passes a module that it has simplified, partitioned and fused. In it, a product is a `dot`, or a fusion that holds
nothing but a dot and moves of its operands (a fusion of YNNPACK or oneDNN, or a loop, for products with a vector).
Other products are first brought into this form: `fusions` takes them out of fusions with other operations,
`inner_products` finds them in sums of elementwise products. Each becomes one custom call. Its labels describe operands
and result as they lie in memory: in whatever layout XLA chose, and before or after the copies that XLA made for its own
kernels. The loop after a product becomes a part of the call if an epilogue computes the same. Products that stay are in
the report as well, with the reason.

Whatever is not recognised stays as it was, and so do products without a kernel or declined by the gate.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from jax_nano._core import hlo, places, record
from jax_nano._core import jax_compat as compat
from jax_nano._core.contraction import Labels
from jax_nano._core.hlo import Body, Computation, Instruction, Module
from jax_nano._dispatch import xla
from jax_nano._dispatch.decision import Policy
from jax_nano._programs import (
    attention,
    attention_calls,
    attention_gradients,
    calls,
    fusions,
    inner_products,
    loops,
    products,
    quantized,
    quantized_calls,
    views,
)
from jax_nano._programs.products import Dot

# Where the results of a changed module are not stored in donated memory, each call gets new pages for those that are
# too large for malloc to keep: decoding with GPT-2, which donates 9 MB, gains all that its products do, a perceptron's
# training step with 22 MB ran at 0.85 of XLA's speed, GPT-2's with 1.5 GB at 0.46.
_MOST_DONATED: Final = 16 << 20

_FEWEST_OF_TRAINING: Final = 4  # products: two of attention, one for the cotangents of weights and one gradient

_SMALL: Final = "part of a small loop that XLA compiles into one function, in which no call can stand"


def rewrite(module: Module, policy: Policy) -> list[record.Product | record.Attention]:
    """Turns the attentions and products of a module into calls; returns what became of each."""
    return _Rewriter(module, policy).rewrite()


class _Rewriter:
    """The rewriting of one module."""

    def __init__(self, module: Module, policy: Policy) -> None:
        self._module, self._policy = module, policy
        self._why_none = _why_none(module)
        self._in_one_function = module.called_from(hlo.is_one_function)
        self._why_floats: dict[int, str] = {}
        """Why products read a float matrix that was made of quantised weights, by their ids, in one computation."""

    def rewrite(self) -> list[record.Product | record.Attention]:
        module, found, seen = self._module, list[record.Product | record.Attention](), set[int]()
        inner_products.restore(module, self._why_not_taken_out)
        why = fusions.take_out(module, self._why_not_taken_out, self._policy)
        if self._why_none is None:
            for body in module.bodies("dot"):
                views.convert_last(body)
            loops.carry_narrow_arrays(module, module.fused(), self._calls_in, self._policy)
            self._in_one_function = module.called_from(hlo.is_one_function)
        for body in module.bodies("dot", "fusion"):
            attentions, body, inside = self._replace_attentions(body)
            found += attentions
            seen |= inside
            with_weights, body, inside = self._replace_quantized(body)
            found += with_weights
            seen |= inside
            dots = _products_of(body)
            if not dots:
                continue
            numbers, reason = frozenset(x.instruction.id for x in dots), self._why_none_in(body.computation)
            seen.update(x.dot.id for x in dots)
            found += [self._replace(body, x, numbers, reason) for x in dots]
            body.commit()
        return [*found, *self._unseen(seen, why)]

    def _why_none_in(self, computation: Computation) -> str | None:
        """Why no product of a computation becomes a call, if none does."""
        return _SMALL if computation.id in self._in_one_function else self._why_none

    def _why_not_taken_out(self, where: Computation, dot: Instruction, sources: Sequence[fusions.Source]) -> str | None:
        return self._why_none_in(where) or products.why_declined(dot, sources, self._policy)

    def _calls_in(self, module: Module, computation: Computation) -> dict[int, loops.Call]:
        """The products of a computation, of a copy of the module, that would become calls, by id."""
        body = Body(module, computation)
        dots = _products_of(body)
        numbers, found = frozenset(x.instruction.id for x in dots), {}
        for number, x in _quantized_in(body, self._policy)[0].items():
            m, k, _, n = x.sizes
            reads = {x.x.instruction.id, x.weights.q.instruction.id}
            found[number] = loops.Call(
                *(reads, m * k * n), is_vector=1 in (m, n), is_narrow=True, between=x.between, is_layer=bool(x.layer)
            )
        for dot in dots:
            if dot.instruction.id in found:
                continue
            seen = products.see(body, dot)
            call = None if seen is None else products.best_call(body, dot.dot, seen, numbers, self._policy)
            if call is not None:
                lhs, rhs, _ = call.views
                labels = call.views.labels
                sizes = labels.sizes(lhs.sizes, rhs.sizes)
                m, n, batch = (math.prod(sizes[i] for i in y) for y in (labels.lhs_free, labels.rhs_free, labels.batch))
                found[dot.instruction.id] = loops.Call(
                    {lhs.instruction.id, rhs.instruction.id},
                    math.prod(sizes.values()),
                    is_vector=1 in (m, n) and batch == 1,
                    is_narrow=min(lhs.dtype.itemsize, rhs.dtype.itemsize) < 4,
                )
        return found

    def _replace_attentions(self, body: Body) -> tuple[list[record.Attention], Body, set[int]]:
        """Puts calls in the place of attentions; the ids of the dots in them, and what is left of the computation."""
        found = list[record.Attention]()
        before = _dots_of(body)
        gradients = attention_gradients.find if len(before) >= _FEWEST_OF_TRAINING else None
        for number in before:
            if all(x.id != number for x in body.instructions):
                continue
            second = body[number]
            attended = attention.find(body, second, gradients)
            if attended is None:
                continue
            arrays: tuple[record.Array, ...] = (_array(second),)
            detail, declined = "", attended if isinstance(attended, str) else self._why_none_in(body.computation)
            if not isinstance(attended, str):
                shown = (*(x.element.instruction for x in (attended.q, attended.k, attended.v)), attended.root)
                arrays, detail = tuple(map(_array, shown)), attended.text()
                if declined is None and self._policy.declines and xla.keeps_attention(attended.count_scores()):
                    declined = "XLA is as fast with so few scores"
                source = self._source(attended.second)
                if declined is None:
                    try:
                        attention_calls.write(body, attended)
                    except attention.NotAttention as error:
                        declined = str(error)
                    else:
                        body.commit()
                        body = Body(body.module, body.computation)
            else:
                source = self._source(second)
            found.append(record.Attention(self._module.name, source, arrays, detail, declined))
        left = _dots_of(body)
        if not found and gradients is not None:
            alone = attention.why_gradients_alone_stay(body, [body[number] for number in left])
            if alone is not None:
                product, why = alone
                found.append(record.Attention(self._module.name, self._source(product), (_array(product),), "", why))
        inside = {dot for number, dots in before.items() if number not in left for dot in dots}
        return found, body, inside

    def _replace_quantized(self, body: Body) -> tuple[list[record.Product], Body, set[int]]:
        """Puts calls in the place of products with quantised weights; as `_replace_attentions`.

        `self._why_floats` gets the reasons of those that look as if they were, by their ids.
        """
        found = list[record.Product]()
        before = _dots_of(body)
        reason = self._why_none_in(body.computation)
        whole, self._why_floats = _quantized_in(body, self._policy)
        for number in whole if reason is None else ():
            quantised = quantized.find(body, body[number])
            if quantised is None or isinstance(quantised, str):
                continue
            try:
                quantized_calls.write(body, quantised)
            except quantized.NotQuantized as error:
                self._why_floats[number] = str(error)
                continue
            found.append(_quantized_record(self._module.name, self._source(quantised.dot), quantised))
            body.commit()
            body = Body(body.module, body.computation)
        left = _dots_of(body)
        return found, body, {dot for number, dots in before.items() if number not in left for dot in dots}

    def _replace(self, body: Body, product: Dot, numbers: frozenset[int], why_none: str | None) -> record.Product:
        """Replaces a product by a call, unless XLA is to compute it."""
        seen = products.see(body, product)
        if seen is None:
            return self._left(self._source(product.instruction), product.dot, product.arrays, products.UNREADABLE)
        call = None if why_none else products.best_call(body, product.dot, seen, numbers, self._policy)
        if call is None:
            arrays, epilogue = seen.views, None
            decision = products.decide(product.dot, arrays, self._policy)
            decision = decision._replace(declined=decision.declined or why_none)
        else:
            arrays, decision, epilogue = call
            assert decision.signature is not None
            calls.write(body, *arrays, decision.labels, decision.signature.algorithm, epilogue)
        algorithm = "default" if decision.signature is None else decision.signature.algorithm
        a, b, c = (record.Array(hlo.NAMES[x.dtype], x.sizes) for x in arrays)
        fate = (decision.declined, str(epilogue or ""))
        why_floats = self._why_floats.get(product.instruction.id, "")
        return record.Product(
            self._module.name,
            self._source(product.instruction),
            (a, b, c),
            decision.labels,
            algorithm,
            *fate,
            weights=why_floats,
        )

    def _unseen(self, seen: Collection[int], why: Mapping[int, str]) -> Iterator[record.Product]:
        """The products that are in no form that becomes a call, for the report."""
        for computation in self._module.computations:
            by_id = {x.id: x for x in computation.instructions}
            for dot in computation.instructions:
                if dot.opcode == "dot" and dot.id not in seen:
                    arrays = (*(by_id[x] for x in dot.operand_ids), dot)
                    reason = why.get(dot.id) or fusions.left_in(computation, dot)
                    yield self._left(self._source(dot), dot, arrays, reason)

    def _source(self, instruction: Instruction) -> record.Source:
        """What JAX calls an operation, and where the program has it."""
        operation = instruction.metadata.op_name or instruction.name
        return record.Source(operation, places.of_user(self._module.frames(instruction)))

    def _left(self, source: record.Source, dot: Instruction, arrays: Sequence[Instruction], why: str) -> record.Product:
        """A product that stays as it is, as HLO counts its dimensions."""
        labels = products.labels_of(dot, *(len(x.shape.dimensions) for x in arrays[:2]))
        a, b, c = (record.Array(hlo.dtype_name(x.shape), tuple(x.shape.dimensions)) for x in arrays)
        return record.Product(self._module.name, source, (a, b, c), labels, "default", why)


def _quantized_in(body: Body, policy: Policy) -> tuple[dict[int, quantized.Found], dict[int, str]]:
    """The products with quantised weights that calls replace, by id, and why others are none."""
    found: dict[int, quantized.Found] = {}
    why: dict[int, str] = {}
    for number in _dots_of(body):
        one = quantized.find(body, body[number])
        if isinstance(one, quantized.Found):
            m, k, _, n = one.sizes
            x = hlo.NAMES[hlo.dtype_of(one.x.instruction)]
            reason = xla.keeps_quantized(m, k * n, x) if policy.declines else None
            if reason is None:
                found[number] = one
            else:
                why[number] = reason
        elif one is not None:
            why[number] = one
    while True:  # a matrix that others read is made in any case
        made = {number for x in found.values() for number in x.between}
        readers = made | set(found)
        shared = {x for x in made if body.is_awaited(body[x]) or any(y.id not in readers for y in body.users(body[x]))}
        losing = [number for number, x in found.items() if x.between & shared]
        if not losing:
            return found, why
        for number in losing:
            why[number] = "something else reads the dequantised weights"
            del found[number]


def _quantized_record(program: str, source: record.Source, found: quantized.Found) -> record.Product:
    m, k, groups, n = found.sizes
    q = (n, k) if found.along_k else (k, n)
    x = hlo.dtype_name(found.x.instruction.shape)
    arrays = (
        record.Array(x, (m, k)),
        record.Array(found.weights.name, q),
        record.Array(hlo.NAMES[found.dtype], (m, n)),
    )
    kernel = record.quantized_text(found.weights.name, k, groups, zero=found.weights.zero is not None)
    labels = Labels((0, 1), (2, 1) if found.along_k else (1, 2), (0, 2))
    return record.Product(program, source, arrays, labels, "default", None, str(found.epilogue or ""), kernel)


def _dots_of(body: Body) -> dict[int, set[int]]:
    """The ids of the dots that a computation's instructions are or hold, by the ids of these."""
    found = {}
    for x in body.instructions:
        inner = body.module.computation(x.called_computation_ids[0]).instructions if x.opcode == "fusion" else [x]
        dots = {y.id for y in inner if y.opcode == "dot"}
        if dots:
            found[x.id] = dots
    return found


def _array(x: Instruction) -> record.Array:
    return record.Array(hlo.dtype_name(x.shape), tuple(x.shape.dimensions))


def _products_of(body: Body) -> list[Dot]:
    return [x for instruction in body.instructions if (x := products.of(body, instruction)) is not None]


def _why_none(module: Module) -> str | None:
    """Why all of the module's products are better left to XLA, if they are."""
    donated = 0 if compat.KEEPS_DONATION else module.donated_bytes()
    if donated <= _MOST_DONATED:
        return None
    return f"this jaxlib would not reuse the {donated >> 20} MiB that the program donates; 0.11.1 and newer do"
