"""Whole matrices for Dion's step, where exchanging them sends less than P does.

Where f devices split the shorter side of n matrices, P is summed over them: 2 n l r
numbers in a ring. An all-to-all that gives each device the whole of ceil(n / f) matrices
takes ceil(n / f) l s, and one brings the update back: with r = s / 4 and many devices a
fraction of it, as r does not shrink with f and s / f does. Q goes with its matrix. The
device that has a matrix does the whole step of it (shared with those that split the
longer side, if any do); momenta stay where they are.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp

from jaxpapers.optim.collectives import AxisNames, exchange

# Products of float32 matrices that a TPU makes while it sends a byte: 150 TFLOP a second
# in three passes, and 600 GB (v5p; 180 of v5e, whose units have 65).
FLOPS_PER_BYTE = 256


def crossings(residual: object) -> int:
    """Arrays of N's shape that cross: N, the update, and what it takes of a momentum."""
    return 3 if residual is None else 2


def exchange_pays(
    stacks: Iterable[tuple[int, int]],
    l: int,
    rank: int,
    devices: int,
    *,
    shared: bool,
    arrays: int,
    item: int,
    wire: int,
    iters: int = 1,
    averaged: bool = False,
) -> bool:
    """Whether a step takes less with whole matrices than with thin factors.

    What a device sends and computes is compared, a byte as ``FLOPS_PER_BYTE``; where the
    matrices do not fill the devices, some have more to compute. Replicas, which a slower
    network may join, must not have more to average.

    Args:
      stacks: (matrices, columns s of a device) of matrices that share l and the rank.
      l: rows of a device.
      rank: r.
      devices: f, that split s.
      shared: whether they share the orthonormalisation of thin factors.
      arrays: ``crossings``.
      item: bytes per number of N.
      wire: bytes per number of P on its way.
      iters: power iterations, each of which sends P.
      averaged: over replicas.

    Example:
      >>> options = {"shared": True, "arrays": 2, "item": 4, "wire": 4}
      >>> exchange_pays([(28, 2048 // 4)], 8192, 512, 4, **options)
      False
      >>> exchange_pays([(28, 2048 // 16)], 8192, 512, 16, **options)
      True
    """
    if devices == 1:
        return False
    thin = whole = thin_average = whole_average = 0.0
    for n, columns in stacks:
        s, mine = columns * devices, math.ceil(n / devices)
        share = n / devices if shared else n
        products, basis = 6 * l * s * rank, 4 * l * rank**2
        thin += 2 * n * l * rank * wire * iters
        thin += (n / devices * products + share * basis) / FLOPS_PER_BYTE
        whole += mine * s * (arrays * l + 2 * rank) * item
        whole += mine * (products + basis) / FLOPS_PER_BYTE
        thin_average += (share * l + n * columns) * rank
        whole_average += mine * (l + s) * rank
    return whole < thin and not (averaged and whole_average > thin_average)


def exchanged(
    factorise: Callable,
    ns: Sequence[jax.Array],
    qs: Sequence[jax.Array],
    small: Sequence[float],
    orders: Sequence[str],
    axis_name: AxisNames,
) -> tuple[list[jax.Array], list[jax.Array] | None, list[jax.Array]]:
    """``factorise`` on whole matrices, a share of them on each device.

    Args:
      factorise: (ns, qs, small, orders) -> directions, what they take of the momenta or
        None, new Qs.
      ns: N, each (batch, l, s) or (batch, s, l), blocks that are split along s.
      qs: Q, each (batch, s, r), likewise.
      small: powers of two, equal for those of equal shapes.
      orders: ``ls`` or ``sl`` of each N.
      axis_name: mesh axes that split s.

    Returns:
      As ``factorise``, for this device's blocks.
    """
    groups: dict[int, list[int]] = {}
    for i, q in enumerate(qs):
        groups.setdefault(q.shape[1], []).append(i)
    inputs: list[tuple] = []
    ways = []
    for members in groups.values():
        # One exchange for all: few matrices fill many devices badly.
        kinds = {orders[i] for i in members}
        order = kinds.pop() if len(kinds) == 1 else "ls"
        n = jnp.concatenate([_stored(ns[i], orders[i], order) for i in members])
        q = jnp.concatenate([qs[i] for i in members])
        n, n_back = exchange(n, axis_name, 0, 1 + order.index("s"))
        q, q_back = exchange(q, axis_name, 0, 1)
        inputs.append((n, q, small[members[0]], order))
        ways.append((members, order, n_back, q_back))
    directions, taken, new_qs = factorise(*(list(x) for x in zip(*inputs)))

    def own(results, *, is_q):
        blocks: list = [None] * len(qs)
        for (members, order, n_back, q_back), y in zip(ways, results):
            y = (q_back if is_q else n_back)(y)
            ends = [
                sum(len(qs[i]) for i in members[:k]) for k in range(1, len(members))
            ]
            for i, part in zip(members, jnp.split(y, ends)):
                blocks[i] = part if is_q else _stored(part, order, orders[i])
        return blocks

    return (
        own(directions, is_q=False),
        taken and own(taken, is_q=False),
        own(new_qs, is_q=True),
    )


def _stored(x: jax.Array, order: str, wanted: str) -> jax.Array:
    return x if order == wanted else jnp.swapaxes(x, -1, -2)
