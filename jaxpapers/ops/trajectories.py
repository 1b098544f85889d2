"""Chains drawn from noise to data, kept whole or as keys, and spread over devices."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxpapers.ops import diffusion
from jaxpapers.ops.diffusion import Chain

STORES = ("all", "last", "keys")
# Numbers of noise that a whole chain may have for them to be drawn before it.
AT_ONCE = 2**18


class Trajectory(NamedTuple):
    """What ``rollout`` keeps of B chains of S steps.

    Attributes:
      sample: (B, ...), the last state.
      states: (S + 1, B, *X) with store="all", else None.
      eps: (S, B, *X), the noise that the net predicted, with store="all", else None.
      log_prob: (S, B), log-probabilities of the steps taken, or None.
      start: (B, ...), the first state, with store="keys", else None.
      key: of the noise, with store="keys", else None.
    """

    sample: Any
    states: Any = None
    eps: Any = None
    log_prob: Any = None
    start: Any = None
    key: Any = None


def rollout(
    key: Key[Array, ""],
    eps_fn: Callable,
    chain: Chain,
    shape: tuple[int, ...] | None = None,
    *,
    start: Float[Array, "B ..."] | None = None,
    store: str = "last",
    log_prob: bool = False,
    reduce: str = "sum",
    remat: bool = False,
) -> Trajectory:
    """Draws B chains from noise to data, as one ``lax.scan``.

    Args:
      key: of the first states and of every step's noise.
      eps_fn: (x, time (B,)) -> predicted noise.
      chain: of S steps.
      shape: (B, ...), to start from N(0, I).
      start: first states, instead of ``shape``.
      store: "all" states and predictions, the "last" state, or "keys": the first state
        and the key, from which ``replay`` makes the rest again; memory then does not
        grow with S.
      log_prob: also the steps' log-probabilities.
      reduce: see ``ops.diffusion.step_log_prob``.
      remat: recompute each step in a backward pass through the chain, whose memory is
        then S states and one net.

    Raises:
      ValueError: unknown store; log-probabilities of a deterministic step.
    """
    if store not in STORES:
        raise ValueError(f"store must be one of {STORES}, got {store!r}")
    if (shape is None) == (start is None):
        raise ValueError("rollout takes either shape= or start=")
    if log_prob:
        diffusion.check_density(chain)
    key_start, key_noise = jax.random.split(key)
    first: Any = start if shape is None else jax.random.normal(key_start, shape)
    first = over_data(first)
    step = functools.partial(_step, eps_fn, chain, key_noise)

    def body(x, now):
        k, noise = now
        x_next, eps = step(x, k, noise)
        score = None
        if log_prob:
            score = diffusion.step_log_prob(chain, k, x, x_next, eps, reduce)
        return x_next, (*((x, eps) if store == "all" else (None, None)), score)

    scan: Any = lax.scan(
        jax.checkpoint(body) if remat else body, first, _steps(chain, key_noise, first)
    )
    last, (states, eps, scores) = scan
    if store == "keys":
        return Trajectory(last, None, None, scores, first, key_noise)
    if store == "last":
        return Trajectory(last, None, None, scores)
    return Trajectory(last, jnp.concatenate([states, last[None]]), eps, scores)


def over_data(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Rows spread over the mesh axis ``data``, where there is one that they fit.

    Noise is drawn from one key, so that nothing else tells the compiler to share chains
    out between devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = dict(zip(mesh.axis_names, mesh.axis_types)).get("data") == AxisType.Auto
    if not auto or len(x) % mesh.shape["data"]:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec("data"))


def of_each(
    x: Shaped[Array, "S B ..."], k: Int[Array, "B N"]
) -> Shaped[Array, "B N ..."]:
    """Entries k of every chain, x[k[b, n], b]; nothing moves between devices."""
    rows = jnp.moveaxis(x, 1, 0)
    index = k.reshape(*k.shape, *(1,) * (rows.ndim - 2))
    return jnp.take_along_axis(rows, index, 1)


def replay(
    trajectory: Trajectory,
    eps_fn: Callable,
    chain: Chain,
    visit: Callable[[Any, Any, Any, Any, Any], Any],
    carry: Any,
) -> Any:
    """Walks a chain again that was kept as keys; its states are bitwise the same.

    Args:
      trajectory: of ``rollout`` with store="keys".
      eps_fn: the policy that drew it.
      chain: the same.
      visit: (carry, k, x, x_next, eps) -> carry, at every step.
      carry: what ``visit`` starts from, e.g. the sum of a gradient.

    Returns:
      The last carry.

    Raises:
      ValueError: a trajectory that was kept in another way.
    """
    if trajectory.key is None:
        raise ValueError("replay needs a trajectory of rollout(..., store='keys')")
    step = functools.partial(_step, eps_fn, chain, trajectory.key)

    def body(state, now):
        (x, carry), (k, noise) = state, now
        x_next, eps = step(x, k, noise)
        return (x_next, visit(carry, k, x, x_next, eps)), None

    steps = _steps(chain, trajectory.key, trajectory.start)
    return lax.scan(body, (trajectory.start, carry), steps)[0][1]


def _steps(chain, key_noise, x):
    """Numbers of the steps, and their noise if it is little: one draw instead of S."""
    k = jnp.arange(len(chain.std))
    if len(k) * x.size > AT_ONCE:
        return k, None
    return k, jax.vmap(functools.partial(_noise, key_noise, x))(k)


def _noise(key_noise, x, k):
    return jax.random.normal(jax.random.fold_in(key_noise, k), x.shape, x.dtype)


def _step(eps_fn, chain, key_noise, x, k, noise=None):
    """One step and the noise that the net predicted."""
    time = jnp.broadcast_to(jnp.asarray(chain.time, jnp.float32)[k], x.shape[:1])
    eps = eps_fn(x, time)
    noise = _noise(key_noise, x, k) if noise is None else noise
    std = jnp.asarray(chain.std, x.dtype)[k]
    return diffusion.step_mean(chain, k, x, eps) + std * noise, eps
