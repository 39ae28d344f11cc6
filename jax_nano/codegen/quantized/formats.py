"""Weights of 8 and 4 bits in memory as vectors of float32.

A vector register of weights is unpacked into *fields*, vectors of float32 whose lanes need not be weights that lie side
by side, where others are cheaper to make: products are then summed in this order, and brought into the natural one
where a sum ends. ``natural`` and ``permuted`` lead from the one to the other.

Integers of 8 bits. A load that extends signs or zeros, and a conversion; in their natural order. On Zen 3 that load
costs no more than another one, where two shifts of a whole register take the time of a product each.

Integers of 4 bits. They are numbers of bfloat16, which has two bytes: one byte shuffle looks up the upper bytes of 32
weights or more, one the lower bytes. Interleaved they are pairs of bfloat16, of which a shift or a bitwise operation
makes float32. That is 19 operations for 64 weights.

Floats of 8 bits. Each is the upper half of a float16, e5m2 as it is; the exponent of e4m3fn has one bit less and
another bias, so it gives a float16 that is too small by a factor of 2**8, which the sum is multiplied by.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .. import ir
from ..ir import I64, Ptr, Value

CHUNK = 16
"""Weights that ``Format.chunk`` unpacks in their natural order. Groups are multiples of it."""


class Format(Protocol):
    """How weights lie in memory.

    Attributes:
      name: part of kernels' names.
      bits: of a weight.
      lanes: float32 in a vector.
      is_integer: whether zero points may be subtracted.
      factor: what sums of fields are to be multiplied by.
      in_order: whether fields are in the order in which the weights lie.
      in_use: registers that making fields takes.
      at_once: fields that are made together: fewer cost more each.
    """

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def lanes(self) -> int: ...
    @property
    def is_integer(self) -> bool: ...
    @property
    def factor(self) -> float: ...
    @property
    def in_order(self) -> bool: ...
    @property
    def in_use(self) -> int: ...
    @property
    def at_once(self) -> int: ...

    def constants(self, flip: I64) -> list[Value]:
        """What ``fields`` needs in registers; made once, at the top of a function."""
        ...

    def fields(self, source: Ptr | Value, which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        """Some fields of a register of weights; each is made when it is asked for.

        Args:
          source: where they lie, or the register as 32-bit words.
          constants: from ``constants``.
        """
        ...

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        """All fields in the order in which the weights lie in memory."""
        ...

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        """The inverse of ``natural``."""
        ...

    def chunk(self, p: Ptr, flip: I64) -> list[Value]:
        """CHUNK weights in their natural order as float32, not shifted by anything."""
        ...


def field_count(form: Format) -> int:
    """Vectors of float32 that a register of weights gives."""
    return 32 // form.bits


def block(form: Format) -> int:
    """Weights in a register."""
    return form.lanes * field_count(form)


def _turns(n: int, unit: int) -> list[int]:
    """Elements of two vectors of n, ``unit`` of them in turn, by their places in both."""
    return [i for u in range(0, n, unit) for first in (u, n + u) for i in range(first, first + unit)]


def _riffle(a: Sequence[Value], b: Sequence[Value], unit: int = 1) -> list[Value]:
    """Elements of two sequences, ``unit`` of them in turn."""
    out = []
    for x, y in zip(a, b, strict=True):
        n = ir.lanes_of(x)
        order = _turns(n, unit)
        out += [ir.shuffle(x, y, half) for half in (order[:n], order[n:])]
    return out


def _unriffle(v: Sequence[Value], unit: int = 1) -> tuple[list[Value], list[Value]]:
    """The inverse of ``_riffle``."""
    n = ir.lanes_of(v[0])
    order = _turns(n, unit)
    halves = ([p for p, i in enumerate(order) if i // n == which] for which in (0, 1))
    pairs = list(zip(v[::2], v[1::2], strict=True))
    first, second = ([ir.shuffle(x, y, places) for x, y in pairs] for places in halves)
    return first, second


def _pieces(v: Value, lanes: int) -> list[Value]:
    """A long vector as several."""
    return [ir.shuffle(v, v, range(i, i + lanes)) for i in range(0, ir.lanes_of(v), lanes)]


def _register(source: Ptr | Value, lanes: int) -> Value:
    return source.as_type("int32").load(lanes, alignment=1) if isinstance(source, Ptr) else source


@dataclass(frozen=True)
class Bytes:
    """int8 or uint8."""

    lanes: int
    signed: bool
    bits = 8
    is_integer = True
    factor = 1.0
    in_order = True
    in_use = 6
    at_once = 1

    @property
    def name(self) -> str:
        return "i8" if self.signed else "u8"

    def constants(self, flip: I64) -> list[Value]:
        return []

    def _widened(self, v: Value) -> Value:
        return ir.int32_to_float32(ir.convert(v, "int8" if self.signed else "uint8", "int32"))

    def fields(self, source: Ptr | Value, which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        if isinstance(source, Ptr):
            elem = "int8" if self.signed else "uint8"
            for field in which:
                yield self._widened(source.as_type(elem).at(field * self.lanes).load(self.lanes))
        else:
            pieces = _pieces(ir.bitcast(source, 4 * self.lanes, "int8"), self.lanes)
            for field in which:
                yield self._widened(pieces[field])

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        return list(fields)

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        return list(vectors)

    def chunk(self, p: Ptr, flip: I64) -> list[Value]:
        return list(self.fields(p, range(CHUNK // self.lanes), ()))


@dataclass(frozen=True)
class Nibbles:
    """int4 and uint4: two to a byte, the first one in its lower half."""

    lanes: int
    bits = 4
    name = "i4"
    is_integer = True
    factor = 1.0
    in_order = False
    in_use = 10
    at_once = 2

    BLOCK = 8  # bytes that interleaving takes from each half of 16

    def _tables(self, *, signed: bool) -> list[Value]:
        """The upper and the lower bytes of the bfloat16 of each number, 16 in every 16 bytes of a register."""
        words = [_bfloat16(i - 16 if signed and i >= 8 else i) for i in range(16)]
        repeats = self.lanes // 4
        return [ir.constant_bytes([w >> shift & 255 for w in words] * repeats) for shift in (8, 0)]

    def constants(self, flip: I64) -> list[Value]:
        pairs = zip(self._tables(signed=True), self._tables(signed=False), strict=True)
        signed = ir.negate(ir.equal(flip, 0))
        return [ir.select(ir.splat_bool(signed, ir.lanes_of(s)), s, u) for s, u in pairs]

    def fields(self, source: Ptr | Value, which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        v = _register(source, self.lanes)
        count = 4 * self.lanes
        intrinsic = {8: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.avx512.pshuf.b.512"}[self.lanes]
        found: dict[int, list[Value]] = {}
        pairs: dict[int, Value] = {}
        for field in which:
            half, kind = divmod(field, 4)  # the lower or upper nibbles; of those the lower or upper bytes, even or odd
            if half not in found:
                nibbles = ir.and_constant(ir.shift_right(v, 4 * half), 0x0F0F0F0F)
                nibbles = ir.bitcast(nibbles, count, "int8")
                found[half] = [ir.call_intrinsic(intrinsic, nibbles.type, [t, nibbles]) for t in constants]
            if field // 2 not in pairs:
                upper, lower = found[half]
                first = kind // 2 * self.BLOCK
                places = [i for lane in range(0, count, 16) for i in range(lane + first, lane + first + self.BLOCK)]
                both = ir.shuffle(lower, upper, [x for i in places for x in (i, count + i)])
                pairs[field // 2] = ir.bitcast(both, self.lanes, "int32")
            pair = pairs[field // 2]
            bits = ir.and_constant(pair, -0x10000) if field % 2 else ir.shift_left(pair, 16)
            yield ir.bits_as(bits, "float32")

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        halves = []
        for half in (fields[:4], fields[4:]):
            first, second = (_riffle([half[i]], [half[i + 1]]) for i in (0, 2))
            halves.append(_riffle(first, second, self.BLOCK))
        return _riffle(halves[0], halves[1])

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        out = []
        for half in _unriffle(vectors):
            for part in _unriffle(half, self.BLOCK):
                out += [x for (x,) in _unriffle(part)]
        return out

    def chunk(self, p: Ptr, flip: I64) -> list[Value]:
        v = p.load(CHUNK // 2)
        low, high = ir.and_constant(v, 15), ir.shift_right(v, 4)
        both = ir.shuffle(low, high, [x for i in range(CHUNK // 2) for x in (i, CHUNK // 2 + i)])
        flipped = ir.splat(ir.as_int32(flip), self.lanes)  # signs
        wide = [ir.xor(ir.convert(x, "uint8", "int32"), flipped) for x in _pieces(both, self.lanes)]
        return [ir.int32_to_float32(ir.subtract(x, flipped)) for x in wide]


def _bfloat16(x: int) -> int:
    """The bits of a small integer."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    assert not bits & 0xFFFF
    return int(bits >> 16)


@dataclass(frozen=True)
class Floats:
    """float8_e5m2, or float8_e4m3fn, which has a mantissa bit more and no infinities."""

    exponent_bits: int
    lanes: int
    bits = 8
    is_integer = False
    in_order = False
    in_use = 8
    at_once = 2

    @property
    def name(self) -> str:
        return f"f8e{self.exponent_bits}m{7 - self.exponent_bits}"

    @property
    def factor(self) -> float:
        return 1.0 if self.exponent_bits == 5 else 256.0

    def constants(self, flip: I64) -> list[Value]:
        return []

    def _float16(self, v: Value) -> Value:
        """float16 from words of 16 bits with a weight in the upper half, zero below."""
        if self.exponent_bits == 4:
            magnitude = ir.and_constant(v, 0x7F00)
            sign = ir.and_constant(v, -0x8000)
            nan = ir.select(ir.equal_to(magnitude, 0x7F00), ir.like(v, 0x7E00), ir.shift_right(magnitude, 1))
            v = ir.or_(nan, sign)
        return ir.bits_as(v, "float16")

    def fields(self, source: Ptr | Value, which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        words = ir.bitcast(_register(source, self.lanes), 2 * self.lanes, "int16")
        halves: dict[int, list[Value]] = {}
        for field in which:
            if field // 2 not in halves:
                half = ir.shift_left(words, 8) if field < 2 else ir.and_constant(words, -0x100)
                halves[field // 2] = _pieces(self._float16(half), self.lanes)
            yield ir.convert(halves[field // 2][field % 2], "float16", "float32")

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        return _riffle(fields[:2], fields[2:])

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        evens, odds = _unriffle(vectors)
        return [*evens, *odds]

    def chunk(self, p: Ptr, flip: I64) -> list[Value]:
        words = ir.shift_left(ir.convert(p.load(CHUNK), "uint8", "int16"), 8)
        wide = [ir.convert(x, "float16", "float32") for x in _pieces(self._float16(words), self.lanes)]
        return [ir.multiply(x, ir.like(x, self.factor)) for x in wide] if self.factor != 1 else wide
