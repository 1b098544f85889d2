"""Learning orders: sorts by a score, orders that respect components, random ones.

An order is an int32 permutation of the nodes, the first to learn first. A node's index is
its tie-break: nodes are numbered by decreasing frequency, then code point.
"""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpapers.papers.dnw.network import (
    CharNet,
    bottom_up,
    parts_of,
    weights,
    wholes_of,
)


def order_from_score(
    score: Float[Array, " n"], *ties: Float[Array, " n"]
) -> Int[Array, " n"]:
    """Nodes by decreasing score, equal ones by decreasing ``ties``, then by index."""
    index = jnp.arange(len(score))
    return jnp.lexsort((index, *(-t for t in reversed(ties)), -score)).astype(jnp.int32)


def rank_of(order: Int[Array, " n"]) -> Int[Array, " n"]:
    """Position of every node in an order."""
    places = jnp.arange(len(order), dtype=order.dtype)
    return jnp.zeros_like(order).at[order].set(places)


def ufo(net: CharNet) -> Float[Array, " n"]:
    """Score of the usage frequency order."""
    return jnp.asarray(net.freq)


def noo_direct(net: CharNet) -> Float[Array, " n"]:
    """Score of the node-offspring order: nodes that directly use a node."""
    comp = jnp.asarray(net.comp)
    return jax.ops.segment_sum(jnp.asarray(weights(net)), comp, len(net.chars))


def noo_all(net: CharNet) -> np.ndarray:
    """Score of the node-offspring order, distinct nodes above a node; on the host."""
    users, above = wholes_of(net), [0] * len(net.chars)
    for node in bottom_up(net)[::-1]:
        for user in users[node]:
            above[node] |= above[user] | 1 << int(user)
    return np.array([bits.bit_count() for bits in above], float)


def by_level(net: CharNet) -> Float[Array, " n"]:
    """Score of the order by level, primitives first."""
    return -jnp.asarray(net.level, float)


def frequency_per_cost(net: CharNet) -> Float[Array, " n"]:
    """Score f / c, Smith's rule without precedence."""
    return jnp.asarray(net.freq) / jnp.asarray(net.own_cost)


def first_needed(order: Int[Array, " n"], net: CharNet) -> Int[Array, " n"]:
    """T: the step of an order at which each node is first needed.

    That of itself or of the first node that is made of it.
    """
    n = len(order)

    def step(_, time):
        best = jax.ops.segment_min(
            time[net.whole], net.comp, n, indices_are_sorted=True
        )
        return jnp.minimum(time, best)

    return jax.lax.fori_loop(0, net.n_levels - 1, step, rank_of(order))


def components_first(order: Int[Array, " n"], net: CharNet) -> Int[Array, " n"]:
    """An order in which every node has its components moved to just before it.

    Components that come before it anyway stay; the result is topological.
    """
    time = first_needed(order, net)
    index = jnp.arange(len(order))
    return jnp.lexsort((index, net.level, time)).astype(jnp.int32)


def loach_order(net: CharNet) -> Int[Array, " n"]:
    """The order of Loach & Wang 2016 (arXiv 1602.08742), as its abstract reads.

    By decreasing frequency / own cost, from the last node to the first each one's
    components moved to just before it.
    """
    return components_first(
        order_from_score(frequency_per_cost(net), jnp.asarray(net.freq)), net
    )


def density_greedy(net: CharNet) -> np.ndarray:
    """Repeatedly the closure with the most frequency per cost, on the host.

    The unknown closure of v, v and its unknown components, is learned from the bottom up
    where sum f / sum c over it is largest. Greedy for 1|prec|sum f_v C_v; topological.
    """
    parts, users = parts_of(net), wholes_of(net)
    freq, cost = np.asarray(net.freq).tolist(), np.asarray(net.own_cost).tolist()
    known = [False] * len(net.chars)

    def unknown(node):
        closure, todo = {node}, [node]
        while todo:
            fresh = {int(c) for c in parts[todo.pop()] if not known[c]} - closure
            closure |= fresh
            todo += fresh
        return sorted(closure, key=lambda v: (net.level[v], v))

    def density(node):
        closure = unknown(node)
        total = sum(freq[v] for v in closure)
        return total / sum(cost[v] for v in closure)

    current = [density(node) for node in range(len(known))]
    heap = [(-d, node) for node, d in enumerate(current)]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        value, node = heapq.heappop(heap)
        if known[node] or -value != current[node]:
            continue  # Learned, or pushed again with another density since.
        learned = unknown(node)
        for v in learned:
            known[v] = True
        order += learned
        for w in _above(learned, users, known):
            current[w] = density(w)
            heapq.heappush(heap, (-current[w], w))
    return np.array(order, np.int32)


def _above(nodes, users, known):
    """Unknown nodes that some of the given ones are part of, in increasing order."""
    reached: set[int] = set()
    todo = list(nodes)
    while todo:
        fresh = {int(w) for w in users[todo.pop()] if not known[w]} - reached
        reached |= fresh
        todo += fresh
    return sorted(reached)


def sample_order(
    key: Key[Array, ""], score: Float[Array, " n"], temperature: float = 1.0
) -> Int[Array, " n"]:
    """A Plackett-Luce order: the next node with probability ~ score^(1 / temperature).

    Drawn by Gumbel noise on log(score) / temperature; nodes of score 0 come last, by
    index. Temperature 0 is the sort by decreasing score.

    Args:
      key: random key.
      score: not negative, e.g. W.
      temperature: not negative.

    Raises:
      ValueError: negative temperature.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if temperature == 0:
        return order_from_score(score)
    noise = jax.random.gumbel(key, score.shape, score.dtype)
    return order_from_score(jnp.log(score) / temperature + noise)


def log_prob(
    order: Int[Array, " n"], score: Float[Array, " n"], temperature: float = 1.0
) -> Float[Array, ""]:
    """Log-probability of ``sample_order`` drawing an order, for positive scores."""
    logit = jnp.log(score[order]) / temperature
    remaining = jax.lax.cumlogsumexp(logit, reverse=True)
    return (logit - remaining).sum()
