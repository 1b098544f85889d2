"""SIM's general search unit: the soft search's scores and the model that trains them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpapers.nets import mlp
from jaxpapers.nets.mlp import DiceState
from jaxpapers.papers.sim.net import GSU_POOL


def soft_scores(
    w_a: Float[Array, "H D"],
    w_b: Float[Array, "H D"],
    hist_emb: Float[Array, "B T D"],
    target: Float[Array, "*candidates D"],
) -> Float[Array, "*candidates T"]:
    """r_i = (W_b e_i) . (W_a e_a), as (W_b^T W_a e_a) . e_i (eq 1, soft).

    Both matrices are applied to the candidate, none to the T behaviours.

    Args:
      w_a: weights of the candidate.
      w_b: weights of the behaviours.
      hist_emb: e_i.
      target: e_a, (B, D) or (B, N, D).
    """
    return jnp.einsum("b...d,btd->b...t", (target @ w_a.T) @ w_b, hist_emb)


def gsu_aux(
    params: dict,
    state: dict[str, DiceState],
    scores: Float[Array, "*candidates T"],
    hist_emb: Float[Array, "B T D"],
    hist_mask: Bool[Array, "B T"],
    target: Float[Array, "*candidates D"],
    *,
    pool: str = "sum",
    **options: Any,
) -> tuple[Float[Array, "*candidates"], dict[str, DiceState]]:
    """Logits of GSU's click model: an MLP of [sum_i r_i e_i; e_a].

    Args:
      params: a ``nets.mlp`` from 2 D to 1.
      state: Dice's statistics.
      scores: r_i.
      hist_emb: e_i.
      hist_mask: True at behaviours.
      target: e_a.
      pool: of ``GSU_POOL``; "sum" is the paper's.
      options: of ``nets.mlp.apply``; its mask is of the rows.

    Returns:
      Logits, and the new statistics.

    Raises:
      ValueError: unknown pool.
    """
    pooled = gsu_pool(scores, hist_emb, hist_mask, pool=pool)
    features = jnp.concatenate([pooled, target], -1)
    logit, state = mlp.apply(params, state, features, **options)
    return logit[..., 0], state


def gsu_pool(
    scores: Float[Array, "*candidates T"],
    hist_emb: Float[Array, "B T D"],
    hist_mask: Bool[Array, "B T"],
    *,
    pool: str = "sum",
) -> Float[Array, "*candidates D"]:
    """U_r = sum_i r_i e_i over the behaviours; see ``gsu_aux``."""
    if pool not in GSU_POOL:
        raise ValueError(f"pool must be one of {GSU_POOL}, got {pool!r}")
    mask = hist_mask[:, None] if scores.ndim == 3 else hist_mask
    pooled = jnp.einsum("b...t,btd->b...d", jnp.where(mask, scores, 0.0), hist_emb)
    if pool == "mean":
        count = jnp.maximum(hist_mask.sum(1), 1).astype(pooled.dtype)
        pooled = pooled / count.reshape((-1,) + (1,) * (pooled.ndim - 1))
    return pooled
