"""scripts/ecosystem: which tests it says that acceleration breaks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "ecosystem"

# Tests of another library, as far as the script can tell; what they do depends on the setting alone.
TESTS = """
import os, warnings
accelerated = os.environ["JAX_NANO_ACCELERATE"] == "1"
gate = os.environ.get("JAX_NANO_GATE")

def test_same(): pass
def test_fails(): assert False
class TestLayers:
    def test_broken(self): assert not accelerated
    def test_broken_without_gate(self): assert gate != "off"
def test_ends_process():
    if accelerated: os._exit(3)
"""
COMPLAINT = """
def test_warns(): warnings.warn("jax_nano.accelerate failed, and so on", RuntimeWarning)
"""
PRODUCTS = """
def test_products():
    import sys
    print("jax_nano: ab,bc->ac  float32[2,2] x float32[2,2] -> float32[2,2]: left to XLA: too small", file=sys.stderr)
"""


def ecosystem(folder: Path, tests: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "tests").mkdir()
    (folder / "tests" / "test_it.py").write_text(tests)
    # The settings of the run that this test is a part of are not meant for the other library's tests. Of pytest's
    # plugins xdist alone is loaded: others take seconds to import.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "JAX_NANO"))}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    more = arguments if "--" in arguments else (*arguments, "--")
    command = [sys.executable, str(SCRIPT), str(folder), "tests", *more, "-p", "xdist"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_names_what_only_acceleration_breaks(tmp_path: Path) -> None:
    done = ecosystem(tmp_path, TESTS + PRODUCTS)
    assert done.returncode == 1, done.stderr
    gate_off, accelerated = done.stdout.split("accelerated: ")
    for part in (gate_off, accelerated):
        assert "tests/test_it.py::TestLayers::test_broken\n" in part
        assert "tests/test_it.py::test_ends_process\n" in part
        assert "1 products compiled, 0 of them on kernels" in part
        assert "test_same" not in part
        assert "test_fails" not in part
    assert "test_broken_without_gate" in gate_off
    assert "test_broken_without_gate" not in accelerated
    assert "plain: 1 failed, 3 passed" in accelerated


def test_nothing_broken(tmp_path: Path) -> None:
    done = ecosystem(tmp_path, TESTS, "--setting", "accelerated", "--", "-k", "same or fails")
    assert done.returncode == 0, done.stdout
    assert "accelerated: 1 failed, 1 passed; 0 pass without acceleration, 1 do not" in done.stdout


def test_reports_complaints(tmp_path: Path) -> None:
    done = ecosystem(tmp_path, TESTS + COMPLAINT, "--setting", "accelerated", "--", "-k", "same or warns")
    assert done.returncode == 1, done.stdout
    assert "jax_nano.accelerate failed, and so on" in done.stdout
