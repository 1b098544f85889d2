"""Multi-layer perceptrons of the click models, and Dice, their activation.

Parameters are dicts ``layer_0, layer_1, ..`` of kernel (in, out), bias and, for Dice,
alpha. Statistics have the same names, and are empty without Dice.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "dice")


class DiceState(NamedTuple):
    """Moving statistics of a Dice activation.

    Attributes:
      mean: (C,).
      var: (C,).
    """

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
    r"""PReLU whose turning point follows the data (DIN, arXiv 1706.06978, eq 9).

    $$ f(s) = p s + (1 - p) \alpha s, \quad
       p = \mathrm{sigmoid}((s - E[s]) / \sqrt{Var[s] + \epsilon}) $$

    Args:
      x: s, channels last.
      alpha: slope of the left side.
      state: moving mean and variance.
      train: statistics of this batch, through which the gradient flows; else the moving
        ones. Under ``jax.jit`` the batch is the global one on every mesh.
      mask: of the leading axes; False where x is padding, which counts nowhere.
      decay: of the moving statistics (the paper does not say).
      eps: added to the variance.
      correction: 1 keeps n/(n-1) times the variance, as torch does.
      axis_name: mesh or vmap axis to take the batch's statistics over as well.

    Returns:
      f(s), and the state to use next.

    Example:
      >>> x = jnp.array([[-1.0], [1.0]])
      >>> y, _ = dice(x, jnp.ones(1), DiceState(jnp.zeros(1), jnp.ones(1)), train=True)
      >>> y.tolist()
      [[-1.0], [1.0]]
    """
    s = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, var = state
    if train:
        axes = tuple(range(s.ndim - 1))
        seen = jnp.ones(s.shape[:-1], s.dtype)
        if mask is not None:
            seen = seen * jnp.broadcast_to(mask, seen.shape)

        def total(x):
            return lax.psum(x, axis_name) if axis_name else x

        count = total(seen.sum())
        some = jnp.maximum(count, 1)
        mean = total((seen[..., None] * s).sum(axes)) / some
        square = jnp.square(s - _to(mean, s))
        var = total((seen[..., None] * square).sum(axes)) / some
        # Nothing seen, nothing learned.
        keep = jnp.where(count > 0, decay, 1.0)
        kept = var * count / jnp.maximum(count - correction, 1)
        moved = (
            keep * state.mean + (1 - keep) * mean,
            keep * state.var + (1 - keep) * kept,
        )
        state = DiceState(*(lax.stop_gradient(m).astype(o.dtype)
                            for m, o in zip(moved, state)))  # fmt: skip
    p = jax.nn.sigmoid((s - _to(mean, s)) * lax.rsqrt(_to(var, s) + eps))
    y = s * (p + (1 - p) * _to(alpha, s))
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
      activation: of ``ACTIVATIONS``.
      last_bias: False where a softmax follows, which does not see it.

    Raises:
      ValueError: unknown activation, or fewer than two sizes.
    """
    check(activation, "activation")
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
    """The first moving statistics of parameters that ``init`` made."""
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
) -> tuple[Float[Array, "*batch O"], dict[str, DiceState]]:
    """Layers with the activation between them; the last one is linear.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      x: input.
      activation: of ``ACTIVATIONS``.
      train: see ``dice``.
      mask: see ``dice``.
      decay: see ``dice``.
      eps: see ``dice``.

    Returns:
      The output, and the statistics to use next.
    """
    options = {"train": train, "mask": mask, "decay": decay, "eps": eps}
    outputs, new = layers(params, state, x, activation=activation, **options)
    return outputs[-1], new


def layers(
    params: dict,
    state: dict[str, DiceState],
    x: Float[Array, "*batch I"],
    *,
    activation: str,
    **options: Any,
) -> tuple[list[Float[Array, "*batch _"]], dict[str, DiceState]]:
    """``apply`` that keeps the hidden layers: their activations, then the output."""
    new, outputs = dict(state), []
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        x = matmul(x, layer["kernel"])
        x = x + _to(layer["bias"], x) if "bias" in layer else x
        if i < len(params) - 1:
            x, new = activate(layer, new, x, f"layer_{i}", activation, **options)
        outputs.append(x)
    return outputs, new


def activate(
    layer: dict,
    state: dict[str, DiceState],
    x: Float[Array, "*batch C"],
    name: str,
    activation: str,
    **options: Any,
) -> tuple[Float[Array, "*batch C"], dict[str, DiceState]]:
    """One activation of a layer; ``options`` are Dice's.

    Raises:
      ValueError: unknown activation.
    """
    check(activation, "activation")
    if activation == "dice":
        x, moved = dice(x, layer["alpha"], state[name], **options)
        return x, {**state, name: moved}
    return getattr(jax.nn, activation)(x), state


def matmul(
    x: Float[Array, "*batch I"], kernel: Float[Array, "I O"], dtype: Any = None
) -> Float[Array, "*batch O"]:
    """x @ kernel as one product of matrices, on CPUs faster than a batch of them.

    Args:
      x: rows.
      kernel: (in, out).
      dtype: of the factors, e.g. bfloat16; summed in float32.
    """
    flat, w = x.reshape(-1, x.shape[-1]), kernel
    if dtype:
        flat, w = flat.astype(dtype), w.astype(dtype)
    kind = jnp.promote_types(flat.dtype, jnp.float32)
    y = jnp.matmul(flat, w, preferred_element_type=kind)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def check(activation: str, field: str) -> None:
    """Raises ValueError naming the config field of an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{field} must be one of {ACTIVATIONS}, got {activation!r}")


def _to(v: jax.Array, x: jax.Array) -> jax.Array:
    """A vector of channels with the rank of x."""
    return v.reshape((1,) * (x.ndim - 1) + v.shape)
