"""Models as their users write them, none of which knows of jax_nano: what tests and the benchmark run.

Each is made of the layers of one library, and gives a `Workload`: a step, its state and its inputs. No model imports
jax_nano, and no library but JAX is imported before a model that needs it is built. `zoo.compiled` reads what became of
their products.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Workload:
    """A program to be compiled: ``step(state, inputs) -> (state, result)``, and what it starts from.

    Whoever runs it donates the state, as training loops do; it is empty where a step leaves nothing behind.
    """

    step: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    inputs: Any


@dataclasses.dataclass(frozen=True)
class Model:
    """An entry of the catalogue: ``module.function(**sizes)`` gives the workload."""

    module: str  # of this package
    function: str
    needs: tuple[str, ...]  # modules that must be importable; flax and equinox are its users' choice, not ours
    goal: float  # how many times faster than plain XLA a step should be
    tiny: Mapping[str, Any]  # sizes of tests: every kind of product, none of them large
    real: Mapping[str, Any]  # sizes that people run
    devices: int = 1
    element_bytes: int = 4  # of its matrices

    def build(self, sizes: Mapping[str, Any]) -> Workload:
        """Makes weights and inputs; ImportError if the library is missing."""
        module = importlib.import_module(f"{__name__}.{self.module}")
        return getattr(module, self.function)(**sizes)


_NEVER_SLOWER, _TRAINING, _DECODING, _NO_REGRESSION = 1.0, 1.3, 2.0, 0.98

_TINY_GPT = {"vocabulary": 61, "layers": 1, "heads": 2, "features": 32, "hidden": 96}
_GPT2_SMALL = {"vocabulary": 50257, "layers": 12, "heads": 12, "features": 768, "hidden": 3072}
_TINY_BERT = {"vocabulary": 61, "layers": 1, "heads": 2, "features": 32, "hidden": 96, "batch": 3, "tokens": 16}
_BERT_BASE = {"vocabulary": 30522, "layers": 4, "heads": 12, "features": 768, "hidden": 3072, "batch": 4, "tokens": 128}
_TINY_VIT = {"image": 16, "patch": 4, "heads": 2, "features": 32, "hidden": 96, "classes": 10}
_VIT_BASE = {"image": 224, "patch": 16, "heads": 12, "features": 768, "hidden": 3072, "classes": 1000}

MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "gpt2 forward": Model(
            "gpt", "forward", ("flax",), _NEVER_SLOWER, {**_TINY_GPT, "tokens": 16}, {**_GPT2_SMALL, "tokens": 128}
        ),
        "gpt2 training": Model(
            "gpt",
            "training",
            ("flax", "optax"),
            _TRAINING,
            {**_TINY_GPT, "batch": 2, "tokens": 16},
            {**_GPT2_SMALL, "batch": 1, "tokens": 128},
        ),
        "gpt2 decoding, bf16": Model(
            "gpt",
            "decoding",
            ("flax",),
            _DECODING,
            {**_TINY_GPT, "vocabulary": 4099, "features": 64, "tokens": 24, "filled": 5},
            {**_GPT2_SMALL, "tokens": 256, "filled": 16},
            element_bytes=2,
        ),
        "vit block training": Model(
            "vit", "training", ("flax", "optax"), _TRAINING, {**_TINY_VIT, "batch": 3}, {**_VIT_BASE, "batch": 4}
        ),
        "bert forward, bf16": Model(
            "bert", "forward", ("flax",), _NEVER_SLOWER, _TINY_BERT, _BERT_BASE, element_bytes=2
        ),
        "bert training, bf16": Model(
            "bert", "training", ("flax", "optax"), _TRAINING, _TINY_BERT, _BERT_BASE, element_bytes=2
        ),
        "equinox mlp training": Model(
            "mlp",
            "training",
            ("equinox", "optax"),
            _TRAINING,
            {"inputs": 20, "outputs": 10, "width": 48, "depth": 2, "batch": 12},
            {"inputs": 784, "outputs": 10, "width": 1024, "depth": 3, "batch": 128},
        ),
        "haiku lstm training": Model(
            "lstm",
            "training",
            ("haiku", "optax"),
            _TRAINING,
            {"vocabulary": 23, "hidden": 24, "batch": 3, "tokens": 7},
            {"vocabulary": 128, "hidden": 512, "batch": 32, "tokens": 64},
        ),
        "data parallel training": Model(
            "data_parallel",
            "training",
            ("flax", "optax"),
            _TRAINING,
            {**_TINY_VIT, "batch": 4, "devices": 2},
            {**_VIT_BASE, "batch": 4, "devices": 2},
            devices=2,
        ),
        "kalman filter": Model(
            "kalman", "gradient", (), _NO_REGRESSION, {"states": 4, "steps": 30}, {"states": 4, "steps": 2000}
        ),
    }
)
"""All models by name."""
