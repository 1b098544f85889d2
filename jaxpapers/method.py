"""The protocol of every method: a state, and a few pure functions on it."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec


class State(NamedTuple):
    """What a training run carries; a pytree of arrays and nothing else.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: parameters, float32.
      opt_state: of the optax transformation.
      extra: what gradients do not touch (EMA, target nets, posterior); () if unused.
      key: set once; the key of a step is ``fold_in(key, step)``.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any
    key: jax.Array


class Method(NamedTuple):
    """Pure functions bound to their hyper-parameters.

    Attributes:
      init: (key, batch) -> State; a batch of shapes is enough.
      loss: (params, batch, key) -> (scalar, dict of scalars).
      update: (state, batch) -> (state, dict of scalars): one optimizer step.
      sampler: (params, key, ...) -> arrays, or None.
      rules: (regex over the leaf's "/"-joined path, PartitionSpec), first match wins. A
        function instead of a PartitionSpec is for leaves that belong to a parameter but
        have another shape: (path of the parameter, leaf, parameter, its spec) -> spec;
        its regex sees only what comes before the parameter's path.
      labels: params -> tree of strings saying which optimizer each leaf goes to.
      resize: (State, shapes) -> State of those shapes, for checkpoints whose optimizer
        state has others (another rank, another number of replicas); None: refused.
    """

    init: Callable[..., State]
    loss: Callable
    update: Callable
    sampler: Callable | None = None
    rules: Sequence[tuple[str, Any]] = ()
    labels: Callable | None = None
    resize: Callable | None = None


class Replicas(NamedTuple):
    """Data-parallel replicas whose gradients the optimizer averages in its own way.

    Attributes:
      axis: mesh axis of the replicas; the optimizer reduces over it.
      specs: (opt_state, params) -> PartitionSpecs of the optimizer state over that axis,
        e.g. ``optim.replica_specs``.
    """

    axis: str
    specs: Callable


def path_name(path: Sequence[Any]) -> str:
    """A pytree key path as "params/layers/mlp/up/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def param_spec(rules: Sequence[tuple[str, Any]], path: str) -> PartitionSpec:
    """PartitionSpec that the rules give the parameter of this path; () if none does."""
    for regex, spec in rules:
        if not callable(spec) and re.search(regex, path):
            return spec
    return PartitionSpec()


def gradient(
    init_params: Callable,
    loss: Callable,
    tx: optax.GradientTransformation,
    *,
    sampler: Callable | None = None,
    rules: Sequence[tuple[str, Any]] = (),
    labels: Callable | None = None,
    resize: Callable | None = None,
    accumulate: int = 1,
    replicas: Replicas | None = None,
) -> Method:
    """A method whose update is one step of gradient descent.

    Args:
      init_params: (key, batch) -> params.
      loss: (params, batch, key) -> (scalar, metrics). A metric ``weight`` makes the loss
        a weighted mean: micro-batches are then combined by their weights, and so are
        the other metrics, which must be means too.
      tx: optimizer.
      sampler: see ``Method``.
      rules: see ``Method``.
      labels: see ``Method``.
      accumulate: micro-batches that the batch is cut into, along its leading axis, to
        bound activation memory. Equal to the whole batch up to rounding.
      resize: see ``Method``.
      replicas: compute gradients per replica, inside ``jax.shard_map`` over their axis,
        and hand them to ``tx`` unaveraged. The metric ``grad_norm`` is then the mean of
        the replicas' norms.

    Raises:
      ValueError: ``accumulate`` below 1, or a batch that it does not divide.
    """
    if accumulate < 1:
        raise ValueError(f"train.accumulate must be >= 1, got {accumulate}")

    def init(key, batch):
        if replicas:
            _check_axis(replicas.axis)
        key, key_params = jax.random.split(key)
        params = init_params(key_params, batch)
        return State(jnp.zeros((), jnp.int32), params, tx.init(params), (), key)

    def value_and_grad(params, batch, key):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            params, batch, key
        )
        return grads, {"loss": value, **metrics}

    def accumulated(params, batch, key):
        def cut(x):
            if x.shape[0] % accumulate:
                raise ValueError(
                    f"train.accumulate={accumulate} does not divide the batch of "
                    f"{x.shape[0]}; nearest batch that works: "
                    f"{accumulate * max(round(x.shape[0] / accumulate), 1)}"
                )
            # Interleaved, so that every micro-batch keeps the batch's sharding.
            return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

        def body(total, micro):
            part, i = micro
            grads, metrics = value_and_grad(params, part, jax.random.fold_in(key, i))
            weight = metrics.get("weight", jnp.ones(()))
            # A micro-batch without weight counts for nothing, even if its mean is NaN.
            scaled = jax.tree.map(
                lambda x: jnp.where(weight == 0, 0, x * weight), (grads, metrics)
            )
            return jax.tree.map(jnp.add, total, (scaled, weight)), None

        parts = jax.tree.map(cut, batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(value_and_grad, params, first, key)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        start = (zero, jnp.zeros(()))
        if replicas:
            start = lax.pcast(start, replicas.axis, to="varying")
        (sums, weight), _ = lax.scan(body, start, (parts, jnp.arange(accumulate)))
        grads, metrics = jax.tree.map(
            lambda x: x / jnp.where(weight == 0, 1, weight), sums
        )
        if "weight" in metrics:
            metrics["weight"] = weight
        return grads, metrics

    compute = value_and_grad if accumulate == 1 else accumulated

    def step(params, opt_state, batch, key):
        grads, metrics = compute(params, batch, key)
        metrics["grad_norm"] = optax.tree.norm(grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, opt_state, params)
        return updates, opt_state, metrics

    def replicated_step(params, opt_state, batch, key):
        """``step`` on each replica's part of the batch."""
        assert replicas is not None
        axis = replicas.axis
        specs = replicas.specs(opt_state, params)

        def local(params, opt_state, batch, key):
            # The gradient of an unvarying value would be summed over the replicas.
            own = lax.pcast(params, axis, to="varying")
            key = jax.random.fold_in(key, lax.axis_index(axis))
            grads, metrics = compute(own, batch, key)
            if "weight" in metrics:
                grads, metrics = _by_weight(grads, metrics, axis)
            metrics["grad_norm"] = optax.tree.norm(grads)
            metrics = lax.pmean(metrics, axis)
            with jax.named_scope("optimizer"):
                updates, opt_state = tx.update(grads, opt_state, params)
            return updates, opt_state, metrics

        return jax.shard_map(
            local,
            in_specs=(PartitionSpec(), specs, PartitionSpec(axis), PartitionSpec()),
            out_specs=(PartitionSpec(), specs, PartitionSpec()),
            axis_names={axis},
        )(params, opt_state, batch, key)

    def update(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        run = replicated_step if replicas else step
        updates, opt_state, metrics = run(state.params, state.opt_state, batch, key)
        params = optax.apply_updates(state.params, updates)
        # The loss is that of the old parameters: this one sees the new ones.
        metrics["param_norm"] = optax.tree.norm(params)
        return (
            state._replace(step=state.step + 1, params=params, opt_state=opt_state),
            metrics,
        )

    return Method(init, loss, update, sampler, rules, labels, resize)


def _check_axis(axis: str) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.axis_names:
        raise ValueError(
            f"replicas need a mesh axis {axis!r}, got {dict(mesh.shape)}; pass e.g. "
            f"--mesh {axis}:2,data:4"
        )


def _by_weight(grads, metrics, axis: str):
    """Scales weighted means so that their plain mean over replicas is the global one."""
    weight = metrics["weight"]
    total = lax.psum(weight, axis)
    share = weight * lax.axis_size(axis) / jnp.where(total == 0, 1, total)
    # A replica without weight counts for nothing, even if its mean is NaN.
    scaled = jax.tree.map(
        lambda x: jnp.where(weight == 0, 0, x * share), (grads, metrics)
    )
    return scaled[0], {**scaled[1], "weight": weight * lax.axis_size(axis)}
