"""The auxiliary loss: every state tells the next behaviour from a sampled one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpapers.nets import mlp
from jaxpapers.ops.means import weighted_mean

REDUCE = ("per_sample", "padded_mean", "valid_mean")


def sample_negatives(
    key: Key[Array, ""],
    pool: Int[Array, " P"],
    avoid: Int[Array, "*shape"],
    mask: Bool[Array, " P"] | None = None,
) -> Int[Array, "*shape"]:
    """Positions in a pool of ids, drawn uniformly, whose ids differ from those to avoid.

    A draw that hits the id to avoid is repeated once; if it hits again, the next position
    is taken. That one may hold the same id where the pool has duplicates: ``loss`` counts
    such collisions.

    Args:
      key: of the draws.
      pool: ids; with the ids of a log, negatives are drawn by popularity.
      avoid: per draw, the id it must not have.
      mask: False at positions that are never drawn; None: all may be.

    Returns:
      Indices into the pool; its last position if none can be drawn.

    Example:
      >>> import numpy as np
      >>> pool, avoid = np.array([5, 6]), np.array([5, 5, 6])
      >>> pool[jax.jit(sample_negatives)(jax.random.key(0), pool, avoid)].tolist()
      [6, 6, 5]
    """
    mask = jnp.ones(pool.shape, bool) if mask is None else mask
    number = jnp.cumsum(mask)
    count = jnp.maximum(number[-1], 1)
    first, again = (
        jax.random.randint(k, avoid.shape, 0, count) for k in jax.random.split(key)
    )

    def position(n):
        return jnp.minimum(jnp.searchsorted(number, n + 1), len(pool) - 1)

    drawn = jnp.where(pool[position(first)] == avoid, again, first)
    drawn = jnp.where(pool[position(drawn)] == avoid, (drawn + 1) % count, drawn)
    return position(drawn)


def aux_loss(
    params: dict,
    states: Float[Array, "B T H"],
    pos: Float[Array, "B T E"],
    neg: Float[Array, "B T E"],
    mask: Bool[Array, "B T"],
    reduce: str = "valid_mean",
    *,
    weight: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy of telling the next behaviour from a sampled one (eq 6).

    Args:
      params: a ``nets.mlp`` from H + E to 1 with sigmoids; {}: the inner product.
      states: of the extractor.
      pos: behaviours; the state of step t is scored with that of t + 1.
      neg: sampled ones, aligned with ``pos``.
      mask: True at behaviours.
      reduce: divides the sum of both logarithms by: "valid_mean" the number of steps that
        have a next one (twice the mean over positives and negatives that DeepCTR-Torch
        takes), "padded_mean" B (T - 1) (released code), "per_sample" B (paper).
      weight: of the rows; None: all 1.

    Returns:
      The loss, 0 where no step has a next one, and ``aux_accuracy``: the share of steps
      whose next behaviour scores above the sampled one, ties one half.

    Raises:
      ValueError: unknown ``reduce``, or an inner product of vectors that differ in size.
    """
    if reduce not in REDUCE:
        raise ValueError(f"aux_reduce must be one of {REDUCE}, got {reduce!r}")
    if not params and states.shape[-1] != pos.shape[-1]:
        raise ValueError(
            f"the inner product needs states as wide as behaviours, got "
            f"{states.shape[-1]} and {pos.shape[-1]}; set net.state to the latter or "
            "net.aux to 'concat'"
        )
    states, mask = states[:, :-1], mask[:, :-1] & mask[:, 1:]
    items = jnp.stack([pos[:, 1:], neg[:, 1:]])
    if params:
        first = params["layer_0"]
        # The states' part of the first layer serves both.
        w_state, w_item = jnp.split(first["kernel"], [states.shape[-1]])
        shared = mlp.matmul(states, w_state) + mlp.channels(first["bias"], states)
        x = jax.nn.sigmoid(mlp.matmul(items, w_item) + shared[None])
        logit, _ = mlp.apply(params, {}, x, activation="sigmoid", train=False, start=1)
        logit = logit[..., 0]
    else:
        logit = (items * states[None]).sum(-1)
    weight = jnp.ones(len(mask), logit.dtype) if weight is None else weight
    of_steps = weight[:, None] * mask
    nats = jax.nn.softplus(-logit[0]) + jax.nn.softplus(logit[1])
    above = (logit[0] > logit[1]) + 0.5 * (logit[0] == logit[1])
    metrics = {"aux_accuracy": weighted_mean(above.astype(nats.dtype), of_steps)}
    if reduce == "valid_mean":
        return weighted_mean(nats, of_steps), metrics
    # Not 0 times the values at padding, which may be infinite.
    nats = jnp.where(mask, nats, 0.0)
    of_rows = nats.sum(-1)
    if reduce == "padded_mean":
        of_rows = of_rows / max(mask.shape[1], 1)
    return weighted_mean(of_rows, weight), metrics
