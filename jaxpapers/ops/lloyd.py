"""Lloyd's iterations on one device's points, for ``ops.kmeans``.

A point whose bounds say that no other centre can be nearer is not looked at again
(Hamerly 2010): its distance to its own centre grows by at most what that centre has
moved, that to any other falls by at most what the others have. The others are gathered
into the smallest of a few buckets, so that late iterations cost a fraction of the first;
labels are those of Lloyd up to rounding.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST = lax.Precision.HIGHEST
_BUCKETS = (32, 8, 2)  # Shares of the points, as divisors.
_SLACK = 1e-4  # Rounding of bounds, relative.


class Points(NamedTuple):
    """What the iterations do not change.

    Attributes:
      x: (N, D) of this device, rows of weight 0 are zero.
      weight: (N,), 0 for padding.
      squares: (N,), |x|^2.
      total: number of points of all devices.
      chunk: points whose distances are in memory at once; divides N.
      axis: mesh axis of the devices, or None.
    """

    x: Any
    weight: Any
    squares: Any
    total: int
    chunk: int
    axis: Any


class Clusters(NamedTuple):
    """State of the iterations: an assignment to centres.

    Attributes:
      centres: (K, D).
      labels: (N,).
      upper: (N,), at least the distance to the own centre.
      lower: (N,), at most the distance to any other.
      sums: (K, D) of the members, of all devices.
      counts: (K,) of the members, of all devices.
      history: J after each assignment.
      step: assignments after the first one.
      moved: whether the last assignment changed any label.
    """

    centres: Any
    labels: Any
    upper: Any
    lower: Any
    sums: Any
    counts: Any
    history: Any
    step: Any
    moved: Any


def run(points: Points, centres: Any, options: Any) -> Clusters:
    """Iterations from centres until no label changes, ``options.iterations`` at most."""
    labels, upper, lower = assigned(points, centres, options)
    sums, counts = members(points, labels, len(centres))
    history = jnp.zeros(options.iterations + 1, points.x.dtype)
    zero = jnp.zeros((), jnp.int32)
    start = Clusters(
        centres, labels, upper, lower, sums, counts, history, zero, jnp.ones((), bool)
    )
    start = _recorded(points, start)
    return lax.while_loop(
        lambda s: s.moved & (s.step < options.iterations),
        lambda s: _iterated(points, s, options),
        start,
    )


def _iterated(points: Points, s: Clusters, options: Any) -> Clusters:
    """One update of the centres and one assignment."""
    centres = s.sums / jnp.maximum(s.counts, 1)[:, None]
    centres = jnp.where(s.counts[:, None] > 0, centres, s.centres)
    empty = (s.counts == 0).any()
    centres = lax.cond(
        empty,
        lambda: refill(points, own_distance(points, s), s.counts, centres),
        lambda: centres,
    )
    if options.balanced:
        labels, upper, lower = assigned(points, centres, options)
        sums, counts = members(points, labels, len(centres))
    else:
        shift = jnp.sqrt(jnp.square(centres - s.centres).sum(1))
        farthest = jnp.argmax(shift)
        second = jnp.where(jnp.arange(len(shift)) == farthest, 0, shift).max()
        upper = s.upper + shift[s.labels]
        lower = s.lower - jnp.where(s.labels == farthest, second, shift[farthest])
        lower = jnp.where(empty, -jnp.inf, lower)
        old = s._replace(centres=centres, upper=upper, lower=lower)
        labels, upper, lower = _reassigned(points, old, options)
        sums, counts = _moved_members(points, old, labels)
    changed = _sum((labels != s.labels).astype(jnp.int32).sum(), points.axis)
    new = Clusters(
        centres, labels, upper, lower, sums, counts, s.history, s.step + 1,
        (changed > 0) | (counts == 0).any(),
    )  # fmt: skip
    return _recorded(points, new)


def objective(points: Points, s: Clusters) -> jax.Array:
    """J of an assignment, from the sums of the clusters."""
    total = _sum((points.squares * points.weight).sum(), points.axis)
    cross = (s.centres * s.sums).sum()
    inside = (s.counts * jnp.square(s.centres).sum(1)).sum()
    return jnp.maximum(total - 2 * cross + inside, 0)


def _recorded(points, s):
    value = objective(points, s)
    later = jnp.arange(len(s.history)) >= s.step
    return s._replace(history=jnp.where(later, value, s.history))


def gap(x: Any, centres: Any) -> jax.Array:
    """|x - c|^2 - |x|^2 of every point and centre."""
    dots = jnp.matmul(x, centres.T, precision=HIGHEST)
    return jnp.square(centres).sum(1)[None] - 2 * dots


def assigned(points: Points, centres: Any, options: Any) -> tuple[Any, Any, Any]:
    """Labels of all points, distances to the own and to the nearest other centre."""
    price = jnp.zeros(len(centres), points.x.dtype)
    if options.balanced:
        price = prices(points, centres, options)
    return _in_chunks(points.x, points.squares, centres, price, points.chunk)


def _in_chunks(x, squares, centres, price, chunk):
    def part(rows):
        own, square = rows
        distance = gap(own, centres)
        score = distance - price[None]
        labels = jnp.argmin(score, 1).astype(jnp.int32)
        chosen = labels[:, None] == jnp.arange(len(centres))[None]
        near = jnp.where(chosen, distance, 0).sum(1)
        other = jnp.where(chosen, jnp.inf, distance).min(1)
        near, other = (jnp.sqrt(jnp.maximum(d + square, 0)) for d in (near, other))
        return labels, near, other

    cut = (x.reshape(-1, chunk, x.shape[1]), squares.reshape(-1, chunk))
    return jax.tree.map(lambda y: y.reshape(-1), lax.map(part, cut))


def _reassigned(points: Points, s: Clusters, options: Any) -> tuple[Any, Any, Any]:
    """``assigned`` of the points whose bounds do not settle it."""
    n, price = len(points.x), jnp.zeros(len(s.centres), points.x.dtype)
    need = (s.upper * (1 + _SLACK) >= s.lower) & (points.weight > 0)
    count = need.sum()

    def whole():
        return assigned(points, s.centres, options)

    def bucket(size, chunk):
        def few():
            rows = jnp.nonzero(need, size=size, fill_value=0)[0]
            x, squares = points.x[rows], points.squares[rows]
            found = _in_chunks(x, squares, s.centres, price, chunk)
            old = s.labels, s.upper, s.lower
            return tuple(a.at[rows].set(b) for a, b in zip(old, found))

        return few

    sizes = _buckets(n, points.chunk)
    branches = [bucket(*size) for size in sizes]
    index = sum((count > size).astype(jnp.int32) for size, _ in sizes)
    return lax.switch(index, [*branches, whole]) if sizes else whole()


def _buckets(n: int, chunk: int) -> list[tuple[int, int]]:
    """Sizes of the buckets, whole numbers of chunks, and these chunks."""
    sizes = []
    for divisor in _BUCKETS:
        own = min(chunk, max(1, n // divisor))
        size = n // divisor // own * own
        if size:
            sizes.append((size, own))
    return sizes


def members(points: Points, labels: Any, clusters: int) -> tuple[Any, Any]:
    """Sums and numbers of each cluster's points, of all devices."""

    def part(carry, rows):
        x, label, mass = rows
        member = (label[:, None] == jnp.arange(clusters)[None]) * mass[:, None]
        sums = carry[0] + jnp.matmul(member.T, x, precision=HIGHEST)
        return (sums, carry[1] + member.sum(0)), None

    x, chunk = points.x, points.chunk
    zeros = jnp.zeros((clusters, x.shape[1]), x.dtype), jnp.zeros(clusters, x.dtype)
    cut = (
        x.reshape(-1, chunk, x.shape[1]), labels.reshape(-1, chunk),
        points.weight.reshape(-1, chunk),
    )  # fmt: skip
    sums, counts = lax.scan(part, zeros, cut)[0]
    return _sum(sums, points.axis), _sum(counts, points.axis)


def _moved_members(points: Points, s: Clusters, labels: Any) -> tuple[Any, Any]:
    """``members`` after some points have moved, by what they add and take."""
    n, clusters = len(points.x), len(s.centres)
    changed = (labels != s.labels) & (points.weight > 0)
    size = n // _BUCKETS[0]
    few = changed.sum() <= size
    if points.axis:
        few = lax.pmin(few.astype(jnp.int32), points.axis) > 0

    def difference():
        rows = jnp.nonzero(changed, size=size, fill_value=n)[0]
        real = rows < n
        rows = jnp.minimum(rows, n - 1)
        codes = jnp.arange(clusters)[None]
        to, out = (y[rows][:, None] == codes for y in (labels, s.labels))
        step = (to.astype(points.x.dtype) - out) * real[:, None]
        sums = jnp.matmul(step.T, points.x[rows], precision=HIGHEST)
        sums, counts = (_sum(y, points.axis) for y in (sums, step.sum(0)))
        return s.sums + sums, s.counts + counts

    def whole():
        return members(points, labels, clusters)

    return lax.cond(few, difference, whole) if size else whole()


def own_distance(points: Points, s: Clusters) -> jax.Array:
    """Squared distance of each point to its centre, 0 for padding."""
    own = s.centres[s.labels]
    return jnp.square(points.x - own).sum(1) * points.weight


def refill(points: Points, far: Any, counts: Any, centres: Any) -> jax.Array:
    """The e-th centre without points moves to the point that is e-th farthest."""
    axis, count = points.axis, min(len(centres), len(far))
    value, place = lax.top_k(far, count)
    rows = points.x[place]
    if axis:
        value = lax.all_gather(value, axis, tiled=True)
        rows = lax.all_gather(rows, axis, tiled=True)
    order = jnp.argsort(-value, stable=True)
    empty = counts == 0
    number = jnp.minimum(jnp.cumsum(empty) - 1, len(order) - 1)
    return jnp.where(empty[:, None], rows[order[number]], centres)


def prices(points: Points, centres: Any, options: Any) -> jax.Array:
    """Dual prices of centres of equal mass, by Sinkhorn's iterations."""
    x, weight, total, axis = points.x, points.weight, points.total, points.axis
    cost = points.squares[:, None] + gap(x, centres)
    mean = _sum((cost * weight[:, None]).sum(), axis) / (total * len(centres))
    mean = jnp.maximum(mean, 1e-30)
    target = math.log(total / len(centres))
    absent = jnp.where(weight > 0, 0.0, -jnp.inf)
    # The temperature falls over three quarters of the iterations: prices of clusters far
    # apart then need few.
    fall = 1 / max(1, 3 * options.sinkhorn // 4 - 1)

    def body(i, price):
        share = jnp.minimum(i * fall, 1.0)
        eps = mean * options.temperature**share
        row = jax.nn.logsumexp((price[None] - cost) / eps, axis=1)
        column = -cost / eps - row[:, None] + absent[:, None]
        return eps * (target - _logsumexp(column, axis))

    return lax.fori_loop(0, options.sinkhorn, body, jnp.zeros(len(centres), cost.dtype))


def _logsumexp(x, axis):
    """Over points, of all devices."""
    peak = x.max(0)
    peak = lax.pmax(peak, axis) if axis else peak
    return peak + jnp.log(_sum(jnp.exp(x - peak[None]).sum(0), axis))


def _sum(value, axis):
    return lax.psum(value, axis) if axis else value
