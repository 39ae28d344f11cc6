"""Benchmarks of jax_nano and its peers: ``python -m benchmarks --help``.

The arrows point one way:

    __main__ -> measure -> worker (one process a peer) -> peers/ -> native/*.c
             -> report, plots, compare, publish, overheads
             -> models, suite -> accelerated
    cases, operands, machine: data that all of them read
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# `python -m benchmarks` puts the checkout first on sys.path, where `import jax_nano` would find the
# sources, which have no extension module. What is measured is the package that is installed.
sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != ROOT]

# The models that are measured are examples.
sys.path.append(str(ROOT / "examples"))
