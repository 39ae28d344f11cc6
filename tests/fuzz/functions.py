"""Random functions in functions: loops, branches, and what JAX makes of a function."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .drawing import FLOATS, LARGE, MAX_COUNT, Scope
from .program import Block, Statement, Value
from .quantised import Quantised


class Functions(Quantised):
    def match(self, scope: Scope, like: Value) -> Value:
        """A value of the type of another one, and not much larger: the latest that is near to it."""
        local = [x for x in scope.values if x.is_float and x.shape == like.shape and x.name != like.name]
        if local and self.chance(0.8):
            x = local[-1 if self.chance(0.7) else self.rng.integers(len(local))]
        elif like.ndim >= 2 and like.is_float and self.chance(0.7):
            w = self.need(scope, (like.shape[-1],) * 2, like.dtype, max(like.shape[-1], 1) ** -0.5)
            x = self.emit(scope, "{0} @ {1}", [like, w], like.shape, like.dtype, like.size)
        elif like.ndim and self.chance(0.5):
            x = self.updated(scope, like)
        else:
            x = self.activation(scope, like) if like.is_float else like
        if x.dtype != like.dtype:
            x = self.emit(scope, f"{{0}}.astype(jnp.{like.dtype})", [x], like.shape, like.dtype, x.size)
        if x.is_float and not x.size < 1.5 * like.size + 1:
            x = self.emit(scope, "jnp.tanh({0})", [x], x.shape, x.dtype)
        return x

    def carried(self, scope: Scope) -> list[Value]:
        """What a loop begins with."""
        found = [self.array(scope, 1 if self.chance(0.2) else 2, 4) for _ in range(int(self.rng.integers(1, 4)))]
        return list({x.name: x for x in found}.values())

    def inside(self, scope: Scope, params: Sequence[Value]) -> Scope:
        inner = Scope(scope, params)
        self.fill(inner, 1 if scope.depth or self.chance(0.7) else 2)
        return inner

    def renamed(self, x: Value, shape: tuple[int, ...] | None = None) -> Value:
        return Value(self.name(), x.shape if shape is None else shape, x.dtype, x.size)

    def loop(self, scope: Scope) -> None:
        forms = (self.scan, self.fori_loop, self.while_loop)
        forms[self.rng.choice(3, p=[0.5, 0.3, 0.2])](scope)

    def next_values(self, inner: Scope, carry: Sequence[Value]) -> list[Value]:
        """Of what a loop carries: some unchanged, the rest computed."""
        unchanged = [self.chance(0.25) for _ in carry]
        if all(unchanged):
            unchanged[0] = False
        following = [x if same else self.match(inner, x) for x, same in zip(carry, unchanged, strict=True)]
        if self.chance(0.05):  # exchange two of a type
            for i in range(1, len(carry)):
                if carry[i].type == carry[0].type:
                    following[0], following[i] = following[i], following[0]
        return following

    def scan(self, scope: Scope) -> None:
        start = self.carried(scope)
        length = int(self.rng.integers(1, 7))
        xs = []
        if self.chance(0.5):
            x = self.pick(scope, lambda x: x.is_float and 2 <= x.ndim <= 4 and 1 < x.shape[0] <= 8)
            if x is None:
                x = self.need(scope, (length, *self.shape(int(self.rng.integers(1, 3)))), self.dtype, 0.5)
            xs, length = [x], x.shape[0]
        carry = [self.renamed(x) for x in start]
        slices = [self.renamed(x, x.shape[1:]) for x in xs]
        inner = self.inside(scope, [*slices, *carry])
        following = self.next_values(inner, carry)
        made = [x for x in inner.values if x not in carry and x not in slices and x.count * length <= MAX_COUNT]
        ys = made[-1:] if made and self.chance(0.5) else []
        head: list[Value | tuple[Value, ...]] = [tuple(carry), slices[0] if slices else Value(self.name(), (), "int32")]
        names = ["{}"] * len(following)
        returns = f"({', '.join(names)},), {'{}' if ys else 'None'}"
        body = Block(tuple(head), tuple(inner.statements), (*following, *ys), returns)
        after = [self.renamed(x) for x in start]
        stacked = [self.renamed(x, (length, *x.shape)) for x in ys]
        first = ", ".join(f"{{{i}}}" for i in range(len(start)))
        over = f"{{{len(start)}}}" if xs else "None"
        options = f", length={length}" if not xs else ""
        options += ", unroll=2" if self.chance(0.1) else ", reverse=True" if self.chance(0.1) else ""
        text = f"jax.tree.leaves(lax.scan({{f0}}, ({first},), {over}{options}))"
        if len(after) + len(stacked) == 1:
            text += "[0]"
        scope.statements.append(Statement((*after, *stacked), text, (*start, *xs), (body,)))
        scope.values += [*after, *stacked]

    def fori_loop(self, scope: Scope) -> None:
        start = self.carried(scope)
        i = Value(self.name(), (), "int32")
        carry = [self.renamed(x) for x in start]
        inner = self.inside(scope, carry)
        following = self.next_values(inner, carry)
        if self.chance(0.4):  # a row written at the counter
            place, x = 0, carry[0]
            row = self.part(inner, x.shape[1:], x.dtype)
            following[place] = self.emit(
                inner, "{0}.at[{1}].set({2})", [following[place], i, row], x.shape, x.dtype, x.size + row.size
            )
        returns = "".join("{}, " for _ in following)
        body = Block((i, tuple(carry)), tuple(inner.statements), tuple(following), returns)
        first = ", ".join(f"{{{j}}}" for j in range(len(start)))
        after = [self.renamed(x) for x in start]
        text = f"lax.fori_loop(0, {int(self.rng.integers(1, 6))}, {{f0}}, ({first},))" + (
            "[0]" if len(start) == 1 else ""
        )
        scope.statements.append(Statement(tuple(after), text, tuple(start), (body,)))
        scope.values += after

    def while_loop(self, scope: Scope) -> None:
        start = self.carried(scope)
        i = Value(self.name(), (), "int32")
        carry = [self.renamed(x) for x in start]
        inner = self.inside(scope, carry)
        following = self.next_values(inner, carry)
        step = self.emit(inner, "{0} + 1", [i], (), "int32")
        returns = "{}, " + "".join("{}, " for _ in following)
        body = Block(((i, *carry),), tuple(inner.statements), (step, *following), returns)
        first = ", ".join(f"{{{j}}}" for j in range(len(start)))
        after = [self.renamed(x) for x in start]
        trips = self.index(scope, 5)
        text = f"lax.while_loop(lambda s: s[0] < {{{len(start)}}}, {{f0}}, (jnp.int32(0), {first}))[1:]"
        text += "[0]" if len(start) == 1 else ""
        scope.statements.append(Statement(tuple(after), text, (*start, trips), (body,)))
        scope.values += after

    def stationary(self, scope: Scope) -> None:
        """A loop around products with weights that it does not change, which XLA may convert in front of it."""
        b, n = max(1, min(self.dim(), 24)), max(1, self.dim())
        dtype = self.choose((*FLOATS[1:], self.dtype))
        x = self.need(scope, (b, n), dtype)
        count = int(self.rng.integers(1, 4))
        weights = [self.need(scope, (n, n), dtype, n**-0.5, reuse=0.4) for _ in range(count)]
        if self.chance(0.3):
            weights[0] = self.activation(scope, weights[0])
        if self.chance(0.2):
            w = self.need(scope, (n, n), "int8")
            weights.append(self.emit(scope, f"{{0}}.astype(jnp.{dtype}) * 0.01", [w], (n, n), dtype, n**-0.5))
        carry, start = [self.renamed(x)], [x]
        carries_weights = self.chance(0.4)
        inner = Scope(scope, carry)
        if carries_weights:
            start += weights
            carry += [self.renamed(w) for w in weights]
            used = carry[1:]
        else:
            used = weights
        h = self._steps(inner, carry[0], used)
        if self.chance(0.2) and scope.depth < 2:
            depth_carry = self.renamed(h)
            deep = Scope(inner, [depth_carry])
            last = self._steps(deep, depth_carry, used)
            i = Value(self.name(), (), "int32")
            body = Block((i, depth_carry), tuple(deep.statements), (last,))
            after = self.renamed(h)
            inner.statements.append(Statement((after,), "lax.fori_loop(0, 2, {f0}, {0})", (h,), (body,)))
            h = after
        following = [h, *carry[1:]]
        if carries_weights and self.chance(0.2):  # one of them is changed after all
            following[1] = self.updated(inner, carry[1])
        body = Block(
            (tuple(carry), Value(self.name(), (), "int32")),
            tuple(inner.statements),
            tuple(following),
            f"({'{}, ' * len(following)}), None",
        )
        after = tuple(self.renamed(v) for v in start)
        first = ", ".join(f"{{{i}}}" for i in range(len(start)))
        text = f"lax.scan({{f0}}, ({first},), None, length={int(self.rng.integers(1, 5))})[0]"
        scope.statements.append(Statement(after, text + ("[0]" if len(after) == 1 else ""), tuple(start), (body,)))
        scope.values += after
        if self.chance(0.5):  # what it read is read or updated later
            w = weights[0]
            d = self.updated(scope, w) if self.chance(0.6) else w
            self.emit(scope, "{0} @ {1}", [after[0], d], (b, n), dtype, after[0].size)

    def _steps(self, scope: Scope, h: Value, weights: Sequence[Value]) -> Value:
        for w in weights:
            text = self.choose(("{0} @ {1}", "{0} @ {1}.T", 'jnp.einsum("ab,cb->ac", {0}, {1})', "({1} @ {0}.T).T"))
            h = self.emit(scope, text, [h, w], h.shape, h.dtype, h.size)
            if self.chance(0.3):
                h = self.emit(scope, "{0} + {1} @ {2}", [h, h, w], h.shape, h.dtype, h.size)
            if self.chance(0.5):
                h = self.activation(scope, h)
        return self.emit(scope, "jnp.tanh({0})", [h], h.shape, h.dtype)

    def nested(self, scope: Scope) -> None:
        forms = (
            (1.0, self.cond), (0.6, self.switch), (1.0, self.remat), (0.5, self.inner_jit), (2.2, self.grad),
            (1.5, self.vmap), (0.5, self.jvp),
        )  # fmt: skip
        p = np.array([x for x, _ in forms])
        forms[self.rng.choice(len(forms), p=p / p.sum())][1](scope)

    def branches(self, scope: Scope, count: int) -> tuple[list[Value], list[Block], Value]:
        given = self.carried(scope)
        like = given[0]
        blocks = []
        for _ in range(count):
            params = [self.renamed(x) for x in given]
            inner = self.inside(scope, params)
            result = self.match(inner, params[0])
            blocks.append(Block(tuple(params), tuple(inner.statements), (result,)))
        return given, blocks, self.renamed(like)

    def cond(self, scope: Scope) -> None:
        given, blocks, result = self.branches(scope, 2)
        i = self.index(scope, 2)
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        text = f"lax.cond({{{len(given)}}} > 0, {{f0}}, {{f1}}, {places})"
        scope.statements.append(Statement((result,), text, (*given, i), tuple(blocks)))
        scope.values.append(result)

    def switch(self, scope: Scope) -> None:
        given, blocks, result = self.branches(scope, 3)
        i = self.index(scope, 3)
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        text = f"lax.switch({{{len(given)}}}, [{{f0}}, {{f1}}, {{f2}}], {places})"
        scope.statements.append(Statement((result,), text, (*given, i), tuple(blocks)))
        scope.values.append(result)

    def called(self, scope: Scope, wrapper: str) -> None:
        given = self.carried(scope)
        params = [self.renamed(x) for x in given]
        inner = self.inside(scope, params)
        made = [x for x in inner.values if x not in params]
        if not made:
            return
        results = tuple({x.name: x for x in (made[-1], made[self.rng.integers(len(made))])}.values())
        body = Block(tuple(params), tuple(inner.statements), results)
        after = tuple(self.renamed(x) for x in results)
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        scope.statements.append(Statement(after, f"{wrapper.format('{f0}')}({places})", tuple(given), (body,)))
        scope.values += after

    def remat(self, scope: Scope) -> None:
        self.called(
            scope,
            self.choose(("jax.checkpoint({})", "jax.checkpoint({}, policy=jax.checkpoint_policies.dots_saveable)")),
        )

    def inner_jit(self, scope: Scope) -> None:
        self.called(scope, "jax.jit({})")

    def scalar_function(self, scope: Scope, given: Sequence[Value]) -> Block:
        params = [self.renamed(x) for x in given]
        inner = self.inside(scope, params)
        last = next((x for x in reversed(inner.values) if x.is_float and x not in params), None)
        if last is None:
            last = self.matmul(inner)
        last = self.tame(inner, last)
        text = self.choose(("jnp.mean({0} * {0})", "jnp.mean(jnp.tanh({0}))", "jnp.mean({0})"))
        dtype = last.dtype
        value = self.emit(inner, text, [last], (), dtype, last.size**2)
        return Block(tuple(params), tuple(inner.statements), (value,))

    def grad(self, scope: Scope) -> None:
        given = self.carried(scope)
        body = self.scalar_function(scope, given)
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        numbers = tuple(range(len(given)))
        fun = "{f0}" if self.chance(0.75) else "jax.checkpoint({f0})"
        results = tuple(self.renamed(x) for x in given)
        text = f"jax.grad({fun}, {numbers})({places})"
        if self.chance(0.4):
            loss = self.renamed(body.results[0])
            text = f"jax.tree.leaves(jax.value_and_grad({fun}, {numbers})({places}))"
            results = (loss, *results)
        elif len(results) == 1:
            text += "[0]"
        scope.statements.append(Statement(results, text, tuple(given), (body,)))
        if self.chance(0.5) and given[0].size < LARGE:  # a step of descent
            self_result = results[-1]
            x = given[-1]
            self.emit_after(scope, results)
            self.emit(scope, "{0} - 0.5 * {1}", [x, self_result], x.shape, x.dtype, x.size)
        else:
            self.emit_after(scope, results)

    @staticmethod
    def emit_after(scope: Scope, results: Sequence[Value]) -> None:
        scope.values += results

    def jvp(self, scope: Scope) -> None:
        given = self.carried(scope)[:1]
        tangent = self.need(scope, given[0].shape, given[0].dtype)
        self.forward, before = True, self.forward
        body = self.scalar_function(scope, given)
        self.forward = before
        results = (self.renamed(body.results[0]), self.renamed(body.results[0]))
        scope.statements.append(Statement(results, "jax.jvp({f0}, ({0},), ({1},))", (given[0], tangent), (body,)))
        scope.values += results

    def vmap(self, scope: Scope) -> None:
        x = self.array(scope, 2, 5)
        axis = int(self.rng.integers(x.ndim)) if self.chance(0.4) else 0
        n = x.shape[axis]
        given, axes = [x], [axis]
        if self.chance(0.5):
            y = self.array(scope, 1, 4)
            given.append(y)
            axes.append(0 if y.shape[0] == n and y.ndim > 1 else -1)
        params = [
            self.renamed(v, v.shape if a < 0 else v.shape[:a] + v.shape[a + 1 :])
            for v, a in zip(given, axes, strict=True)
        ]
        inner = self.inside(scope, params)
        made = [v for v in inner.values if v not in params and v.count * n <= MAX_COUNT]
        if not made:
            return
        result = made[-1]
        body = Block(tuple(params), tuple(inner.statements), (result,))
        in_axes = "(" + "".join(f"{None if a < 0 else a}, " for a in axes) + ")"
        out = int(self.rng.integers(result.ndim + 1)) if self.chance(0.2) else 0
        shape = (*result.shape[:out], n, *result.shape[out:])
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        text = f"jax.vmap({{f0}}, {in_axes}, {out})({places})"
        after = self.renamed(result, shape)
        scope.statements.append(Statement((after,), text, tuple(given), (body,)))
        scope.values.append(after)

    def over_devices(self, scope: Scope) -> None:
        """shard_map of something, over the first dimension."""
        if self.mode == "pmap" or scope.depth:
            self.layer(scope)
            return
        x = self.pick(scope, lambda x: x.is_float and x.ndim >= 2 and x.shape[0] % 4 == 0)
        if x is None:
            x = self.argument((4 * int(self.rng.integers(1, 5)), self.dim()), self.dtype)
        given, specs = [x], ['P("d")']
        if self.chance(0.6):
            given.append(self.need(scope, (x.shape[-1], self.columns(x.count)), x.dtype, 0.5))
            specs.append("P()")
        params = [
            self.renamed(v, (v.shape[0] // 4, *v.shape[1:]) if s != "P()" else v.shape)
            for v, s in zip(given, specs, strict=True)
        ]
        inner = Scope(None, params)  # sees nothing else
        count = len(self.arguments)
        self.fill_closed(inner)
        assert len(self.arguments) == count
        made = [v for v in inner.values if v not in params and v.ndim]
        if not made:
            return
        result = made[-1]
        if self.chance(0.3):
            result = self.emit(inner, 'lax.psum({0}, "d")', [result], result.shape, result.dtype, 4 * result.size)
            out, shape = "P()", result.shape
        else:
            out, shape = 'P("d")', (4 * result.shape[0], *result.shape[1:])
        if math.prod(shape) > MAX_COUNT:
            return
        body = Block(tuple(params), tuple(inner.statements), (result,))
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        after = self.renamed(result, shape)
        text = f"sharded({{f0}}, ({''.join(s + ', ' for s in specs)}), {out})({places})"
        scope.statements.append(Statement((after,), text, tuple(given), (body,)))
        scope.values.append(after)

    def fill_closed(self, inner: Scope) -> None:
        """Products of what is there, and no new arguments."""
        x = inner.values[0]
        if len(inner.values) > 1:
            w = inner.values[1]
            x = self.emit(
                inner, "{0} @ {1}", [x, w], (*x.shape[:-1], w.shape[-1]), x.dtype, x.size * math.sqrt(w.shape[0]) * 0.5
            )
        x = self.activation(inner, x)
        if self.chance(0.5):
            x = self.with_itself(inner)
            self.tame(inner, x)
