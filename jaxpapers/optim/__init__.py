"""Optax transformations: Dion and what it is made of."""

from jaxpapers.optim.dion import (
    DionState,
    dion,
    dion_state_sharding,
    q_rule,
    scale_by_dion,
)
from jaxpapers.optim.layout import DimensionNumbers
from jaxpapers.optim.orthonormalize import orthonormalize
from jaxpapers.optim.power_iteration import power_iterate
from jaxpapers.optim.routing import route

__all__ = [
    "DimensionNumbers",
    "DionState",
    "dion",
    "dion_state_sharding",
    "orthonormalize",
    "power_iterate",
    "q_rule",
    "route",
    "scale_by_dion",
]
