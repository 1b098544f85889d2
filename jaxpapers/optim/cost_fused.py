"""Cost of a Dion step on a leaf that holds several matrices, by ``plan_dion``."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.collectives import replica_dtype
from jaxpapers.optim.cost import Axes, DionPlan, plan_dion
from jaxpapers.optim.fused import block_sharding, read_layout
from jaxpapers.optim.layout import DimensionNumbers, mesh_axes
from jaxpapers.optim.options import static_fraction, static_multiple
from jaxpapers.optim.placement import check_spec


class FusedPlan(NamedTuple):
    """Cost of one fused leaf's (or several equal leaves') Dion step on one device.

    Attributes:
      blocks: the plan of all blocks of a size together, in the order of the sizes.
      moved: bytes sent in rings besides, by (collective, mesh axes): the leaf's exchange
        where its split axis is sharded, the averages of gradients that replicas exchange.
    """

    blocks: tuple[DionPlan, ...]
    moved: dict[tuple[str, Axes], float]

    @property
    def bytes_per_step(self) -> dict[tuple[str, Axes], float]:
        """``DionPlan.bytes_per_step`` of the leaf."""
        total = Counter(self.moved)
        for block in self.blocks:
            total.update(block.bytes_per_step)
        return dict(total)

    @property
    def total_bytes(self) -> float:
        """Sum of ``bytes_per_step``."""
        return sum(self.bytes_per_step.values())

    @property
    def flops(self) -> float:
        """Of all blocks."""
        return sum(x.flops for x in self.blocks)

    @property
    def state_bytes(self) -> int:
        """M and every Q."""
        return sum(x.state_bytes for x in self.blocks)


def plan_fused(
    shape: Sequence[int],
    spec: P,
    mesh: Any,
    split_sizes: Sequence[int],
    rank_fraction: int | float = 1.0,
    rank_multiple_of: int = 1,
    *,
    dimensions: DimensionNumbers | None = None,
    replicate_axis: str | None = None,
    p_side: str = "longer",
    dtype: Any = jnp.float32,
    momentum_dtype: Any = None,
    count: int = 1,
    **options: Any,
) -> FusedPlan:
    """Cost of a leaf's step under ``scale_by_dion`` with ``split_sizes``.

    Args:
      shape: of the leaf.
      spec: its PartitionSpec.
      mesh: see ``plan_dion``.
      split_sizes: see ``scale_by_dion``.
      rank_fraction: see ``plan_dion``, as for all that follow.
      rank_multiple_of: see ``plan_dion``.
      dimensions: see ``plan_dion``.
      replicate_axis: see ``plan_dion``.
      p_side: see ``plan_dion``.
      dtype: see ``plan_dion``.
      momentum_dtype: see ``plan_dion``.
      count: see ``plan_dion``.
      **options: further ones of ``plan_dion``.

    Raises:
      ValueError, TypeError: as ``scale_by_dion``.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = {"data": 4, "model": 2}
      >>> along, across = (
      ...     plan_fused((2048, 3072), spec, mesh, (2048, 512, 512), 0.25)
      ...     for spec in (P("data"), P(None, "data"))
      ... )
      >>> [block.rank for block in along.blocks], along.moved
      ([512, 128], {})
      >>> round(across.moved["all-to-all", ("data",)] / 2**20)
      18
    """
    sizes = dict(mesh) if isinstance(mesh, dict) else dict(mesh.shape)
    abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    layout = read_layout(
        "leaf",
        jax.ShapeDtypeStruct(tuple(shape), dtype),
        weight_dimension_numbers=dimensions,
        split_sizes=tuple(split_sizes),
        rank_fraction=static_fraction("leaf", rank_fraction, None),
        rank_multiple_of=static_multiple(rank_multiple_of, None),
        p_side=p_side,
    )
    where = NamedSharding(abstract, check_spec(layout, spec, abstract))
    own = block_sharding(layout, where)
    local = count * math.prod(where.shard_shape(layout.shape))
    moved: Counter = Counter()

    def add(kind, names, size):
        axes = tuple(a for a in sizes if a in names and sizes[a] > 1)
        devices = math.prod(sizes[a] for a in axes)
        if devices > 1:
            moved[kind, axes] += (devices - 1) / devices * size

    if own != where:
        both = sum(jnp.dtype(x).itemsize for x in (dtype, momentum_dtype or dtype))
        names = mesh_axes(where.spec[layout.split_axis])
        add("all-to-all", names, 2 * local * both)
    if replicate_axis and not layout.compresses:
        wide = replica_dtype(options.get("communication_dtype")) or dtype
        add("all-reduce", (replicate_axis,), 2 * local * jnp.dtype(wide).itemsize)
    blocks = [
        plan_dion(
            block_shape,
            own.spec,
            sizes,
            rank_fraction,
            rank_multiple_of,
            dimensions=dimensions,
            replicate_axis=replicate_axis if layout.compresses else None,
            p_side=p_side,
            dtype=dtype,
            momentum_dtype=momentum_dtype,
            count=count * number,
            **options,
        )
        for block_shape, number in Counter(x.shape for x in layout.parts).items()
    ]
    return FusedPlan(tuple(blocks), dict(moved))
