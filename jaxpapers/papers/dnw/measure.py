"""The distributed node weight and its gradient: W = f + b A W on an acyclic network.

The arrays of the network are arguments, so that everything can be differentiated and
mapped over; ``sweep`` takes the network and checks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxpapers.papers.dnw.network import CharNet, bottom_up, padded, weights, wholes_of


def dnw(
    freq: Float[Array, " n"],
    comp: Int[Array, " E"],
    whole: Int[Array, " E"],
    weight: Float[Array, " E"],
    b: Float[Array, ""] | float,
    *,
    n_levels: int,
    axis: str | None = None,
) -> Float[Array, " n"]:
    """W by n_levels - 1 steps of W <- f + b A W, after which it is exact.

    Args:
      freq: f.
      comp: component of each link, rising.
      whole: whole of each link.
      weight: A of each link.
      b: the inherited fraction; any real number.
      n_levels: nodes on the longest path.
      axis: mesh axis over which the links are split, inside ``shard_map``.
    """

    def step(_, w):
        inherited = jax.ops.segment_sum(
            weight * w[whole], comp, freq.shape[0], indices_are_sorted=True
        )
        if axis is not None:
            inherited = lax.psum(inherited, axis)
        return freq + b * inherited

    return lax.fori_loop(0, n_levels - 1, step, freq)


class LevelLinks(NamedTuple):
    """Links by the level of their whole, highest first, padded to the largest level.

    Attributes:
      comp: int32 (L - 1, M).
      whole: int32 (L - 1, M).
      weight: float (L - 1, M), A; 0 for links that fill.
    """

    comp: Any
    whole: Any
    weight: Any


def level_links(net: CharNet, use_multiplicity: bool = False) -> LevelLinks:
    """The links of a network for ``dnw_levels``."""
    valid = net.mult > 0
    weight = np.asarray(weights(net, use_multiplicity))
    comp, whole, weight = net.comp[valid], net.whole[valid], weight[valid]
    row = net.n_levels - net.level[whole]
    size = np.bincount(row, minlength=1).max(initial=1)
    shape = (net.n_levels - 1, int(size))
    last = len(net.chars) - 1
    links = LevelLinks(
        np.full(shape, last, np.int32), np.full(shape, last, np.int32), np.zeros(shape)
    )
    for i in range(net.n_levels - 1):
        links_of_row = row == i
        count = int(links_of_row.sum())
        for table, values in zip(links, (comp, whole, weight)):
            table[i, :count] = values[links_of_row]
    return links


def dnw_levels(
    freq: Float[Array, " n"],
    comp: Int[Array, "steps M"],
    whole: Int[Array, "steps M"],
    weight: Float[Array, "steps M"],
    b: Float[Array, ""] | float,
) -> Float[Array, " n"]:
    """W in one pass from the top level down, O(E) instead of O(E L).

    When the links into a level are added, all wholes of that level are final.

    Args:
      freq: f.
      comp: see ``LevelLinks``.
      whole: see ``LevelLinks``.
      weight: see ``LevelLinks``.
      b: the inherited fraction.
    """

    def step(w, links):
        c, v, a = links
        return w.at[c].add(b * a * w[v], indices_are_sorted=True), None

    return lax.scan(step, freq, (comp, whole, weight))[0]


def sweep(
    net: CharNet,
    b: Any,
    *,
    mesh: Mesh | None = None,
    use_multiplicity: bool = False,
    allow_any_b: bool = False,
) -> Float[Array, "B n"]:
    """W for each of B values of b, in one program.

    Args:
      net: the network.
      b: (B,), each in [0, 1].
      mesh: links over its axis ``data``, values of b over ``model``; None: one device,
        one pass over the levels.
      use_multiplicity: A counts how often a component occurs.
      allow_any_b: b may be any real number; W exists, as A is nilpotent.

    Raises:
      ValueError: b is not a vector of numbers or lies outside [0, 1].
    """
    b = np.atleast_1d(np.asarray(b, float))
    if b.ndim != 1 or not np.isfinite(b).all():
        raise ValueError(f"b must be a vector of numbers, got {b.tolist()}")
    if not allow_any_b and (b.min(initial=0) < 0 or b.max(initial=0) > 1):
        raise ValueError(
            f"b must lie in [0, 1], got {b.tolist()}; allow_any_b=True computes W anyway"
        )
    if mesh is None:
        links = level_links(net, use_multiplicity)
        return _levels_of_each(jnp.asarray(net.freq), *map(jnp.asarray, links), b)
    net = padded(net, mesh.shape["data"])
    links = (net.comp, net.whole, weights(net, use_multiplicity))
    padded_b = np.pad(b, (0, -len(b) % mesh.shape["model"]), mode="edge")
    w = _sharded(mesh, net.n_levels)(jnp.asarray(net.freq), *links, padded_b)
    return w[: len(b)]


@jax.jit
def _levels_of_each(freq, comp, whole, weight, b):
    weight, b = weight.astype(freq.dtype), b.astype(freq.dtype)
    return jax.vmap(lambda x: dnw_levels(freq, comp, whole, weight, x))(b)


@functools.lru_cache
def _sharded(mesh: Mesh, n_levels: int) -> Any:
    def local(freq, comp, whole, weight, b):
        one = functools.partial(dnw, n_levels=n_levels, axis="data")
        weight, b = weight.astype(freq.dtype), b.astype(freq.dtype)
        freq = lax.pcast(freq, ("model",), to="varying")
        return jax.vmap(lambda x: one(freq, comp, whole, weight, x))(b)

    links = P("data")
    specs = (P(), links, links, links, P("model"))
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("model"))
    )


class Contribution(NamedTuple):
    """Contribution of one node to another's W.

    Attributes:
      char: the node w.
      amount: b^k f_w, summed over the paths of k links from the explained node to w.
      share: of W.
    """

    char: str
    amount: float
    share: float


def explain(
    net: CharNet, char: str, b: float = 0.35, top: int = 10
) -> tuple[Contribution, ...]:
    """Why a node comes early: the largest terms of its W, largest first.

    Args:
      net: the network.
      char: a node.
      b: the inherited fraction.
      top: number of terms.

    Raises:
      ValueError: no such node.
    """
    if char not in net.chars:
        raise ValueError(f"{char!r} is not a node of the network")
    start = net.chars.index(char)
    paths = np.zeros(len(net.chars))
    paths[start] = 1.0
    users = wholes_of(net)
    for node in bottom_up(net):
        if paths[node]:
            paths[users[node]] += b * paths[node]
    amount = paths * net.freq
    total = amount.sum()
    largest = np.argsort(-amount, kind="stable")[:top]
    return tuple(
        Contribution(net.chars[i], float(amount[i]), float(amount[i] / total))
        for i in largest
        if amount[i] > 0
    )
