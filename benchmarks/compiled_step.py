"""One optimizer step on sharded matrices, compiled for chips that are not here."""

import importlib.util
import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo, optim, plan
from jaxpapers.optim.orthonormalize import RESCUE

# Stacked kernels: layers, inputs, outputs.
NUMBERS = optim.DimensionNumbers(1, 2)


class Step(NamedTuple):
    """A compiled update.

    Attributes:
      compiled: the executable.
      collectives: of well-conditioned matrices, see ``hlo.Collective``.
      flops: of the matrix products, per chip if the chips share them evenly.
      cpu_seconds: of the compiler, over all threads.
      wall_seconds: of the compiler.
    """

    compiled: Any
    collectives: list[hlo.Collective]
    flops: float
    cpu_seconds: float
    wall_seconds: float

    @property
    def sent_bytes(self) -> int:
        """What a chip sends in rings."""
        return int(sum(hlo.wire_bytes(self.collectives).values()))


def compile_step(
    name: str,
    options: dict,
    devices: Sequence[Any],
    mesh: dict[str, int],
    shape: Sequence[int],
) -> Step:
    """Compiles the update of stacked float32 kernels, without scale and decay.

    Args:
      name: a function of ``optim``, or ``optax_muon``.
      options: its arguments.
      devices: of a topology, or those of this process.
      mesh: sizes of the axes that split the inputs and the outputs.
      shape: layers, inputs, outputs.
    """
    grid = Mesh(
        np.asarray(devices).reshape(tuple(mesh.values())),
        tuple(mesh),
        axis_types=(AxisType.Auto,) * len(mesh),
    )
    where = NamedSharding(grid, P(None, *mesh))
    if name == "optax_muon":
        numbers = {"w": optax.contrib.MuonDimensionNumbers(1, 2)}
        tx = optax.contrib.scale_by_muon(weight_dimension_numbers=numbers, **options)
    else:
        tx = getattr(optim, name)(
            weight_dimension_numbers=NUMBERS, sharding={"w": where}, **options
        )
    params = {"w": jax.ShapeDtypeStruct(tuple(shape), np.float32, sharding=where)}
    with jax.set_mesh(grid):
        state = _state(tx, params, where)
        traced = jax.jit(lambda g, s: tx.update(g, s, None)).trace(params, state)
        lowered = traced.lower()
    began, wall = time.process_time(), time.monotonic()
    compiled = lowered.compile()
    cpu, wall = time.process_time() - began, time.monotonic() - wall
    found = hlo.collectives(compiled.as_text(), grid)
    return Step(
        compiled,
        [c for c in found if RESCUE not in c.op_name],
        plan.product_flops(traced.jaxpr.jaxpr) / math.prod(mesh.values()),
        cpu,
        wall,
    )


def versions() -> dict[str, str]:
    """Of what compiles."""
    packages = ["jax", "jaxlib", "optax"]
    if importlib.util.find_spec("libtpu"):  # On Linux x86-64.
        packages.append("libtpu")
    return {p: version(p) for p in packages}


def _state(tx, params, where):
    """Shapes and shardings of the state."""
    state = jax.eval_shape(tx.init, params)
    placed = optim.dion_state_sharding(
        state, params, {"w": where}, weight_dimension_numbers=NUMBERS
    )
    # NorMuon has one number per output.
    row = NamedSharding(where.mesh, P(None, None, where.spec[2]))
    rows = (*params["w"].shape[:1], 1, *params["w"].shape[2:])
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=row if x.shape == rows else s
        ),
        state,
        placed,
    )
