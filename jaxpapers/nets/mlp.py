"""Multi-layer perceptrons, and DIN's activation Dice with its moving statistics.

Parameters are dicts ``layer_0, layer_1, ..`` of kernel (in, out), bias and, for Dice,
alpha. Dice's statistics have the same names; without Dice they are {}.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key, Shaped

ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "dice")


class DiceState(NamedTuple):
    """Moving mean and variance of a Dice activation's input, (C,) each."""

    mean: Any
    var: Any


def dice(
    x: Float[Array, "*batch C"],
    alpha: Float[Array, " C"],
    state: DiceState,
    *,
    train: bool,
    mask: Bool[Array, "..."] | None = None,
    decay: float = 0.99,
    eps: float = 1e-8,
    correction: int = 0,
    axis_name: str | None = None,
) -> tuple[Float[Array, "*batch C"], DiceState]:
    r"""PReLU that bends at the mean of its input (DIN, arXiv 1706.06978, eq 9).

    $$ f(s) = p s + (1 - p) \alpha s, \quad
       p = \mathrm{sigmoid}((s - E[s]) / \sqrt{Var[s] + \epsilon}) $$

    Args:
      x: s, channels last.
      alpha: slope below the mean.
      state: moving mean and variance.
      train: use the statistics of this batch, with gradients through them; else the
        moving ones. Under ``jax.jit`` the batch is the global one on every mesh.
      mask: broadcasts to the leading axes; False at padding, which no statistic counts.
      decay: of the moving statistics (not in the paper).
      eps: added to the variance.
      correction: 1 stores n/(n-1) times the variance, as torch does; 0 the variance.
      axis_name: mesh or vmap axis over which statistics are taken too.

    Returns:
      f(s), and the new moving statistics.

    Example:
      >>> x = jnp.array([[-1.0], [1.0]])
      >>> state = DiceState(jnp.zeros(1), jnp.ones(1))
      >>> train = jax.jit(lambda x: dice(x, jnp.ones(1), state, train=True))
      >>> y, _ = train(x)
      >>> y.tolist()
      [[-1.0], [1.0]]
    """
    s = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, var = state
    if train:
        axes = tuple(range(s.ndim - 1))
        kept = jnp.ones(s.shape[:-1], s.dtype)
        if mask is not None:
            kept = kept * jnp.broadcast_to(mask, kept.shape)

        def total(x):
            return lax.psum(x, axis_name) if axis_name else x

        count = total(kept.sum())
        divisor = jnp.maximum(count, 1)
        mean = total((kept[..., None] * s).sum(axes)) / divisor
        square = jnp.square(s - channels(mean, s))
        var = total((kept[..., None] * square).sum(axes)) / divisor
        # A batch of padding leaves the moving statistics alone.
        momentum = jnp.where(count > 0, decay, 1.0)
        stored = var * count / jnp.maximum(count - correction, 1)
        moved = (
            momentum * state.mean + (1 - momentum) * mean,
            momentum * state.var + (1 - momentum) * stored,
        )
        state = DiceState(*(lax.stop_gradient(new).astype(old.dtype)
                            for new, old in zip(moved, state)))  # fmt: skip
    p = jax.nn.sigmoid((s - channels(mean, s)) * lax.rsqrt(channels(var, s) + eps))
    y = s * (p + (1 - p) * channels(alpha, s))
    return y.astype(x.dtype), state


def init(
    key: Key[Array, ""],
    sizes: Sequence[int],
    activation: str = "relu",
    *,
    last_bias: bool = True,
) -> dict:
    """Glorot-uniform kernels, zero biases and alphas.

    Args:
      key: of the kernels.
      sizes: input, hidden layers, output.
      activation: one of ``ACTIVATIONS``.
      last_bias: whether the last layer has a bias; a softmax after it does not see one.

    Raises:
      ValueError: unknown activation, or fewer than two sizes.
    """
    _check(activation)
    if len(sizes) < 2:
        raise ValueError(f"mlp.init needs input and output size, got {tuple(sizes)}")
    params = {}
    keys = jax.random.split(key, len(sizes) - 1)
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        kernel = jax.nn.initializers.glorot_uniform()(keys[i], (fan_in, fan_out))
        params[f"layer_{i}"] = {"kernel": kernel, "bias": jnp.zeros(fan_out)}
        if i == len(sizes) - 2 and not last_bias:
            del params[f"layer_{i}"]["bias"]
        if activation == "dice" and i < len(sizes) - 2:
            params[f"layer_{i}"]["alpha"] = jnp.zeros(fan_out)
    return params


def statistics(params: dict) -> dict[str, DiceState]:
    """Initial moving statistics, mean 0 and variance 1, of the Dice of ``params``."""
    return {
        name: DiceState(jnp.zeros_like(p["alpha"]), jnp.ones_like(p["alpha"]))
        for name, p in params.items()
        if "alpha" in p
    }


def apply(
    params: dict,
    state: dict[str, DiceState],
    x: Float[Array, "*batch I"],
    *,
    activation: str,
    train: bool,
    mask: Bool[Array, "..."] | None = None,
    decay: float = 0.99,
    eps: float = 1e-8,
    start: int = 0,
) -> tuple[Float[Array, "*batch O"], dict[str, DiceState]]:
    """Linear layers with the activation between them.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      x: input.
      activation: one of ``ACTIVATIONS``.
      train, mask, decay, eps: see ``dice``.
      start: first layer to apply; ``x`` is the output of those before it.

    Returns:
      The output, and the new statistics.
    """
    outputs, state = layers(
        params, state, x, activation=activation, start=start,
        train=train, mask=mask, decay=decay, eps=eps,
    )  # fmt: skip
    return outputs[-1], state


def layers(
    params: dict,
    state: dict[str, DiceState],
    x: Float[Array, "*batch I"],
    *,
    activation: str,
    start: int = 0,
    **options: Any,
) -> tuple[list[Float[Array, "*batch _"]], dict[str, DiceState]]:
    """``apply`` that returns the activations of every hidden layer, then the output."""
    outputs = []
    for i in range(start, len(params)):
        layer = params[f"layer_{i}"]
        x = matmul(x, layer["kernel"])
        x = x + channels(layer["bias"], x) if "bias" in layer else x
        if i < len(params) - 1:
            x, state = activate(layer, state, x, f"layer_{i}", activation, **options)
        outputs.append(x)
    return outputs, state


def activate(
    layer: dict,
    state: dict[str, DiceState],
    x: Float[Array, "*batch C"],
    name: str,
    activation: str,
    **options: Any,
) -> tuple[Float[Array, "*batch C"], dict[str, DiceState]]:
    """The activation of one layer; ``options`` are those of ``dice``.

    Raises:
      ValueError: unknown activation.
    """
    _check(activation)
    if activation == "dice":
        x, new = dice(x, layer["alpha"], state[name], **options)
        return x, {**state, name: new}
    return getattr(jax.nn, activation)(x), state


def matmul(
    x: Float[Array, "*batch I"], kernel: Float[Array, "I O"], dtype: Any = None
) -> Float[Array, "*batch O"]:
    """x @ kernel as one matrix product, which CPUs compute faster than a batched one.

    Args:
      x: rows.
      kernel: (in, out).
      dtype: of both factors, e.g. bfloat16, accumulated in float32; None: as they are.
    """
    flat, w = x.reshape(-1, x.shape[-1]), kernel
    if dtype:
        flat, w = flat.astype(dtype), w.astype(dtype)
    kind = jnp.promote_types(flat.dtype, jnp.float32)
    y = jnp.matmul(flat, w, preferred_element_type=kind)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def channels(v: Shaped[Array, " C"], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """A vector with as many axes as ``x``, to broadcast along its last one, channels."""
    return v.reshape((1,) * (x.ndim - 1) + v.shape)


def _check(activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
