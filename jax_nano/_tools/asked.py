"""Products to compose kernels for: those of a command line, of a file, or of a program that is run for them."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from jax_nano._core import spec
from jax_nano._tools import explain

_SIZES: Final = re.compile(r"\d+(x\d+)+")


class Epilogue(NamedTuple):
    """What a call does with finished sums."""

    activation: str = "none"
    scale: float = 1.0
    bias: bool = False
    residual: bool = False


class Asked(NamedTuple):
    """A product of dense arrays, as the extension takes it."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    labels: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str, str]
    algorithm: str = spec.DEFAULT_ALGORITHM
    epilogue: Epilogue | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those that all functions of the extension take first."""
        return (*self.shapes, *self.labels, *self.dtypes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The sizes of the result."""
        sizes = dict(zip(self.labels[0] + self.labels[1], self.shapes[0] + self.shapes[1], strict=True))
        return tuple(sizes[x] for x in self.labels[2])

    def __str__(self) -> str:
        lhs, rhs, out = (
            f"{dtype}[{','.join(map(str, shape))}]"
            for dtype, shape in zip(self.dtypes, (*self.shapes, self.out_shape), strict=True)
        )
        letters = {x: chr(ord("a") + i) for i, x in enumerate(dict.fromkeys(self.labels[0] + self.labels[1]))}
        a, b, c = ("".join(letters[x] for x in term) for term in self.labels)
        then = f", then {text}" if self.epilogue and (text := epilogue_text(self.epilogue)) else ""
        return f"{a},{b}->{c}  {lhs} x {rhs} -> {out}{then}"


def epilogue_text(x: Epilogue) -> str:
    """As reports write it: "scale 0.25, bias, relu, residual"."""
    parts = {f"scale {x.scale:g}": x.scale != 1, "bias": x.bias, x.activation: x.activation != "none"}
    return ", ".join(name for name, there in {**parts, "residual": x.residual}.items() if there)


def epilogue_of(text: str) -> Epilogue | None:
    """What `epilogue_text` wrote; None if it is empty.

    Raises:
      ValueError: it is no such text.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (x.strip() for x in text.split(","))):
        name, _, number = part.partition(" ")
        if name == "scale":
            found["scale"] = float(number)
        elif part in ("bias", "residual"):
            found[part] = True
        elif part in spec.ACTIVATIONS:
            found["activation"] = part
        else:
            known = ", ".join(("scale NUMBER", "bias", *spec.ACTIVATIONS, "residual"))
            raise ValueError(f"epilogue {part!r}: expected some of {known}")
    return Epilogue(**found) if found else None


def add_options(parser: argparse.ArgumentParser) -> None:
    """What describes a product beside its sizes."""
    parser.add_argument("--dtype", default="float32", help="as for `explain`: f32, bf16, bf16-f32, i8, f64 ...")
    parser.add_argument("--layout", default="NN", choices=explain.LAYOUTS, help="T: the operand is stored transposed")
    parser.add_argument("--batch", metavar="SIZES", help="batch dimensions in front, e.g. 64 or 8x12")
    parser.add_argument(
        "--algorithm", default=spec.DEFAULT_ALGORITHM, metavar="PRESET", help="a lax.DotAlgorithmPreset"
    )
    parser.add_argument(
        "--epilogue", default="", metavar="TEXT", help='what a call of `linear` adds, e.g. "bias, gelu_tanh"'
    )


def of_options(sizes: Sequence[str], args: argparse.Namespace) -> Asked:
    """The product of a command line."""
    asked = explain.request(sizes, args.dtype, args.layout, args.batch)
    labels = (tuple(asked.labels.lhs), tuple(asked.labels.rhs), tuple(asked.labels.out))
    return Asked(asked.shapes, labels, asked.dtypes, args.algorithm, epilogue_of(args.epilogue))


def of_file(file: Path) -> list[Asked]:
    """The products of a file: on each line what the command line would say; # begins a comment.

    Raises:
      ValueError: a line is no product; the message names it.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("sizes", nargs="+")
    add_options(parser)
    out = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        try:
            args, unknown = parser.parse_known_args(words)
            if unknown:
                raise ValueError(f"unknown: {' '.join(unknown)}")
            out.append(of_options(args.sizes, args))
        except (ValueError, argparse.ArgumentError) as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    return out


def is_sizes(word: str) -> bool:
    """Whether it is MxNxK or MxK, and no program."""
    return _SIZES.fullmatch(word) is not None


# --- programs -----------------------------------------------------------------------------------


def of_program(program: Sequence[str]) -> list[Asked]:
    """The products that kernels compute in a program, which is run for it in a process of its own.

    Raises:
      ValueError: the program fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "products.json"
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-P", "-m", __name__, str(file), *program]
        status = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}).returncode
        if status or not file.exists():
            raise ValueError(f"{' '.join(program)} failed with status {status}")
        return [_of_json(x) for x in json.loads(file.read_text())]


def _of_json(x: dict[str, Any]) -> Asked:
    lhs, rhs = (tuple(shape) for shape in x["shapes"])
    a, b, c = (tuple(term) for term in x["labels"])
    left, right, out = x["dtypes"]
    return Asked((lhs, rhs), (a, b, c), (left, right, out), x["algorithm"], epilogue_of(x["epilogue"]))


def _recorded() -> Iterable[dict[str, Any]]:
    """What `_of_json` reads, of each product of this process that a plain kernel computes."""
    from jax_nano._core import record

    for x, _ in record.products():
        shapes = [array.shape for array in x.arrays[:2]]
        if x.declined is None and not x.kernel and all(isinstance(n, int) for shape in shapes for n in shape):
            numbers = {label: i for i, label in enumerate(dict.fromkeys(x.labels.lhs + x.labels.rhs))}
            labels = [[numbers[label] for label in term] for term in x.labels]
            dtypes = [array.dtype for array in x.arrays]
            yield {
                "shapes": shapes,
                "labels": labels,
                "dtypes": dtypes,
                "algorithm": x.algorithm,
                "epilogue": x.epilogue,
            }


def _run_for(file: Path, program: Sequence[str]) -> int:
    """Runs a program accelerated, with its report, and leaves its products in a file."""
    from jax_nano._tools import run

    def leave() -> None:
        if "jax" in sys.modules:
            found = list(_recorded())
            file.write_text(json.dumps(found))
        else:
            file.write_text("[]")

    atexit.register(leave)
    return run.run(program)


if __name__ == "__main__":
    raise SystemExit(_run_for(Path(sys.argv[1]), sys.argv[2:]))
