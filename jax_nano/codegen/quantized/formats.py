"""Weights of 8 and 4 bits in memory as vectors of float32.

A vector register of weights is unpacked into *fields*, vectors of float32 whose lanes are weights that do not lie side
by side: so much cheaper to make that products are summed in this order, and brought into the natural one where a sum
ends. ``natural`` and ``permuted`` lead from the one to the other.

Integers. A register is seen as words of 32 bits. A field of ``bits`` bits in each word is cut out and put among the
mantissa bits of 2**23, or of 2**15 or 2**19 where it lies further up: as a float32 that is 2**23 + u, exactly. Signed
numbers are flipped in their upper bit before, which adds 128 or 8 to them. Then one subtraction of 2**23 + 128 + zero
point gives q minus the zero point, exactly. That is two bitwise operations and a subtraction for a vector, one bitwise
operation with AVX-512.

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
      is_integer: whether zero points are subtracted.
      factor: what sums of fields are to be multiplied by.
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

    def fields(self, v: Value, which: Sequence[int], flip: I64) -> Iterator[Value]:
        """Some fields of a register of weights, as 32-bit words; each is made when it is asked for.

        Args:
          flip: what is added to integers: 8 or 128 if they are signed, else 0.
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


def _riffle(a: Sequence[Value], b: Sequence[Value]) -> list[Value]:
    """Elements of two sequences in turn."""
    out = []
    for x, y in zip(a, b, strict=True):
        n = ir.lanes_of(x)
        for half in (range(n // 2), range(n // 2, n)):
            out.append(ir.shuffle(x, y, [z for i in half for z in (i, n + i)]))
    return out


def _unriffle(v: Sequence[Value]) -> tuple[list[Value], list[Value]]:
    """The even and the odd elements of a sequence."""
    n = ir.lanes_of(v[0])
    pairs = list(zip(v[::2], v[1::2], strict=True))
    evens, odds = ([ir.shuffle(x, y, range(first, 2 * n, 2)) for x, y in pairs] for first in (0, 1))
    return evens, odds


def _pieces(v: Value, lanes: int) -> list[Value]:
    """A long vector as several."""
    return [ir.shuffle(v, v, range(i, i + lanes)) for i in range(0, ir.lanes_of(v), lanes)]


def _float_bits(x: float) -> int:
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    return int(bits)


@dataclass(frozen=True)
class Integers:
    """int8 and uint8, or int4 and uint4: two to a byte, the first one in its lower half."""

    bits: int
    lanes: int
    is_integer = True
    factor = 1.0

    @property
    def name(self) -> str:
        return f"i{self.bits}"

    def _place(self, field: int) -> tuple[int, int]:
        """By how much words are shifted for a field, and its lowest bit then."""
        return field // 2 * 2 * self.bits, field % 2 * self.bits

    def origin(self, field: int) -> float:
        """What a field holds for zero bits."""
        return float(2 ** (23 - self._place(field)[1]))

    def fields(self, v: Value, which: Sequence[int], flip: I64) -> Iterator[Value]:
        ones = sum(1 << i for i in range(0, 32, self.bits))
        v = ir.xor(v, ir.splat(ir.as_int32(flip * ones), self.lanes))
        shifted: dict[int, Value] = {}
        for field in which:
            shift, low = self._place(field)
            if shift not in shifted:
                shifted[shift] = ir.shift_right(v, shift)
            cut = ir.and_constant(shifted[shift], ((1 << self.bits) - 1) << low)
            yield ir.bits_as(ir.or_(cut, ir.like(cut, _float_bits(self.origin(field)))), "float32")

    def zeros(self, flip: Value) -> list[Value]:
        """What each field holds for the weight 0, as vectors; ``flip`` as a float32."""
        return [
            ir.splat(ir.add_vectors(flip, ir.scalar_constant(self.origin(field), "float32")), self.lanes)
            for field in range(field_count(self))
        ]

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        sequences = [[x] for x in fields]
        while len(sequences) > 1:
            half = len(sequences) // 2
            sequences = [_riffle(a, b) for a, b in zip(sequences[:half], sequences[half:], strict=True)]
        return sequences[0]

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        if len(vectors) == 1:
            return list(vectors)
        evens, odds = (self.permuted(half) for half in _unriffle(vectors))
        return [x for pair in zip(evens, odds, strict=True) for x in pair]

    def chunk(self, p: Ptr, flip: I64) -> list[Value]:
        v = p.load(CHUNK * self.bits // 8)
        if self.bits == 4:
            low, high = ir.and_constant(v, 15), ir.shift_right(v, 4)
            v = ir.shuffle(low, high, [x for i in range(CHUNK // 2) for x in (i, CHUNK // 2 + i)])
        lifted = ir.splat(ir.as_int32(flip), self.lanes)
        wide = [ir.xor(ir.convert(x, "uint8", "int32"), lifted) for x in _pieces(v, self.lanes)]
        return [ir.int32_to_float32(ir.subtract(x, lifted)) for x in wide]


@dataclass(frozen=True)
class Floats:
    """float8_e5m2, or float8_e4m3fn, which has a mantissa bit more and no infinities."""

    exponent_bits: int
    lanes: int
    bits = 8
    is_integer = False

    @property
    def name(self) -> str:
        return f"f8e{self.exponent_bits}m{7 - self.exponent_bits}"

    @property
    def factor(self) -> float:
        return 1.0 if self.exponent_bits == 5 else 256.0

    def _float16(self, v: Value) -> Value:
        """float16 from words of 16 bits with a weight in the upper half, zero below."""
        if self.exponent_bits == 4:
            magnitude = ir.and_constant(v, 0x7F00)
            sign = ir.and_constant(v, -0x8000)
            nan = ir.select(ir.equal_to(magnitude, 0x7F00), ir.like(v, 0x7E00), ir.shift_right(magnitude, 1))
            v = ir.or_(nan, sign)
        return ir.bits_as(v, "float16")

    def fields(self, v: Value, which: Sequence[int], flip: I64) -> Iterator[Value]:
        words = ir.bitcast(v, 2 * self.lanes, "int16")
        for field in which:
            half = ir.shift_left(words, 8) if field < 2 else ir.and_constant(words, -0x100)
            yield ir.convert(_pieces(self._float16(half), self.lanes)[field % 2], "float16", "float32")

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        return _riffle(fields[:2], fields[2:])

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        evens, odds = _unriffle(vectors)
        return [*evens, *odds]

    def chunk(self, p: Ptr, flip: I64) -> list[Value]:
        words = ir.shift_left(ir.convert(p.load(CHUNK), "uint8", "int16"), 8)
        wide = [ir.convert(x, "float16", "float32") for x in _pieces(self._float16(words), self.lanes)]
        return [ir.multiply(x, ir.like(x, self.factor)) for x in wide] if self.factor != 1 else wide
