"""Packs: the files that hold kernels for given products, which of them are used, and what says so."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import composed
import pytest
from composed import asked

from jax_nano import _runtime
from jax_nano._core import packs
from jax_nano._tools.asked import Epilogue, epilogue_of, epilogue_text, of_file

MINE = packs.signature(_runtime)
NAME = f"{packs.prefix(_runtime)}20260101000000-1"
ABOUT = {"cpu": "a CPU", "measured": "2026-01-01"}
PRODUCT = asked("mk,kn->mn", m=40, n=72, k=56)


@pytest.fixture
def folder(tmp_path):
    """With a pack whose description is in order, and whose library is none."""
    packs.save(tmp_path / "packs" / f"{NAME}.json", b"no library", [{"symbol": "x", "share": 0.5}], ABOUT, MINE)
    return tmp_path / "packs"


@pytest.fixture
def file(folder):
    return folder / f"{NAME}.json"


class TestDescriptions:
    def test_what_is_saved_is_read(self, file):
        pack = packs.read(file, MINE)
        assert pack.kernels == ({"symbol": "x", "share": 0.5},)
        assert pack.about == ABOUT
        assert pack.name == NAME
        assert pack.library.read_bytes() == b"no library"
        assert sorted(x.suffix for x in file.parent.iterdir()) == [".json", ".so"]

    @pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
    @pytest.mark.parametrize("of", ["description", "library", "folder", "folder above"])
    def test_others_must_not_be_able_to_write_to_it(self, file, mode, of):
        place = {
            "description": file,
            "library": file.with_suffix(".so"),
            "folder": file.parent,
            "folder above": file.parent.parent,
        }[of]
        before = place.stat().st_mode
        place.chmod(mode | 0o111 if place.is_dir() else mode)
        try:
            with pytest.raises(ValueError, match="other users may write to"):
                packs.load(packs.read(file, MINE), _runtime, _runtime.specialized.Kernels())
        finally:
            place.chmod(before)

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
    @pytest.mark.parametrize("of", ["description", "library", "folder"])
    def test_it_must_not_be_another_users(self, file, of, monkeypatch):
        place = {"description": file, "library": file.with_suffix(".so"), "folder": file.parent}[of]
        os.chown(place, 12345, 12345)
        with pytest.raises(ValueError, match="other users may write to"):
            packs.load(packs.read(file, MINE), _runtime, _runtime.specialized.Kernels())

    def test_where_a_link_leads_counts_too(self, file, tmp_path):
        """The folder of the link is in order, and that of the file is not."""
        open_to_all = tmp_path / "open"
        open_to_all.mkdir()
        file.rename(open_to_all / file.name)
        file.symlink_to(open_to_all / file.name)
        assert packs.read(file, MINE)
        open_to_all.chmod(0o777)
        with pytest.raises(ValueError, match="other users may write to"):
            packs.read(file, MINE)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x.update(version=packs.VERSION + 1), "version"),
            (lambda x: x.update(signature="GenuineIntel-6-1-1-01234567"), "made for GenuineIntel"),
            (lambda x: x.update(signature=f"{MINE}0"), "made for"),
            (lambda x: x.update(sha256="0"), "damaged"),
            (lambda x: x["kernels"].append({}), "damaged"),
            (lambda x: x["kernels"][0].update(share=0.25), "damaged"),
            (lambda x: x.pop("kernels"), "damaged"),
            (lambda x: x.pop("check"), "lacks"),
            (lambda x: x.pop("version"), "lacks"),
        ],
    )
    def test_damage_is_told(self, file, change, message):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            packs.read(file, MINE)

    @pytest.mark.parametrize("change", [{"kernels": 3}, {"kernels": [3]}, {"cpu": None}, {"kernels": None}])
    def test_one_that_lacks_something_and_knows_it(self, file, change):
        """With a check that fits: nobody's mistake, but no crash either."""
        content = json.loads(file.read_text())
        del content["check"]
        content |= {x: y for x, y in change.items() if y is not None}
        for x in (x for x, y in change.items() if y is None):
            del content[x]
        file.write_text(json.dumps(content | {"check": packs._check(content)}))
        with pytest.raises(ValueError, match="lacks"):
            packs.read(file, MINE)

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"3", b"\0", b"\xff", b"[" * 100_000])
    def test_what_is_no_description_is_told(self, file, text):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=r".+"):
            packs.read(file, MINE)

    def test_a_truncated_one(self, file):
        whole = file.read_bytes()
        for size in range(0, len(whole) - 2, 29):
            file.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r".+"):
                packs.read(file, MINE)

    def test_a_folder_in_its_place(self, file):
        file.unlink()
        file.mkdir()
        with pytest.raises(OSError, match=r".+"):
            packs.read(file, MINE)

    def test_some_kernels_are_taken_out(self, file):
        packs.save(file, b"no library", [{"symbol": "x"}, {"symbol": "y"}], ABOUT, MINE)
        packs.drop(packs.read(file, MINE), {"x"}, MINE)
        assert packs.read(file, MINE).kernels == ({"symbol": "y"},)
        packs.drop(packs.read(file, MINE), {"y"}, MINE)
        assert list(file.parent.iterdir()) == []


class TestLibraries:
    def test_another_one_than_the_descriptions(self, file):
        file.with_suffix(".so").write_bytes(b"another")
        with pytest.raises(ValueError, match="damaged"):
            packs.load(packs.read(file, MINE), _runtime, _runtime.specialized.Kernels())

    def test_none(self, file):
        file.with_suffix(".so").unlink()
        with pytest.raises(OSError, match=r".+"):
            packs.load(packs.read(file, MINE), _runtime, _runtime.specialized.Kernels())

    def test_one_that_is_no_library(self, file):
        with pytest.raises(OSError, match=r".+"):
            packs.load(packs.read(file, MINE), _runtime, _runtime.specialized.Kernels())

    @pytest.mark.parametrize("kernel", [{}, {"symbol": 3}, {"symbol": "none_such"}, {"symbol": "PyInit__runtime"}])
    def test_one_without_the_kernels(self, file, kernel):
        """A real one, the extension itself: its only symbol is no kernel of any product."""
        library = Path(_runtime.__file__).read_bytes()
        packs.save(file, library, [kernel], ABOUT, MINE)
        table = _runtime.specialized.Kernels()
        with pytest.raises(ValueError, match=r"damaged|needs"):
            packs.load(packs.read(file, MINE), _runtime, table)
        assert len(table) == 0


class TestUse:
    @pytest.fixture(autouse=True)
    def nothing_used(self, monkeypatch):
        monkeypatch.setattr(packs, "_used", packs._Used())
        yield
        _runtime.specialized.use(None)

    def test_in_the_cache_folder(self, monkeypatch, tmp_path):
        monkeypatch.delenv(packs.ENVIRONMENT, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert packs.folder() == tmp_path / "jax_nano" / "packs"
        packs.use(_runtime)  # no such folder, and no warning

    def test_off(self, monkeypatch, folder):
        monkeypatch.setenv(packs.ENVIRONMENT, "off")
        assert packs.folder() is None
        packs.use(_runtime)

    def test_a_missing_folder_is_told_only_if_it_was_named(self, monkeypatch, tmp_path):
        monkeypatch.setenv(packs.ENVIRONMENT, str(tmp_path / "none"))
        with pytest.warns(UserWarning, match="there is no such folder"):
            packs.use(_runtime)

    def test_one_warning_for_each_that_is_not_usable(self, monkeypatch, folder, file):
        monkeypatch.setenv(packs.ENVIRONMENT, str(folder))
        (folder / f"{NAME}2.json").write_text("{")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            packs.use(_runtime)
        told = [str(x.message) for x in caught]
        assert [str(folder / f"{NAME}{x}.json") in y for x, y in zip(("", "2"), told, strict=True)] == [True, True]
        assert all("specialize --remove" in x for x in told)
        assert packs.used() == ()

    def test_those_of_other_machines_are_passed_over(self, monkeypatch, folder, file):
        """As in a home folder that several machines share."""
        file.rename(folder / "pack-GenuineIntel-6-1-1-01234567-20260101000000-1.json")
        monkeypatch.setenv(packs.ENVIRONMENT, str(folder))
        packs.use(_runtime)
        assert packs.used() == ()


def test_the_signature_names_the_cpu_and_the_generator(monkeypatch):
    assert MINE.startswith(_runtime.cpu_signature())

    class Other:
        cpu_signature = staticmethod(_runtime.cpu_signature)

        @staticmethod
        def generator():
            return "0123456789abcdef"

    assert packs.signature(Other) != MINE


# --- whole packs --------------------------------------------------------------------------------

WHY_NOT = composed.why_not()
needs_generator = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

PROGRAM = """
import hashlib, sys, warnings
import numpy as np
warnings.simplefilter("always")
import jax
import jax_nano
m, n, k = 40, 72, 56
rng = np.random.default_rng(0)
a, b, c = (rng.standard_normal(x, np.float32) for x in ((m, k), (k, n), (n,)))
out = [jax_nano.matmul(a, b), jax.jit(jax_nano.matmul)(a, b), jax_nano.linear(a, b, c, activation="relu")]
print(hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in out)).hexdigest())
print(jax_nano.report())
print(jax_nano.info())
"""


def run(*arguments, **environment):
    env = {**os.environ, "JAX_NANO_PACKS": "", "JAX_NANO_UNTYPED": "", **environment}
    done = subprocess.run([sys.executable, "-P", *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Two packs, as `specialize` would keep them if these kernels were faster: of a product, and with an epilogue."""
    where = tmp_path_factory.mktemp("packs")
    with composed.Composer() as composer:
        products = (PRODUCT, PRODUCT._replace(epilogue=Epilogue("relu", bias=True)))
        for i, product in enumerate(products):
            (found,) = list(composed.made(composer, product, most=1))[:1]
            library = composer.link([found.object], f"pack{i}.so").read_bytes()
            entry = {**found.entry, "what": str(product), "share": 0.9}
            packs.save(where / f"{packs.prefix(_runtime)}{i}.json", library, [entry], ABOUT, MINE)
    return where


@needs_generator
@pytest.mark.parametrize("untyped", ["", "off"])
def test_programs_use_what_is_kept(kept, untyped):
    """Both kinds of call, and the results are the same."""
    plain = run("-c", PROGRAM, JAX_NANO_PACKS="off", JAX_NANO_UNTYPED=untyped)
    other = run("-c", PROGRAM, JAX_NANO_PACKS=str(kept), JAX_NANO_UNTYPED=untyped)
    assert plain.stdout.splitlines()[0] == other.stdout.splitlines()[0]
    assert other.stderr == ""
    for i in range(2):
        name = f"{packs.prefix(_runtime)}{i}"
        assert f"composed for it in {name}" in other.stdout
        assert f"1 kernel for given products, in {kept / name}.json" in other.stdout
    assert packs.prefix(_runtime) not in plain.stdout


@needs_generator
def test_explain_says_so(kept):
    told = run("-m", "jax_nano", "explain", "40x72x56", "--threads", "1", JAX_NANO_PACKS=str(kept)).stdout
    assert f"composed for this product, in {packs.prefix(_runtime)}0" in told
    told = run("-m", "jax_nano", "explain", "41x72x56", "--threads", "1", JAX_NANO_PACKS=str(kept)).stdout
    assert "composed for this product" not in told


@needs_generator
def test_a_damaged_one_is_refused_and_the_others_are_used(kept, tmp_path):
    expected = run("-c", PROGRAM, JAX_NANO_PACKS="off").stdout.splitlines()[0]
    for x in kept.iterdir():
        (tmp_path / x.name).write_bytes(x.read_bytes())
        (tmp_path / x.name).chmod(0o644)
    library = tmp_path / f"{packs.prefix(_runtime)}0.so"
    library.write_bytes(library.read_bytes()[:5000])
    done = run("-c", PROGRAM, JAX_NANO_PACKS=str(tmp_path))
    assert done.stderr.count("does not use the kernels in") == 1
    assert f"composed for it in {packs.prefix(_runtime)}1" in done.stdout
    assert f"composed for it in {packs.prefix(_runtime)}0" not in done.stdout
    assert done.stdout.splitlines()[0] == expected


@needs_generator
def test_the_symbol_is_that_of_the_product(kept):
    """A kernel's name is made of all its constants: another product's is not found in its place."""
    (x,) = packs.read(kept / f"{packs.prefix(_runtime)}0.json", MINE).kernels
    (y,) = packs.read(kept / f"{packs.prefix(_runtime)}1.json", MINE).kernels
    assert x["symbol"] != y["symbol"]
    assert x["kernel"] == y["kernel"]


# --- the command --------------------------------------------------------------------------------


class TestProducts:
    def test_of_a_file(self, tmp_path):
        file = tmp_path / "shapes"
        file.write_text('# layers\n8x9x10\n4x5 5x6 --dtype bf16 --batch 3  # two\n\n7x8x9 --epilogue "bias, relu"\n')
        first, second, third = of_file(file)
        assert first.shapes == ((8, 10), (10, 9))
        assert second.shapes == ((3, 4, 5), (3, 5, 6))
        assert second.dtypes == ("bfloat16",) * 3
        assert third.epilogue == Epilogue("relu", bias=True)

    @pytest.mark.parametrize("line", ["8x9", "x", "8x8x8 --dtype f31", "8x8x8 --what", "8x8x8 --epilogue swish9"])
    def test_a_wrong_line_is_named(self, tmp_path, line):
        file = tmp_path / "shapes"
        file.write_text(f"8x8x8\n{line}\n")
        with pytest.raises(ValueError, match="line 2"):
            of_file(file)

    @pytest.mark.parametrize("x", [Epilogue(bias=True), Epilogue("gelu_erf", 0.25, residual=True), Epilogue("relu")])
    def test_epilogues_as_text(self, x):
        assert epilogue_of(epilogue_text(x)) == x
        assert epilogue_of("") is None


def specialize(*arguments, **environment):
    env = {**os.environ, "JAX_NANO_PACKS": "", **environment}
    command = [sys.executable, "-P", "-m", "jax_nano", "specialize", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)


SCRIPT = """
import sys
import jax
import jax.numpy as jnp
assert sys.argv[1:] == ["--rows", "40"], sys.argv
print(jax.jit(lambda x, w: x @ w)(jnp.ones((40, 96)), jnp.ones((96, 80))).shape)
"""


@needs_generator
class TestCommand:
    def test_measures_and_keeps_what_is_faster(self, tmp_path):
        done = specialize("8x8x8", "--budget", "3", "--out", str(tmp_path / "packs"))
        assert done.returncode == 0, done.stderr
        assert "float32[8,8] x float32[8,8]" in done.stdout
        assert "specializing" in done.stderr
        files = packs.found(tmp_path / "packs", _runtime)
        assert len(files) == ("kept in" in done.stdout)
        listed = specialize("--list", "--out", str(tmp_path / "packs")).stdout
        assert ("float32[8,8]" in listed) == bool(files)
        removed = specialize("--remove", "--out", str(tmp_path / "packs")).stdout
        assert removed.count("removed") == len(files)
        assert packs.found(tmp_path / "packs", _runtime) == []

    def test_products_of_a_program(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        arguments = ("--budget", "2", "--out", str(tmp_path / "packs"), str(script), "--rows", "40")
        done = specialize(*arguments, JAX_NANO_GATE="off")
        assert done.returncode == 0, done.stderr
        assert "(40, 80)" in done.stdout
        assert "ab,bc->ac  float32[40,96] x float32[96,80] -> float32[40,80]:" in done.stdout

    def test_what_is_measured_again_gives_way(self, kept, tmp_path):
        from jax_nano._tools import specialize as tool

        for x in kept.iterdir():
            (tmp_path / x.name).write_bytes(x.read_bytes())
            (tmp_path / x.name).chmod(0o644)
        plan = _runtime.plan(*PRODUCT.arguments, 1, specialized=False)
        (first, second) = packs.found(tmp_path, _runtime)
        (entry,) = packs.read(first, MINE).kernels
        recipe = {"kernel": entry["kernel"], "mr": 1, "nr": 16, "small": False}
        recipe["fields"] = {**{x: entry[x] for x in tool.recipes.SCHEDULE}, "m": 40, "epilogue": 0}
        candidate = tool.Candidate(recipe, {"symbol": "x"}, None, [])
        tool._keep(_runtime, tmp_path, [tool.Found(PRODUCT, plan, candidate, 1.0, kept=False)], b"")
        assert packs.found(tmp_path, _runtime) == [second]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "no product"),
            (("8x8x8", "--budget", "0"), "expected more than 0"),
            (("8x8x8", "--budget", "nan"), "expected more than 0"),
            (("8x8x8", "--dtype", "f31"), "dtype"),
            (("8x8x8", "--epilogue", "none such"), "epilogue"),
            (("--shapes", "/none/such"), "No such file"),
            (("/none/such.py",), "failed"),
            (("8x8x8", "--generator", "/none/such"), "No such file"),
        ],
    )
    def test_what_cannot_be(self, arguments, message, tmp_path):
        done = (
            specialize(*arguments, "--out", str(tmp_path))
            if arguments[-1:] != ("/none/such.py",)
            else specialize("--out", str(tmp_path), *arguments)
        )
        assert done.returncode == 1
        assert message in done.stderr
        assert "jax_nano/_tools" not in done.stderr

    def test_without_llvm(self, tmp_path):
        """One sentence says what to install."""
        if WHY_NOT is not None and "LLVM" not in WHY_NOT:
            pytest.skip("the generator stops for another reason before")
        linker = tmp_path / "ld"
        linker.write_text("")
        linker.chmod(0o755)
        done = specialize("8x8x8", "--out", str(tmp_path / "packs"), PATH=str(tmp_path))
        assert done.returncode == 1
        assert "LLVM 22" in done.stderr
        assert "Traceback" not in done.stderr

    def test_packs_that_are_off(self):
        done = specialize("8x8x8", JAX_NANO_PACKS="off")
        assert done.returncode == 1
        assert "name a folder with --out" in done.stderr


def test_bits_of_a_library_are_hashed(file):
    assert packs.read(file, MINE).sha256 == hashlib.sha256(b"no library").hexdigest()
