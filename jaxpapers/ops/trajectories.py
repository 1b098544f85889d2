"""Trajectories of reverse processes: drawn, replayed, and sharded over devices."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxpapers.ops import diffusion
from jaxpapers.ops.diffusion import Schedule

STORES = ("all", "last", "keys")
# Largest number of noise values of a rollout that are drawn in one call before it.
AT_ONCE = 2**18


class Trajectory(NamedTuple):
    """B trajectories of S steps, see ``rollout``.

    Attributes:
      sample: (B, ...), the last state.
      states: (S + 1, B, *X) with store="all", else None.
      eps: (S, B, *X), predicted noise, with store="all", else None.
      log_prob: (S, B), log-probabilities of the steps, or None.
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
    schedule: Schedule,
    shape: tuple[int, ...] | None = None,
    *,
    start: Float[Array, "B ..."] | None = None,
    store: str = "last",
    log_prob: bool = False,
    reduce: str = "sum",
    remat: bool = False,
) -> Trajectory:
    """Draws B trajectories from noise to data in one ``lax.scan``.

    Args:
      key: of the first states and of every step's noise.
      eps_fn: (x, time (B,)) -> predicted noise.
      schedule: of S steps.
      shape: (B, ...), to start from N(0, I).
      start: first states, instead of ``shape``.
      store: "all" states and predictions, the "last" state, or "keys": the first state
        and the key, from which ``replay`` recomputes the rest; memory then does not
        grow with S.
      log_prob: also the steps' log-probabilities.
      reduce: see ``ops.diffusion.step_log_prob``.
      remat: recompute each step in the backward pass, whose memory is then S states
        and the activations of one step.

    Raises:
      ValueError: unknown store; log-probabilities of a deterministic step.
    """
    if store not in STORES:
        raise ValueError(f"store must be one of {STORES}, got {store!r}")
    if (shape is None) == (start is None):
        raise ValueError("rollout takes either shape= or start=")
    if log_prob:
        diffusion.check_density(schedule)
    key_start, key_noise = jax.random.split(key)
    first: Any = start if shape is None else jax.random.normal(key_start, shape)
    first = over_data(first)
    step = functools.partial(_step, eps_fn, schedule, key_noise)

    def body(x, now):
        k, noise = now
        x_next, eps = step(x, k, noise)
        score = None
        if log_prob:
            score = diffusion.step_log_prob(schedule, k, x, x_next, eps, reduce)
        return x_next, (*((x, eps) if store == "all" else (None, None)), score)

    scan: Any = lax.scan(
        jax.checkpoint(body) if remat else body,
        first,
        _steps(schedule, key_noise, first),
    )
    last, (states, eps, scores) = scan
    if store == "keys":
        return Trajectory(last, None, None, scores, first, key_noise)
    if store == "last":
        return Trajectory(last, None, None, scores)
    return Trajectory(last, jnp.concatenate([states, last[None]]), eps, scores)


def over_data(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Rows sharded over the mesh axis ``data``, if it exists and divides them.

    Noise is drawn from one key: without this constraint the compiler replicates it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = dict(zip(mesh.axis_names, mesh.axis_types)).get("data") == AxisType.Auto
    if not auto or len(x) % mesh.shape["data"]:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec("data"))


def of_each(
    x: Shaped[Array, "S B ..."], k: Int[Array, "B N"]
) -> Shaped[Array, "B N ..."]:
    """Entries x[k[b, n], b] of every trajectory, without moving rows between devices."""
    rows = jnp.moveaxis(x, 1, 0)
    index = k.reshape(*k.shape, *(1,) * (rows.ndim - 2))
    return jnp.take_along_axis(rows, index, 1)


def replay(
    trajectory: Trajectory,
    eps_fn: Callable,
    schedule: Schedule,
    visit: Callable[[Any, Any, Any, Any, Any], Any],
    carry: Any,
) -> Any:
    """Recomputes trajectories that were stored as keys; states are bitwise the same.

    Args:
      trajectory: of ``rollout`` with store="keys".
      eps_fn: the policy that drew it.
      schedule: of ``rollout``.
      visit: (carry, k, x, x_next, eps) -> carry, at every step.
      carry: initial carry, e.g. zeros for the sum of a gradient.

    Returns:
      The last carry.

    Raises:
      ValueError: a trajectory stored in another way.
    """
    if trajectory.key is None:
        raise ValueError("replay needs a trajectory of rollout(..., store='keys')")
    step = functools.partial(_step, eps_fn, schedule, trajectory.key)

    def body(state, now):
        (x, carry), (k, noise) = state, now
        x_next, eps = step(x, k, noise)
        return (x_next, visit(carry, k, x, x_next, eps)), None

    steps = _steps(schedule, trajectory.key, trajectory.start)
    return lax.scan(body, (trajectory.start, carry), steps)[0][1]


def _steps(schedule, key_noise, x):
    """Indices of the steps, and their noise if it is small: one draw instead of S."""
    k = jnp.arange(len(schedule.std))
    if len(k) * x.size > AT_ONCE:
        return k, None
    return k, jax.vmap(functools.partial(_noise, key_noise, x))(k)


def _noise(key_noise, x, k):
    return jax.random.normal(jax.random.fold_in(key_noise, k), x.shape, x.dtype)


def _step(eps_fn, schedule, key_noise, x, k, noise=None):
    """The next state and the predicted noise."""
    time = jnp.broadcast_to(jnp.asarray(schedule.time, jnp.float32)[k], x.shape[:1])
    eps = eps_fn(x, time)
    noise = _noise(key_noise, x, k) if noise is None else noise
    std = jnp.asarray(schedule.std, x.dtype)[k]
    return diffusion.step_mean(schedule, k, x, eps) + std * noise, eps
