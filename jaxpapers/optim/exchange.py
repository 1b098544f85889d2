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

from jaxpapers.optim.collectives import AxisNames, all_to_all

# What a v5p multiplies (float32 in three passes) while it sends a byte; a v5e 330, a v6e
# 770, for which this overrates products.
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
        # N Q and N^T P; P Q^T and, without a residual, P R^T.
        products = (4 * iters + 2 * (arrays - 1)) * l * s * rank
        # Two Gram passes, with twice the bfloat16 passes of other products.
        basis = 16 * iters * l * rank**2
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
    inputs, ways_back = [], []
    for members in groups.values():
        # One exchange for all: few matrices fill many devices badly.
        alike = len({orders[i] for i in members}) == 1
        order = orders[members[0]] if alike else "ls"
        n = jnp.concatenate([_stored(ns[i], orders[i], order) for i in members])
        q = jnp.concatenate([qs[i] for i in members])
        n, n_back = all_to_all(n, axis_name, 0, 1 + order.index("s"))
        q, q_back = all_to_all(q, axis_name, 0, 1)
        inputs.append((n, q, small[members[0]], order))
        ways_back.append((members, order, n_back, q_back))
    directions, taken, new_qs = factorise(*(list(x) for x in zip(*inputs)))

    def blocks(stacks, *, is_q):
        out: list = [None] * len(qs)
        for (members, order, n_back, q_back), y in zip(ways_back, stacks):
            y = (q_back if is_q else n_back)(y)
            ends = [
                sum(len(qs[i]) for i in members[:k]) for k in range(1, len(members))
            ]
            for i, part in zip(members, jnp.split(y, ends)):
                out[i] = part if is_q else _stored(part, order, orders[i])
        return out

    return (
        blocks(directions, is_q=False),
        taken and blocks(taken, is_q=False),
        blocks(new_qs, is_q=True),
    )


def _stored(x: jax.Array, order: str, wanted: str) -> jax.Array:
    return x if order == wanted else jnp.swapaxes(x, -1, -2)
