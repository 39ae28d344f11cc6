"""Programs over several devices: where a product runs, and how jit partitions it.

Inside shard_map and pmap an operand is one device's shard, and the call is made as it is. Under jit with sharded arrays
XLA would gather the operands of a custom call, about which it knows nothing. There the call is inside a
custom_partitioning: a rule in Shardy's terms (the same labels), and a callback that turns the sharding that XLA has
chosen into the product of shards, with a psum where a contracting dimension is sharded.
"""

from __future__ import annotations

import enum
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
