"""The protocol of every method: a state, and a few pure functions on it."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from jaxpapers.ops.micro_batches import value_and_grad


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


class WarmStart(NamedTuple):
    """What a run takes from a checkpoint of another stage, e.g. its averaged parameters.

    Attributes:
      parts: State of shapes -> dict of a State's fields, with the shapes to read.
      apply: (fresh State, what was read) -> State.
    """

    parts: Callable
    apply: Callable


class Method(NamedTuple):
    """Pure functions bound to their hyper-parameters.

    Attributes:
      init: (key, batch) -> State; a batch of shapes is enough.
      loss: (params, batch, key) -> (scalar, dict of scalars).
      update: (state, batch) -> (state, dict of scalars): one optimizer step, or one round
        of a method whose update is several.
      sampler: (params, key, ...) -> arrays, or None.
      rules: (regex over the leaf's "/"-joined path, PartitionSpec), first match wins. A
        function instead of a PartitionSpec is for leaves that belong to a parameter but
        have another shape: (path of the parameter, leaf, parameter, its spec) -> spec;
        its regex sees only what comes before the parameter's path.
      labels: params -> tree of strings saying which optimizer each leaf goes to.
      resize: (State, shapes) -> State of those shapes, for checkpoints whose optimizer
        state has others (another rank, another number of replicas); None: refused.
      warm_start: how ``init_from`` starts a run; None: all parameters are taken.
      diagnose: (params, extra, batch, key) -> dict of scalars that cost more than a
        step's metrics, for evaluations.
      predict: (params, extra, batch) -> scores of the batch's rows, or a NamedTuple of
        scores whose first field is the one compared; None for models that score nothing.
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


class Replicas(NamedTuple):
    """Data-parallel replicas whose gradients the optimizer averages in its own way.

    Attributes:
      axis: mesh axis of the replicas; the optimizer reduces over it.
      specs: (opt_state, params) -> PartitionSpecs of the optimizer state over that axis,
        e.g. ``optim.replica_specs``.
    """

    axis: str
    specs: Callable


def only_if(good: jax.Array, new: State, old: State) -> State:
    """The new state, or the old one at the new step where ``good`` is False."""
    kept = {
        name: jax.tree.map(lambda a, b: jnp.where(good, a, b), *pair)
        for name, pair in {
            "params": (new.params, old.params),
            "opt_state": (new.opt_state, old.opt_state),
            "extra": (new.extra, old.extra),
        }.items()
    }
    return old._replace(step=old.step + 1, **kept)


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
      loss: (params, batch, key) -> (scalar, metrics). A metric ``weight`` makes the loss
        a weighted mean: micro-batches are then combined by their weights, and so are
        the other metrics, which must be means too.
      tx: optimizer.
      sampler, predict: see ``Method``.
      rules: see ``Method``.
      labels: see ``Method``.
      accumulate: micro-batches that the batch is cut into, along its leading axis, to
        bound activation memory. Equal to the whole batch up to rounding.
      resize: see ``Method``.
      replicas: compute gradients per replica, inside ``jax.shard_map`` over their axis,
        and hand them to ``tx`` unaveraged. The metric ``grad_norm`` is then the mean of
        the replicas' norms.
      init_extra: params -> the first ``State.extra``, for losses that carry statistics:
        the loss is then (params, extra, batch, key) -> (scalar, (metrics, extra)). With
        micro-batches, each starts from the extra of the one before.

    Raises:
      ValueError: ``accumulate`` below 1, a batch that it does not divide, or both
        ``replicas`` and ``init_extra``.
    """
    if replicas and init_extra:
        raise ValueError(
            "replicas and init_extra exclude each other: whose is the extra?"
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
        """``step`` on each replica's part of the batch."""
        assert replicas is not None
        axis = replicas.axis
        specs = replicas.specs(opt_state, params)

        def local(params, opt_state, batch, key):
            # The gradient of an unvarying value would be summed over the replicas.
            own = lax.pcast(params, axis, to="varying")
            key = jax.random.fold_in(key, lax.axis_index(axis))
            grads, metrics, _ = compute(own, extra, batch, key)
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
        # The loss is that of the old parameters: this one sees the new ones.
        metrics["param_norm"] = optax.tree.norm(params)
        return State(state.step + 1, params, opt_state, extra, state.key), metrics

    return Method(init, plain, update, sampler, rules, labels, resize, predict=predict)


def averaged(method: Method, decay: float) -> Method:
    """A method whose ``extra`` is {"ema": moving average of the parameters}.

    The average starts at the first parameters and is theirs after every step; the
    sampler takes it in their place.

    Args:
      method: without an ``extra`` of its own.
      decay: share of the average that a step keeps; 0: the parameters themselves.

    Raises:
      ValueError: decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"the decay of an average must be in [0, 1), got {decay}")

    def init(key, batch):
        state = method.init(key, batch)
        # Copies: a donated state must not hold an array twice.
        return state._replace(extra={"ema": jax.tree.map(jnp.copy, state.params)})

    def update(state, batch):
        ema = state.extra["ema"]
        state, metrics = method.update(state._replace(extra=()), batch)
        ema = optax.incremental_update(state.params, ema, 1 - decay)
        return state._replace(extra={"ema": ema}), metrics

    inner = method.sampler

    def sampler(params, key, *args, extra=None, **kwargs):
        assert inner is not None
        return inner(extra["ema"] if extra else params, key, *args, **kwargs)

    return method._replace(init=init, update=update, sampler=sampler if inner else None)


def from_average(name: str, copies: Sequence[str] = ()) -> WarmStart:
    """A start from the averaged parameters of another stage, see ``averaged``.

    Args:
      name: part of ``params``, a dict, that both stages have.
      copies: parts that start as copies of it.
    """

    def parts(shapes):
        return {"extra": {"ema": {name: shapes.params[name]}}}

    def apply(state, found):
        average = found["extra"]["ema"][name]
        # Copies: a donated state must not hold an array twice.
        own = {copy: jax.tree.map(jnp.copy, average) for copy in copies}
        return state._replace(params={**state.params, name: average, **own})

    return WarmStart(parts, apply)


def start(
    init_params: Callable,
    init_opt: Callable,
    init_extra: Callable | None,
    key: jax.Array,
    batch: Any,
) -> State:
    """The first state of a method whose parts are drawn and built by these."""
    key, key_params = jax.random.split(key)
    params = init_params(key_params, batch)
    extra = init_extra(params) if init_extra else ()
    return State(jnp.zeros((), jnp.int32), params, init_opt(params), extra, key)


def with_extra(
    loss: Callable, init_extra: Callable | None
) -> tuple[Callable, Callable]:
    """A loss as (params, extra, batch, key) -> (scalar, (metrics, extra)) and without."""
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
