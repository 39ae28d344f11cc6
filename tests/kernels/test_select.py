"""Detection and target choice, by name, on CPUs that are not this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_nano import _runtime

V3 = ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe"]
V4 = [*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]
AMX = ["amx_tile", "amx_bf16", "amx_int8"]

# (leaf, subleaf): (eax, ebx, ecx, edx), recorded on an AMD EPYC of family 25, model 17 under KVM.
ZEN4 = {
    (0x0, 0): (0x1C, 0x68747541, 0x444D4163, 0x69746E65),
    (0x1, 0): (0xA10F11, 0x1020800, 0xFFFA3203, 0x178BFBFF),
    (0x7, 0): (0x1, 0xF1BF07AB, 0x405FC6, 0x10),
    (0x7, 1): (0x20, 0x0, 0x0, 0x0),
    (0x80000000, 0): (0x80000021, 0x68747541, 0x444D4163, 0x69746E65),
    (0x80000001, 0): (0xA10F11, 0x40000000, 0x4003F3, 0x2FD3FBFF),
}
OSXSAVE = 1 << 27
XCR0_AVX, XCR0_AVX512, XCR0_AMX = 0x7, 0xE7, 0x600E7


def with_amx(palettes: int) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """The same CPU as if it had tiles, described by leaf 0x1D."""
    eax, ebx, ecx, edx = ZEN4[0x7, 0]
    amx = 1 << 22 | 1 << 24 | 1 << 25
    return {
        **ZEN4,
        (0x7, 0): (eax, ebx, ecx, edx | amx),
        (0x0, 0): (0x20, *ZEN4[0x0, 0][1:]),  # the highest leaf
        (0x1D, 0): (palettes, 0, 0, 0),
    }


def usable(features: list[str]) -> set[str]:
    return {t["name"] for t in _runtime.targets(features) if t["supported"]}


class TestDetection:
    def test_zen4(self):
        found = _runtime.testing.decode_features(ZEN4, XCR0_AVX512, False)
        assert found == [*V4, "avx512_bf16", "avx512_vnni"]

    def test_xeons_have_a_slow_bf16_dot(self):
        eax, _, ecx, edx = ZEN4[0x0, 0]
        intel = {**ZEN4, (0x0, 0): (eax, 0x756E6547, ecx, edx)}
        found = _runtime.testing.decode_features(intel, XCR0_AVX512, False)
        assert found == [*V4, "avx512_bf16", "avx512_vnni", "microcoded_vdpbf16ps"]
        assert _runtime.testing.select_target(found) == "avx512_vnni"
        status = {t["name"]: t for t in _runtime.targets(found)}["avx512_bf16"]
        assert status["supported"]
        assert status["why"] == "slower than a lower target on this CPU: microcoded_vdpbf16ps"

    def test_operating_system_without_avx512(self):
        assert _runtime.testing.decode_features(ZEN4, XCR0_AVX, False) == V3

    def test_operating_system_without_avx(self):
        assert _runtime.testing.decode_features(ZEN4, 0x3, False) == []

    def test_no_xgetbv(self):
        eax, ebx, ecx, edx = ZEN4[0x1, 0]
        without = {**ZEN4, (0x1, 0): (eax, ebx, ecx & ~OSXSAVE, edx)}
        assert _runtime.testing.decode_features(without, XCR0_AVX512, False) == []

    def test_old_cpu(self):
        assert _runtime.testing.decode_features({(0, 0): (1, 0, 0, 0), (1, 0): (0, 0, 0, 0)}, 0, False) == []

    def test_amx(self):
        found = _runtime.testing.decode_features(with_amx(palettes=1), XCR0_AMX, True)
        assert set(AMX) < set(found)
        assert "amx_permission" in found

    def test_amx_denied_by_the_operating_system(self):
        found = _runtime.testing.decode_features(with_amx(palettes=1), XCR0_AMX, False)
        assert set(AMX) < set(found)
        assert "amx_permission" not in found

    def test_amx_without_palettes(self):
        """CPUID and XCR0 offer tiles, but the first tile instruction would fault (seen under a hypervisor)."""
        assert not set(AMX) & set(_runtime.testing.decode_features(with_amx(palettes=0), XCR0_AMX, True))

    def test_amx_state_not_saved(self):
        assert not set(AMX) & set(_runtime.testing.decode_features(with_amx(palettes=1), XCR0_AVX512, True))

    def test_this_machine_agrees_with_the_kernel(self):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = set(next(line for line in lines if line.startswith("flags")).split())
        names = {"lzcnt": "abm", "amx_permission": "amx_tile"}
        for feature in _runtime.features():
            assert names.get(feature, feature) in flags
        assert ("avx512f" in flags) == ("avx512f" in _runtime.features())

    def test_caches(self):
        caches = _runtime.caches()
        assert 16 << 10 <= caches["l1d"] <= caches["l2"] <= 1 << 30


class TestTargets:
    @pytest.mark.parametrize(
        ("features", "names"),
        [
            ([], set()),
            (V3[:-1], set()),
            (V3, {"x86-64-v3"}),
            ([*V3, "avx_vnni"], {"x86-64-v3", "avx_vnni"}),
            ([*V3, "avx512f"], {"x86-64-v3"}),
            (V4, {"x86-64-v3", "x86-64-v4"}),
            ([*V4, "avx512_vnni"], {"x86-64-v3", "x86-64-v4", "avx512_vnni"}),
            ([*V4, "avx512_bf16"], {"x86-64-v3", "x86-64-v4", "avx512_bf16"}),
            ([*V4, *AMX], {"x86-64-v3", "x86-64-v4"}),
            ([*V4, *AMX, "amx_permission"], {"x86-64-v3", "x86-64-v4", "amx"}),
        ],
    )
    def test_supported(self, features, names):
        assert usable(features) == names

    def test_reasons(self):
        why = {t["name"]: t["why"] for t in _runtime.targets(V3)}
        assert why["x86-64-v3"] == ""
        assert why["x86-64-v4"] == "this CPU lacks avx512f, avx512bw, avx512cd, avx512dq, avx512vl"
        why = {t["name"]: t["why"] for t in _runtime.targets([*V4, *AMX])}
        assert why["amx"] == "the operating system does not permit AMX"
        assert {t["name"]: t["why"] for t in _runtime.targets(V4)}["amx"] == f"this CPU lacks {', '.join(AMX)}"

    def test_every_kernel_has_a_known_target(self):
        names = [t["name"] for t in _runtime.targets()]
        assert {k["target"] for k in _runtime.kernels()} == {t["name"] for t in _runtime.targets() if t["compiled"]}
        assert len(set(names)) == len(names)

    def test_unknown_feature(self):
        with pytest.raises(ValueError, match="unknown CPU feature: sse9"):
            _runtime.targets(["sse9"])


class TestSelection:
    @pytest.mark.parametrize(
        ("features", "target"), [([], ""), (V3, "x86-64-v3"), (V4, "x86-64-v4"), ([*V4, *AMX], "x86-64-v4")]
    )
    def test_the_best_is_chosen(self, features, target):
        assert _runtime.testing.select_target(features) == target

    def test_a_lower_one_can_be_forced(self):
        assert _runtime.testing.select_target(V4, "x86-64-v3") == "x86-64-v3"
        assert _runtime.testing.select_target(V4, "x86-64-v4") == "x86-64-v4"

    @pytest.mark.skipif(not usable(_runtime.features()), reason="no target runs here")
    @pytest.mark.parametrize("lhs", ["int8", "uint8"])
    def test_integers_of_the_other_sign_have_the_same_bits(self, lhs):
        """So one kernel serves both; results that no kernel stores have none."""

        def kernel(out):
            return _runtime.plan([4, 5], [5, 6], [0, 1], [1, 2], [0, 2], lhs, "uint8", out, 1)["kernel"]

        assert kernel("uint32") == kernel("int32")
        narrow, other = ("uint8", "int8") if lhs == "uint8" else ("int16", "uint16")
        assert kernel(narrow) == kernel(other)
        with pytest.raises(ValueError, match="no kernel"):
            kernel("float32")

    def test_unsupported(self):
        with pytest.raises(ValueError, match=r"^JAX_NANO_TARGET=x86-64-v4: this CPU lacks avx512f, "):
            _runtime.testing.select_target(V3, "x86-64-v4")

    def test_unknown(self):
        with pytest.raises(
            ValueError, match=r"^JAX_NANO_TARGET=avx99: unknown target; known: .*x86-64-v4, .*x86-64-v3"
        ):
            _runtime.testing.select_target(V4, "avx99")


class TestEnvironment:
    """JAX_NANO_TARGET is read at the first use, so each case needs a process."""

    @staticmethod
    def python(code: str, target: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"from jax_nano import _runtime as r\n{code}"],
            env={**os.environ, "JAX_NANO_TARGET": target},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.strip()

    @pytest.mark.skipif(not usable(_runtime.features()), reason="no target runs here")
    def test_forced(self):
        assert self.python("print(r.selected_target())", "x86-64-v3") == "x86-64-v3"
        assert self.python("print(r.supports('float32', 'float32', 'float32'))", "x86-64-v3") == "True"
        plan = "r.plan([4, 5], [5, 6], [0, 1], [1, 2], [0, 2], *['float32'] * 3, 1)['target']"
        assert self.python(f"print({plan})", "x86-64-v3") == "x86-64-v3"

    def test_import_survives_an_unknown_name(self):
        code = """
for use in (r.selected_target, lambda: r.supports("float32", "float32", "float32")):
    try:
        use()
    except ValueError as e:
        print(e)
"""
        first, second = self.python(code, "nonsense").splitlines()
        assert first == second
        assert first.startswith("JAX_NANO_TARGET=nonsense: unknown target; known: ")

    def test_empty_is_unset(self):
        assert self.python("print(r.selected_target())", "") == _runtime.testing.select_target(_runtime.features())


def test_required_targets_are_here():
    """JAX_NANO_REQUIRE_TARGET must name targets that exist, are compiled and run here."""
    required = {name for name in os.environ.get("JAX_NANO_REQUIRE_TARGET", "").split(",") if name}
    why = {t["name"]: t["why"] for t in _runtime.targets()}
    assert {name: why.get(name, "unknown target") for name in required} == dict.fromkeys(required, "")


def test_supports():
    assert not _runtime.supports("int64", "int64", "int64")
    if _runtime.selected_target():
        assert _runtime.supports("float32", "float32", "float32")
