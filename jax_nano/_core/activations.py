"""The activations that an epilogue knows: their names, the functions of JAX that they are, and their slopes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import Array

NONE: Final = "none"
FUNCTIONS: Final[dict[str, Callable[[Array], Array]]] = {
    NONE: lambda x: x,
    "relu": jax.nn.relu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_erf": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}
"""By the spec's names."""

SLOPES_OF_RESULT: Final[dict[str, Callable[[Array], Array]]] = {
    "tanh": lambda y: 1 - y * y,
    "sigmoid": lambda y: y * (1 - y),
}
"""The slopes that follow from the result; relu's is 0 or 1, as the result is positive or not."""

_NAMES: Final = {**{name: name for name in FUNCTIONS}, "gelu": "gelu_tanh", "swish": "silu"}
_CALLABLES: Final = (
    (jax.nn.relu, "relu"),
    (jax.nn.gelu, "gelu_tanh"),
    (jax.nn.silu, "silu"),
    (jax.nn.tanh, "tanh"),
    (jnp.tanh, "tanh"),
    (jax.lax.tanh, "tanh"),
    (jax.nn.sigmoid, "sigmoid"),
    (jax.lax.logistic, "sigmoid"),
)


def name_of(activation: Any) -> str:
    """The name of an activation given by name, as JAX's function, or as None.

    Raises:
      ValueError: it is none of those that are known.
    """
    if activation is None:
        return NONE
    if isinstance(activation, str) and activation in _NAMES:
        return _NAMES[activation]
    if isinstance(activation, partial) and activation.func is jax.nn.gelu and not activation.args:
        match activation.keywords:
            case {"approximate": bool(approximate)} if len(activation.keywords) == 1:
                return "gelu_tanh" if approximate else "gelu_erf"
    for function, name in _CALLABLES:
        if activation is function:
            return name
    raise ValueError(
        f"unknown activation {activation!r}: expected None, one of {', '.join(sorted(_NAMES))}, "
        "or jax.nn's relu, gelu, silu, tanh or sigmoid"
    )
