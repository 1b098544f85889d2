"""Denoiser, critic and value net that a config names, as functions of parameters."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxpapers.nets import denoiser, unet
from jaxpapers.nets.critic import ConvCritic, MLPCritic
from jaxpapers.nets.denoiser import MLPDenoiser, StepMLP
from jaxpapers.nets.unet import UNet
from jaxpapers.ops import diffusion

MODELS = ("steps", "mlp", "unet")
RULES = {"steps": (), "mlp": denoiser.RULES, "unet": unet.RULES}
"""Sharding rules of each model's denoiser."""


class Parts(NamedTuple):
    """Functions of the nets' parameters; ``init_*`` take a key.

    Attributes:
      shape: of a sample, X.
      eps: (params, x (B, *X), time (B,), word=None, train=False, key=None) -> noise.
      critic: (params, x) -> (B,).
      value: (params, x, k (B,), word=None) -> (B,).
      init_net, init_critic, init_value: key -> params.
    """

    shape: tuple[int, ...]
    eps: Callable
    critic: Callable
    value: Callable
    init_net: Callable
    init_critic: Callable
    init_value: Callable


def parts(c: Any, steps: int, timesteps: int) -> Parts:
    """Nets of ``config.net``.

    Args:
      c: ``shape`` X of a sample, ``model`` one of ``MODELS``, ``words`` of the table
        (0: none), ``value`` widths and optionally ``critic`` widths,
        ``value_scale_output``, and the model's own fields: ``widths`` (steps);
        ``width``, ``blocks``, ``dtype`` (mlp); ``channels``, ``multipliers``, ``blocks``,
        ``attention``, ``groups``, ``dropout``, ``dtype`` (unet).
      steps: S of the chain; the value net has a vector for each.
      timesteps: T of training; the model "steps" has a vector for each.

    Raises:
      ValueError: unknown model, a shape that does not fit it.
    """
    shape = tuple(c.shape)
    net = _denoiser(c, shape, timesteps)
    picture = c.model == "unet"
    widths = tuple(c.get("critic", ()))
    critic = ConvCritic(widths) if picture else MLPCritic(widths)
    value = StepMLP(
        tuple(c.value), 1, steps, activation="relu", scale_output=c.value_scale_output
    )
    one, time = jnp.zeros((1, *shape)), jnp.zeros(1)
    word = jnp.zeros(1, jnp.int32) if c.words else None
    told = None if word is None else _told(word, c.words)

    def value_of(
        params: dict,
        x: Float[Array, "B ..."],
        k: Int[Array, " B"],
        word: Int[Array, "B ..."] | None = None,
    ) -> Float[Array, " B"]:
        context = None if word is None else _told(word, c.words)
        found: Any = value.apply({"params": params}, x, k, context)
        return found[:, 0]

    return Parts(
        shape,
        functools.partial(_eps, net, c.model),
        lambda params, x: critic.apply({"params": params}, x),
        value_of,
        lambda key: net.init(key, one, _time(c.model, time), *_optional(word))[
            "params"
        ],
        lambda key: critic.init(key, one)["params"],
        lambda key: value.init(key, one, jnp.zeros(1, jnp.int32), told)["params"],
    )


def denoising_loss(
    params: dict,
    batch: dict,
    key: Key[Array, ""],
    *,
    parts: Parts,
    alpha_bar: Any,
    drop: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean square of the noise that a denoiser missed, all steps alike.

    Args:
      params: dict of net.
      batch: x (B, *X); word (B,) or (B, L) where the net takes words.
      key: of steps, noise, dropped captions and dropout.
      parts: functions of the nets.
      alpha_bar: (T,) of the forward process.
      drop: share of captions that become the null word, for guidance.
    """
    key, key_drop, key_word = jax.random.split(key, 3)
    word = batch.get("word")
    if word is not None and drop:
        shape = (len(word), *(1,) * (word.ndim - 1))
        word = jnp.where(jax.random.bernoulli(key_word, drop, shape), 0, word)
    eps_fn = functools.partial(
        parts.eps, params["net"], word=word, train=True, key=key_drop
    )
    return diffusion.noise_loss(eps_fn, batch["x"], key, alpha_bar).mean(), {}


def _eps(
    net: Any,
    model: str,
    params: dict,
    x: Float[Array, "B ..."],
    time: Float[Array, " B"],
    word: Int[Array, "B ..."] | None = None,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B ..."]:
    rngs = {"dropout": key} if train and key is not None else {}
    found = net.apply(
        {"params": params}, x, _time(model, time), *_optional(word), train=train,
        rngs=rngs,
    )  # fmt: skip
    return found.reshape(x.shape)


def _denoiser(c, shape, timesteps):
    if c.model not in MODELS:
        raise ValueError(f"net.model must be one of {MODELS}, got {c.model!r}")
    if c.model == "steps":
        if c.words:
            raise ValueError("net.model='steps' takes no words: set net.words=0")
        return StepMLP(tuple(c.widths), math.prod(shape), timesteps)
    dtype = jnp.dtype(c.dtype)
    if c.model == "mlp":
        return MLPDenoiser(c.width, c.blocks, words=c.words, dtype=dtype)
    if len(shape) != 3:
        raise ValueError(f"net.model='unet' needs net.shape (H, W, C), got {shape}")
    return UNet(
        c.channels, tuple(c.multipliers), c.blocks, tuple(c.attention),
        dropout=c.dropout, words=c.words, groups=c.groups, dtype=dtype,
    )  # fmt: skip


def _time(model, time):
    """The model "steps" has one vector for each whole step."""
    return time.astype(jnp.int32) if model == "steps" else time


def _optional(word):
    return () if word is None else (word,)


def _told(word, words):
    """Words as a vector of counts; in captions the null word, padding, does not count."""
    counts = jax.nn.one_hot(word, words)
    if word.ndim == 1:
        return counts
    return counts.sum(1).at[:, 0].set(0)
