"""The planners: each moves a distribution of plans towards the best of its draws.

All have one signature: ``returns`` (plans (P, H, A), key) -> (P,), a key, the shifted
warm start, options, bounds (H, A) of the actions, and noise in place of draws or None.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpapers.ops.planning.options import Options, Planned, Trace, Warm


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


def cem(returns, key, warm, options, bounds, noise):
    """The cross-entropy method: see ``ops.planning`` for the draw."""
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


def icem(returns, key, warm, options, bounds):
    """CEM with coloured noise, fewer plans in each iteration, and elites kept."""
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


def mppi(returns, key, warm, options, bounds, noise):
    """The mean moves to the softmax-weighted mean of the plans."""
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


def shooting(returns, key, warm, options, bounds, noise):
    """The best of plans drawn uniformly between the bounds."""
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
