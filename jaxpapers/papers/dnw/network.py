"""The network: characters, the components they directly use, frequencies and costs.

Built on the host, once; the other modules read its arrays.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

COSTS = ("parts", "combinations")
MAX_CLOSURES = 1 << 24
"""Nodes below all nodes, each counted for every node above it."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("comp", "whole", "mult", "level", "freq", "own_cost"),
    meta_fields=("chars", "n_levels"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class CharNet:
    """A directed acyclic graph of n nodes and E links, a pytree of its arrays.

    Attributes:
      chars: names of the nodes, by decreasing frequency, then code point.
      n_levels: number of levels L, the nodes on the longest path.
      comp: int32 (E,), the component of each link, rising.
      whole: int32 (E,), the node that directly uses it.
      mult: float (E,), how often; 0 for links that only fill a length.
      level: int32 (n,), 1 for primitives, else 1 + the components' highest.
      freq: float (n,), usage frequency, sum 1.
      own_cost: float (n,), cost of a node whose components are known.
    """

    chars: tuple[str, ...]
    n_levels: int
    comp: Any
    whole: Any
    mult: Any
    level: Any
    freq: Any
    own_cost: Any


def build_network(
    decomposition: Mapping[str, Sequence[str]],
    freq: Mapping[str, float | int],
    seeds: Iterable[str] | None = None,
    *,
    close: bool = False,
    cost: str = "parts",
    costs: Mapping[str, float | int] | None = None,
) -> CharNet:
    """The network of some characters and all their components.

    Args:
      decomposition: node -> its direct components, repeated ones as often as they occur.
        A node that is absent, has none, or contains itself is a primitive.
      freq: node -> usage frequency or count; 0 where absent.
      seeds: the wanted nodes; None: all of ``decomposition``.
      close: adds components that are not among the nodes; else they are an error.
      cost: own cost of a compound of k components with multiplicity: "parts" k,
        "combinations" k - 1; of a primitive 1.
      costs: own costs of some nodes, instead, e.g. strokes of primitives.

    Raises:
      ValueError: no nodes; a node given twice; a component outside the nodes; a cycle,
        which is named; frequencies that are negative, not finite or all zero; costs that
        are not positive; an unknown ``cost``.
    """
    if cost not in COSTS:
        raise ValueError(f"cost must be one of {COSTS}, got {cost!r}")
    wanted = list(decomposition if seeds is None else seeds)
    repeated = _repeated(wanted)
    if repeated is not None:
        raise ValueError(f"node {repeated!r} is given twice; nodes must differ")
    if not wanted:
        raise ValueError("the network has no nodes; give at least one")
    parts = _parts(decomposition, wanted, close)
    chars = sorted(parts, key=lambda c: (-freq.get(c, 0.0), c))
    index = {c: i for i, c in enumerate(chars)}
    links = {
        (index[part], index[whole]): mult
        for whole, components in parts.items()
        for part, mult in components.items()
    }
    rising = sorted(links)
    comp, whole = np.array(rising, np.int32).reshape(-1, 2).T
    level = _levels(chars, comp, whole)
    totals = {c: sum(components.values()) for c, components in parts.items()}
    less = cost == "combinations"
    own_cost = {c: float(max(total - less, 1)) for c, total in totals.items()}
    own_cost |= {c: x for c, x in (costs or {}).items() if c in index}
    return CharNet(
        tuple(chars),
        int(level.max()),
        comp.copy(),
        whole.copy(),
        np.array([links[link] for link in rising], float),
        level,
        _frequencies(chars, freq),
        _positive_costs(chars, own_cost),
    )


def check_order(order: Any, n: int) -> None:
    """Refuses an order that is not a permutation of 0 .. n - 1 (ValueError)."""
    order = np.asarray(order)
    fits = order.shape == (n,) and np.issubdtype(order.dtype, np.integer)
    if not fits or not np.array_equal(np.sort(order), np.arange(n)):
        raise ValueError(
            f"an order must be a permutation of 0 .. {n - 1}, got {order.dtype} of shape "
            f"{order.shape}: {order.ravel()[:8]} ..."
        )


def weights(net: CharNet, use_multiplicity: bool = False) -> Any:
    """A of the links: 1, or the multiplicity; 0 for links that fill."""
    return net.mult if use_multiplicity else (net.mult > 0).astype(net.freq.dtype)


def padded(net: CharNet, multiple: int) -> CharNet:
    """The same network with a number of links that ``multiple`` divides.

    The links that fill go from the last node to itself with multiplicity 0.
    """
    count = -len(net.comp) % multiple
    if not count:
        return net
    last = np.full(count, len(net.chars) - 1, np.int32)
    return dataclasses.replace(
        net,
        comp=np.concatenate([net.comp, last]),
        whole=np.concatenate([net.whole, last]),
        mult=np.concatenate([net.mult, np.zeros(count)]),
    )


def wholes_of(net: CharNet) -> list[np.ndarray]:
    """For each node, the nodes that directly use it."""
    return _grouped(net.comp, net.whole, net.mult > 0, len(net.chars))


def parts_of(net: CharNet) -> list[np.ndarray]:
    """For each node, its distinct direct components."""
    order = np.argsort(net.whole, kind="stable")
    valid = net.mult[order] > 0
    return _grouped(net.whole[order], net.comp[order], valid, len(net.chars))


def bottom_up(net: CharNet) -> np.ndarray:
    """The nodes by rising level: components before their wholes."""
    return np.argsort(net.level, kind="stable")


def _grouped(key, value, valid, n):
    ends = np.cumsum(np.bincount(key[valid], minlength=n))
    return np.split(value[valid], ends[:-1])


def _repeated(nodes):
    seen: set[str] = set()
    for node in nodes:
        if node in seen:
            return node
        seen.add(node)
    return None


def _parts(decomposition, wanted, close):
    """Node -> component -> multiplicity, for the wanted nodes and their components."""
    allowed = set(wanted)
    parts: dict[str, dict[str, int]] = {}
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node in parts:
            continue
        components = list(decomposition.get(node) or ())
        if node in components:
            components = []
        parts[node] = dict(collections.Counter(components))
        outside = [c for c in parts[node] if c not in allowed]
        if outside and not close:
            raise ValueError(
                f"component {outside[0]!r} of {node!r} is not among the nodes; add it, "
                "or all missing ones with close=True (data.close of the config)"
            )
        todo += components
    return parts


def _levels(chars, comp, whole):
    """1 for primitives, else 1 + the components' highest; link by link (Kahn)."""
    n = len(chars)
    missing = np.bincount(whole, minlength=n)
    users = _grouped(comp, whole, np.ones(len(comp), bool), n)
    level = np.ones(n, np.int32)
    ready = list(np.flatnonzero(missing == 0))
    for node in ready:  # Grows while it is read.
        for user in users[node]:
            level[user] = max(level[user], level[node] + 1)
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    if len(ready) < n:
        names = [chars[i] for i in _cycle(comp, whole, missing > 0)]
        raise ValueError(
            f"the network has a cycle: {' -> '.join(names)} (each is a component of the "
            "next); remove one of these links"
        )
    return level


def _cycle(comp, whole, stuck):
    """Nodes of one cycle, the first one again at the end."""
    part = {int(w): int(c) for c, w in zip(comp, whole) if stuck[c] and stuck[w]}
    walk = [next(iter(part))]
    while walk[-1] not in walk[:-1]:
        walk.append(part[walk[-1]])
    return walk[walk.index(walk[-1]) :][::-1]


def _frequencies(chars, freq):
    values = np.array([freq.get(c, 0.0) for c in chars], float)
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(
            f"frequencies must be finite and >= 0, got {values[i]} for {chars[i]!r}"
        )
    if not values.any():
        raise ValueError("all frequencies are 0; give at least one node a positive one")
    return values / values.sum()


def _positive_costs(chars, own_cost):
    values = np.array([own_cost[c] for c in chars], float)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"costs must be > 0, got {values[i]} for {chars[i]!r}")
    return values


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("nodes", "part", "whole"),
    meta_fields=("rounds",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Closures:
    """Every node with all nodes below it, padded to K nodes and Q links.

    Attributes:
      nodes: int32 (n, K), the node itself first; n where there is none.
      part: int32 (n, Q), the component of each link, as a column of ``nodes``.
      whole: int32 (n, Q), its whole; links from 0 to 0 fill.
      rounds: links on the longest path.
    """

    nodes: Any
    part: Any
    whole: Any
    rounds: int


def closures(net: CharNet) -> Closures:
    """The closures of all nodes under components.

    Raises:
      ValueError: more than ``MAX_CLOSURES`` nodes or links in them.
    """
    n, parts = len(net.chars), parts_of(net)
    below: list[tuple[int, ...]] = [()] * n
    for node in _bounded(net, bottom_up(net), below, "nodes"):
        under = itertools.chain(parts[node], *(below[part] for part in parts[node]))
        below[node] = tuple(dict.fromkeys(int(x) for x in under))
    nodes = [(i, *below[i]) for i in range(n)]
    links: list[list] = [[]] * n
    for node in _bounded(net, range(n), links, "links"):
        links[node] = _local_links(nodes[node], parts)
    width = max(map(len, nodes))
    size = max(1, max(map(len, links)))
    if n * max(width, size) > 4 * MAX_CLOSURES:
        raise ValueError(
            f"the network has {n:,} nodes, and up to {width:,} nodes and {size:,} links "
            "below one of them: too many to simulate"
        )
    table = np.full((n, width), n, np.int32)
    both = np.zeros((2, n, size), np.int32)
    for i, (group, pairs) in enumerate(zip(nodes, links)):
        table[i, : len(group)] = group
        if pairs:
            both[:, i, : len(pairs)] = np.array(pairs).T
    return Closures(table, both[0], both[1], net.n_levels - 1)


def _bounded(net, order, lists, kind):
    """The nodes in order; refuses when the lists, each made for its node, grow large."""
    count = 0
    for node in order:
        yield node
        count += len(lists[node])
        if count > MAX_CLOSURES:
            raise ValueError(
                f"the {len(net.chars):,} nodes have more than {MAX_CLOSURES:,} {kind} "
                f"below them in all, at node {net.chars[node]!r}: too many to simulate"
            )


def _local_links(group, parts):
    column = {node: k for k, node in enumerate(group)}
    return [(column[int(c)], column[w]) for w in group for c in parts[w]]
