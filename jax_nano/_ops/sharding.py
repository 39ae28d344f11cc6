"""Programs over several devices: where a product runs, and how jit partitions it.

Inside shard_map and pmap an operand is one device's shard, and the call is made as it is. Under jit with sharded arrays
XLA would gather the operands of a custom call, about which it knows nothing. There the call is inside a
custom_partitioning: a rule in Shardy's terms (the same labels), and a callback that turns the sharding that XLA has
chosen into the product of shards, with a psum where a contracting dimension is sharded.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax import Array
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_nano._core.contraction import Dims, Labels

Product: TypeAlias = Callable[..., Array]
Axes: TypeAlias = tuple[str, ...]
"""Mesh axes, major first, that shard one dimension."""


class Placement(enum.Enum):
    """What the operands of a product are when its program runs."""

    LOCAL = "arrays of one device"
    PARTITIONED = "arrays that XLA shards over several devices"
    XLA = "arrays over several devices, in a program that cannot hold a callback"


def placement(ctx: mlir.LoweringRuleContext, out: Any) -> Placement:
    """The placement of a product with the result `out` in a program that is being lowered.

    XLA computes the product itself in three cases: in an exported program, which outlives the process that has the
    callback; in a shard_map over some axes of a mesh only, where XLA would gather the operands instead of calling back;
    and for a result that is to be left unreduced, as partial sums.
    """
    module = ctx.module_context
    axes = module.axis_context
    if isinstance(axes, mlir.ShardingContext):
        if axes.num_devices == 1:
            return Placement.LOCAL
        if out.sharding.spec.unreduced or axes.device_assignment is None or module.lowering_parameters.for_export:
            return Placement.XLA
        return Placement.PARTITIONED
    if isinstance(axes, mlir.SPMDAxisContext):
        automatic = set(axes.mesh.axis_names) - set(axes.manual_axes)
        if any(axes.mesh.shape[name] > 1 for name in automatic):
            return Placement.XLA
    return Placement.LOCAL


def partitioned(
    product: Product,
    labels: Labels,
    *,
    extras: Sequence[Dims] = (),
    sums: Product | None = None,
    finish: Product = lambda sums: sums,
) -> Product:
    """`product` as one operation that XLA partitions along any of its labels.

    Args:
      product: of lhs, rhs and further operands.
      labels: of lhs, rhs and the result.
      extras: those of the further operands, each along dimensions of the result.
      sums, finish: the product in two steps, for shards of a contracting dimension: `finish(sums(lhs, rhs), *others)`
        is what has to be done where the sums of all shards are needed first.
    """
    sums = sums or product

    # custom_partitioning binds arguments to the names of parameters: one for each operand.
    def whole2(lhs: Array, rhs: Array) -> Array:
        return product(lhs, rhs)

    def whole3(lhs: Array, rhs: Array, other: Array) -> Array:
        return product(lhs, rhs, other)

    def whole4(lhs: Array, rhs: Array, other: Array, last: Array) -> Array:
        return product(lhs, rhs, other, last)

    def partition(
        mesh: Mesh, operands: Sequence[Any], result: Any
    ) -> tuple[Mesh, Product, NamedSharding, tuple[NamedSharding, ...]]:
        lhs_axes, rhs_axes, *_, out_axes = (spec_axes(x.sharding, x.ndim) for x in (*operands, result))
        axes = settle(labels, lhs_axes, rhs_axes, out_axes)
        reduced = tuple(axis for label in labels.contracting for axis in axes[label])

        def shard(lhs: Array, rhs: Array, *others: Array) -> Array:
            # Not in the caller's mesh: if that has explicit axes, JAX 0.12 annotates the adder of the psum
            # with shardings, and XLA then fails to recognise the addition.
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                if not reduced:
                    return product(lhs, rhs, *others)
                return finish(jax.lax.psum(sums(lhs, rhs), reduced), *others)

        lhs, rhs, out, *others = (NamedSharding(mesh, _spec(dims, axes)) for dims in (*labels, *extras))
        return mesh, shard, out, (lhs, rhs, *others)

    def infer(mesh: Mesh, operands: Sequence[Any], result: Any) -> NamedSharding:
        lhs_axes, rhs_axes, *_ = (spec_axes(x.sharding, x.ndim) for x in operands)
        axes = settle(labels, lhs_axes, rhs_axes, ((),) * len(result.shape))
        return NamedSharding(mesh, _spec(labels.out, axes))

    wrapped = custom_partitioning((whole2, whole3, whole4)[len(extras)])
    wrapped.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=sharding_rule(labels, extras),
        reduction_factors=tuple(factor(label) for label in labels.contracting),
    )
    return wrapped


def settle(labels: Labels, lhs: Sequence[Axes], rhs: Sequence[Axes], out: Sequence[Axes]) -> dict[int, Axes]:
    """The mesh axes of each label, from those of each dimension of the three arrays.

    Where arrays disagree the result wins, then lhs. An axis serves one label only; later ones lose it
    and XLA reshards the operand.
    """
    axes: dict[int, Axes] = {}
    used: set[str] = set()
    for dims, wanted in ((labels.out, out), (labels.lhs, lhs), (labels.rhs, rhs)):
        for label, names in zip(dims, wanted, strict=True):
            if names and not axes.get(label) and not used.intersection(names):
                axes[label] = names
                used.update(names)
            axes.setdefault(label, ())
    return axes


def spec_axes(sharding: Any, ndim: int) -> tuple[Axes, ...]:
    """The mesh axes of each dimension; none if the sharding does not name any."""
    spec = tuple(getattr(sharding, "spec", ()))
    padded = spec + (None,) * (ndim - len(spec))
    return tuple(() if x is None else (x,) if isinstance(x, str) else tuple(x) for x in padded)


def _spec(dims: Dims, axes: dict[int, Axes]) -> PartitionSpec:
    return PartitionSpec(*(axes[label] or None for label in dims))


def sharding_rule(labels: Labels, extras: Sequence[Dims] = ()) -> str:
    """The product as Shardy writes it, such as "a b, b c -> a c"."""
    lhs, rhs, out, *others = (" ".join(factor(label) for label in dims) for dims in (*labels, *extras))
    return f"{', '.join([lhs, rhs, *others])} -> {out}"


def factor(label: int) -> str:
    """A label as letters, the only thing that a factor's name may hold: a, b, ..., z, ba, bb, ..."""
    rest, last = divmod(label, 26)
    return (factor(rest) if rest else "") + chr(ord("a") + last)


def partitioned_attention(
    call: Callable[..., Sequence[Array]],
    operands: Sequence[str],
    results: Sequence[str],
    sizes: dict[str, int],
    sums: Sequence[int] = (),
) -> Callable[..., Sequence[Array]]:
    """`call` as one operation that XLA partitions along batches and heads.

    Args:
      call: attention or its gradients, of operands to results.
      operands, results: the dimensions of each as letters: b batches, k heads of keys and values, n of queries, 1 one
        that is broadcast; other letters are of dimensions that stay whole.
      sizes: of each letter.
      sums: which results are summed over batches and heads where their dimensions are 1.
    """
    group = sizes["n"] // sizes["k"]

    def factors(dims: str, number: int) -> str:
        heads = "(k g)" if group > 1 else "k"
        # A factor of its own for each dimension that is 1.
        return " ".join(
            {"n": heads, "1": f"{'yz'[number % 2]}{chr(97 + number)}{'pqrs'[i]}"}.get(x, x) for i, x in enumerate(dims)
        )

    def settled(mesh: Mesh, arrays: Sequence[Any]) -> dict[str, Axes]:
        """The axes of batches and heads: the first array's that has any, if they divide them."""
        axes: dict[str, Axes] = {"b": (), "k": ()}
        for dims, x in zip(operands, arrays, strict=False):
            for letter, names in zip(dims, spec_axes(x.sharding, x.ndim), strict=True):
                key = "k" if letter == "n" else letter
                taken = axes["k" if key == "b" else "b"] if key in axes else ()
                if key not in axes or axes[key] or not names or set(names) & set(taken):
                    continue
                if sizes[key] % math.prod(mesh.shape[name] for name in names) == 0:
                    axes[key] = names
        return {**axes, "n": axes["k"]}

    def shardings(mesh: Mesh, axes: dict[str, Axes], of: Sequence[str]) -> tuple[NamedSharding, ...]:
        return tuple(NamedSharding(mesh, PartitionSpec(*(axes.get(x) or None for x in dims))) for dims in of)

    def partition(mesh: Mesh, arrays: Sequence[Any], _: Any) -> tuple[Mesh, Any, Any, Any]:
        axes = settled(mesh, arrays)

        def shard(*local: Array) -> tuple[Array, ...]:
            # As in `partitioned`.
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                found = list(call(*local))
                for i in sums:
                    pairs = zip(results[i], "bn", strict=False)
                    over = tuple(name for have, letter in pairs if have == "1" for name in axes[letter])
                    if over:
                        found[i] = jax.lax.psum(found[i], over)
            return tuple(found)

        return mesh, shard, shardings(mesh, axes, results), shardings(mesh, axes, operands)

    def infer(mesh: Mesh, arrays: Sequence[Any], _: Any) -> tuple[NamedSharding, ...]:
        return shardings(mesh, settled(mesh, arrays), results)

    def whole(*arrays: Array) -> tuple[Array, ...]:
        return tuple(call(*arrays))

    sides = [
        ", ".join(factors(dims, base + i) for i, dims in enumerate(x)) for base, x in ((0, operands), (12, results))
    ]
    wrapped = custom_partitioning(whole)
    wrapped.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=" -> ".join(sides),
        **({"g": group} if group > 1 else {}),
    )
    return wrapped


def partitioned_weights(
    product: Product,
    sums: Product,
    finish: Product,
    operands: Sequence[str],
    sizes: dict[str, int],
    *,
    unit: int,
) -> Product:
    """A product with quantised weights as one operation that XLA partitions along rows, columns and K.

    Args:
      product: of x, weights, scales and further operands.
      sums, finish: the product in two steps, for shards of K: `finish(sums(x, q, scale, *zero), *others)`.
      operands: the dimensions of each as letters: k values that are summed, g groups of them that share scales, n
        columns; others are rows. Those with a g or k belong to the sums.
      sizes: of each letter.
      unit: what the shards of k and n are multiples of.
    """
    rows = operands[0][:-1]
    result = f"{rows}n"
    several = sizes["g"] > 1

    def fits(letter: str, shards: int) -> bool:
        whole_groups = letter != "k" or not several or sizes["g"] % shards == 0
        return whole_groups and sizes[letter] % (shards * (unit if letter in "kn" else 1)) == 0

    def settled(mesh: Mesh, arrays: Sequence[Any], out: Any) -> dict[str, Axes]:
        """The axes of each letter. Where arrays disagree the result wins, then the first."""
        axes: dict[str, Axes] = {}
        used: set[str] = set()
        for dims, x in ((result, out), *zip(operands, arrays, strict=True)):
            for letter, names in zip(dims, spec_axes(x.sharding, x.ndim) if x is not None else (), strict=False):
                key = "k" if letter == "g" else letter
                if not names or axes.get(key) or used.intersection(names):
                    continue
                if fits(key, math.prod(mesh.shape[name] for name in names)):
                    axes[key] = names
                    used.update(names)
        return {**axes, "g": axes.get("k", ()) if several else ()}

    def sharding_of(mesh: Mesh, axes: dict[str, Axes], dims: str) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(axes.get(x) or None for x in dims)))

    def partition(mesh: Mesh, arrays: Sequence[Any], out: Any) -> tuple[Mesh, Any, Any, Any]:
        axes = settled(mesh, arrays, out)
        reduced = axes.get("k", ())
        of_sums = sum(1 for dims in operands if set(dims) & set("gk"))

        def shard(*local: Array) -> Array:
            # As in `partitioned`.
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                if not reduced:
                    return product(*local)
                return finish(jax.lax.psum(sums(*local[:of_sums]), reduced), *local[of_sums:])

        return mesh, shard, sharding_of(mesh, axes, result), tuple(sharding_of(mesh, axes, x) for x in operands)

    def infer(mesh: Mesh, arrays: Sequence[Any], _: Any) -> NamedSharding:
        return sharding_of(mesh, settled(mesh, arrays, None), result)

    def whole(*arrays: Array) -> Array:
        return product(*arrays)

    def factors(dims: str) -> str:
        return " ".join("(g h)" if letter == "k" and several else letter for letter in dims)

    wrapped = custom_partitioning(whole)
    wrapped.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{', '.join(map(factors, operands))} -> {factors(result)}",
        reduction_factors=("g", "h") if several else ("k",),
        **({"h": sizes["k"] // sizes["g"]} if several else {}),
    )
    return wrapped
