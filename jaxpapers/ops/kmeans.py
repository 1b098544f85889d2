r"""k-means in JAX: k-means++ by Gumbel draws, Lloyd in chunks, restarts, equal sizes.

With points x (N, D), weights m (N) and centres c (K, D):

$$ J = \sum_i m_i \min_k \|x_i - c_k\|^2 $$

``kmeans`` is one program. On a mesh, points are split over ``data``: the sums of a step
are added up over the devices, and all draws are numbered by the point, so that the
centres are those of one device up to rounding.

k-means++ (Arthur and Vassilvitskii 2007) draws the next centre with a probability in
proportion to the squared distance from those before; adding Gumbel noise to its logarithm
and taking the largest is that draw without a sum over the points. A centre without points
moves to the point that is farthest from its own centre. ``balanced`` solves the transport
of the points to centres of equal mass by Sinkhorn's iterations (Cuturi 2013) and assigns
each point by the prices of the centres.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jaxpapers.ops import lloyd
from jaxpapers.ops.host import non_finite_rows

HIGHEST = lax.Precision.HIGHEST
_AXIS = "data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of k-means.

    Attributes:
      iterations: of Lloyd, at most; they end where no label changes.
      restarts: independent starts, of which the one with the smallest J is kept.
      balanced: clusters of nearly equal mass.
      temperature: of Sinkhorn, as a share of the mean squared distance.
      sinkhorn: its iterations.
      sample: k-means++ draws from about this many points for each centre, chosen at
        random; 0: from all.
      chunk: points whose distances to all centres are in memory at once; of balanced
        clusters those of all points are.

    Raises:
      ValueError: values out of range.
    """

    iterations: int = 25
    restarts: int = 1
    balanced: bool = False
    temperature: float = 0.02
    sinkhorn: int = 40
    sample: int = 64
    chunk: int = 2048

    def __post_init__(self):
        least = {"iterations": 0, "restarts": 1, "sinkhorn": 1, "sample": 0, "chunk": 1}
        for name, low in least.items():
            if not (value := getattr(self, name)) >= low:
                raise ValueError(f"kmeans.{name} must be >= {low}, got {value}")
        if not self.temperature > 0:
            raise ValueError(f"kmeans.temperature must be > 0, got {self.temperature}")


class KMeans(NamedTuple):
    """Result of ``kmeans``.

    Attributes:
      centres: (K, D).
      labels: (N,), the centre of each point.
      inertia: J of the centres and the labels.
      history: J after each assignment, from the sums of the clusters and so exact to
        rounding of the points' total; the last one is repeated where Lloyd ended early.
    """

    centres: Any
    labels: Any
    inertia: Any
    history: Any


def kmeans(
    key: Key[Array, ""],
    x: Any,
    clusters: int,
    options: Options = Options(),
    mesh: Mesh | None = None,
) -> KMeans:
    """Centres and labels of points.

    Args:
      key: of all draws.
      x: points (N, D), of equal weight.
      clusters: K.
      options: see ``Options``.
      mesh: with an axis ``data`` that points are split over; None: one device.

    Raises:
      ValueError: fewer points than clusters, points that are not finite (unless traced),
        no clusters.
    """
    if jnp.ndim(x) != 2:
        raise ValueError(f"k-means needs points (N, D), got shape {jnp.shape(x)}")
    n = len(x)
    if not 1 <= clusters <= n:
        raise ValueError(
            f"k-means needs 1 <= clusters <= points, got {clusters} clusters and {n} "
            "points; lower the number of codes or give more points"
        )
    if not isinstance(x, jax.core.Tracer) and len(bad := non_finite_rows(x)):
        raise ValueError(
            f"{len(bad)} of {n} points are NaN or infinite, rows {bad[:10].tolist()}"
        )
    return _run(key, jnp.asarray(x), clusters=clusters, options=options, mesh=mesh)


def assign(
    x: Float[Array, "N D"], centres: Float[Array, "K D"]
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """The nearest centre of each point, of equal ones the first, and |x - c|^2."""
    gap = lloyd.gap(x, centres)
    labels = jnp.argmin(gap, 1).astype(jnp.int32)
    squares = jnp.min(gap, 1) + jnp.square(x).sum(1)
    return labels, jnp.maximum(squares, 0)


def residual_kmeans(
    key: Key[Array, ""],
    x: Any,
    levels: int,
    clusters: int,
    options: Options = Options(),
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "L K D"], Int[Array, "N L"]]:
    """k-means of the points, then of what its centres leave, level by level.

    Args:
      key: of all draws.
      x: points (N, D).
      levels: L, at least 1.
      clusters: K of each level.
      options, mesh: see ``kmeans``.

    Returns:
      Codebooks, and the codes of each point.
    """
    if levels < 1:
        raise ValueError(f"residual k-means needs levels >= 1, got {levels}")
    residual, books, codes = jnp.asarray(x), [], []
    for level in range(levels):
        found = kmeans(
            jax.random.fold_in(key, level), residual, clusters, options, mesh
        )
        residual = residual - found.centres[found.labels]
        books.append(found.centres)
        codes.append(found.labels)
    return jnp.stack(books), jnp.stack(codes, 1)


def product_kmeans(
    key: Key[Array, ""],
    x: Any,
    levels: int,
    clusters: int,
    options: Options = Options(),
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "L K D"], Int[Array, "N L"]]:
    """k-means of each of L equal parts of the features (Jegou et al. 2011).

    Codebooks are given in all D features, zero outside of their part, so that a point is
    the sum of its codes as in ``residual_kmeans``.

    Raises:
      ValueError: fewer features than levels.
    """
    x = jnp.asarray(x)
    if not 1 <= levels <= x.shape[1]:
        raise ValueError(
            f"product k-means needs 1 <= levels <= features, got {levels} and "
            f"{x.shape[1]}"
        )
    edges = [round(i * x.shape[1] / levels) for i in range(levels + 1)]
    books, codes = [], []
    for level, (low, high) in enumerate(zip(edges, edges[1:])):
        part = kmeans(
            jax.random.fold_in(key, level), x[:, low:high], clusters, options, mesh
        )
        wide = jnp.pad(part.centres, ((0, 0), (low, x.shape[1] - high)))
        books.append(wide)
        codes.append(part.labels)
    return jnp.stack(books), jnp.stack(codes, 1)


@functools.partial(jax.jit, static_argnames=("clusters", "options", "mesh"))
def _run(key, x, *, clusters, options, mesh) -> KMeans:
    n = len(x)
    shards = mesh.shape[_AXIS] if mesh is not None else 1
    chunk = min(options.chunk, -(-n // shards))
    size = -(-n // (shards * chunk)) * shards * chunk
    points = jnp.pad(x, ((0, size - n), (0, 0)))
    weight = (jnp.arange(size) < n).astype(x.dtype)
    run = functools.partial(_restarts, clusters, options, chunk, n)
    if shards == 1:
        found = run(None, key, points, weight)
    else:
        found = jax.shard_map(
            functools.partial(run, _AXIS),
            mesh=mesh,
            in_specs=(P(), P(_AXIS), P(_AXIS)),
            out_specs=KMeans(P(), P(_AXIS), P(), P()),
            check_vma=False,
        )(key, points, weight)
    return found._replace(labels=found.labels[:n])


def _restarts(clusters, options, chunk, total, axis, key, x, weight) -> KMeans:
    def once(key):
        return _once(key, x, weight, clusters, options, chunk, total, axis)

    if options.restarts == 1:
        return once(key)

    def better(i, best):
        new = once(jax.random.fold_in(key, i))
        return jax.tree.map(
            lambda a, b: jnp.where(new.inertia < best.inertia, a, b), new, best
        )

    first = once(jax.random.fold_in(key, 0))
    return lax.fori_loop(1, options.restarts, better, first)


def _once(key, x, weight, clusters, options, chunk, total, axis) -> KMeans:
    """k-means++ and Lloyd's iterations on one device's points."""
    mean = _sum((x * weight[:, None]).sum(0), axis) / total
    # Distances are those of centred points: smaller numbers, less rounding.
    x = (x - mean[None]) * weight[:, None]
    squares = jnp.square(x).sum(1)
    points = lloyd.Points(x, weight, squares, total, chunk, axis)
    centres = _plus_plus(key, x, weight, clusters, options, total, axis)
    found = lloyd.run(points, centres, options)
    value = _sum(lloyd.own_distance(points, found).sum(), axis)
    return KMeans(found.centres + mean[None], found.labels, value, found.history)


def _plus_plus(key, x, weight, clusters, options, total, axis):
    """Centres that k-means++ draws, each one a point."""
    key_sample, key_draw = jax.random.split(key)
    local = len(x)
    everywhere = local * _shards(axis)
    begin = local * lax.axis_index(axis) if axis else 0

    def own(numbers):
        return lax.dynamic_slice_in_dim(numbers, begin, local) if axis else numbers

    count = options.sample * clusters
    if 0 < count < total:
        # The points with the largest of uniform numbers, on whichever device they are.
        ticket = jax.random.uniform(key_sample, (everywhere,))
        ticket = jnp.where(jnp.arange(everywhere) < total, ticket, -1.0)
        places = lax.top_k(ticket, count)[1]
        x = _rows(x, places, begin, axis)
        weight = jnp.ones(count, x.dtype)
        axis, everywhere = None, count

        def own(numbers):
            return numbers

        begin = 0

    norms = jnp.square(x).sum(1)

    def distance(centre):
        dots = jnp.matmul(x, centre, precision=HIGHEST)
        return jnp.maximum(norms - 2 * dots + jnp.square(centre).sum(), 0)

    def draw(i, near):
        noise = own(jax.random.gumbel(jax.random.fold_in(key_draw, i), (everywhere,)))
        score = jnp.where(weight > 0, jnp.log(near) + noise, -jnp.inf)
        # Where all points are at centres any of them will do.
        spare = jnp.where(weight > 0, noise - 1e30, -jnp.inf)
        return _first_largest(x, jnp.maximum(score, spare), begin, axis)

    def body(i, carry):
        near, centres = carry
        centre = draw(i, near)
        return jnp.minimum(near, distance(centre)), centres.at[i].set(centre)

    first = draw(0, jnp.ones(len(x), x.dtype))
    centres = jnp.zeros((clusters, x.shape[1]), x.dtype).at[0].set(first)
    return lax.fori_loop(1, clusters, body, (distance(first), centres))[1]


def _first_largest(x, score, begin, axis):
    """The point with the largest score, of equal ones the first of all devices."""
    place = jnp.argmax(score)
    if not axis:
        return x[place]
    scores = lax.all_gather(score[place], axis)
    mine = jnp.argmax(scores) == lax.axis_index(axis)
    return lax.psum(jnp.where(mine, x[place], 0), axis)


def _rows(x, places, begin, axis):
    """Points by their number over all devices, on every device."""
    if not axis:
        return x[places]
    local = places - begin
    mine = (local >= 0) & (local < len(x))
    rows = x[jnp.clip(local, 0, len(x) - 1)]
    return lax.psum(jnp.where(mine[:, None], rows, 0), axis)


def _sum(value, axis):
    return lax.psum(value, axis) if axis else value


def _shards(axis: Any) -> int:
    return lax.axis_size(axis) if axis else 1


__all__: Sequence[str] = [
    "KMeans", "Options", "assign", "kmeans", "product_kmeans", "residual_kmeans",
]  # fmt: skip
