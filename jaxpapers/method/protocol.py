"""The protocol of every method: a state, and pure functions on it."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


class State(NamedTuple):
    """State of a training run: a pytree of arrays.

    Attributes:
      step: int32 scalar, number of updates done.
      params: parameters, float32.
      opt_state: state of the optax transformation.
      extra: state that is not trained by gradients: moving averages, target networks,
        a posterior; () if there is none.
      key: PRNG key of the run, constant; the key of a step is ``fold_in(key, step)``.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any
    key: jax.Array


class WarmStart(NamedTuple):
    """How a run starts from the checkpoint of another stage.

    Attributes:
      parts: State of shapes -> dict of the State's fields to restore, as shapes.
      apply: (initial State, restored fields) -> State.
    """

    parts: Callable
    apply: Callable


class Method(NamedTuple):
    """Pure functions bound to their hyper-parameters.

    Attributes:
      init: (key, batch) -> State; a batch of shapes is enough.
      loss: (params, batch, key) -> (scalar, dict of scalars).
      update: (state, batch) -> (state, dict of scalars): one optimizer step, or one
        iteration of a method that takes several, e.g. rollout, critic and policy steps.
      sampler: (params, key, ...) -> arrays, or None.
      rules: (regex over the leaf's "/"-joined path, PartitionSpec), first match wins. A
        function in place of a PartitionSpec serves optimizer state whose shape is not
        its parameter's: (path of the parameter, leaf, parameter, its spec) -> spec. Its
        regex is matched with the part of the path before the parameter's.
      labels: params -> tree of strings, the optimizer that updates each leaf.
      resize: (State, shapes) -> State of those shapes, to restore optimizer state of
        another rank or number of replicas; None: other shapes are an error.
      warm_start: how ``init_from`` starts a run; None: from all parameters.
      diagnose: (params, extra, batch, key) -> dict of scalars for evaluations, too
        expensive for every step.
      predict: (params, extra, batch) -> scores, one per row of the batch, or a NamedTuple
        of scores whose first field is evaluated; None for models without scores.
      served: params or ``extra`` -> the part that predicting needs; None: all of it.
    """

    init: Callable[..., State]
    loss: Callable
    update: Callable
    sampler: Callable | None = None
    rules: Sequence[tuple[str, Any]] = ()
    labels: Callable | None = None
    resize: Callable | None = None
    warm_start: WarmStart | None = None
    diagnose: Callable | None = None
    predict: Callable | None = None
    served: Callable | None = None


class Replicas(NamedTuple):
    """Data-parallel replicas whose gradients the optimizer itself reduces.

    Attributes:
      axis: mesh axis of the replicas.
      specs: (opt_state, params) -> PartitionSpecs of the optimizer state over ``axis``,
        e.g. ``optim.replica_specs``.
    """

    axis: str
    specs: Callable


def only_if(good: jax.Array, new: State, old: State) -> State:
    """``new`` where ``good``, else ``old`` with its step advanced by one."""
    fields = {
        name: jax.tree.map(lambda a, b: jnp.where(good, a, b), *pair)
        for name, pair in {
            "params": (new.params, old.params),
            "opt_state": (new.opt_state, old.opt_state),
            "extra": (new.extra, old.extra),
        }.items()
    }
    return old._replace(step=old.step + 1, **fields)


def path_name(path: Sequence[Any]) -> str:
    """A pytree key path as "params/layers/mlp/up/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def param_spec(rules: Sequence[tuple[str, Any]], path: str) -> PartitionSpec:
    """PartitionSpec of the first rule that matches a parameter's path; () without one."""
    for regex, spec in rules:
        if not callable(spec) and re.search(regex, path):
            return spec
    return PartitionSpec()
