"""The user behaviour tree of SIM: user -> category -> behaviours, in flat arrays.

arXiv 2006.05639, section 3.2: an index for ``ops.search.hard_search`` whose queries take
time independent of the length of the history.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxpapers.ops.search import check_k


class BehaviourTree(NamedTuple):
    """Index user -> category -> behaviours in time order, in flat arrays.

    Attributes:
      user_start: int32 (U + 1), where each user's categories start.
      cats: int32 (C), categories of the users, increasing within one user.
      cat_start: int32 (C + 1), where their behaviours start.
      items: int32 (N).
      times: int32 (N), oldest first within one category.
    """

    user_start: Any
    cats: Any
    cat_start: Any
    items: Any
    times: Any


class Behaviours(NamedTuple):
    """Behaviours of one category, newest first; zeros in empty slots.

    Attributes:
      items: int32 (.., K).
      times: int32 (.., K).
      valid: bool (.., K).
    """

    items: Any
    times: Any
    valid: Any


def build_ubt(
    user: Any, item: Any, cat: Any, time: Any, *, users: int = 0, cats: int = 0
) -> BehaviourTree:
    """Builds the user behaviour tree of a log, on the host.

    Rows may be in any order: they are sorted by user, category and time. Of equal times
    the later row is newer, as in ``hard_search``.

    Args:
      user: (N), 0 .. users - 1.
      item: (N).
      cat: (N), categories of the items, 0 .. cats - 1.
      time: (N), e.g. unix seconds.
      users: number of users; 0: the largest id + 1.
      cats: number of categories; 0: not checked.

    Returns:
      NumPy arrays.

    Raises:
      ValueError: lengths that differ, ids out of range, more than 2^31 - 1 rows, or times
        that int32 does not hold.

    Example:
      >>> tree = build_ubt([1, 0, 1], [5, 6, 7], [3, 3, 2], [10, 20, 30])
      >>> tree.user_start.tolist(), tree.cats.tolist(), tree.items.tolist()
      ([0, 1, 3], [3, 2, 3], [6, 7, 5])
    """
    log = {"user": user, "item": item, "cat": cat, "time": time}
    log = {name: np.asarray(x).reshape(-1) for name, x in log.items()}
    sizes = {name: len(x) for name, x in log.items()}
    top = np.iinfo(np.int32).max
    if len(set(sizes.values())) > 1 or sizes["user"] > top:
        raise ValueError(
            "build_ubt needs user, item, cat and time of one length, at most "
            f"{top}, got {sizes}"
        )
    users = users or int(log["user"].max(initial=-1)) + 1
    limits = {"user": users, "item": top, "cat": cats or top, "time": top}
    for name, limit in limits.items():
        low, high = log[name].min(initial=0), log[name].max(initial=0)
        if low < 0 or high >= limit > 0:
            raise ValueError(
                f"build_ubt: {name} must be within 0 .. {limit - 1}, got {low} .. {high}"
            )
    order = np.lexsort((log["time"], log["cat"], log["user"]))
    user, item, cat, time = (log[n][order].astype(np.int32) for n in log)
    new = np.ones(len(user), bool)
    new[1:] = (user[1:] != user[:-1]) | (cat[1:] != cat[:-1])
    start = np.flatnonzero(new)
    user_start = np.searchsorted(user[start], np.arange(users + 1))
    return BehaviourTree(
        user_start.astype(np.int32),
        cat[start],
        np.append(start, len(user)).astype(np.int32),
        item,
        time,
    )


def ubt_query(
    ubt: BehaviourTree, user: Int[Array, "*batch"], cat: Int[Array, "*batch"], k: int
) -> Behaviours:
    """The k most recent behaviours of users in categories: ``hard_search`` by index.

    A binary search among the user's categories, then one slice, at a cost independent of
    the length of the history.

    Args:
      ubt: see ``build_ubt``.
      user: unknown users have no behaviours.
      cat: categories of the candidates.
      k: slots of the result.

    Raises:
      ValueError: k below 1.
    """
    check_k(k)
    categories, total = len(ubt.cats), len(ubt.items)
    slots = (1,) * user.ndim + (k,)
    if not total:
        none = jnp.zeros((*user.shape, k), jnp.int32)
        return Behaviours(none, none, none > 0)
    ubt = jax.tree.map(jnp.asarray, ubt)
    known = (user >= 0) & (user < len(ubt.user_start) - 1)
    user = jnp.where(known, user, 0)
    first, end = ubt.user_start[user], ubt.user_start[user + 1]

    def halve(_, span):
        low, high = span
        middle = (low + high) // 2
        right = ubt.cats[jnp.minimum(middle, categories - 1)] < cat
        go = low < high
        return jnp.where(go & right, middle + 1, low), jnp.where(
            go & ~right, middle, high
        )

    place, _ = lax.fori_loop(0, categories.bit_length(), halve, (first, end))
    hit = known & (place < end)
    place = jnp.minimum(place, categories - 1)
    hit &= ubt.cats[place] == cat
    newest = ubt.cat_start[place + 1] - 1
    where = newest[..., None] - jnp.arange(k, dtype=jnp.int32).reshape(slots)
    valid = hit[..., None] & (where >= ubt.cat_start[place][..., None])
    where = jnp.where(valid, where, 0)
    items, times = (jnp.where(valid, x[where], 0) for x in (ubt.items, ubt.times))
    return Behaviours(items, times, valid)
