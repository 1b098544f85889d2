r"""Row-sparse optimizers: a step's cost is in the rows of its batch, not the vocabulary.

A gradient is a tree of ``Rows`` (ids and values, each id once), an update too; states are
as large as the tables, but only those rows of them are read and written. The
transformations chain like optax's own. They need a chain made for ``Rows``: optax's
element-wise ones would change the ids.

``params`` of an update are ``Rows`` as well: the values of the rows of the gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jaxpapers.ops import rows
from jaxpapers.ops.rows import FILL, Rows, is_rows
from jaxpapers.optim.config import read, schedule, unclipped

__all__ = [
    "FILL", "STATE_RULES", "LazyAdamState", "MbaState", "RowAdagradState", "Rows",
    "apply_rows", "from_config", "lazy_adam", "mba_transform", "row_adagrad",
    "row_sgd", "rows_of",
]  # fmt: skip


def _row_state_spec(path, leaf, param, spec):
    """State of one number per row lies where the row does."""
    del path
    per_row = leaf.shape == param.shape[:1]
    return P(*spec[:1]) if per_row else spec if leaf.shape == param.shape else P()


STATE_RULES = ((r"/(sum_of_squares|counts)/$", _row_state_spec),)
"""Where per-row state lies; for ``Method.rules``, with the tables' own rule after it."""


class RowAdagradState(NamedTuple):
    """State of ``row_adagrad``.

    Attributes:
      count: steps.
      sum_of_squares: (V,) per table, of the rows' mean squared gradients.
    """

    count: jax.Array
    sum_of_squares: Any


class LazyAdamState(NamedTuple):
    """State of ``lazy_adam``.

    Attributes:
      count: steps.
      mu: as the tables, first moments.
      nu: as the tables, second moments.
    """

    count: jax.Array
    mu: Any
    nu: Any


class MbaState(NamedTuple):
    """State of ``mba_transform``.

    Attributes:
      counts: float32 (V,) per table.
    """

    counts: Any


def rows_of(gradient: jax.Array, ids: jax.Array) -> Rows:
    """Rows of gradients per position, those of the same id summed.

    Args:
      gradient: (n, D), per position.
      ids: (n,); padding is left out.
    """
    ids = rows.resolve(ids, FILL)
    unique = rows.unique(ids, FILL)
    place = jnp.searchsorted(unique, ids)
    place = jnp.where(ids == rows.PADDING, len(unique), place)
    values = jnp.zeros((len(unique), gradient.shape[1]), gradient.dtype)
    return Rows(unique, values.at[place].add(gradient, mode="drop"))


def apply_rows(params: Any, updates: Any) -> Any:
    """Tables plus row-sparse updates; all other rows keep their bits.

    Args:
      params: tree of tables (V, D).
      updates: tree of ``Rows``.
    """
    return jax.tree.map(
        lambda u, p: rows.add(p, u.ids, u.values.astype(p.dtype)),
        updates,
        params,
        is_leaf=is_rows,
    )


def row_sgd(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """w_j <- w_j - lr g_j for the rows of the gradient."""

    def init(params):
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        rate = _rate(learning_rate, state.count)
        updates = _map(lambda u: -rate * u.values, updates)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)


def row_adagrad(
    learning_rate: optax.ScalarOrSchedule, *, eps: float = 1e-8, initial: float = 0.0
) -> optax.GradientTransformation:
    r"""Adagrad with one accumulator per row, as large embedding models use it.

    $$ a_j \leftarrow a_j + \tfrac1D \|g_j\|^2, \quad
       w_j \leftarrow w_j - \eta g_j / (\sqrt{a_j} + \epsilon) $$

    Args:
      learning_rate: number or schedule.
      eps: added to the root.
      initial: value that accumulators start with.
    """

    def init(params):
        start = jax.tree.map(
            lambda p: jnp.full(p.shape[:1], initial, jnp.float32), params
        )
        return RowAdagradState(jnp.zeros((), jnp.int32), start)

    def update(updates, state, params=None):
        del params
        rate = _rate(learning_rate, state.count)

        def one(u, total):
            square = jnp.square(u.values.astype(jnp.float32)).mean(-1)
            new = rows.take(total, u.ids) + square
            # Rows without any gradient so far, and FILL, would divide by eps alone.
            root = jnp.where(new > 0, jnp.sqrt(new), 1.0) + eps
            step = -rate * u.values / root[:, None]
            # Written from what was read, so the write comes after it: in place.
            return Rows(u.ids, step), rows.put(total, u.ids, new)

        updates, (totals,) = _map_with(one, updates, state.sum_of_squares)
        return updates, RowAdagradState(state.count + 1, totals)

    return optax.GradientTransformation(init, update)


def lazy_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam whose moments move only in the steps that touch their row.

    Equal to Adam while every row is touched in every step. The bias correction counts
    the optimizer's steps, not the row's, so a rare row's first steps are smaller than
    Adam's would be after the same number of gradients.

    Args:
      learning_rate: number or schedule.
      b1: decay of the first moments.
      b2: decay of the second moments.
      eps: added to the root.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return LazyAdamState(
            jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params)
        )

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        rate = _rate(learning_rate, state.count)
        bias1, bias2 = 1 - b1**count, 1 - b2**count

        def one(u, mu, nu):
            m = b1 * rows.take(mu, u.ids) + (1 - b1) * u.values
            v = b2 * rows.take(nu, u.ids) + (1 - b2) * jnp.square(u.values)
            step = -rate * (m / bias1) / (jnp.sqrt(v / bias2) + eps)
            return Rows(u.ids, step), rows.put(mu, u.ids, m), rows.put(nu, u.ids, v)

        updates, (mu, nu) = _map_with(one, updates, state.mu, state.nu)
        return updates, LazyAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def mba_transform(lam: float, counts: Any) -> optax.GradientTransformation:
    r"""Mini-batch aware L2 (DIN, arXiv 1706.06978, eq 7): adds $\lambda w_j / n_j$.

    Each row of the gradient gets it once, however often the batch has its id. Rows that
    are not in the batch get nothing. Rows with $n_j = 0$ have no penalty. Put it before
    the optimizer: ``optax.chain(mba_transform(..), row_adagrad(..))``.

    Args:
      lam: weight of the penalty (paper: 0.01).
      counts: tree as the tables, of (V,): training samples that contain the id.

    Raises:
      ValueError: negative lam, or counts that do not fit their table.
    """
    if not lam >= 0:
        raise ValueError(f"mba_transform: lam must be >= 0, got {lam}")

    def init(params):
        def check(table, n):
            if np.shape(n) != table.shape[:1]:
                raise ValueError(
                    f"mba_transform: counts of shape {np.shape(n)} for a table of "
                    f"{table.shape[0]} rows; pad them with zeros to the table's rows"
                )
            return jnp.asarray(n, jnp.promote_types(jnp.float32, table.dtype))

        return MbaState(jax.tree.map(check, params, counts))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "mba_transform needs params: the Rows that the gradient is of"
            )

        def one(u, w, n):
            n = rows.take(n, u.ids)[:, None]
            decay = jnp.where(n > 0, lam / jnp.where(n > 0, n, 1.0), 0.0)
            return Rows(u.ids, u.values + decay * w.values)

        return jax.tree.map(one, updates, params, state.counts, is_leaf=is_rows), state

    return optax.GradientTransformation(init, update)


def from_config(
    config: Any, steps: int
) -> tuple[optax.GradientTransformation, optax.GradientTransformation | None]:
    """Optimizers of ``method.tables.row_gradient``: ``tx`` and ``table_tx``.

    Neither clips: ``row_gradient`` clips the gradients of both together.

    Args:
      config: a config's group ``optim``: the fields of ``optim.Options`` and
        ``tables``, the tables' optimizer: lazy_adam, row_adagrad or row_sgd; dense: that
        of all other parameters (``table_tx`` is None).
      steps: optimizer steps of the run.

    Raises:
      ValueError: see ``optim.Options``; unknown ``tables``.
    """
    sparse = {"lazy_adam": lazy_adam, "row_adagrad": row_adagrad, "row_sgd": row_sgd}
    if config["tables"] not in (*sparse, "dense"):
        raise ValueError(
            f"optim.tables must be one of {', '.join(sparse)}, dense, got "
            f"{config['tables']!r}"
        )
    dense = read(config)
    tx = unclipped(dense, steps)
    if config["tables"] == "dense":
        return tx, None
    return tx, sparse[config["tables"]](schedule(dense, steps))


def _rate(learning_rate: Any, count: jax.Array) -> Any:
    return learning_rate(count) if callable(learning_rate) else learning_rate


def _map(f: Callable, updates: Any) -> Any:
    """Replaces the values of every ``Rows``."""
    return jax.tree.map(lambda u: Rows(u.ids, f(u)), updates, is_leaf=is_rows)


def _map_with(f: Callable, updates: Any, *states: Any) -> tuple[Any, tuple]:
    """(updates, states) from f(rows, *state) -> (rows, *state) at every leaf."""
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_rows)
    results = [
        f(u, *s) for u, *s in zip(leaves, *(treedef.flatten_up_to(s) for s in states))
    ]
    first, *rest = (jax.tree.unflatten(treedef, x) for x in zip(*results))
    return first, tuple(rest)
