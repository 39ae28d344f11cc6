"""A program as data: statements on typed values, in blocks, that are printed as Python, changed and run.

Every value has a name of its own in the whole program, so a body of a loop may use any value that was made before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DEVICES = 4

PRELUDE = '''\
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

inf, nan = float("inf"), float("nan")


def sharded(fun, specs, out):
    """fun on each device's part of its arguments."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(fun, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


@jax.custom_vjp
def custom(x, w):
    return x @ w


def custom_forward(x, w):
    return x @ w, (x, w)


def custom_backward(kept, g):
    x, w = kept
    rows = x.reshape(-1, x.shape[-1])
    return 0.5 * (g @ w.T), rows.T @ g.reshape(-1, g.shape[-1])


custom.defvjp(custom_forward, custom_backward)
'''
"""What printed programs import and call."""


@dataclass(frozen=True)
class Value:
    """An array of a program: its type, and about how large its elements are."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: float = 1.0

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def type(self) -> tuple[tuple[int, ...], str]:
        return self.shape, self.dtype

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype


@dataclass(frozen=True)
class Block:
    """A function's body. A parameter that is a tuple of values is taken apart when it begins."""

    params: tuple[Value | tuple[Value, ...], ...]
    statements: tuple[Statement, ...]
    results: tuple[Value, ...]
    returns: str = ""
    """How they are returned: a template with a place for each; default: one, or a tuple."""

    def lines(self, name: str) -> Iterator[str]:
        """Its text, as the definition of a function."""
        heads = [x.name if isinstance(x, Value) else f"{name}_{i}" for i, x in enumerate(self.params)]
        yield f"def {name}({', '.join(heads)}):"
        for head, x in zip(heads, self.params, strict=True):
            if not isinstance(x, Value):
                yield f"    ({''.join(y.name + ', ' for y in x)}) = {head}"
        for x in self.statements:
            for line in x.lines():
                yield "    " + line
        returns = self.returns or ", ".join("{}" for _ in self.results)
        yield "    return " + returns.format(*(x.name for x in self.results))


@dataclass(frozen=True)
class Statement:
    """`targets = text`, where the text has places {0}, {1}... for operands and {f0}, {f1}... for local functions."""

    targets: tuple[Value, ...]
    text: str
    operands: tuple[Value, ...] = ()
    bodies: tuple[Block, ...] = ()

    def lines(self) -> Iterator[str]:
        names = {f"f{i}": f"f{i}_{self.targets[0].name}" for i in range(len(self.bodies))}
        for body, name in zip(self.bodies, names.values(), strict=True):
            yield from body.lines(name)
        left = ", ".join(x.name for x in self.targets)
        yield f"{left} = {self.text.format(*(x.name for x in self.operands), **names)}"


@dataclass(frozen=True)
class Argument:
    """An argument of the whole program, and how it is filled."""

    value: Value
    number: int  # names its random numbers
    fill: str = "normal"  # or "index", below `limit`
    limit: int = 1
    donated: bool = False
    mapped: bool = True  # under pmap, each device has its own

    def shape(self, mode: str) -> tuple[int, ...]:
        return (DEVICES, *self.value.shape) if mode == "pmap" and self.mapped else self.value.shape

    def text(self, seed: int, mode: str) -> str:
        """An expression for it."""
        value, shape = self.value, self.shape(mode)
        rng = f"np.random.default_rng([{seed}, {self.number}])"
        if self.fill == "index":
            return f"jnp.asarray(np.asarray({rng}.integers(0, {self.limit}, {shape}), jnp.{value.dtype}))"
        if not value.is_float:
            least, most = {"int8": (-128, 128), "uint8": (0, 256)}.get(value.dtype, (0, 50))
            return f"jnp.asarray(np.asarray({rng}.integers({least}, {most}, {shape}), jnp.{value.dtype}))"
        return f"jnp.asarray(np.asarray({value.size:.3g} * {rng}.standard_normal({shape}), jnp.{value.dtype}))"


@dataclass(frozen=True)
class Program:
    """A function of arguments, and how it is run: "jit", "pmap", or "sharded", jit of arguments spread over devices."""

    seed: int
    kind: str
    arguments: tuple[Argument, ...]
    statements: tuple[Statement, ...]
    results: tuple[Value, ...]
    mode: str = "jit"
    x64: bool = False

    @property
    def block(self) -> Block:
        returns = "".join("{}, " for _ in self.results)
        return Block(tuple(x.value for x in self.arguments), self.statements, self.results, returns)

    @property
    def definition(self) -> str:
        return "\n".join(self.block.lines("program")) + "\n"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of jit or pmap."""
        options: dict[str, Any] = {}
        donated = tuple(i for i, x in enumerate(self.arguments) if x.donated)
        if donated:
            options["donate_argnums"] = donated
        if self.mode == "pmap":
            options["axis_name"] = "d"
            options["in_axes"] = tuple(0 if x.mapped else None for x in self.arguments)
        return options

    def script(self, *, gate: bool) -> str:
        """A file that shows the difference by itself."""
        options = "".join(f", {k}={v!r}" for k, v in self.options.items())
        wrapper = "pmap" if self.mode == "pmap" else "jit"
        spread = ""
        if self.mode == "sharded":
            spread = (
                '\n\ndef spread(x):\n    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))\n'
                "    axes = ['d' if n % 4 == 0 else None for n in x.shape[:1]]\n"
                "    return jax.device_put(x, jax.sharding.NamedSharding(mesh, P(*axes)))\n"
            )
        place = "spread({})" if self.mode == "sharded" else "{}"
        made = "".join(f"        {place.format(x.text(self.seed, self.mode))},\n" for x in self.arguments)
        return (
            f"# seed {self.seed}, kind {self.kind}, gate {'on' if gate else 'off'}\n"
            f"{PRELUDE}\n"
            "import jax_nano\nfrom jax_nano._dispatch import decision\n\n"
            f"decision.policy = decision.Policy(declines={gate})\n"
            'jax.config.update("jax_num_cpu_devices", 4)\n'
            + ('jax.config.update("jax_enable_x64", True)\n' if self.x64 else "")
            + spread
            + f"\n\n{self.definition}\n\n"
            f"def arguments():\n    return [\n{made}    ]\n\n\n"
            f"want = jax.{wrapper}(program{options})(*arguments())\n"
            "with jax_nano.accelerate():\n"
            f"    got = jax.{wrapper}(lambda *args: program(*args){options})(*arguments())\n"
            "for x, y in zip(want, got):\n"
            "    a, b = (np.asarray(v).astype(np.float64) for v in (x, y))\n"
            "    print(x.dtype, x.shape, 'largest', np.abs(a).max(initial=0), 'apart', np.abs(a - b).max(initial=0))\n"
        )

    def function(self, **names: Any) -> Callable[..., tuple[jax.Array, ...]]:
        """The function; `names` replace what the prelude defines."""
        space: dict[str, Any] = {}
        exec(compile(PRELUDE, "prelude", "exec"), space)
        space.update(names)
        exec(compile(self.definition, f"program {self.seed}", "exec"), space)
        return space["program"]

    def values(self) -> list[Any]:
        """Fresh arrays for its arguments."""
        made = [eval(x.text(self.seed, self.mode), {"np": np, "jnp": jnp}) for x in self.arguments]
        if self.mode != "sharded":
            return made
        mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

        def spread(x: jax.Array) -> jax.Array:
            axes = ["d" if n % DEVICES == 0 else None for n in x.shape[:1]]
            return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))

        return [spread(x) for x in made]

    def without_dead_code(self) -> Program:
        """Without statements whose values nothing reads, and arguments that nothing reads."""
        statements, used = _live(self.statements, {x.name for x in self.results})
        kept = tuple(x for x in self.arguments if x.value.name in used) or self.arguments[:1]
        if self.mode == "pmap" and not any(x.mapped for x in kept):
            kept = (replace(kept[0], mapped=True), *kept[1:])
        return replace(self, statements=statements, arguments=kept)


def _live(statements: Sequence[Statement], used: set[str]) -> tuple[tuple[Statement, ...], set[str]]:
    kept = []
    used = set(used)
    for x in reversed(statements):
        if not any(y.name in used for y in x.targets):
            continue
        bodies = []
        for body in x.bodies:
            inner, needs = _live(body.statements, {y.name for y in body.results})
            used |= needs
            bodies.append(replace(body, statements=inner))
        used |= {y.name for y in x.operands}
        kept.append(replace(x, bodies=tuple(bodies)))
    return tuple(reversed(kept)), used
