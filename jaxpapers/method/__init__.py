"""Methods: a state, and the pure functions that a trainer, a mesh and a study need."""

from jaxpapers.method.average import averaged, from_average
from jaxpapers.method.descent import gradient, start, with_extra
from jaxpapers.method.population import population
from jaxpapers.method.protocol import (
    Method,
    Replicas,
    State,
    WarmStart,
    only_if,
    param_spec,
    path_name,
)

__all__ = [
    "Method",
    "Replicas",
    "State",
    "WarmStart",
    "averaged",
    "from_average",
    "gradient",
    "only_if",
    "param_spec",
    "path_name",
    "population",
    "start",
    "with_extra",
]
