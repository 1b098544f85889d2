r"""Model-predictive planners: CEM, iCEM, MPPI and random shooting, one signature.

``plan`` maximises the return of a sequence of H actions over a model and gives the first
action, with what the next step's plan starts from. A plan's return comes from any
function of (state, plans (P, H, A), key); ``rollout`` makes one of a model's step. All
loops are ``lax.scan`` with static shapes: ``jax.vmap`` plans for many tasks at once.

CEM draws P plans from a truncated normal whose variance the distance to the bounds
limits, so that none needs clipping:

$$ u = m + \sqrt{\min(v, ((m - l) / 2)^2, ((h - m) / 2)^2)}\, z, \quad z \in [-2, 2] $$

and moves mean and variance to those of the E best, 1 - ``alpha`` of the way.

References: CEM as in Chua et al., Deep Reinforcement Learning in a Handful of Trials,
2018, arXiv 1805.12114; iCEM: Pinneri et al., Sample-efficient Cross-Entropy Method for
Real-time Planning, 2020, arXiv 2008.06389; MPPI: Williams et al., Information Theoretic
MPC, ICRA 2017.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.ops.environments.spaces import Box

NAMES = ("cem", "icem", "mppi", "shooting")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a planner does; one reads the fields that it has.

    Attributes:
      name: one of ``NAMES``.
      horizon: H, actions of a plan.
      population: P, plans of an iteration.
      iterations: of an update; shooting: the plans of all are drawn at once.
      elites: cem, icem: E.
      alpha: cem, icem: share of the old mean and variance that an iteration keeps.
      variance: of the first draw, of every action; mppi: of all.
      stop: cem: variance below which no further iteration is done.
      execute: cem, icem, mppi: the first action of the last mean, or of the best plan.
      colour: icem: exponent beta of the noise's spectrum, 1 / f^beta; 0: white.
      reuse: icem: share of the elites that the next iteration and the next step evaluate
        again.
      decay: icem: an iteration has so many times fewer plans than the one before.
      temperature: mppi: plans are weighted by exp(return / temperature).

    Raises:
      ValueError: a value out of range, named.
    """

    name: str = "cem"
    horizon: int = 30
    population: int = 500
    iterations: int = 5
    elites: int = 50
    alpha: float = 0.1
    variance: float = 1.0
    stop: float = 0.01
    execute: str = "mean"
    colour: float = 2.0
    reuse: float = 0.3
    decay: float = 1.25
    temperature: float = 1.0

    def __post_init__(self):
        choices = {"name": NAMES, "execute": ("mean", "best")}
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"planner.{field} must be one of {known}, got "
                    f"{getattr(self, field)!r}"
                )
        for field in ("horizon", "population", "iterations", "elites"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"planner.{field} must be >= 1, got {getattr(self, field)}"
                )
        if self.elites > self.population:
            raise ValueError(
                f"planner.elites must be at most the population {self.population}, got "
                f"{self.elites}"
            )
        for field in ("variance", "temperature"):
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"planner.{field} must be > 0, got {getattr(self, field)}"
                )
        bounds = {"alpha": (0, 1), "reuse": (0, 1), "decay": (1, math.inf),
                  "stop": (0, math.inf), "colour": (0, math.inf)}  # fmt: skip
        for field, (low, high) in bounds.items():
            if not low <= getattr(self, field) <= high:
                raise ValueError(
                    f"planner.{field} must lie in [{low}, {high}], got "
                    f"{getattr(self, field)}"
                )

    @property
    def kept(self) -> int:
        """Plans that an iteration hands on."""
        return math.ceil(self.reuse * self.elites) if self.name == "icem" else 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Plans that each iteration draws."""
        if self.name != "icem":
            return (self.population,) * self.iterations
        least = min(2 * self.elites, self.population)
        return tuple(
            max(round(self.population / self.decay**i), least)
            for i in range(self.iterations)
        )


class Warm(NamedTuple):
    """What the plan of the next step starts from.

    Attributes:
      mean: (H, A), the last mean.
      kept: (K, H, A), good plans; none but for icem.
    """

    mean: Any
    kept: Any


class Trace(NamedTuple):
    """What happened in the iterations; compiled away where it is not looked at.

    Attributes:
      returns: (I, P), -inf where a return was not finite, or none was asked for.
      elites: (I, E), indices of the best, the best first.
      means: (I, H, A), after each iteration.
      variances: (I, H, A).
    """

    returns: Any
    elites: Any
    means: Any
    variances: Any


class Planned(NamedTuple):
    """A plan.

    Attributes:
      action: (A,), to execute.
      warm: for the next step.
      value: (), return of the best plan that was evaluated.
      trace: see ``Trace``; of icem, whose iterations have different sizes, None.
    """

    action: Any
    warm: Warm
    value: Any
    trace: Trace | None


Evaluate = Callable[[Any, Any, Any], Any]
"""(state, plans (P, H, A), key) -> returns (P,)."""


def rollout(step: Callable) -> Evaluate:
    """Sum of a model's rewards along plans.

    Args:
      step: (states with a leading axis P, actions (P, A), key) -> (states, rewards (P,)),
        of all plans at once.
    """

    def evaluate(state, plans, key):
        count, horizon, _ = plans.shape
        states = jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), state
        )

        def body(states, x):
            states, reward = step(states, *x)
            return states, reward

        xs = (plans.swapaxes(0, 1), jax.random.split(key, horizon))
        _, rewards = lax.scan(body, states, xs)
        return rewards.sum(0)

    return evaluate


def start(options: Options, space: Box) -> Warm:
    """What the first plan of an episode starts from: no action at all.

    Raises:
      ValueError: bounds that are not finite or not in order.
    """
    rest = _rest(space)
    mean = jnp.tile(jnp.asarray(rest, float)[None], (options.horizon, 1))
    return Warm(mean, jnp.tile(mean[None], (options.kept, 1, 1)))


def plan(
    evaluate: Evaluate,
    state: Any,
    key: Key[Array, ""],
    warm: Warm,
    options: Options,
    space: Box,
    noise: Float[Array, "I P H A"] | None = None,
) -> Planned:
    """The best sequence of actions from a state, as far as a planner finds it.

    Args:
      evaluate: see ``Evaluate``; what is not finite counts as -inf.
      state: where the plans start.
      key: of the draws and of ``evaluate``.
      warm: of the step before, which is shifted by one step, or ``start``.
      options: see ``Options``.
      space: bounds of the actions.
      noise: cem: standard normal numbers truncated to [-2, 2], in place of a draw.

    Raises:
      ValueError: bounds that are not finite or not in order; a warm start or noise of
        another shape.

    Example:
      >>> options = Options(horizon=2, population=64, elites=8)
      >>> space = Box((-1.0,), (1.0,))
      >>> def evaluate(state, plans, key):
      ...     return -jnp.square(plans - 0.5).sum((1, 2))
      >>> first = start(options, space)
      >>> solve = jax.jit(lambda key: plan(evaluate, (), key, first, options, space))
      >>> round(float(solve(jax.random.key(0)).action[0]), 1)
      0.5
    """
    rest = _rest(space)
    if jnp.shape(warm.mean) != (options.horizon, len(rest)):
        raise ValueError(
            f"the warm start must have shape {(options.horizon, len(rest))}, got "
            f"{jnp.shape(warm.mean)}; planning.start makes one"
        )
    drawn = (options.iterations, options.population, options.horizon, len(rest))
    if noise is not None and (options.name != "cem" or noise.shape != drawn):
        raise ValueError(
            f"noise can be given for cem, of shape {drawn}, got {noise.shape} for "
            f"{options.name}"
        )

    def shifted(x):
        end = jnp.broadcast_to(
            jnp.asarray(rest, x.dtype), (*x.shape[:-2], 1, len(rest))
        )
        return jnp.concatenate([x[..., 1:, :], end], -2)

    def returns(plans, key):
        values = evaluate(state, plans, key)
        return jnp.where(jnp.isfinite(values), values, -jnp.inf)

    warm = Warm(shifted(warm.mean), jax.vmap(shifted)(warm.kept))
    bounds = tuple(_rows(x, warm.mean) for x in space)
    if options.name == "icem":
        return _icem(returns, key, warm, options, bounds)
    solve = {"cem": _cem, "mppi": _mppi, "shooting": _shooting}[options.name]
    return solve(returns, key, warm, options, bounds, noise)


def _rest(space: Box) -> np.ndarray:
    """No action: zero, or the middle of bounds that do not have it inside."""
    low, high = (np.asarray(x, np.float64) for x in space)
    if not np.isfinite([low, high]).all() or not (low < high).all():
        raise ValueError(
            "a planner needs finite bounds of the actions with low < high, got low "
            f"{space.low}, high {space.high}"
        )
    return np.where((low < 0) & (high > 0), 0, (low + high) / 2)


def _rows(bound: Any, mean: Any) -> Any:
    """A bound of the actions for every step."""
    return jnp.tile(jnp.asarray(bound, mean.dtype)[None], (len(mean), 1))


def _spread(mean: Any, variance: Any, z: Any) -> Any:
    """Plans (P, H, A) around a mean (H, A)."""
    return mean[None] + jnp.sqrt(variance)[None] * z


class _Search(NamedTuple):
    """What an iteration changes: the distribution, and the best plan so far."""

    mean: Any
    variance: Any
    best: Any
    value: Any


def _begin(warm: Warm, options: Options) -> _Search:
    mean = warm.mean
    value = jnp.asarray(-jnp.inf, mean.dtype)
    return _Search(mean, jnp.full_like(mean, options.variance), mean, value)


def _better(search: _Search, plans: Any, values: Any) -> _Search:
    top = values.argmax()
    better = values[top] > search.value
    return search._replace(
        best=jnp.where(better, plans[top], search.best),
        value=jnp.where(better, values[top], search.value).astype(search.value.dtype),
    )


def _end(search: _Search, kept: Any, options: Options, trace: Any) -> Planned:
    first = search.best if options.execute == "best" else search.mean
    return Planned(first[0], Warm(search.mean, kept), search.value, trace)


def _moved(search: _Search, elites: Any, alpha: float) -> _Search:
    """Mean and variance 1 - alpha of the way to the elites' (divided by their number)."""
    return search._replace(
        mean=alpha * search.mean + (1 - alpha) * elites.mean(0),
        variance=alpha * search.variance + (1 - alpha) * elites.var(0),
    )


def _cem(returns, key, warm, options, bounds, noise):
    low, high = bounds
    shape = (options.population, *warm.mean.shape)

    def iterate(search, key, z):
        key_noise, key_model = jax.random.split(key)
        if z is None:
            z = jax.random.truncated_normal(key_noise, -2, 2, shape, low.dtype)
        room = jnp.minimum(search.mean - low, high - search.mean)
        variance = jnp.minimum(search.variance, jnp.square(room / 2))
        plans = _spread(search.mean, variance, z)
        values = returns(plans, key_model)
        _, elites = lax.top_k(values, options.elites)
        search = _better(search, plans, values)
        return _moved(search, plans[elites], options.alpha), (values, elites)

    def skip(search, key, z):
        values = jnp.full(shape[0], -jnp.inf, search.value.dtype)
        return search, (values, jnp.zeros(options.elites, jnp.int32))

    def body(search, x):
        go = search.variance.max() > options.stop
        search, (values, elites) = lax.cond(go, iterate, skip, search, *x)
        return search, Trace(values, elites, search.mean, search.variance)

    keys = jax.random.split(key, options.iterations)
    search, trace = lax.scan(body, _begin(warm, options), (keys, noise))
    return _end(search, warm.kept, options, trace)


def _icem(returns, key, warm, options, bounds):
    low, high = bounds
    search, kept = _begin(warm, options), warm.kept
    horizon, width = warm.mean.shape
    root = jnp.asarray(coloured(horizon, options.colour), low.dtype)
    for i, (size, key_i) in enumerate(
        zip(options.sizes, jax.random.split(key, options.iterations))
    ):
        key_noise, key_model = jax.random.split(key_i)
        z = jax.random.normal(key_noise, (size, root.shape[1], width), low.dtype)
        z = jnp.einsum("hk,pka->pha", root, z)
        plans = _spread(search.mean, search.variance, z)
        plans = jnp.clip(plans, low[None], high[None])
        last = i == options.iterations - 1
        more = [kept, search.mean[None]] if last else [kept]
        plans = jnp.concatenate([plans, *more])
        values = returns(plans, key_model)
        elites = plans[lax.top_k(values, options.elites)[1]]
        search = _better(search, plans, values)
        search, kept = _moved(search, elites, options.alpha), elites[: options.kept]
    return _end(search, kept, options, None)


def _mppi(returns, key, warm, options, bounds, noise):
    del noise
    low, high = bounds
    shape = (options.population, *warm.mean.shape)

    def body(search, key):
        key_noise, key_model = jax.random.split(key)
        z = jax.random.normal(key_noise, shape, warm.mean.dtype)
        plans = _spread(search.mean, search.variance, z)
        plans = jnp.clip(plans, low[None], high[None])
        values = returns(plans, key_model)
        # Where every return is -inf, all plans weigh the same.
        top = values.max()
        known = jnp.where(jnp.isfinite(top), values - top, 0.0)
        weights = jax.nn.softmax(known / options.temperature)
        mean = jnp.einsum("p,pha->ha", weights, plans)
        search = _better(search, plans, values)._replace(mean=mean)
        elites = lax.top_k(values, options.elites)[1]
        return search, Trace(values, elites, search.mean, search.variance)

    keys = jax.random.split(key, options.iterations)
    search, trace = lax.scan(body, _begin(warm, options), keys)
    return _end(search, warm.kept, options, trace)


def _shooting(returns, key, warm, options, bounds, noise):
    del noise
    low, high = bounds
    shape = (options.population, *warm.mean.shape)

    def body(search, key):
        key_noise, key_model = jax.random.split(key)
        u = jax.random.uniform(key_noise, shape, warm.mean.dtype)
        plans = low[None] + (high - low)[None] * u
        values = returns(plans, key_model)
        search = _better(search, plans, values)
        search = search._replace(mean=search.best)
        elites = lax.top_k(values, options.elites)[1]
        return search, Trace(values, elites, search.mean, search.variance)

    keys = jax.random.split(key, options.iterations)
    search, trace = lax.scan(body, _begin(warm, options), keys)
    return _end(search, warm.kept, options, trace)


@functools.cache
def coloured(length: int, beta: float) -> np.ndarray:
    """Root R (T, K) of the covariance of noise with the spectrum 1 / f^beta.

    R z with a standard normal z (K) has unit variance at every time. The lowest
    frequency, 0, has the power of the next one.

    Args:
      length: T.
      beta: 0: white noise.
    """
    frequency = np.fft.rfftfreq(length)
    power = np.maximum(frequency, 1 / length) ** -beta
    both = np.concatenate([power, power[1 : (length + 1) // 2][::-1]])
    # Circulant: cosines and sines of each frequency with its power.
    covariance = np.fft.ifft(both).real
    shift = (np.arange(length)[:, None] - np.arange(length)) % length
    covariance = covariance[shift] / covariance[0]
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))
