"""Dimension numbers as labels: pure logic on tuples of ints, no tracing, no JAX.

A product is described as einsum describes it: every dimension of lhs, rhs and out has a label (an int).
A label in lhs, rhs and out is a batch dimension, in lhs and rhs only a contracting one, in lhs and out
only an M, in rhs and out only an N. Everything that transforms a product (vmap, transposition, folding a
transpose of an operand) is a line or two on labels, where dimension numbers need index juggling.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

Dims: TypeAlias = tuple[int, ...]
DimensionNumbers: TypeAlias = tuple[tuple[Dims, Dims], tuple[Dims, Dims]]
Shape: TypeAlias = Sequence[int]


class Labels(NamedTuple):
    """One label per dimension of each array. Labels do not repeat within an array."""

    lhs: Dims
    rhs: Dims
    out: Dims

    @property
    def batch(self) -> Dims:
        """Labels of all three arrays, in the order of out."""
        return tuple(x for x in self.out if x in self.lhs and x in self.rhs)

    @property
    def contracting(self) -> Dims:
        """Labels that are summed over, in the order of lhs."""
        return tuple(x for x in self.lhs if x not in self.out)

    @property
    def lhs_free(self) -> Dims:
        """Labels of lhs and out only (M), in the order of lhs."""
        return tuple(x for x in self.lhs if x in self.out and x not in self.rhs)

    @property
    def rhs_free(self) -> Dims:
        """Labels of rhs and out only (N), in the order of rhs."""
        return tuple(x for x in self.rhs if x in self.out and x not in self.lhs)

    def sizes(self, lhs_shape: Shape, rhs_shape: Shape) -> dict[int, int]:
        """The size of each label."""
        return dict(zip(self.lhs + self.rhs, (*lhs_shape, *rhs_shape), strict=True))

    def out_shape(self, lhs_shape: Shape, rhs_shape: Shape) -> tuple[int, ...]:
        """The shape of the result."""
        sizes = self.sizes(lhs_shape, rhs_shape)
        return tuple(sizes[x] for x in self.out)


@lru_cache(maxsize=4096)
def labels_of(dimension_numbers: DimensionNumbers, out_perm: Dims | None, lhs_ndim: int, rhs_ndim: int) -> Labels:
    """Labels of a dot_general whose result is transposed by out_perm (None: not at all).

    lhs dimension i has label i, so that equal products get equal labels.
    """
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    lhs = tuple(range(lhs_ndim))
    shared = dict(zip(rhs_batch + rhs_contracting, lhs_batch + lhs_contracting, strict=True))
    rhs = tuple(shared.get(i, lhs_ndim + i) for i in range(rhs_ndim))
    lhs_free = remove(lhs, lhs_batch + lhs_contracting)
    rhs_free = tuple(x for x in rhs if x >= lhs_ndim)
    out = lhs_batch + lhs_free + rhs_free
    return Labels(lhs, rhs, out if out_perm is None else permute(out, out_perm))


@lru_cache(maxsize=4096)
def dimension_numbers_of(labels: Labels) -> tuple[DimensionNumbers, Dims | None]:
    """The dimension numbers and the permutation of the result (None: identity) that mean `labels`."""
    lhs, rhs, out = labels
    batch, contracting = labels.batch, labels.contracting
    natural = batch + labels.lhs_free + labels.rhs_free
    dimension_numbers = (
        (positions(lhs, contracting), positions(rhs, contracting)),
        (positions(lhs, batch), positions(rhs, batch)),
    )
    return dimension_numbers, None if natural == out else positions(natural, out)


def lhs_cotangent(labels: Labels) -> Labels:
    """The product `dot(g, rhs)` that gives the cotangent of lhs, laid out as lhs."""
    return Labels(labels.out, labels.rhs, labels.lhs)


def rhs_cotangent(labels: Labels) -> Labels:
    """The product `dot(lhs, g)` that gives the cotangent of rhs, laid out as rhs."""
    return Labels(labels.lhs, labels.out, labels.rhs)


def batched(labels: Labels, lhs_dim: int | None, rhs_dim: int | None) -> Labels:
    """The product under vmap: a new dimension in the operands that have one, and first in the result."""
    new = 1 + max(labels.lhs + labels.rhs, default=0)
    return Labels(
        labels.lhs if lhs_dim is None else insert(labels.lhs, lhs_dim, new),
        labels.rhs if rhs_dim is None else insert(labels.rhs, rhs_dim, new),
        (new, *labels.out),
    )


def before_transpose(operand: Dims, perm: Sequence[int]) -> Dims:
    """Labels of x, given those of transpose(x, perm)."""
    source = dict(zip(perm, operand, strict=True))
    return tuple(source[i] for i in range(len(operand)))


def runnable_out(labels: Labels, lhs_shape: Shape, rhs_shape: Shape) -> Dims:
    """The order of result dimensions closest to `labels.out` that a kernel can store.

    Kernels store rows of C, so the last dimension longer than one must be an M or an N, if there is any.
    """
    sizes = labels.sizes(lhs_shape, rhs_shape)
    batch = set(labels.batch)
    long = [x for x in labels.out if is_not_one(sizes[x])]
    if not long or long[-1] not in batch or batch.issuperset(long):
        return labels.out
    return labels.batch + tuple(x for x in labels.out if x not in batch)


class MatmulLayout(NamedTuple):
    """How `matmul` is one product: what to squeeze first, the product, what to expand after."""

    lhs_squeeze: Dims
    rhs_squeeze: Dims
    labels: Labels
    expand: Dims


@lru_cache(maxsize=4096)
def matmul_layout(
    lhs_shape: tuple[int, ...],
    rhs_shape: tuple[int, ...],
    lhs_spec: tuple[Hashable, ...] | None = None,
    rhs_spec: tuple[Hashable, ...] | None = None,
) -> MatmulLayout | None:
    """The product behind `matmul` of operands of at least one dimension; None if they do not broadcast.

    The specs are the explicit sharding of each dimension. As in jnp.matmul, a sharded dimension of size
    one is not broadcast, and batch dimensions must be sharded alike. Contracting sizes are not compared.
    """
    lhs_batch = tuple(lhs_shape[:-2])
    rhs_batch = tuple(rhs_shape[:-2])
    ndim = max(len(lhs_batch), len(rhs_batch))
    lhs_offset, rhs_offset = ndim - len(lhs_batch), ndim - len(rhs_batch)
    lhs_specs = _leading(lhs_spec, len(lhs_batch))
    rhs_specs = _leading(rhs_spec, len(rhs_batch))
    lhs_labels: list[int] = []
    rhs_labels: list[int] = []
    out: list[int] = []
    lhs_squeeze: list[int] = []
    rhs_squeeze: list[int] = []
    expand: list[int] = []
    for i in range(ndim):
        li, ri = i - lhs_offset, i - rhs_offset
        if li < 0:
            rhs_labels.append(i)
        elif ri < 0:
            lhs_labels.append(i)
        else:
            lhs_one = lhs_batch[li] == 1 and lhs_specs[li] is None
            rhs_one = rhs_batch[ri] == 1 and rhs_specs[ri] is None
            if lhs_one:
                lhs_squeeze.append(li)
            if rhs_one:
                rhs_squeeze.append(ri)
            if lhs_one and rhs_one:
                expand.append(i)
                continue
            if not lhs_one:
                lhs_labels.append(i)
            if not rhs_one:
                rhs_labels.append(i)
            if not (lhs_one or rhs_one) and not (lhs_batch[li] == rhs_batch[ri] and lhs_specs[li] == rhs_specs[ri]):
                return None
        out.append(i)
    m, k, n = ndim, ndim + 1, ndim + 2
    lhs_labels += [m, k] if len(lhs_shape) > 1 else [k]
    rhs_labels += [k, n] if len(rhs_shape) > 1 else [k]
    out += ([m] if len(lhs_shape) > 1 else []) + ([n] if len(rhs_shape) > 1 else [])
    labels = Labels(tuple(lhs_labels), tuple(rhs_labels), tuple(out))
    return MatmulLayout(tuple(lhs_squeeze), tuple(rhs_squeeze), labels, tuple(expand))


def _leading(spec: Sequence[Hashable] | None, count: int) -> Sequence[Hashable]:
    return (None,) * count if spec is None else spec


def einsum_labels(inputs: Sequence[str], output: str, shapes: Sequence[Shape]) -> Labels | None:
    """The labels of a two-operand einsum that is exactly one product, else None.

    None: a repeated or summed-out index, sizes that differ or broadcast, or a malformed expression.
    """
    if len(inputs) != 2 or len(shapes) != 2:
        return None
    if any(len(set(names)) != len(names) for names in (*inputs, output)):
        return None
    if any(len(names) != len(shape) for names, shape in zip(inputs, shapes, strict=True)):
        return None
    lhs, rhs = (dict(zip(names, shape, strict=True)) for names, shape in zip(inputs, shapes, strict=True))
    if any(name not in lhs and name not in rhs for name in output):
        return None
    if any(name not in output and not (name in lhs and name in rhs) for name in {*lhs, *rhs}):
        return None
    if any(lhs[name] != rhs[name] for name in lhs.keys() & rhs.keys()):
        return None
    number: Mapping[str, int] = {name: i for i, name in enumerate(dict.fromkeys(inputs[0] + inputs[1]))}
    return Labels(*(tuple(number[name] for name in names) for names in (*inputs, output)))


def is_not_one(size: int) -> bool:
    """Whether a size is, or for a symbolic one may be, other than one."""
    return not (isinstance(size, int) and size == 1)


def positions(labels: Dims, wanted: Iterable[int]) -> Dims:
    """Where each of the wanted labels is."""
    return tuple(labels.index(x) for x in wanted)


def permute(values: Sequence[int], perm: Sequence[int]) -> Dims:
    """transpose() of a shape or of labels."""
    return tuple(values[i] for i in perm)


def inverse(perm: Sequence[int]) -> Dims:
    """The permutation that undoes `perm`."""
    return tuple(sorted(range(len(perm)), key=perm.__getitem__))


def insert(values: Dims, index: int, value: int) -> Dims:
    """A tuple with one value more."""
    return (*values[:index], value, *values[index:])


def remove_index(values: Sequence[int], index: int) -> Dims:
    """A shape without one of its dimensions."""
    return (*values[:index], *values[index + 1 :])


def remove(values: Dims, unwanted: Iterable[int]) -> Dims:
    """A tuple without some values."""
    drop = set(unwanted)
    return tuple(x for x in values if x not in drop)
