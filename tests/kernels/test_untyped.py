"""The C functions that XLA calls without its typed FFI, without jax_nano's Python layer and mostly without XLA.

They see nothing of a call but addresses and the description in the program, so a description must be refused unless it
is exactly what `_runtime.untyped_call` writes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from itertools import product

import guarded
import jax
import ml_dtypes
import numpy as np
import pytest
import reference
from contraction import Contraction

from jax_nano import _runtime
from jax_nano._core import custom_calls

if not _runtime.supports("float32", "float32", "float32"):
    pytest.skip("no float32 kernel runs on this CPU", allow_module_level=True)

ABI = b"abi=%d" % _runtime.ABI_VERSION
ONE = 0x3F800000  # the bits of 1.0
MATMUL = Contraction("mk,kn->mn", m=3, n=5, k=7)
A, B = np.arange(21, dtype=np.float32).reshape(3, 7), np.ones((7, 5), np.float32)


class Status(ctypes.Structure):
    """XLA's status as the functions see it: a std::optional<std::string>."""

    _fields_ = (
        ("text", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("rest", ctypes.c_char * 16),
        ("is_set", ctypes.c_bool),
    )

    @property
    def message(self) -> str | None:
        return ctypes.string_at(self.text, self.size).decode(errors="replace") if self.is_set else None


def functions() -> dict:
    """The functions by the names of their calls."""
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    capsules = _runtime.untyped_registrations().items()
    return {name: kind(address(capsule, b"xla._CUSTOM_CALL_TARGET")) for name, capsule in capsules}


FUNCTIONS = functions()


def describe(c: Contraction, dtype: str = "float32", out: str | None = None, **epilogue: object) -> bytes:
    description = _runtime.untyped_call(*c.shapes, *c.labels, dtype, dtype, out or dtype, **epilogue)
    assert description is not None
    return description.encode()


def run(opaque: bytes, *operands: np.ndarray, out: np.ndarray, name: str = "jax_nano_dot_general") -> str | None:
    """Calls the function on operands as XLA would; the message of the failure, if it is one."""
    addresses = (ctypes.c_void_p * max(4, len(operands)))(*(x.ctypes.data for x in operands))
    status = Status()
    memory = ctypes.create_string_buffer(opaque, len(opaque) + 1)  # ends in a zero, as XLA's string does
    FUNCTIONS[name](
        out.ctypes.data, ctypes.addressof(addresses), ctypes.addressof(memory), len(opaque), ctypes.byref(status)
    )
    return status.message


def refused(opaque: bytes, name: str = "jax_nano_dot_general") -> str:
    """The message with which a description is refused; nothing may have been read or written."""
    status = Status()
    memory = ctypes.create_string_buffer(opaque, len(opaque) + 1)
    FUNCTIONS[name](None, (ctypes.c_void_p * 4)(), ctypes.addressof(memory), len(opaque), ctypes.byref(status))
    assert status.message is not None
    return status.message


def check(text: bytes) -> bytes:
    """The description with the sum that belongs to it, as somebody would write who means it."""
    text = text.rpartition(b" check=")[0] or text
    total = 0xCBF29CE484222325
    for byte in text:
        total = (total ^ byte) * 0x100000001B3 % 2**64
    return text + b" check=%016x" % total


@pytest.mark.parametrize(
    "c",
    [
        MATMUL,
        Contraction("mk,kn->nm", m=30, n=20, k=50),
        Contraction("bqhd,bkhd->bhqk", b=2, q=5, h=3, d=8, k=7),
        Contraction("mxky,xkyn->mn", m=5, n=9, k=3, x=2, y=4),
        Contraction("mk,kn->mn", m=0, n=5, k=7),
        Contraction("mk,kn->mn", m=3, n=5, k=0),
        Contraction("k,k->", k=100),
        Contraction("xmk,xkn->xmn", x=500, m=4, n=4, k=4),
        Contraction("mk,kn->mn", m=1, n=9, k=8192),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int8"])
def test_contractions(c, dtype, rng):
    """Bit for bit what the runtime computes otherwise, next to pages that may not be touched."""
    lhs, rhs = (
        rng.integers(-9, 9, shape).astype(dtype)
        if dtype == "int8"
        else reference.random(rng, shape).astype(getattr(ml_dtypes, dtype, dtype))
        for shape in c.shapes[:2]
    )
    opaque = describe(c, lhs.dtype.name)
    with guarded.Slots(3, max(x.nbytes for x in (lhs, rhs, np.empty(c.shapes[2], lhs.dtype))) or 1) as slots:
        for at in ("end", "begin"):
            arrays = [slots.array(i, shape, lhs.dtype, at=at) for i, shape in enumerate(c.shapes)]
            arrays[0][...], arrays[1][...] = lhs, rhs
            for _ in range(2):  # the second time it is known
                arrays[2][...] = np.array(99).astype(lhs.dtype)
                assert run(opaque, *arrays[:2], out=arrays[2]) is None
                assert arrays[2].tobytes() == c.dot(lhs, rhs).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True), (True, True)])
def test_epilogues(dtype, bias, residual, rng):
    x, w = (reference.random(rng, shape).astype(getattr(ml_dtypes, dtype, dtype)) for shape in MATMUL.shapes[:2])
    more = [
        np.asarray(reference.random(rng, shape), x.dtype)
        for shape, given in (((5,), bias), ((3, 5), residual))
        if given
    ]
    scale = int(np.float32(0.5).view(np.uint32))
    opaque = describe(MATMUL, dtype, activation="relu", scale=scale, bias=bias, residual=residual)
    out = np.empty((3, 5), x.dtype)
    assert run(opaque, x, w, *more, out=out, name="jax_nano_linear") is None
    want = x.astype(float) @ w.astype(float) / 2
    want = np.maximum(want + (more[0].astype(float) if bias else 0), 0) + (more[-1].astype(float) if residual else 0)
    np.testing.assert_allclose(out.astype(float), want, rtol=2e-2 if dtype == "bfloat16" else 1e-5, atol=1e-2)


def test_every_changed_byte_is_noticed():
    for opaque, name in (
        (describe(MATMUL), "jax_nano_dot_general"),
        (describe(MATMUL, activation="gelu", scale=ONE, bias=True), "jax_nano_linear"),
    ):
        for position, bit in product(range(len(opaque)), range(8)):
            changed = bytearray(opaque)
            changed[position] ^= 1 << bit
            assert refused(bytes(changed), name).startswith("jax_nano")
        for size in range(len(opaque)):
            assert "damaged" in refused(opaque[:size], name)
            assert "damaged" in refused(opaque[size + 1 :], name)
            assert "damaged" in refused(opaque[:size] + opaque[size + 1 :], name)
        for more in (b" ", b"\0", b"x", opaque):
            assert "damaged" in refused(opaque + more, name)


@pytest.mark.parametrize(
    "foreign",
    [
        b"",
        b"\0" * 64,
        bytes(range(256)),
        b"{abi = 1 : i64}",
        b"jax_nano",
        b"jax_nano abi=",
        b"jax_nano abi=%d " % _runtime.ABI_VERSION,
        b"jax_nano abi=99999999999999999999 ",
        b"x" * 100_000,
        describe(MATMUL, activation="none", scale=ONE),
    ],
    ids=range(10),
)
def test_what_others_wrote_is_refused(foreign):
    assert "the description of this call is damaged, or was not written by jax_nano" in refused(foreign)


def test_the_description_of_one_call_is_refused_at_another():
    assert "jax_nano_linear: the description of this call is damaged" in refused(describe(MATMUL), "jax_nano_linear")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (ABI, b"abi=99", f"this program asks for ABI 99, the installed one is {_runtime.ABI_VERSION}"),
        (b"algorithm=default", b"algorithm=magic", "no kernel on this machine for .*, algorithm magic"),
        (b"lhs=float32", b"lhs=complex64", "dtype complex64 is not supported"),
        (b"lhs=float32", b"lhs=", "dtype  is not supported"),
        (b"[7,5]", b"[8,5]", "label 107 has sizes"),
        (b"[7,5]", b"[7]", "2 labels for 1 dimensions"),
        (b"[3,5]", b"[3,6]", "label 110 has sizes 5 and 6"),
        (b"[3,7]", b"[-3,7]", "negative size"),
        (b"{109,107}", b"{109,109}", "label 109 repeated"),
        (b"[7,5]", b"[07,5]", "damaged"),
        (b"[7,5]", b"[7 ,5]", "damaged"),
        (b"[7,5]", b"[7,,5]", "damaged"),
        (b"[7,5]", b"[99999999999999999999,5]", "damaged"),
        (b" out=", b"  out=", "damaged"),
        (b" lhs=", b" lhs=lhs=", "dtype lhs=float32 is not supported"),
    ],
)
def test_wrong_descriptions_that_add_up(old, new, message):
    opaque = describe(MATMUL)
    assert old in opaque
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(refused(check(opaque.replace(old, new, 1))))


@pytest.mark.parametrize("size", [2**31, 2**62])
def test_sizes_of_no_memory(size):
    text = describe(MATMUL).replace(b"[3,7]", b"[%d,7]" % size).replace(b"[3,5]", b"[%d,5]" % size)
    if size == 2**62:
        assert "jax_nano" in refused(check(text))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"activation=none", b"activation=magic", "unknown activation magic"),
        (b"bias=1", b"bias=2", "damaged"),
        (b"bias=1", b"bias=256", "damaged"),
        (b"scale=3f800000", b"scale=3F800000", "damaged"),
        (b"scale=3f800000", b"scale=13f800000", "damaged"),
        (b"{109,110} activation", b"{110,109} activation", "label 109 has sizes 3 and 5"),
    ],
)
def test_wrong_epilogues_that_add_up(old, new, message):
    opaque = describe(MATMUL, activation="none", scale=ONE, bias=True)
    assert old in opaque
    assert message in refused(check(opaque.replace(old, new, 1)), "jax_nano_linear")


def test_an_address_with_another_call():
    """A program is gone, another's description lies where its was."""
    first, second = MATMUL, Contraction("mk,kn->mn", m=3, n=6, k=7)
    memory = ctypes.create_string_buffer(200)
    operands = (ctypes.c_void_p * 2)(A.ctypes.data, np.ones((7, 6), np.float32).ctypes.data)
    wide = np.ones((7, 6), np.float32)
    operands[1] = wide.ctypes.data
    for c in (first, second, first, second):
        opaque, out, status = describe(c), np.zeros(c.shapes[2], np.float32), Status()
        memory.value = opaque
        call = FUNCTIONS["jax_nano_dot_general"]
        call(out.ctypes.data, ctypes.addressof(operands), ctypes.addressof(memory), len(opaque), ctypes.byref(status))
        assert status.message is None
        assert np.array_equal(out, A @ wide[:, : c.sizes["n"]])
    memory.value = b"!" + describe(second)[1:]
    call(out.ctypes.data, ctypes.addressof(operands), ctypes.addressof(memory), len(opaque), ctypes.byref(status))
    assert "damaged" in status.message


def test_more_calls_than_a_thread_keeps(rng):
    """Those that it forgot are read again."""
    x = reference.random(rng, (60, 60))
    for _ in range(2):
        for m, k in product(range(1, 41), repeat=2):
            c = Contraction("mk,kn->mn", m=m, n=2, k=k)
            lhs, rhs, out = x[:m, :k].copy(), x[:k, :2].copy(), np.empty((m, 2), np.float32)
            assert run(describe(c), lhs, rhs, out=out) is None
            np.testing.assert_allclose(out, lhs @ rhs, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*fork", "ignore:.*multi-threaded")
def test_threads_and_a_fork(rng):
    """Threads call at once, and so does a child that was forked meanwhile."""
    cases = []
    for n in range(1, 20):
        c = Contraction("mk,kn->mn", m=n, n=n, k=n)
        lhs, rhs = (reference.random(rng, shape) for shape in c.shapes[:2])
        cases.append((describe(c), lhs, rhs, c.dot(lhs, rhs)))
    stop = threading.Event()
    wrong = []

    def all_right() -> bool:
        for opaque, lhs, rhs, want in cases:
            out = np.empty_like(want)
            if run(opaque, lhs, rhs, out=out) is not None or out.tobytes() != want.tobytes():
                return False
        return True

    def work() -> None:
        while not stop.is_set():
            if not all_right():
                wrong.append(True)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    statuses = []
    for _ in range(5):
        if (child := os.fork()) == 0:
            os._exit(0 if all_right() else 1)
        statuses.append(os.waitpid(child, 0)[1])
    stop.set()
    for worker in workers:
        worker.join()
    assert statuses == [0] * 5
    assert not wrong


@pytest.mark.parametrize(
    ("c", "dtypes"),
    [
        (Contraction("mk,kn->mn", m=512, n=512, k=512), ("float32",) * 3),  # for several threads
        (Contraction("mk,kn->mn", m=3, n=5, k=7), ("float32", "float32", "int32")),  # no kernel
        (Contraction("mb,nb->mnb", m=3, n=5, b=7), ("float32",) * 3),  # a result that kernels do not write
    ],
    ids=str,
)
def test_what_must_be_a_typed_call(c, dtypes):
    assert _runtime.untyped_call(*c.shapes, *c.labels, *dtypes) is None


def call(opaque: str, name: str = "jax_nano_dot_general"):
    for target, function in _runtime.untyped_registrations().items():
        jax.ffi.register_ffi_target(target, function, platform="cpu", api_version=0)
    version = custom_calls.STATUS_RETURNING
    out = jax.ShapeDtypeStruct((3, 5), np.float32)
    return jax.ffi.ffi_call(name, out, custom_call_api_version=version, legacy_backend_config=opaque)


@pytest.mark.skipif(not custom_calls.UNTYPED, reason="this jaxlib takes typed calls only")
def test_errors_reach_the_caller_and_leave_the_process_usable():
    opaque = describe(MATMUL).decode()
    for wrong in ("", opaque[:-1], opaque.replace("float32", "float64"), "é" + opaque, opaque + "\0", "x" * 5000):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"jax_nano_dot_general: the description .* is damaged"):
            jax.jit(call(wrong))(A, B)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"asks for ABI 7, the installed one is {_runtime.ABI_VERSION}"
    ):
        jax.jit(call(opaque.replace(ABI.decode(), "abi=7")))(A, B)
    assert np.array_equal(jax.jit(call(opaque))(A, B), A @ B)
    looped = jax.jit(lambda a, b: jax.lax.fori_loop(0, 9, lambda _, y: call(opaque)(a + y[:, :1], b), A @ B))
    want = A @ B
    for _ in range(9):
        want = (A + want[:, :1]) @ B
    np.testing.assert_allclose(looped(A, B), want, rtol=1e-5)
