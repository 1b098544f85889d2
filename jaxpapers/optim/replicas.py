"""Data-parallel replicas that exchange factors instead of gradients.

With ``replicate_axis`` every replica keeps the momentum of its gradients. Outside the
``jax.shard_map`` over that axis the momenta of one leaf are one array with the replicas
on its leading axis, so a checkpoint of the state is complete and a run resumed from it is
bitwise the uninterrupted one. Parameters, Q and all else are equal on all replicas.

    specs = optim.replica_specs(state, params, "replica")

    @jax.shard_map(in_specs=(P(), specs, P("replica")), out_specs=(P(), specs),
                   axis_names={"replica"})
    def step(params, state, batch):
        # Gradients of an unvarying value are summed over replicas: not wanted here.
        local = jax.lax.pcast(params, "replica", to="varying")
        grads = jax.grad(loss)(local, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

The means of P and R over replicas are those of the mean gradient: P and R are linear in
M + G, and M of the mean is the mean of the M.
"""

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding


def check_axis(name: str) -> int:
    """Size of a manual mesh axis.

    Raises:
      ValueError: no manual mesh axis of that name where it is called.
    """
    try:
        return lax.axis_size(name)
    except NameError:
        raise ValueError(
            f"replicate_axis={name!r} is no manual mesh axis here; call update inside "
            f"jax.shard_map(..., axis_names={{{name!r}}}), or leave replicate_axis out "
            "and pass averaged gradients"
        ) from None


def count_replicas(name: str, where: NamedSharding | None) -> int:
    """Replicas of a momentum that is being initialised: 1 inside their shard_map.

    Raises:
      ValueError: no mesh with that axis is in sight.
    """
    scope = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(scope.axis_names, scope.axis_types))
    if kinds.get(name) == AxisType.Manual:
        return 1
    for mesh in (where.mesh if where is not None else scope, scope):
        if name in mesh.axis_names:
            return dict(zip(mesh.axis_names, mesh.axis_sizes))[name]
    raise ValueError(
        f"replicate_axis={name!r}: no mesh with this axis is in scope; call init under "
        "jax.set_mesh(mesh), on sharded parameters, or inside the shard_map over it"
    )
