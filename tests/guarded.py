"""Memory for tests of addresses: arrays beside pages that may not be touched, and arrays with gigabyte strides.

A generated kernel is invisible to sanitizers. An operand that ends, or begins, exactly at a page without access
rights turns a read or write of one byte too many into the death of the test run.
"""

from __future__ import annotations

import ctypes
import mmap
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0
_MAP_NORESERVE = 0x4000


class Region:
    """``nbytes`` of zeroed memory with a forbidden page on either side; takes no memory until it is touched."""

    def __init__(self, nbytes: int) -> None:
        self._size = (nbytes + _PAGE - 1) // _PAGE * _PAGE + 2 * _PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        base = _libc.mmap(None, self._size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if base is None or base == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        self._base: int = base
        self.begin = base + _PAGE
        self.end = base + self._size - _PAGE
        for page in (base, self.end):
            if _libc.mprotect(page, _PAGE, _PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # else the report of the failure may still print arrays that lie here
            _libc.munmap(self._base, self._size)

    def array(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32, *, at: str = "end") -> NDArray[np.generic]:
        """A dense array that ends at the upper guard page (``at="end"``) or begins at the lower one (``"begin"``)."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if nbytes > self.end - self.begin:
            raise ValueError(f"{nbytes} bytes in a region of {self.end - self.begin}")
        address = self.end - nbytes if at == "end" else self.begin
        return np.ndarray(shape, dtype, (ctypes.c_byte * nbytes).from_address(address))

    def strided(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray:
        """An array at the region's begin with these strides, in elements."""
        dtype = np.dtype(dtype)
        memory = (ctypes.c_byte * (self.end - self.begin)).from_address(self.begin)
        return np.ndarray(shape, dtype, memory, strides=[s * dtype.itemsize for s in strides])


class Slots:
    """``count`` areas of at least ``nbytes``, each between pages that may not be touched.

    Attributes:
      begin, end: the addresses of the areas' first bytes and of the first ones behind them.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        size = (nbytes + _PAGE - 1) // _PAGE * _PAGE
        self._region = Region(count * (size + _PAGE))
        self.begin = self._region.begin + np.arange(count, dtype=np.int64) * (size + _PAGE)
        self.end = self.begin + size
        for page in self.end[:-1]:
            if _libc.mprotect(int(page), _PAGE, _PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")

    @property
    def base(self) -> int:
        """The address of the first area."""
        return self._region.begin

    def elements(self, dtype: DTypeLike) -> NDArray[np.generic]:
        """Everything from ``base`` on as one array; touching its forbidden parts is fatal as anywhere else."""
        return self._region.array(((self._region.end - self._region.begin) // np.dtype(dtype).itemsize,), dtype)

    def array(self, slot: int, shape: tuple[int, ...], dtype: DTypeLike, *, at: str = "end") -> NDArray[np.generic]:
        """A dense array that ends (or begins) where an area does."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        address = int(self.end[slot] - nbytes if at == "end" else self.begin[slot])
        return np.ndarray(shape, dtype, (ctypes.c_byte * nbytes).from_address(address))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._region.__exit__(*error)
