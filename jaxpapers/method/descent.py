"""Methods whose update is one step of gradient descent."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from jaxpapers.method.protocol import Method, Replicas, State
from jaxpapers.ops.micro_batches import value_and_grad


def gradient(
    init_params: Callable,
    loss: Callable,
    tx: optax.GradientTransformation,
    *,
    sampler: Callable | None = None,
    predict: Callable | None = None,
    rules: Sequence[tuple[str, Any]] = (),
    labels: Callable | None = None,
    resize: Callable | None = None,
    accumulate: int = 1,
    replicas: Replicas | None = None,
    init_extra: Callable | None = None,
) -> Method:
    """A method whose update is one step of gradient descent.

    Args:
      init_params: (key, batch) -> params.
      loss: (params, batch, key) -> (scalar, metrics). With a metric ``weight`` the loss
        and all other metrics are weighted means, and micro-batches are combined by their
        weights.
      tx: optimizer.
      sampler, predict, rules, labels, resize: see ``Method``.
      accumulate: number of micro-batches, cut along the batch's leading axis to bound
        activation memory. The step is that of the whole batch up to rounding.
      replicas: compute gradients per replica, inside ``jax.shard_map`` over their axis,
        and pass them to ``tx`` without averaging. The metric ``grad_norm`` is then the
        mean of the replicas' norms.
      init_extra: params -> initial ``State.extra``, for losses with running statistics:
        the loss is then (params, extra, batch, key) -> (scalar, (metrics, extra)). Each
        micro-batch continues from the extra of the previous one.

    Raises:
      ValueError: ``accumulate`` below 1, a batch that it does not divide, or both
        ``replicas`` and ``init_extra``.
    """
    if replicas and init_extra:
        raise ValueError(
            "replicas and init_extra exclude each other: every replica would have an "
            "extra of its own; got both"
        )
    stateful, plain = with_extra(loss, init_extra)
    compute = value_and_grad(stateful, accumulate, replicas.axis if replicas else None)

    def init(key, batch):
        if replicas:
            _check_axis(replicas.axis)
        return start(init_params, tx.init, init_extra, key, batch)

    def step(params, opt_state, extra, batch, key):
        grads, metrics, extra = compute(params, extra, batch, key)
        metrics["grad_norm"] = optax.tree.norm(grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, opt_state, params)
        return updates, opt_state, metrics, extra

    def replicated_step(params, opt_state, extra, batch, key):
        """``step`` on each replica's share of the batch."""
        assert replicas is not None
        axis = replicas.axis
        _check_replicas(axis)
        specs = replicas.specs(opt_state, params)

        def local(params, opt_state, batch, key):
            # The gradient of an unvarying value would be summed over the replicas.
            varying = lax.pcast(params, axis, to="varying")
            key = jax.random.fold_in(key, lax.axis_index(axis))
            grads, metrics, _ = compute(varying, extra, batch, key)
            if "weight" in metrics:
                grads, metrics = _by_weight(grads, metrics, axis)
            metrics["grad_norm"] = optax.tree.norm(grads)
            metrics = lax.pmean(metrics, axis)
            with jax.named_scope("optimizer"):
                updates, opt_state = tx.update(grads, opt_state, params)
            return updates, opt_state, metrics

        updates, opt_state, metrics = jax.shard_map(
            local,
            in_specs=(PartitionSpec(), specs, PartitionSpec(axis), PartitionSpec()),
            out_specs=(PartitionSpec(), specs, PartitionSpec()),
            axis_names={axis},
        )(params, opt_state, batch, key)
        return updates, opt_state, metrics, extra

    def update(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        run = replicated_step if replicas else step
        updates, opt_state, metrics, extra = run(
            state.params, state.opt_state, state.extra, batch, key
        )
        params = optax.apply_updates(state.params, updates)
        # Of the updated parameters; the loss is that of the old ones.
        metrics["param_norm"] = optax.tree.norm(params)
        return State(state.step + 1, params, opt_state, extra, state.key), metrics

    return Method(init, plain, update, sampler, rules, labels, resize, predict=predict)


def start(
    init_params: Callable,
    init_opt: Callable,
    init_extra: Callable | None,
    key: jax.Array,
    batch: Any,
) -> State:
    """Initial state of a method from the initialisers of its parts."""
    key, key_params = jax.random.split(key)
    params = init_params(key_params, batch)
    extra = init_extra(params) if init_extra else ()
    return State(jnp.zeros((), jnp.int32), params, init_opt(params), extra, key)


def with_extra(
    loss: Callable, init_extra: Callable | None
) -> tuple[Callable, Callable]:
    """A loss with and without extra state, whichever of the two is given.

    Returns:
      (params, extra, batch, key) -> (scalar, (metrics, extra)), and
      (params, batch, key) -> (scalar, metrics) with the initial extra.
    """
    if init_extra is None:

        def stateful(params, extra, batch, key):
            value, metrics = loss(params, batch, key)
            return value, (metrics, extra)

        return stateful, loss

    def plain(params, batch, key):
        value, (metrics, _) = loss(params, init_extra(params), batch, key)
        return value, metrics

    return loss, plain


def _check_axis(axis: str) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.axis_names:
        raise ValueError(
            f"replicas need a mesh axis {axis!r}, got {dict(mesh.shape)}; pass e.g. "
            f"--mesh {axis}:2,data:4, or another train.replica_axis"
        )


def _check_replicas(axis: str) -> None:
    """ValueError for one replica, which a run can be read on but not trained."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape[axis] == 1:
        raise ValueError(
            f"replicas need more than one device on mesh axis {axis!r}, got "
            f"{dict(mesh.shape)}; leave train.replica_sync=gradient"
        )


def _by_weight(grads, metrics, axis: str):
    """Scales weighted means so that their mean over replicas is the global one."""
    weight = metrics["weight"]
    total = lax.psum(weight, axis)
    share = weight * lax.axis_size(axis) / jnp.where(total == 0, 1, total)
    # The mean of a replica of weight 0 may be NaN.
    scaled = jax.tree.map(
        lambda x: jnp.where(weight == 0, 0, x * share), (grads, metrics)
    )
    return scaled[0], {**scaled[1], "weight": weight * lax.axis_size(axis)}
