"""The protocol of every method: a state, and a few pure functions on it."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from jaxpapers.ops import rows
from jaxpapers.ops.micro_batches import value_and_grad
from jaxpapers.ops.rows import Rows


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
    init_extra: Callable | None = None,
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
    stateful, plain = _with_extra(loss, init_extra)
    compute = value_and_grad(stateful, accumulate, replicas.axis if replicas else None)

    def init(key, batch):
        if replicas:
            _check_axis(replicas.axis)
        return _start(init_params, tx.init, init_extra, key, batch)

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

    return Method(init, plain, update, sampler, rules, labels, resize)


def row_gradient(
    init_params: Callable,
    loss: Callable,
    tx: optax.GradientTransformation,
    *,
    table_tx: optax.GradientTransformation | None,
    ids: Callable,
    tables: str = "tables",
    clip: float = 0.0,
    sampler: Callable | None = None,
    rules: Sequence[tuple[str, Any]] = (),
    labels: Callable | None = None,
    accumulate: int = 1,
    init_extra: Callable | None = None,
) -> Method:
    """``gradient`` for models with large tables: a step costs what its batch reads.

    The step gathers the rows of the batch once, differentiates with respect to them
    instead of the tables, and updates those rows alone. While it does, the tables are
    ``Rows`` instead of arrays; ``nets.embedding.lookup`` reads both. ``opt_state`` has
    the parts ``dense`` and ``rows``; ``param_norm`` is that of the dense parameters.

    Args:
      init_params: (key, batch) -> params, a dict with a dict of tables in it.
      loss, sampler, rules, labels, accumulate, init_extra: see ``gradient``. Rules:
        ``optim.rows.STATE_RULES`` before the tables' own.
      tx: optimizer of all but the tables.
      table_tx: optimizer made for ``Rows``, e.g. ``optim.rows.lazy_adam``; the params
        that it sees are the ``Rows`` that the step read. None: ``tx`` updates the tables
        too, every row of them.
      ids: batch -> dict with all ids, 0 for padding, that the loss looks up, per table.
        An id that is missing there reads zeros.
      tables: path of the dict of tables in ``params``, "/" between its parts.
      clip: bound of the norm of all gradients together, rows included; 0: none.

    Raises:
      ValueError: ``accumulate`` below 1, or a batch that it does not divide.
    """
    if table_tx is None:
        clipped = optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx
        return gradient(
            init_params, loss, clipped, sampler=sampler, rules=rules, labels=labels,
            accumulate=accumulate, init_extra=init_extra,
        )  # fmt: skip
    stateful, plain = _with_extra(loss, init_extra)
    value_and_grad(stateful, accumulate)  # Refuses bad values before any step.
    path = tables.split("/")

    def init_opt(params):
        own, rest = _take(params, path)
        return {"dense": tx.init(rest), "rows": table_tx.init(_put({}, path, own))}

    def init(key, batch):
        return _start(init_params, init_opt, init_extra, key, batch)

    def update(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        own, rest = _take(state.params, path)
        found = {n: rows.unique(x, len(own[n])) for n, x in ids(batch).items()}
        values = {n: rows.take(own[n], x) for n, x in found.items()}

        def with_ids(values):
            return {n: Rows(found[n], value) for n, value in values.items()}

        def row_loss(part, extra, batch, key):
            values, rest = part
            whole = _put(rest, path, with_ids(values))
            return stateful(whole, extra, batch, key)

        compute = value_and_grad(row_loss, accumulate)
        grads, metrics, extra = compute((values, rest), state.extra, batch, key)
        norm = metrics["grad_norm"] = optax.tree.norm(grads)
        if clip:
            scale = jnp.minimum(1.0, clip / jnp.maximum(norm, clip))
            grads = jax.tree.map(lambda g: g * scale, grads)
        row_grads, dense_grads = _put({}, path, with_ids(grads[0])), grads[1]
        with jax.named_scope("optimizer"):
            dense, dense_state = tx.update(dense_grads, state.opt_state["dense"], rest)
            changes, row_state = table_tx.update(
                row_grads, state.opt_state["rows"], _put({}, path, with_ids(values))
            )
        rest: dict = cast(dict, optax.apply_updates(rest, dense))
        metrics["param_norm"] = optax.tree.norm(rest)
        changed = _take(cast(dict, changes), path)[0]
        own = {n: rows.add(table, *changed[n]) for n, table in own.items()}
        params, opt_state = (
            _put(rest, path, own),
            {"dense": dense_state, "rows": row_state},
        )
        return State(state.step + 1, params, opt_state, extra, state.key), metrics

    return Method(init, plain, update, sampler, rules, labels)


def _take(tree: dict, path: Sequence[str]) -> tuple[Any, dict]:
    """What lies at a path of nested dicts, and the tree without it."""
    first, *further = path
    rest = {k: v for k, v in tree.items() if k != first}
    if not further:
        return tree[first], rest
    found, rest[first] = _take(tree[first], further)
    return found, rest


def _put(tree: dict, path: Sequence[str], value: Any) -> dict:
    """The tree with a value at a path of nested dicts."""
    first, *further = path
    value = _put(tree.get(first, {}), further, value) if further else value
    return {**tree, first: value}


def _start(init_params, init_opt, init_extra, key, batch) -> State:
    key, key_params = jax.random.split(key)
    params = init_params(key_params, batch)
    extra = init_extra(params) if init_extra else ()
    return State(jnp.zeros((), jnp.int32), params, init_opt(params), extra, key)


def _with_extra(
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
