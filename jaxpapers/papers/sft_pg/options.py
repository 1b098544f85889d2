"""Hyper-parameters of SFT-PG."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxpapers.ops import diffusion
from jaxpapers.ops.diffusion import Schedule
from jaxpapers.options import check_choices, check_least, check_positive

REGULARIZERS = ("none", "spectral", "clip")
STAGES = ("pretrain", "tune")


@dataclasses.dataclass(frozen=True)
class Options:
    """Hyper-parameters of tuning; the config group ``method``.

    Attributes:
      n_critic: rollouts per update, each with a step of critic and value net.
      n_generator: policy steps per update.
      reduce: of log-probabilities over coordinates, "sum" or "mean".
      leak: whether the value net's loss has a gradient to the critic, the released
        code's variant (B).
      value_weight: weight of the value net's loss.
      penalty: weight of the gradient penalty; 10 is WGAN-GP's.
      regularizer: of the critic: "none", "spectral" normalisation, or "clip".
      weight_bound: of "clip".
      ratio_clip: half width of PPO's band; 0: no importance weights.
      normalize: whether advantages are standardised.
      cost_clip: bound of the advantages' size; 0: none.

    Raises:
      ValueError: values out of range, or that exclude each other.
    """

    n_critic: int = 5
    n_generator: int = 10
    reduce: str = "sum"
    leak: bool = True
    value_weight: float = 1.0
    penalty: float = 0.0
    regularizer: str = "none"
    weight_bound: float = 0.01
    ratio_clip: float = 0.0
    normalize: bool = False
    cost_clip: float = 0.0

    def __post_init__(self) -> None:
        check_choices(
            self, "method", regularizer=REGULARIZERS, reduce=diffusion.REDUCTIONS
        )
        check_least(
            self, "method", n_critic=1, n_generator=1, penalty=0, value_weight=0,
            ratio_clip=0, cost_clip=0, weight_bound=0,
        )  # fmt: skip
        if self.regularizer == "clip":
            check_positive(self, "method", "weight_bound")


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Hyper-parameters of pretraining; the config group ``method`` of that stage.

    Attributes:
      ema: decay of the parameters' moving average; 0: none.
      stage: "pretrain".
    """

    ema: float = 0.0
    stage: str = "pretrain"


def check_schedule(options: Options, model: str, schedule: Schedule) -> None:
    """Checks the sampler's steps against the options and the denoiser.

    Raises:
      ValueError: more policy steps than transitions, steps that are not whole for a net
        that looks them up, a deterministic step.
    """
    steps = options.n_critic * len(schedule.std)
    if options.n_generator > steps:
        raise ValueError(
            f"method.n_generator must be <= n_critic * steps = {steps}, so that no "
            f"transition is used twice; got {options.n_generator}"
        )
    if model == "steps" and (schedule.time != np.round(schedule.time)).any():
        raise ValueError(
            "net.model='steps' has scales for each whole step, but the sampler's times "
            "are not whole: use mlp or unet"
        )
    diffusion.check_density(schedule)


def check_training(config: Any, options: Options) -> None:
    """Checks the fields outside of the group ``method``: batch and optimizers.

    Raises:
      ValueError: fields that do not fit each other.
    """
    if config.data.batch % options.n_critic:
        raise ValueError(
            f"data.batch must be a multiple of method.n_critic={options.n_critic}, got "
            f"{config.data.batch}"
        )
    for name in ("critic_lr", "value_lr"):
        if not config.optim[name] > 0:
            raise ValueError(f"optim.{name} must be > 0, got {config.optim[name]}")
    if config.train.accumulate != 1:
        raise ValueError(
            "train.accumulate must be 1: an update's rollouts are its parts, got "
            f"{config.train.accumulate}"
        )


def check_batch(x: Array, shape: tuple[int, ...], rollouts: int) -> None:
    """Checks the data of an update against samples, rollouts and devices.

    Raises:
      ValueError: another shape than the samples', rows that the rollouts do not divide,
        or rollouts that the mesh axis ``data`` does not divide, which every device would
        compute whole.
    """
    if x.shape[1:] != shape or len(x) % rollouts:
        raise ValueError(
            f"an update needs x of shape (n, {', '.join(map(str, shape))}) with n a "
            f"multiple of method.n_critic={rollouts}, got {x.shape}"
        )
    devices = dict(jax.sharding.get_abstract_mesh().shape).get("data", 1)
    if len(x) // rollouts % devices:
        raise ValueError(
            f"data.batch={len(x)} makes rollouts of {len(x) // rollouts} trajectories, "
            f"one of method.n_critic={rollouts} parts: they must be a multiple of the "
            f"{devices} devices of the mesh axis data"
        )
