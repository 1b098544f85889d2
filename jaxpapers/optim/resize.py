"""A Dion state for another rank or another number of replicas.

All functions take optimizer states of any nesting (``optax.chain``, ``partition``) and
change the ``DionState`` in them.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpapers.optim.dion import DionState
from jaxpapers.optim.fused import owner, part_of, read_layout
from jaxpapers.optim.options import is_number, static_fraction, static_multiple
from jaxpapers.optim.paths import map_named, named_leaves, per_leaf


def rescale_rank(
    state: Any,
    params: Any,
    rank_fraction: Any,
    rank_multiple_of: int = 1,
    *,
    weight_dimension_numbers: Any = None,
    split_sizes: Any = None,
    replicas: int = 0,
    seed: int = 0,
) -> Any:
    """The state for another ``rank_fraction``, to go on with ``dion(rank_fraction=...)``.

    M is kept. A smaller Q keeps its leading columns; a larger one gets further ones,
    normal with the root mean square of the columns that are there, so that the first
    step's power iteration finds new directions and keeps the old ones.

    Args:
      state: optimizer state.
      params: the parameters, or their shapes.
      rank_fraction: as for ``scale_by_dion``.
      rank_multiple_of: as for ``scale_by_dion``.
      weight_dimension_numbers: as for ``scale_by_dion``.
      split_sizes: as for ``scale_by_dion``; they cannot change.
      replicas: with ``replicate_axis``, how many there are: a rank at which factors are
        no longer worth averaging (or are again) changes which momenta have their axis.
      seed: of the further columns.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxpapers.optim import scale_by_dion
      >>> params = {"kernel": jnp.ones((8, 16))}
      >>> state = scale_by_dion(0.5).init(params)
      >>> rescale_rank(state, params, 0.25).q["kernel"].shape
      (8, 2)
    """
    table = dict(named_leaves(params)[0])

    def layout_of(name):
        named = [(name, table[name])]
        fraction = per_leaf(rank_fraction, named, is_number, "rank_fraction")[0]
        return read_layout(
            *named[0],
            weight_dimension_numbers=weight_dimension_numbers,
            split_sizes=split_sizes,
            rank_fraction=static_fraction(name, fraction, None),
            rank_multiple_of=static_multiple(rank_multiple_of, None),
        )

    def q(path, leaf):
        part = part_of(layout_of(owner(path, table)), path)
        return _with_rank(path, leaf, part.rank, seed)

    def momentum(path, m):
        layout = layout_of(path)
        replicated = m.ndim > len(layout.shape)
        if replicated and not replicas:
            raise ValueError(
                f"{layout.path}: momentum has an axis of {m.shape[0]} replicas; pass "
                f"replicas={m.shape[0]}"
            )
        lead = (replicas,) if replicas and layout.compresses else ()
        return _with_replicas(layout.path, m, (*lead, *layout.shape), replicated)

    return _map_dion(_map_dion(state, "momentum", momentum), "q", q)


def sync_for_checkpoint(state: Any, params: Any) -> Any:
    """Gives all replicas the mean of their momenta, outside their ``jax.shard_map``.

    Not needed for checkpoints of the whole state, which hold every replica's momentum.
    It is for code that stores one replica only: training goes on from the mean as it
    would have without this call, up to rounding.

    Args:
      state: optimizer state with replicas on the leading axis of its momenta.
      params: the parameters, or their shapes.
    """
    shapes = {path: leaf.shape for path, leaf in named_leaves(params)[0]}

    def momentum(path, m):
        if m.shape[1:] != shapes[path]:
            return m
        mean = jnp.broadcast_to(m.mean(0, keepdims=True), m.shape)
        return (
            mean if isinstance(m, jax.core.Tracer) else jax.device_put(mean, m.sharding)
        )

    return _map_dion(state, "momentum", momentum)


def resize(state: Any, target: Any, *, seed: int = 0) -> Any:
    """The state in the shapes of ``target``: another rank, or number of replicas.

    A momentum gets one more axis in front for replicas, loses it, or has it resized; in
    all cases every replica gets the mean.

    Args:
      state: optimizer state.
      target: like ``state``, of the wanted shapes.
      seed: see ``rescale_rank``.

    Raises:
      ValueError: shapes that differ in anything else.
    """

    def node(x, t):
        if not isinstance(x, DionState):
            return x

        old_q, old_m = dict(named_leaves(x.q)[0]), dict(named_leaves(x.momentum)[0])
        new_q = dict(named_leaves(t.q)[0])
        if old_q.keys() != new_q.keys():
            raise ValueError(_SPLIT.format(got=[*old_q], expected=[*new_q]))

        def q(name, new):
            old = old_q[name]
            if old.shape[:-1] != new.shape[:-1]:
                raise ValueError(
                    _UNLIKE.format(name=name, got=old.shape, expected=new.shape)
                )
            return _with_rank(name, old, new.shape[-1], seed).astype(new.dtype)

        def momentum(name, new):
            old = old_m[name]
            # M has at least Q's axes; only one more can be that of replicas.
            axes = old_q[name if name in old_q else f"{name}/0"].ndim
            replicated = old.ndim > max(new.ndim - 1, axes)
            return _with_replicas(name, old, new.shape, replicated).astype(new.dtype)

        return x._replace(momentum=map_named(momentum, t.momentum), q=map_named(q, t.q))

    return jax.tree.map(node, state, target, is_leaf=lambda x: isinstance(x, DionState))


_UNLIKE = (
    "{name}: cannot resize a leaf of Dion's state from shape {got} to {expected}; only "
    "the rank and the number of replicas may change"
)


_SPLIT = (
    "cannot resize a Dion state with Q of {got} to one of {expected}; keep its leaves "
    "and their split_sizes, or start from init"
)


def _with_replicas(name: str, m: jax.Array, shape: tuple[int, ...], replicated: bool):
    """M in a shape with other replicas, each with the mean.

    ``replicated``: m has an axis of replicas.
    """
    if m.shape == shape:
        return m
    matrix = m.shape[1:] if replicated else m.shape
    if shape[len(shape) - len(matrix) :] != matrix or len(shape) > len(matrix) + 1:
        raise ValueError(_UNLIKE.format(name=name, got=m.shape, expected=shape))
    return jnp.broadcast_to(m.mean(0) if replicated else m, shape)


def _with_rank(name: str, q: jax.Array, rank: int, seed: int) -> jax.Array:
    old = q.shape[-1]
    if rank <= old:
        return q[..., :rank]
    # Not init's key: its first columns may be Q itself.
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    key = jax.random.fold_in(jax.random.fold_in(key, 1), old)
    more = jax.random.normal(key, (*q.shape[:-1], rank - old), jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(q.astype(jnp.float32))))
    return jnp.concatenate([q, (size * more).astype(q.dtype)], axis=-1)


def _map_dion(state: Any, field: str, f: Callable) -> Any:
    """Maps (path, leaf) over a field of every DionState."""

    def node(x):
        if not isinstance(x, DionState):
            return x
        return x._replace(**{field: map_named(f, getattr(x, field))})

    return jax.tree.map(node, state, is_leaf=lambda x: isinstance(x, DionState))
