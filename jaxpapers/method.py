"""The protocol of every method: a state, and a few pure functions on it."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
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
    """

    init: Callable[..., State]
    loss: Callable
    update: Callable
    sampler: Callable | None = None
    rules: Sequence[tuple[str, Any]] = ()
    labels: Callable | None = None


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
    accumulate: int = 1,
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

    Raises:
      ValueError: ``accumulate`` below 1, or a batch that it does not divide.
    """
    if accumulate < 1:
        raise ValueError(f"train.accumulate must be >= 1, got {accumulate}")

    def init(key, batch):
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
        (sums, weight), _ = jax.lax.scan(
            body, (zero, jnp.zeros(())), (parts, jnp.arange(accumulate))
        )
        grads, metrics = jax.tree.map(
            lambda x: x / jnp.where(weight == 0, 1, weight), sums
        )
        if "weight" in metrics:
            metrics["weight"] = weight
        return grads, metrics

    def update(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        compute = value_and_grad if accumulate == 1 else accumulated
        grads, metrics = compute(state.params, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        # The loss is that of the old parameters: this one sees the new ones.
        metrics["param_norm"] = optax.tree.norm(params)
        return (
            state._replace(step=state.step + 1, params=params, opt_state=opt_state),
            metrics,
        )

    return Method(init, loss, update, sampler, rules, labels)
