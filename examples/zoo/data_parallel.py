"""Training with the batch split over several devices and the weights on each of them."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zoo import Workload, vit


def training(*, devices: int, **sizes: int) -> Workload:
    """The vision transformer's step; XLA adds the sum of the gradients over the devices."""
    alone = vit.training(**sizes)
    mesh = jax.make_mesh((devices,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:devices])
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    return Workload(alone.step, jax.device_put(alone.state, everywhere), jax.device_put(alone.inputs, split))
