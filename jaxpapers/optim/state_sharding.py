"""How Dion's state lies on a mesh, for code that lays out state by itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.dion import DionState
from jaxpapers.optim.fused import (
    block_sharding,
    owner,
    part_of,
    read_layout,
    without_split_axis,
)
from jaxpapers.optim.layout import is_sharding
from jaxpapers.optim.paths import map_named, named_leaves, per_leaf


def dion_state_sharding(
    state: Any,
    params: Any,
    params_sharding: Any,
    *,
    weight_dimension_numbers: Any = None,
    split_sizes: Any = None,
    p_side: Any = "longer",
    replicate_axis: str | None = None,
) -> Any:
    """Shardings for an optimizer state that contains Dion's, on the parameters' mesh.

    Q has a shape of its own, so rules that go by the parameter's shape or path miss it:
    it takes the specs of the batch and Q-side axes, its rank axis is whole. Every other
    leaf whose path ends in a parameter's path takes that parameter's sharding; the rest
    (counts) is replicated.

    Args:
      state: arrays or ``jax.eval_shape(tx.init, params)``; any nesting of optax states.
      params: the parameters, or their shapes.
      params_sharding: tree of NamedSharding like ``params``; boxes of the one need not
        be those of the other.
      weight_dimension_numbers: as given to ``dion``.
      split_sizes: as given to ``dion``.
      p_side: as given to ``dion``.
      replicate_axis: as given to ``dion``.

    Returns:
      Tree of NamedSharding like ``state``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxpapers.optim import scale_by_dion
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = {"kernel": jnp.ones((8, 16))}
      >>> state = jax.eval_shape(scale_by_dion(0.5).init, params)
      >>> where = {"kernel": NamedSharding(mesh, P(None, "data"))}
      >>> dion_state_sharding(state, params, where).q["kernel"].spec == P(None, None)
      True
    """
    named, _ = named_leaves(params)
    shardings = per_leaf(params_sharding, named, is_sharding, "params_sharding")
    table = {path: (leaf, where) for (path, leaf), where in zip(named, shardings)}
    mesh = shardings[0].mesh
    whole: Any = NamedSharding(mesh, P())
    q_layout = functools.partial(
        _q_layout,
        weight_dimension_numbers=weight_dimension_numbers,
        split_sizes=split_sizes,
        p_side=p_side,
    )

    def like_parameter(name, leaf):
        # The longest, as "block/kernel" ends in "kernel" too.
        owners = [p for p in table if name == p or name.endswith("/" + p)]
        if owners:
            param, where = table[max(owners, key=len)]
            if leaf.shape == param.shape:
                return where
            if replicate_axis and leaf.shape[1:] == param.shape:
                return NamedSharding(mesh, P(replicate_axis, *where.spec))
        return whole

    def like_q(name, leaf):
        path = owner(name, table)
        param, where = table[path]
        layout = q_layout(path, leaf, param)
        spec = block_sharding(layout, where).spec
        return NamedSharding(mesh, part_of(layout, name).q_spec(spec))

    def node(path, x):
        # Found by its type: a parameter may be called "q" as well.
        if not isinstance(x, DionState):
            return like_parameter(path, x)
        return x._replace(
            count=whole,
            momentum=map_named(like_parameter, x.momentum),
            q=map_named(like_q, x.q),
        )

    return map_named(node, state, is_leaf=lambda x: isinstance(x, DionState))


def replica_specs(state: Any, params: Any, replicate_axis: str) -> Any:
    """PartitionSpecs of an optimizer state for ``jax.shard_map`` over its replicas.

    Args:
      state: arrays or shapes; any nesting of optax states.
      params: the parameters, or their shapes.
      replicate_axis: as given to ``dion``.

    Returns:
      Tree like ``state``: momenta with a leading axis of replicas are split along it,
      everything else is whole.
    """
    shapes = {path: leaf.shape for path, leaf in named_leaves(params)[0]}

    def momentum(path, leaf):
        per_replica = leaf.shape[1:] == shapes[path]
        return P(replicate_axis) if per_replica else P()

    def node(x):
        specs = jax.tree.map(lambda _: P(), x)
        if not isinstance(x, DionState):
            return specs
        return specs._replace(momentum=map_named(momentum, x.momentum))

    return jax.tree.map(node, state, is_leaf=lambda x: isinstance(x, DionState))


def state_rules(
    weight_dimension_numbers: Any = None,
    *,
    split_sizes: Any = None,
    p_side: Any = "longer",
    replicate_axis: str | None = None,
) -> tuple[tuple[str, Callable[..., P]], ...]:
    """Sharding rules of Dion's state: (regex of a leaf's path, function giving its spec).

    For leaves whose shape is not their parameter's: Q, and with ``replicate_axis`` M. A
    function takes (path of the parameter, leaf, parameter, the parameter's spec). Put
    the rules before those of the parameters. The Q of a block of a fused leaf is not
    split along the leaf's split axis.

    Args:
      weight_dimension_numbers: as given to ``dion``, as are the others.
      split_sizes: see ``dion``.
      p_side: see ``dion``.
      replicate_axis: see ``dion``.
    """
    q_layout = functools.partial(
        _q_layout,
        weight_dimension_numbers=weight_dimension_numbers,
        split_sizes=split_sizes,
        p_side=p_side,
    )

    def q_spec(path, q, param, param_spec):
        layout = q_layout(path, q, param)
        if not layout.blocks:
            return layout.q_spec(param_spec)
        for block in layout.blocks:
            # Equal blocks have equal specs.
            if block.q_shape == q.shape:
                return block.q_spec(without_split_axis(layout, param_spec))
        raise ValueError(
            f"{path}: the state has a Q of shape {q.shape}, expected one of "
            f"{[x.q_shape for x in layout.blocks]}; pass the split_sizes, dimension "
            "numbers and p_side that made the state"
        )

    def momentum_spec(path, momentum, param, param_spec):
        if momentum.shape[1:] == param.shape:
            return P(replicate_axis, *param_spec)
        return param_spec

    rules = ((r"(^|/)q/", q_spec),)
    return (*rules, (r"(^|/)momentum/", momentum_spec)) if replicate_axis else rules


def _q_layout(path: str, q: Any, param: Any, *, p_side: Any, **options: Any):
    """The layout of a parameter whose Q, or that of a block, has q's rank."""
    side = per_leaf(p_side, [(path, param)], lambda x: isinstance(x, str), "p_side")[0]
    return read_layout(path, param, p_side=side, rank=q.shape[-1], **options)
