"""Rounds of mining: a posterior from the buffer, a draw, a scan of the pool.

Round e runs before the steps of epoch e. What it needs from before is in ``State.extra``:
the indices of the outliers of the last rounds (``ring``), from which the features are
recomputed, since those of an older network are of no use. The pool is read by the caller,
chunk by chunk; none of these functions holds more than a chunk and the chosen.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jaxpapers.ops import posterior as blr
from jaxpapers.ops import selection
from jaxpapers.ops.linalg import HIGHEST
from jaxpapers.ops.mesh_axes import batch_axes
from jaxpapers.papers.poem.net import Net, apply, features
from jaxpapers.papers.poem.objective import Options, augmented, detection_score

# Keys of steps are fold_in(key, step): no run has as many.
_MINING = 0x504F454D
SHOWN = (8, 24)
"""Rounds, and outliers of each, the nearest to the boundary, that pictures show."""


def boundary_score(w: Float[Array, " D"], z: Float[Array, "B _"]) -> Float[Array, " B"]:
    """G = -|w . z|: largest at the boundary between ID and outliers.

    Raises:
      ValueError: weights and features of another width.
    """
    if z.ndim != 2 or w.shape != z.shape[1:]:
        raise ValueError(
            f"weights {w.shape} need features (B, {w.shape[0]}), got {z.shape}"
        )
    return -jnp.abs(jnp.matmul(z, w, precision=HIGHEST))


@functools.partial(jax.jit, static_argnames=("kind", "options"))
def targets(kind: str, options: Options, key: Any = None) -> Array:
    """-K of ID images (kind "id") or K of outliers, and the shared noise, if any."""
    value = jnp.float32(-options.target if kind == "id" else options.target)
    if not options.shared_noise:
        return value
    return value + options.noise**0.5 * jax.random.normal(round_keys(key, 0)["noise"])


def start(statistics: Any, net: Net, options: Options, count: int) -> dict[str, Any]:
    """``State.extra`` before the first round.

    Args:
      statistics: of the net.
      net: sizes.
      options: hyper-parameters.
      count: outliers of a round.

    Returns:
      ``net``; unless nothing is selected ``round`` (rounds done), ``ring`` (slots, count)
      and ``shown`` (see ``SHOWN``), indices into the pool, -1 for none; for POEM also
      ``posterior`` and the drawn weights ``w``.
    """
    if options.select == "none":
        return {"net": statistics}
    extra = {
        "net": statistics,
        "round": jnp.zeros((), jnp.int32),
        "ring": jnp.full((options.buffer, count), -1, jnp.int32),
        "shown": jnp.full(SHOWN, -1, jnp.int32),
    }
    if options.select == "poem":
        width = features(net)
        extra["posterior"] = blr.prior(width, options.prior)
        extra["w"] = jnp.zeros(width)
    return extra


@jax.jit
def round_keys(key: Key[Array, ""], number: Any) -> dict[str, Key[Array, ""]]:
    """Keys of a round, by use, from the key of the run."""
    own = jax.random.fold_in(jax.random.fold_in(key, _MINING), number)
    names = ("mean", "draw", "items", "score", "crop", "noise")
    return dict(zip(names, jax.random.split(own, len(names))))


@functools.partial(jax.jit, static_argnames=("size", "options"))
def scanned(
    key: Key[Array, ""], number: Int[Array, ""], *, size: int, options: Options
) -> Int[Array, " scan"]:
    """Indices of the items that a round scans, ascending, of a pool of ``size``.

    All of a pool that is not larger than ``options.pool``.
    """
    count, own = min(options.pool, size), round_keys(key, number)["items"]
    if options.scan == "random":
        items = jax.random.permutation(own, size)[:count]
    else:
        first = jax.random.randint(own, (), 0, size)
        items = (first + jnp.arange(count)) % size
    return jnp.sort(items).astype(jnp.int32)


def slots(count: int, options: Options, scan: int) -> int:
    """Slots of the running top: the chosen, and those that a quantile skips."""
    return count + (round(options.quantile * scan) if options.select == "greedy" else 0)


@functools.partial(jax.jit, static_argnames=("count", "options", "scan"))
def empty_top(count: int, options: Options, scan: int) -> selection.Top:
    """A running top on every shard of the mesh's data axes."""
    top = selection.empty(slots(count, options, scan))
    return selection.Top(*(jnp.tile(x, _shards()) for x in top))


@functools.partial(jax.jit, static_argnames=("net", "options"))
def scan_chunk(
    top: selection.Top,
    params: dict,
    statistics: Any,
    w: Float[Array, " D"] | None,
    chunk: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    net: Net,
    options: Options,
) -> tuple[selection.Top, Int[Array, ""]]:
    """The running top after a chunk of the pool, each shard's of its own rows.

    Args:
      top: see ``empty_top``.
      params, statistics: of the net.
      w: drawn weights, for ``options.select="poem"``.
      chunk: image (B, H, W, C) in [0, 1], index (B,) and valid (B,), False for padding.
      key: of the round.
      net: sizes.
      options: hyper-parameters.

    Returns:
      The new top, and the number of valid rows whose score is not finite.
    """
    logits, z, _ = apply(params, statistics, chunk["image"], net=net, train=False)
    if options.select == "poem":
        assert w is not None
        scores = boundary_score(w, z)
    elif options.select == "greedy":
        scores = detection_score(logits, options)
    else:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(chunk["index"])
        scores = jax.vmap(jax.random.uniform)(keys)
    bad = (chunk["valid"] & ~jnp.isfinite(scores)).sum()
    rows = (scores, chunk["index"], chunk["valid"])
    if _shards() == 1:
        return selection.merge(top, *rows), bad
    spec = P(_axes())
    local = jax.shard_map(selection.merge, in_specs=spec, out_specs=spec)
    return local(top, *rows), bad


@functools.partial(jax.jit, static_argnames=("count",))
def chosen(top: selection.Top, *, count: int) -> selection.Top:
    """The chosen of all shards, from the highest score to the lowest."""
    if _shards() == 1:
        top = selection.ordered(top)
    else:
        spec, axes = P(_axes()), _axes()
        # The gathered result is every device's; the check cannot see that.
        top = jax.shard_map(
            functools.partial(selection.across, axis_name=axes),
            in_specs=(spec,), out_specs=P(), check_vma=False,
        )(top)  # fmt: skip
    return selection.Top(*(x[-count:] for x in top))


@functools.partial(jax.jit, static_argnames=("net", "options"))
def buffer_chunk(
    params: dict,
    statistics: Any,
    chunk: Mapping[str, Array],
    target: Float[Array, ""],
    key: Key[Array, ""],
    *,
    net: Net,
    options: Options,
) -> blr.Statistics:
    """Sufficient statistics of a chunk of the buffer, in the current network's features.

    Args:
      params, statistics: of the net.
      chunk: image (B, H, W, C) in [0, 1] and weight (B,), 0 for padding.
      target: of its rows.
      key: of the augmentation, the same whenever these rows are seen.
      net: sizes.
      options: hyper-parameters.
    """
    x = augmented(key, chunk["image"], options)
    _, z, _ = apply(params, statistics, x, net=net, train=False)
    y = jnp.full(len(z), target)
    return blr.statistics(z, y, chunk["weight"])


def buffer_slots(number: int, options: Options) -> list[tuple[int, int]]:
    """(slot, round) of the outliers that the posterior of a round sees.

    A slot is overwritten in turn: before round 7 four slots hold rounds 4, 5, 6 and 3.
    """
    rounds = range(max(number - options.buffer, 0), number)
    return sorted((r % options.buffer, r) for r in rounds)


def solve(stats: blr.Statistics, options: Options) -> blr.Posterior:
    """The posterior of summed statistics, in float64 on the host's processor.

    Of statistics of 400,000 rows of features >= 0, float32 keeps no digit of the
    directions that the prior decides.

    Raises:
      ValueError: it is not finite.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        stats = jax.tree.map(lambda x: np.asarray(x, np.float64), stats)
        post = jax.device_get(_solve(stats, options.prior, options.noise))
    blr.check_finite(post)
    return post


_solve = jax.jit(blr.posterior, static_argnums=(1, 2))


def draw(
    key: Key[Array, ""], post: blr.Posterior, options: Options
) -> Float[Array, " D"]:
    """One weight vector from the posterior, the boundary of a round."""
    single = jax.tree.map(lambda x: np.asarray(x, np.float32), post)
    return _draw(key, single, options)


@functools.partial(jax.jit, static_argnames=("options",))
def _draw(key, post, options):
    scale = options.prior if options.covariance == "reference" else 1.0
    return blr.sample(key, post, scale=scale)


@functools.partial(jax.jit, static_argnames=("net", "options"))
def first_posterior(key: Key[Array, ""], net: Net, options: Options) -> blr.Posterior:
    """The prior, its mean drawn from N(0, 0.01^2) as in the released code."""
    post = blr.prior(features(net), options.prior)
    return post._replace(mean=0.01 * jax.random.normal(key, post.mean.shape))


@jax.jit
def remember(
    extra: Mapping[str, Any],
    items: Any,
    post: blr.Posterior | None = None,
    w: Float[Array, " D"] | None = None,
) -> dict[str, Any]:
    """``State.extra`` after a round: its outliers in the ring, its posterior and draw.

    Args:
      extra: before it.
      items: (n,), indices of the chosen, by score.
      post, w: for POEM.
    """
    number, items = extra["round"], jnp.asarray(items, jnp.int32)
    slot = number % len(extra["ring"])
    row = jnp.full(SHOWN[1], -1, jnp.int32)
    row = lax.dynamic_update_slice(row, items[: SHOWN[1]], (0,))
    new = {
        **extra,
        "round": number + 1,
        "ring": extra["ring"].at[slot].set(items),
        "shown": extra["shown"].at[number % SHOWN[0]].set(row),
    }
    if post is not None:
        single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), post)
        new |= {"posterior": single, "w": jnp.asarray(w, jnp.float32)}
    return new


def latest(extra: Mapping[str, Any]) -> np.ndarray:
    """Indices of the outliers of the current round."""
    ring = np.asarray(extra["ring"])
    return ring[(int(extra["round"]) - 1) % len(ring)].copy()


def _axes() -> tuple[str, ...]:
    """Axes of the mesh over which rows are split."""
    return batch_axes(jax.sharding.get_abstract_mesh().axis_names)


def _shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return int(np.prod([mesh.shape[n] for n in _axes()], dtype=int))
