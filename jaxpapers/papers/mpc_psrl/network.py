r"""Probabilistic networks whose penultimate layer is regressed on, and their training.

$$ L = E[(m - y)^2 e^{-v} + v] + \sum_l \tfrac{\lambda_l}{2} \|W_l\|^2
   + 0.01 \sum (v_{max} - v_{min}) $$

with mean m and log-variance v of every target, v softly between two trained bounds.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.options import check_least

DECAY = {
    2: (2.5e-5, 5e-5, 7.5e-5, 7.5e-5),
    3: (2.5e-4, 5e-4, 5e-4, 7.5e-4, 7.5e-4),
}
"""Weight decay of each layer, by the number of hidden layers before the features."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """Sizes of the networks.

    Attributes:
      hidden: width of the hidden layers.
      depth: hidden layers before the features: 2, or 3 for the arms.
      features: D, width of the penultimate layer; 0: twice the inputs.
      decay: weight decay of each of the ``depth`` + 2 layers; (): those of the paper's
        code for depths 2 and 3, else that of depth 2's last layer for all.
      reward_hidden: width of the hidden layers of the learned reward.
    """

    hidden: int = 200
    depth: int = 2
    features: int = 0
    decay: tuple[float, ...] = ()
    reward_hidden: int = 10

    def __post_init__(self):
        check_least(
            self, "net", hidden=1, depth=1, features=0, reward_hidden=1, decay=0
        )
        if self.decay and len(self.decay) != self.depth + 2:
            raise ValueError(
                f"net.decay needs one number for each of {self.depth + 2} layers, got "
                f"{self.decay}"
            )

    def sizes(self, inputs: int, hidden: int) -> tuple[int, ...]:
        """Widths up to the features."""
        return (inputs, *(hidden,) * self.depth, self.features or 2 * inputs)

    @property
    def decays(self) -> tuple[float, ...]:
        """Weight decay of each layer."""
        known = DECAY.get(self.depth, (DECAY[2][-1],) * (self.depth + 2))
        return self.decay or known


class Scaler(NamedTuple):
    """Standardisation of the inputs.

    Attributes:
      mean, std: (S + A,) each.
    """

    mean: Any
    std: Any


class Fit(NamedTuple):
    """A trained network.

    Attributes:
      params: its parameters.
      opt_state: of the optimizer, which goes on from one episode to the next.
      loss: () of the last minibatch.
      grad_norm: () of the last minibatch.
    """

    params: Any
    opt_state: Any
    loss: Any
    grad_norm: Any


def init(key: Key[Array, ""], sizes: tuple[int, ...], outputs: int) -> dict[str, Any]:
    """Parameters: truncated normal kernels of deviation 1 / (2 sqrt(fan-in)).

    Args:
      key: of the kernels.
      sizes: of ``Net.sizes``.
      outputs: S; the last layer has a mean and a log-variance for each.

    Returns:
      layer_0, layer_1, ... of kernel (in, out) and bias; max_logvar and min_logvar (S,).
    """
    widths = (*sizes, 2 * outputs)
    params: dict[str, Any] = {
        "max_logvar": jnp.full(outputs, 0.5, jnp.float32),
        "min_logvar": jnp.full(outputs, -10.0, jnp.float32),
    }
    keys = jax.random.split(key, len(widths) - 1)
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
        kernel = jax.random.truncated_normal(keys[i], -2, 2, (fan_in, fan_out))
        kernel = kernel / (2 * fan_in**0.5)
        params[f"layer_{i}"] = {"kernel": kernel, "bias": jnp.zeros(fan_out)}
    return params


def layers(params: dict[str, Any]) -> int:
    """Number of layers."""
    return sum(name.startswith("layer_") for name in params)


def features(
    params: dict[str, Any], scaler: Scaler, x: Float[Array, "B N"]
) -> Float[Array, "B D"]:
    """The penultimate layer, after its swish."""
    x = (x - scaler.mean[None]) / scaler.std[None]
    for i in range(layers(params) - 1):
        layer = params[f"layer_{i}"]
        x = jax.nn.swish(x @ layer["kernel"] + layer["bias"][None])
    return x


def heads(
    params: dict[str, Any], z: Float[Array, "B D"]
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Mean and log-variance of each target, from features."""
    last = params[f"layer_{layers(params) - 1}"]
    mean, logvar = jnp.split(z @ last["kernel"] + last["bias"][None], 2, axis=1)
    high, low = params["max_logvar"][None], params["min_logvar"][None]
    logvar = high - jax.nn.softplus(high - logvar)
    return mean, low + jax.nn.softplus(logvar - low)


def mean_bias(params: dict[str, Any]) -> Float[Array, " S"]:
    """Bias of the mean, which the regression leaves as it is."""
    bias = params[f"layer_{layers(params) - 1}"]["bias"]
    return bias[: len(bias) // 2]


def likelihood(
    params: dict[str, Any],
    x: Float[Array, "B N"],
    y: Float[Array, "B S"],
    weight: Float[Array, " B"],
    scaler: Scaler,
    decay: tuple[float, ...],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of a minibatch, see above.

    Args:
      params: of ``init``.
      x: inputs, as they are observed.
      y: targets.
      weight: of each row, 0 for padding.
      scaler: of the inputs.
      decay: of each layer's kernel.

    Returns:
      The loss, and its metrics: mse.
    """
    mean, logvar = heads(params, features(params, scaler, x))
    square = jnp.square(mean - y)
    terms = (square * jnp.exp(-logvar) + logvar).mean(1)
    rows = jnp.maximum(weight.sum(), 1)
    kernels = [params[f"layer_{i}"]["kernel"] for i in range(layers(params))]
    penalty = sum(c * jnp.square(k).sum() / 2 for c, k in zip(decay, kernels))
    bounds = 0.01 * (params["max_logvar"].sum() - params["min_logvar"].sum())
    mse = (weight * square.mean(1)).sum() / rows
    return (weight * terms).sum() / rows + penalty + bounds, {"mse": mse}


def fit_scaler(x: Float[Array, "M N"], count: Any) -> Scaler:
    """Mean and deviation of the first ``count`` rows; a deviation below 1e-12 is 1."""
    kept = (jnp.arange(len(x)) < count).astype(x.dtype)[:, None]
    mean = (kept * x).sum(0) / count
    std = jnp.sqrt((kept * jnp.square(x - mean[None])).sum(0) / count)
    return Scaler(mean, jnp.where(std < 1e-12, 1, std))


def fit(
    params: dict[str, Any],
    opt_state: Any,
    x: Float[Array, "M N"],
    y: Float[Array, "M S"],
    count: Any,
    key: Key[Array, ""],
    scaler: Scaler,
    *,
    tx: optax.GradientTransformation,
    decay: tuple[float, ...],
    epochs: int,
    batch: int,
) -> Fit:
    """Trains on the first ``count`` rows, in a program that does not depend on ``count``.

    One bootstrap sample of the rows is drawn and shuffled in every epoch; the last
    minibatch of an epoch may be shorter.

    Args:
      params, opt_state: to start from.
      x, y: buffers of all rows that there may be.
      count: rows that there are.
      key: of sample and order.
      scaler: of the inputs.
      tx: optimizer.
      decay: see ``likelihood``.
      epochs: passes over the bootstrap sample.
      batch: rows of a minibatch.
    """
    room = -(-len(x) // batch) * batch
    key_sample, key_order = jax.random.split(key)
    sample = jax.random.randint(key_sample, (room,), 0, count)
    place = jnp.arange(room)
    grad = jax.value_and_grad(likelihood, has_aux=True)

    def minibatch(i, carry, order):
        params, opt_state, *_ = carry
        rows = lax.dynamic_slice(order, (i * batch,), (batch,))
        weight = (i * batch + jnp.arange(batch) < count).astype(x.dtype)
        (loss, _), grads = grad(params, x[rows], y[rows], weight, scaler, decay)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return Fit(params, opt_state, loss, optax.tree.norm(grads))

    def epoch(carry, key):
        ranks = jnp.where(place < count, jax.random.uniform(key, (room,)), 2.0)
        order = sample[jnp.argsort(ranks)]
        steps = (count + batch - 1) // batch
        return lax.fori_loop(0, steps, lambda i, c: minibatch(i, c, order), carry), None

    zero = jnp.zeros((), x.dtype)
    start = Fit(params, opt_state, zero, zero)
    return lax.scan(epoch, start, jax.random.split(key_order, epochs))[0]
