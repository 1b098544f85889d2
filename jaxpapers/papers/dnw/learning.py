"""Learning in an order: its cost, and the share of running text that is covered.

Both simulators give one point per learned node. A node whose components are unknown costs
the sum of its cost and of the costs of all unknown nodes below it; the walk stops at
known nodes. Under ``learn`` these components are then known, under ``transient`` they
are paid for again until their own turn comes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxpapers.papers.dnw.network import CharNet, Closures, check_order
from jaxpapers.papers.dnw.orders import components_first, first_needed, rank_of

CREDITS = ("transient", "learn")
SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)


class Curve(NamedTuple):
    """A course of learning, after each of n steps.

    Attributes:
      cost: C, cumulative.
      usage: F, summed frequency of the known nodes, 1 at the end.
      known: N, number of known nodes.
    """

    cost: Float[Array, " n"]
    usage: Float[Array, " n"]
    known: Int[Array, " n"]


def simulate_learn(order: Int[Array, " n"], net: CharNet) -> Curve:
    """Components of a target are learned with it; a point per target.

    Where n targets include components that are known by then, nothing is added. See
    ``components_first`` for the same course with a point per node.
    """
    time = first_needed(order, net)

    def total(x):
        return jnp.cumsum(jax.ops.segment_sum(x, time, len(order)))

    known = total(jnp.ones_like(order))
    return Curve(total(jnp.asarray(net.own_cost)), total(jnp.asarray(net.freq)), known)


def simulate_transient(
    order: Int[Array, " n"],
    net: CharNet,
    closures: Closures,
    *,
    chunk: int = 1024,
    mesh: Mesh | None = None,
) -> Curve:
    """Components of a target are paid for but not learned; a point per target.

    Args:
      order: permutation of the nodes.
      net: the network.
      closures: ``network.closures(net)``.
      chunk: targets at a time on a device, which bounds memory.
      mesh: targets over its axis ``data``; None: one device.
    """
    costs = functools.partial(target_costs, chunk=chunk)
    if mesh is not None:
        closures = _divided(closures, mesh.shape["data"])
        specs = (P(), P(), P("data"))
        costs = jax.shard_map(costs, mesh=mesh, in_specs=specs, out_specs=P("data"))
    cost = costs(rank_of(order), net, closures)[order]
    known = 1 + jnp.arange(len(order), dtype=order.dtype)
    usage = jnp.cumsum(jnp.asarray(net.freq)[order])
    return Curve(jnp.cumsum(cost), usage, known)


def target_costs(
    place: Int[Array, " n"], net: CharNet, closures: Closures, chunk: int = 1024
) -> Float[Array, " m"]:
    """Cost of each target at its turn under ``transient``.

    Args:
      place: position of every node in the order.
      net: the network.
      closures: of m targets, all or a shard of them.
      chunk: targets at a time.
    """
    # One more entry, for columns without a node: never later, costs nothing.
    place = jnp.append(place, -1)
    own_cost = jnp.append(jnp.asarray(net.own_cost), 0)

    def one(nodes, part, whole):
        later = place[nodes] > place[nodes[0]]

        def step(_, need):
            return need.at[part].max(need[whole] & later[part])

        need = lax.fori_loop(0, closures.rounds, step, nodes == nodes[0])
        return jnp.where(need, own_cost[nodes], 0).sum()

    tables = (closures.nodes, closures.part, closures.whole)
    tables = jax.tree.map(jnp.asarray, tables)
    return lax.map(lambda x: one(*x), tables, batch_size=chunk)


def _divided(closures: Closures, size: int) -> Closures:
    """Closures padded to a multiple of ``size``; targets that are added cost nothing."""
    n = len(closures.nodes)

    def fill(table, value):
        return jnp.pad(table, ((0, -n % size), (0, 0)), constant_values=value)

    return dataclasses.replace(
        closures,
        nodes=fill(closures.nodes, n),
        part=fill(closures.part, 0),
        whole=fill(closures.whole, 0),
    )


def simulate(
    order: Int[Array, " n"], net: CharNet, closures: Closures, credit: str = "transient"
) -> Curve:
    """The course of learning with a point per learned node, for either credit.

    Args:
      order: permutation of the nodes; inside jit its values are not checked.
      net: the network.
      closures: ``network.closures(net)``.
      credit: "transient" or "learn".

    Raises:
      ValueError: another credit, or an order that is no permutation.
    """
    if credit not in CREDITS:
        raise ValueError(f"credit must be one of {CREDITS}, got {credit!r}")
    if not isinstance(order, jax.core.Tracer):
        check_order(order, len(net.chars))
    if credit == "learn":
        return simulate_learn(components_first(order, net), net)
    return simulate_transient(order, net, closures)


class Metrics(NamedTuple):
    """Numbers of a curve.

    Attributes:
      cost: cost to reach each share; NaN where it is not reached.
      known: nodes to reach each share; NaN where it is not reached.
      area: mean usage over costs from 0 to C0.
      completion: S, the frequency-weighted mean cost at which nodes become known.
    """

    cost: Float[Array, " shares"]
    known: Float[Array, " shares"]
    area: Float[Array, ""]
    completion: Float[Array, ""]


def curve_metrics(
    curve: Curve, limit: Float[Array, ""] | float, shares: Any = SHARES
) -> Metrics:
    """Costs to reach shares of usage, area under usage against cost, S.

    Args:
      curve: of a simulator.
      limit: C0 of the area; the tables use half of the sum of own costs.
      shares: of running text.
    """
    usage = curve.usage
    # The last point is 1 up to rounding of the sums.
    slack = 1e-12 if usage.dtype == jnp.float64 else 1e-6
    first = jnp.searchsorted(usage, jnp.asarray(shares, usage.dtype) - slack)
    reached = first < len(usage)
    at = jnp.minimum(first, len(usage) - 1)
    x = jnp.concatenate([jnp.zeros(1, curve.cost.dtype), curve.cost])
    y = jnp.concatenate([jnp.zeros(1, usage.dtype), usage])
    # Points beyond C0 fold onto it, where they add nothing; it ends the curve anyway.
    cut = jnp.append(jnp.minimum(x, limit), limit)
    return Metrics(
        jnp.where(reached, curve.cost[at], jnp.nan),
        jnp.where(reached, curve.known[at], jnp.nan),
        jnp.trapezoid(jnp.interp(cut, x, y), cut) / limit,
        completion(curve),
    )


def completion(curve: Curve) -> Float[Array, ""]:
    """S of a curve with a point per learned node."""
    return (jnp.diff(curve.usage, prepend=0) * curve.cost).sum()


def weighted_completion(
    order: Int[Array, " n"], net: CharNet, closures: Closures, credit: str = "transient"
) -> Float[Array, ""]:
    """S = sum_v f_v C(v known), the scheduling objective 1|prec|sum w_j C_j."""
    return completion(simulate(order, net, closures, credit))


def smith_lower_bound(freq: Any, cost: Any) -> float:
    """S of the sort by f / c without precedence, which no order is below."""
    freq, cost = np.asarray(freq, float), np.asarray(cost, float)
    order = np.argsort(-freq / cost, kind="stable")
    return float((freq[order] * np.cumsum(cost[order])).sum())
