"""Weights of 8 and 4 bits in memory as vectors of float32.

A vector register of weights is unpacked into *fields*, vectors of float32 whose lanes need not be weights that lie side
by side, where others are cheaper to make: products are then summed in this order, and brought into the natural one
where a sum ends. ``natural`` and ``permuted`` lead from the one to the other.

Integers of 8 bits. A load that extends signs or zeros, and a conversion; in their natural order. On Zen 3 that load
costs no more than another one, where two shifts of a whole register take the time of a product each.

Integers of 4 bits. A byte shuffle puts each byte into a word of its own, of which a shift and a bitwise operation cut
out both weights; a conversion makes float32 of them. Signed weights are cut out at the top of the word, where the sign
is, and so are too large by a factor of 2**28, which x and the sums share: a sum over a group of x times integers must
stay below 2**114, and x below 2**-112 loses digits. That is 20 operations for 64 weights, which keep all four pipes of
Zen 3 busy, where looking up both bytes of their bfloat16 takes 19, most of them in two pipes.

Integers of 4 bits with AVX-512. Nothing is cut out: ``vpermps`` looks float32 up in a register by the lowest 4 bits of
each word, so a shift and a table give a field, the weights 8 * i + j for the lanes i. That is 24 operations for 128
weights and their products, which no pipe of Zen 4 is needed for in particular: they take 12 cycles.

Integers of 4 bits with products of pairs (AVX512-BF16). ``vpermw`` looks bfloat16 up likewise, in a table that has
everything twice, as a place there has 5 bits: the weights 4 * i + j for the halves i of words. x stays bfloat16, and
all products are exact; two of them are added to a sum at once, so weights of two values of K must share a word.

Integers of 8 bits as pairs: two float32 that bfloat16 holds exactly, and the upper halves of both by a shuffle.

Floats of 8 bits. Each is the upper half of a float16, e5m2 as it is; the exponent of e4m3fn has one bit less and
another bias, so it gives a float16 that is too small by a factor of 2**8, which the sum is multiplied by.

Floats of 8 bits as pairs. bfloat16 of the 128 magnitudes is in four registers: ``vpermt2w`` looks one up in two of
them, a mask chooses, and the sign is put back. That is 5 operations for 32 weights, where float16 takes 8; with two
more, which make float32 of them, it is not faster.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .. import ir
from ..ir import Ptr, Value

ELEMENT = {1: "float32", 2: "bfloat16"}
"""What x is for a product, by ``Format.step``."""

CHUNK = 16
"""Weights that ``Format.chunk`` unpacks in their natural order. Groups are multiples of it."""


class Format(Protocol):
    """How weights lie in memory.

    Attributes:
      name: part of kernels' names.
      bits: of a weight.
      lanes: float32 in a vector.
      step: values of K that a product adds to a sum: with two of them x and fields are pairs of bfloat16, there are no
        zero points, and blocks are not dequantised.
      depth: rows of weights in a sweep.
      is_integer: whether zero points may be subtracted.
      unit: what a weight of one is in a field.
      x_factor, factor: what x and sums are to be multiplied by for that; powers of two.
      holds_groups: whether a register of weights along K may hold several groups.
      by_field: whether these have fields of their own, not lanes.
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
    def step(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def is_integer(self) -> bool: ...
    @property
    def unit(self) -> float: ...
    @property
    def x_factor(self) -> float: ...
    @property
    def factor(self) -> float: ...
    @property
    def holds_groups(self) -> bool: ...
    @property
    def by_field(self) -> bool: ...
    @property
    def in_use(self) -> int: ...
    @property
    def at_once(self) -> int: ...

    def constants(self) -> list[Value]:
        """What ``fields`` needs in registers; made once, at the top of a function."""
        ...

    def fields(self, source: Ptr | Value, which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        """Some fields of a register of weights; each is made when it is asked for.

        Args:
          source: where they lie, or the register as 32-bit words.
          constants: from ``constants``.
        """
        ...

    def of_rows(self, rows: Sequence[Ptr | Value], which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        """The same of a register each of ``step`` rows of weights whose columns lie side by side."""
        ...

    def product(self, x: Value, w: Value, acc: Value) -> Value:
        """A field times as much of x, added to a sum."""
        ...

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        """All fields in the order in which the weights lie in memory, or sums over their columns."""
        ...

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        """The inverse of ``natural``."""
        ...

    def chunk(self, p: Ptr) -> list[Value]:
        """CHUNK weights in their natural order as float32, not shifted by anything."""
        ...

    def bfloat16(self, p: Ptr) -> Value:
        """2 * CHUNK of them as bfloat16, with AVX-512."""
        ...


def field_count(form: Format) -> int:
    """Vectors of sums that the columns in a register of weights have."""
    return 32 // form.bits


def fields_along_k(form: Format) -> int:
    """Fields of a register of weights."""
    return field_count(form) // form.step


def block(form: Format) -> int:
    """Weights in a register."""
    return form.lanes * field_count(form)


def scaled(v: Value, factor: float) -> Value:
    """v times a constant, of which most are one."""
    return ir.multiply(v, ir.like(v, factor)) if factor != 1 else v


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


class _Single:
    """Formats whose fields are float32."""

    step = 1

    @property
    def depth(self) -> int:
        """With vectors of 64 bytes storing sums takes Zen 4 two cycles, as long as two products."""
        lanes: int = self.lanes  # type: ignore[attr-defined]
        return 16 if lanes == CHUNK else 8

    def fields(self, source: Ptr | Value, which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        raise NotImplementedError

    def of_rows(self, rows: Sequence[Ptr | Value], which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        return self.fields(rows[0], which, constants)

    def product(self, x: Value, w: Value, acc: Value) -> Value:
        return ir.fma(x, w, acc)

    def chunk(self, p: Ptr) -> list[Value]:
        raise NotImplementedError

    def bfloat16(self, p: Ptr) -> Value:
        bits: int = self.bits  # type: ignore[attr-defined]
        halves = [v for i in range(2) for v in self.chunk(p.at(i * CHUNK * bits // 8))]
        return ir.exactly_bfloat16(*halves)


@dataclass(frozen=True)
class Bytes(_Single):
    """int8 or uint8."""

    lanes: int
    signed: bool
    bits = 8
    is_integer = holds_groups = True
    unit = x_factor = factor = 1.0
    by_field = True
    in_use = 6
    at_once = 1

    @property
    def name(self) -> str:
        return "i8" if self.signed else "u8"

    def constants(self) -> list[Value]:
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

    def chunk(self, p: Ptr) -> list[Value]:
        return list(self.fields(p, range(CHUNK // self.lanes), ()))


@dataclass(frozen=True)
class Nibbles(_Single):
    """int4 or uint4: two to a byte, the first one in its lower half."""

    lanes: int
    signed: bool
    bits = 4
    is_integer = holds_groups = True
    by_field = True
    in_use = 8
    at_once = 2

    CHUNK_BYTES = 16  # that byte shuffles take apart: they do not cross parts of 16 bytes

    @property
    def name(self) -> str:
        return "i4" if self.signed else "u4"

    @property
    def unit(self) -> float:
        return 2.0**28 if self.signed else 1.0

    @property
    def x_factor(self) -> float:
        return self.unit**-0.5

    @property
    def factor(self) -> float:
        return self.unit**-0.5

    def constants(self) -> list[Value]:
        """Byte shuffles that put some of 16 bytes into words of their own: signed ones at the top, where they have the
        sign of the word, others at the bottom.
        """
        place, nothing = (3 if self.signed else 0), 0x80
        shuffles = []
        for first in range(0, self.CHUNK_BYTES, self.lanes):
            words = [[nothing] * 4 for _ in range(self.lanes)]
            for i, word in enumerate(words):
                word[place] = first + i
            shuffles.append(ir.constant_bytes([x for word in words for x in word]))
        return shuffles

    def _words(self, source: Ptr | Value, which: int, constants: Sequence[Value], chunks: dict[int, Value]) -> Value:
        """``lanes`` bytes, each in a word of its own, placed as ``constants`` does it."""
        if not isinstance(source, Ptr):
            some = _pieces(ir.bitcast(source, 4 * self.lanes, "int8"), self.lanes)[which]
            wide = ir.convert(some, "uint8", "int32")
            return ir.shift_left(wide, 24) if self.signed else wide
        chunk, shuffle = divmod(which, len(constants))
        if chunk not in chunks:
            v = source.as_type("int8").at(chunk * self.CHUNK_BYTES).load(self.CHUNK_BYTES)
            chunks[chunk] = ir.shuffle(v, v, list(range(self.CHUNK_BYTES)) * (self.lanes // 4))
        intrinsic = {8: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.avx512.pshuf.b.512"}[self.lanes]
        bytes_ = chunks[chunk]
        return ir.bitcast(ir.call_intrinsic(intrinsic, bytes_.type, [bytes_, constants[shuffle]]), self.lanes, "int32")

    def fields(self, source: Ptr | Value, which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        chunks: dict[int, Value] = {}
        words: dict[int, Value] = {}
        for field in which:
            if field // 2 not in words:
                words[field // 2] = self._words(source, field // 2, constants, chunks)
            v = words[field // 2]
            if self.signed:
                v = ir.and_constant(v, -0x10000000) if field % 2 else ir.shift_left(v, 4)
            else:
                v = ir.shift_right(v, 4) if field % 2 else ir.and_constant(v, 15)
            yield ir.int32_to_float32(v)

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        return _riffle(fields[::2], fields[1::2])

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        return [v for pair in zip(*_unriffle(vectors), strict=True) for v in pair]

    def chunk(self, p: Ptr) -> list[Value]:
        v = p.load(CHUNK // 2)
        low, high = ir.and_constant(v, 15), ir.shift_right(v, 4)
        both = ir.shuffle(low, high, [x for i in range(CHUNK // 2) for x in (i, CHUNK // 2 + i)])
        wide = [ir.convert(x, "uint8", "int32") for x in _pieces(both, self.lanes)]
        if self.signed:
            wide = [ir.shift_right_signed(ir.shift_left(x, 28), 28) for x in wide]
        return [ir.int32_to_float32(x) for x in wide]


@dataclass(frozen=True)
class NibbleTable(_Single):
    """int4 or uint4 by a table of the 16 numbers in a register."""

    lanes: int
    signed: bool
    bits = 4
    is_integer = holds_groups = True
    unit = x_factor = factor = 1.0
    by_field = False
    in_use = 4
    at_once = 1

    @property
    def name(self) -> str:
        return "i4" if self.signed else "u4"

    def constants(self) -> list[Value]:
        return [ir.constant_elements([(x ^ 8) - 8 if self.signed else x for x in range(16)], "float32")]

    def _looked_up(self, words: Value, table: Value) -> Value:
        """The numbers that the lowest bits of words stand for; other bits do not matter."""
        return ir.call_intrinsic("llvm.x86.avx512.permvar.sf.512", table.type, [table, words])

    def fields(self, source: Ptr | Value, which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        words = _register(source, self.lanes)
        for field in which:
            yield self._looked_up(ir.shift_right(words, 4 * field), constants[0])

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        if len(fields) == 1:
            return list(fields)
        return _riffle(self.natural(fields[::2]), self.natural(fields[1::2]))

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        if len(vectors) == 1:
            return list(vectors)
        evens, odds = (self.permuted(x) for x in _unriffle(vectors))
        return [v for pair in zip(evens, odds, strict=True) for v in pair]

    def chunk(self, p: Ptr) -> list[Value]:
        v = p.load(CHUNK // 2)
        both = ir.shuffle(v, ir.shift_right(v, 4), [x for i in range(CHUNK // 2) for x in (i, CHUNK // 2 + i)])
        return [self._looked_up(ir.convert(both, "uint8", "int32"), *self.constants())]

    def bfloat16(self, p: Ptr) -> Value:
        """A byte in each word, and its upper weight once more in the upper half."""
        words = ir.convert(p.load(CHUNK), "uint8", "int32")
        halves = ir.bitcast(ir.or_(words, ir.shift_left(words, 12)), 2 * self.lanes, "int16")
        pairs = NibblePairs(self.lanes, self.signed)
        return ir.bits_as(pairs.looked_up(halves, *pairs.constants()), "bfloat16")


@dataclass(frozen=True)
class Floats(_Single):
    """float8_e5m2, or float8_e4m3fn, which has a mantissa bit more and no infinities."""

    exponent_bits: int
    lanes: int
    bits = 8
    is_integer = holds_groups = False
    x_factor = 1.0
    by_field = False
    in_use = 8
    at_once = 2

    @property
    def name(self) -> str:
        return f"f8e{self.exponent_bits}m{7 - self.exponent_bits}"

    @property
    def factor(self) -> float:
        return 1.0 if self.exponent_bits == 5 else 256.0

    @property
    def unit(self) -> float:
        return 1 / self.factor

    def constants(self) -> list[Value]:
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

    def chunk(self, p: Ptr) -> list[Value]:
        words = ir.shift_left(ir.convert(p.load(CHUNK), "uint8", "int16"), 8)
        wide = [ir.convert(x, "float16", "float32") for x in _pieces(self._float16(words), self.lanes)]
        return [ir.multiply(x, ir.like(x, self.factor)) for x in wide] if self.factor != 1 else wide


def magnitude(bits: int, exponent_bits: int) -> float:
    """The number of these 7 bits of a float8, e5m2 or e4m3fn."""
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = bits >> mantissa_bits, bits & (2**mantissa_bits - 1)
    if exponent_bits == 5 and exponent == 31:
        return math.nan if mantissa else math.inf
    if exponent_bits == 4 and bits == 127:
        return math.nan
    of_one = 2.0 ** (max(exponent, 1) - (2 ** (exponent_bits - 1) - 1))
    return (mantissa / 2**mantissa_bits + (exponent > 0)) * of_one


def _bfloat16_bits(x: float) -> int:
    """Those of a number that bfloat16 holds, as a signed integer."""
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    return bits >> 16


class _Pairs:
    """Formats whose fields are pairs of bfloat16."""

    step = 2
    depth = 16
    is_integer = holds_groups = False
    unit = x_factor = factor = 1.0
    by_field = False

    def product(self, x: Value, w: Value, acc: Value) -> Value:
        return ir.add_products_of_pairs(x, w, acc)

    def chunk(self, p: Ptr) -> list[Value]:
        raise NotImplementedError

    def bfloat16(self, p: Ptr) -> Value:
        raise NotImplementedError


@dataclass(frozen=True)
class BytePairs(_Pairs):
    """int8 or uint8 as pairs of bfloat16, in their natural order."""

    lanes: int
    signed: bool
    bits = 8
    in_use = 6
    at_once = 1

    @property
    def _single(self) -> Bytes:
        return Bytes(self.lanes, self.signed)

    @property
    def name(self) -> str:
        return self._single.name

    def constants(self) -> list[Value]:
        return []

    def fields(self, source: Ptr | Value, which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        for field in which:
            lower, higher = self._single.fields(source, (2 * field, 2 * field + 1), constants)
            yield ir.exactly_bfloat16(lower, higher)

    def of_rows(self, rows: Sequence[Ptr | Value], which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        both = (self._single.fields(r, which, constants) for r in rows)
        upper_halves = [i for place in range(1, 2 * self.lanes, 2) for i in (place, 2 * self.lanes + place)]
        for pair in zip(*both, strict=True):
            first, second = (ir.bitcast(v, 2 * self.lanes, "int16") for v in pair)
            yield ir.shuffle(first, second, upper_halves)

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        return list(fields)

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        return list(vectors)


@dataclass(frozen=True)
class FloatPairs(_Pairs):
    """float8 as pairs of bfloat16, by the table of all magnitudes."""

    exponent_bits: int
    lanes: int
    bits = 8
    in_use = 10
    at_once = 2

    @property
    def name(self) -> str:
        return Floats(self.exponent_bits, self.lanes).name

    def constants(self) -> list[Value]:
        bits = [_bfloat16_bits(magnitude(x, self.exponent_bits)) for x in range(128)]
        return [ir.constant_elements(bits[i : i + 32], "int16") for i in range(0, 128, 32)]

    def _looked_up(self, halves: Value, byte: int, tables: Sequence[Value]) -> Value:
        """Bits of the number that byte 0 or 1 of each half of a word stands for."""
        places = ir.shift_right(halves, 8 * byte)
        small, large = (
            ir.call_intrinsic("llvm.x86.avx512.vpermi2var.hi.512", places.type, [some[0], places, some[1]])
            for some in (tables[:2], tables[2:])
        )
        found = ir.select(ir.nonzero(ir.and_constant(halves, 0x40 << 8 * byte)), large, small)
        return ir.or_(found, ir.and_constant(ir.shift_left(halves, 8 - 8 * byte), -0x8000))

    def fields(self, source: Ptr | Value, which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        halves = ir.bitcast(_register(source, self.lanes), 2 * self.lanes, "int16")
        for field in which:
            yield self._looked_up(halves, field, constants)

    def of_rows(self, rows: Sequence[Ptr | Value], which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        """As of ``NibblePairs``."""
        turns = _Turns(rows, self.lanes)
        for field in which:
            half, byte = divmod(field, 2)
            yield self._looked_up(turns.of(half), byte, constants)

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        return _riffle(_riffle(fields[0:1], fields[1:2]), _riffle(fields[2:3], fields[3:4]), 8)

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        return [v for half in _unriffle(vectors) for v in half]


class _Turns:
    """Halves of words of two rows of weights in turn: those of the lower or of the upper half of each 16 bytes."""

    def __init__(self, rows: Sequence[Ptr | Value], lanes: int):
        self._first, self._second = (ir.bitcast(_register(r, lanes), 2 * lanes, "int16") for r in rows)
        self._lanes = lanes
        self._made: dict[int, Value] = {}

    def of(self, half: int) -> Value:
        if half not in self._made:
            places = [8 * part + 4 * half + i for part in range(self._lanes // 4) for i in range(4)]
            order = [x for i in places for x in (i, 2 * self._lanes + i)]
            self._made[half] = ir.shuffle(self._first, self._second, order)
        return self._made[half]


@dataclass(frozen=True)
class NibblePairs(_Pairs):
    """int4 or uint4 as pairs of bfloat16, by a table of the 16 numbers in a register."""

    lanes: int
    signed: bool
    bits = 4
    holds_groups = True
    in_use = 6
    at_once = 4

    @property
    def name(self) -> str:
        return "i4" if self.signed else "u4"

    def constants(self) -> list[Value]:
        numbers = [(x ^ 8) - 8 if self.signed else x for x in range(16)] * 2
        return [ir.constant_elements([_bfloat16_bits(x) for x in numbers], "int16")]

    def looked_up(self, words: Value, table: Value) -> Value:
        """Bits of the numbers that the lowest bits of each half of a word stand for; others do not matter."""
        return ir.call_intrinsic("llvm.x86.avx512.permvar.hi.512", table.type, [table, words])

    def fields(self, source: Ptr | Value, which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        halves = ir.bitcast(_register(source, self.lanes), 2 * self.lanes, "int16")
        for field in which:
            yield self.looked_up(ir.shift_right(halves, 4 * field), constants[0])

    def of_rows(self, rows: Sequence[Ptr | Value], which: Sequence[int], constants: Sequence[Value]) -> Iterator[Value]:
        """In turn of the first and of the second row: first of the lower half of each 16 bytes, then of the upper."""
        turns = _Turns(rows, self.lanes)
        for field in which:
            half, nibble = divmod(field, 4)
            yield self.looked_up(ir.shift_right(turns.of(half), 4 * nibble), constants[0])

    def natural(self, fields: Sequence[Value]) -> list[Value]:
        lower, upper = (_riffle(_riffle(f[0::4], f[2::4]), _riffle(f[1::4], f[3::4])) for f in (fields[:4], fields[4:]))
        return [v for pair in zip(lower, upper, strict=True) for v in pair]

    def permuted(self, vectors: Sequence[Value]) -> list[Value]:
        """Of x along K, in the order of ``fields``."""
        evens, odds = (_unriffle(v) for v in _unriffle(vectors))
        return [*evens[0], *odds[0], *evens[1], *odds[1]]
