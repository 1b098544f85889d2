"""Optax transformations: Dion, its relatives, and optimizers by config."""

from jaxpapers.optim.config import Options, from_config, trapezoid
from jaxpapers.optim.cost import DionPlan, plan_dion
from jaxpapers.optim.cost_fused import FusedPlan, plan_fused
from jaxpapers.optim.dion import DionState, dion, scale_by_dion
from jaxpapers.optim.dion2 import Dion2State, dion2, scale_by_dion2
from jaxpapers.optim.layout import DimensionNumbers
from jaxpapers.optim.muon import MuonState, muon, normuon, scale_by_muon
from jaxpapers.optim.newton_schulz import newton_schulz
from jaxpapers.optim.orthonormalize import orthonormalize
from jaxpapers.optim.power_iteration import power_iterate
from jaxpapers.optim.resize import rescale_rank, resize, sync_for_checkpoint
from jaxpapers.optim.routing import Route, RoutingTable, route, routing_table
from jaxpapers.optim.state_sharding import (
    dion_state_sharding,
    replica_specs,
    state_rules,
)
from jaxpapers.optim.weight_decay import add_cautious_weight_decay

__all__ = [
    "DimensionNumbers",
    "Dion2State",
    "DionPlan",
    "DionState",
    "FusedPlan",
    "MuonState",
    "Options",
    "Route",
    "RoutingTable",
    "add_cautious_weight_decay",
    "dion",
    "dion2",
    "dion_state_sharding",
    "from_config",
    "muon",
    "newton_schulz",
    "normuon",
    "orthonormalize",
    "plan_dion",
    "plan_fused",
    "power_iterate",
    "replica_specs",
    "rescale_rank",
    "resize",
    "route",
    "routing_table",
    "scale_by_dion",
    "scale_by_dion2",
    "scale_by_muon",
    "state_rules",
    "sync_for_checkpoint",
    "trapezoid",
]
