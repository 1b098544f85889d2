"""Denoiser, critic and value net by their options, as functions of parameters."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxpapers.nets import denoiser as denoisers
from jaxpapers.nets import unet
from jaxpapers.nets.critic import ConvCritic, MLPCritic
from jaxpapers.nets.denoiser import MLPDenoiser, StepMLP
from jaxpapers.nets.unet import UNet
from jaxpapers.ops import diffusion
from jaxpapers.options import check_choices, check_least

MODELS = ("steps", "mlp", "unet")
DTYPES = ("float32", "bfloat16", "float16", "float64")
RULES: dict[str, Sequence] = {
    "steps": (), "mlp": denoisers.RULES, "unet": unet.RULES,
}  # fmt: skip
"""Sharding rules of each model's denoiser."""


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A net that predicts noise; the config group ``net`` of pretraining.

    Attributes:
      model: "steps" (``StepMLP``), "mlp" (``MLPDenoiser``) or "unet" (``UNet``).
      shape: X of a sample; of an image (H, W, C).
      vocab: conditioning tokens, the null token 0 included; 0: unconditional.
      widths: hidden layers of "steps".
      width: of "mlp".
      blocks: of "mlp"; of "unet", on each level.
      channels, multipliers, attention, groups, dropout: of "unet".
      dtype: of the products of "mlp" and "unet".

    Raises:
      ValueError: values out of range, or that exclude each other.
    """

    model: str = "mlp"
    shape: tuple[int, ...] = (8, 8, 1)
    vocab: int = 0
    widths: tuple[int, ...] = (128, 128, 128)
    width: int = 192
    blocks: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    attention: tuple[int, ...] = (1,)
    groups: int = 32
    dropout: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choices(self, "net", model=MODELS, dtype=DTYPES)
        check_least(self, "net", shape=1, vocab=0)
        if self.model == "steps" and self.vocab:
            raise ValueError(
                "net.model='steps' is unconditional: net.vocab must be 0, got "
                f"{self.vocab}"
            )
        if self.model == "unet" and len(self.shape) != 3:
            raise ValueError(
                f"net.model='unet' needs net.shape (H, W, C), got {self.shape}"
            )


@dataclasses.dataclass(frozen=True)
class Net(Denoiser):
    """A denoiser with critic and value net; the config group ``net`` of tuning.

    Attributes:
      critic: widths of the critic's hidden layers; with "unet", channels of its
        convolutions.
      value: widths of the value net's hidden layers.
      value_scale_output: see ``StepMLP.scale_output``.
    """

    critic: tuple[int, ...] = (256, 256)
    value: tuple[int, ...] = (256, 256)
    value_scale_output: bool = False


class Parts(NamedTuple):
    """Functions of the nets' parameters; ``init_*`` take a key.

    Attributes:
      shape: of a sample, X.
      eps: (params, x (B, *X), time (B,), tokens=None, train=False, key=None) -> noise.
      critic: (params, x) -> (B,).
      value: (params, x, k (B,), tokens=None) -> (B,).
      init_net, init_critic, init_value: key -> params.
    """

    shape: tuple[int, ...]
    eps: Callable
    critic: Callable
    value: Callable
    init_net: Callable
    init_critic: Callable
    init_value: Callable


def parts(net: Net, steps: int, timesteps: int) -> Parts:
    """Functions of denoiser, critic and value net.

    Args:
      net: options.
      steps: S of the sampler; the value net has scales for each step.
      timesteps: T of training; the model "steps" has scales for each.
    """
    eps, init_net = denoiser(net, timesteps)
    critic = ConvCritic(net.critic) if net.model == "unet" else MLPCritic(net.critic)
    value_net = StepMLP(
        net.value, 1, steps, activation="relu", scale_output=net.value_scale_output
    )

    def counts(tokens):
        return None if tokens is None else token_counts(tokens, net.vocab)

    def value(
        params: dict,
        x: Float[Array, "B ..."],
        k: Int[Array, " B"],
        tokens: Int[Array, "B ..."] | None = None,
    ) -> Float[Array, " B"]:
        output: Any = value_net.apply({"params": params}, x, k, counts(tokens))
        return output[:, 0]

    def init_value(key: Key[Array, ""]) -> dict:
        step = jnp.zeros(1, jnp.int32)
        context = counts(step if net.vocab else None)
        variables: Any = value_net.init(key, _example(net), step, context)
        return variables["params"]

    return Parts(
        net.shape,
        eps,
        lambda params, x: critic.apply({"params": params}, x),
        value,
        init_net,
        lambda key: critic.init(key, _example(net))["params"],
        init_value,
    )


def denoiser(net: Denoiser, timesteps: int) -> tuple[Callable, Callable]:
    """Functions ``eps`` and ``init_net`` of a denoiser, see ``Parts``.

    Args:
      net: options.
      timesteps: T of training; the model "steps" has scales for each.
    """
    module = _module(net, timesteps)

    def time_input(time):
        # The model "steps" looks its scales up by whole steps.
        return time.astype(jnp.int32) if net.model == "steps" else time

    def eps(
        params: dict,
        x: Float[Array, "B ..."],
        time: Float[Array, " B"],
        tokens: Int[Array, "B ..."] | None = None,
        *,
        train: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B ..."]:
        condition = () if tokens is None else (tokens,)
        rngs = {"dropout": key} if train and key is not None else {}
        noise: Any = module.apply(
            {"params": params}, x, time_input(time), *condition, train=train, rngs=rngs
        )
        return noise.reshape(x.shape)

    def init_net(key: Key[Array, ""]) -> dict:
        condition = (jnp.zeros(1, jnp.int32),) if net.vocab else ()
        time = time_input(jnp.zeros(1))
        return module.init(key, _example(net), time, *condition)["params"]

    return eps, init_net


def denoising_loss(
    params: dict,
    batch: dict,
    key: Key[Array, ""],
    *,
    eps: Callable,
    alpha_bar: Any,
    drop: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""$E |\epsilon - \epsilon_\theta(x_t, t)|^2$, mean over rows and coordinates.

    Args:
      params: dict with net.
      batch: x (B, *X); tokens (B,) or (B, L) of a conditional net.
      key: of timesteps, noise, dropped tokens and dropout.
      eps: see ``Parts``.
      alpha_bar: (T,) of the forward process.
      drop: share of rows whose tokens become the null token, for guidance.
    """
    key, key_dropout, key_drop = jax.random.split(key, 3)
    tokens = batch.get("tokens")
    if tokens is not None and drop:
        shape = (len(tokens), *(1,) * (tokens.ndim - 1))
        tokens = jnp.where(jax.random.bernoulli(key_drop, drop, shape), 0, tokens)
    eps_fn = functools.partial(
        eps, params["net"], tokens=tokens, train=True, key=key_dropout
    )
    return diffusion.noise_loss(eps_fn, batch["x"], key, alpha_bar).mean(), {}


def token_counts(tokens: Int[Array, "B ..."], vocab: int) -> Float[Array, "B vocab"]:
    """One-hot tokens (B,), or counts of the tokens (B, L), padding 0 not counted.

    Example:
      >>> token_counts(jnp.array([[2, 2, 0]]), 3).tolist()
      [[0.0, 0.0, 2.0]]
    """
    counts = jax.nn.one_hot(tokens, vocab)
    return counts if tokens.ndim == 1 else counts.sum(1).at[:, 0].set(0)


def _module(net: Denoiser, timesteps: int) -> Any:
    if net.model == "steps":
        return StepMLP(net.widths, math.prod(net.shape), timesteps)
    dtype = jnp.dtype(net.dtype)
    if net.model == "mlp":
        return MLPDenoiser(net.width, net.blocks, vocab=net.vocab, dtype=dtype)
    return UNet(
        net.channels, net.multipliers, net.blocks, net.attention, dropout=net.dropout,
        vocab=net.vocab, groups=net.groups, dtype=dtype,
    )  # fmt: skip


def _example(net: Denoiser) -> Float[Array, "1 ..."]:
    return jnp.zeros((1, *net.shape))
