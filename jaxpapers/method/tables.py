"""Gradient descent that updates only the table rows that a batch looks up."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jaxpapers.method import Method, State, gradient, start, with_extra
from jaxpapers.ops import rows
from jaxpapers.ops.micro_batches import value_and_grad
from jaxpapers.ops.rows import Rows


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
    predict: Callable | None = None,
    rules: Sequence[tuple[str, Any]] = (),
    labels: Callable | None = None,
    accumulate: int = 1,
    init_extra: Callable | None = None,
) -> Method:
    """``gradient`` for models with large embedding tables.

    The cost of a step depends on its batch, not on the size of the tables: it gathers the
    rows of the batch once, differentiates with respect to these rows, and updates them
    alone. During the step the tables are ``Rows`` instead of arrays;
    ``nets.embedding.lookup`` reads both. ``opt_state`` is a dict of ``dense`` and
    ``rows``; ``param_norm`` is the norm of the dense parameters.

    Args:
      init_params: (key, batch) -> params, a dict with a dict of tables in it.
      loss, sampler, predict, rules, labels, accumulate, init_extra: see ``gradient``.
        Rules: ``optim.rows.STATE_RULES`` before the tables' own.
      tx: optimizer of the dense parameters.
      table_tx: optimizer of the ``Rows`` of a step, e.g. ``optim.rows.lazy_adam``. None:
        ``tx`` updates every row of the tables too.
      ids: batch -> dict of table name -> all ids that the loss looks up, 0 for padding.
        An id that is missing there reads zeros.
      tables: path of the dict of tables in ``params``, separated by "/".
      clip: global norm that gradients are clipped to, those of rows included; 0: none.

    Raises:
      ValueError: ``accumulate`` below 1, or a batch that it does not divide.
    """
    if table_tx is None:
        clipped = optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx
        return gradient(
            init_params, loss, clipped, sampler=sampler, predict=predict, rules=rules,
            labels=labels, accumulate=accumulate, init_extra=init_extra,
        )  # fmt: skip
    stateful, plain = with_extra(loss, init_extra)
    value_and_grad(stateful, accumulate)  # Raises before any step.
    path = tables.split("/")

    def init_opt(params):
        arrays, rest = _take(params, path)
        return {"dense": tx.init(rest), "rows": table_tx.init(_put({}, path, arrays))}

    def init(key, batch):
        return start(init_params, init_opt, init_extra, key, batch)

    def update(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        arrays, rest = _take(state.params, path)
        unique = {n: rows.unique(x, len(arrays[n])) for n, x in ids(batch).items()}
        values = {n: rows.take(arrays[n], x) for n, x in unique.items()}

        def with_ids(values):
            return {n: Rows(unique[n], value) for n, value in values.items()}

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
        arrays = {n: rows.add(table, *changed[n]) for n, table in arrays.items()}
        params = _put(rest, path, arrays)
        opt_state = {"dense": dense_state, "rows": row_state}
        return State(state.step + 1, params, opt_state, extra, state.key), metrics

    return Method(init, plain, update, sampler, rules, labels, predict=predict)


def _take(tree: dict, path: Sequence[str]) -> tuple[Any, dict]:
    """Subtree at a path of nested dicts, and the tree without it."""
    first, *further = path
    rest = {k: v for k, v in tree.items() if k != first}
    if not further:
        return tree[first], rest
    subtree, rest[first] = _take(tree[first], further)
    return subtree, rest


def _put(tree: dict, path: Sequence[str], value: Any) -> dict:
    """The tree with ``value`` at a path of nested dicts."""
    first, *further = path
    value = _put(tree.get(first, {}), further, value) if further else value
    return {**tree, first: value}
