"""Hyper-parameters of DPOK."""

import dataclasses
import math
from typing import Any

from jaxpapers.ops import diffusion, policy
from jaxpapers.ops.schedules import Sampler
from jaxpapers.options import check_choices, check_least, check_positive

STAGES = ("pretrain", "tune")
MODES = ("sft", "kl_d", "kl_o")
NAMES = ("dpok", *MODES)
KLS = ("exact", "eps_mse")
KL_MODES = ("grad", "reward")
REWARDS = ("task", "none")
ADVANTAGES = ("value", "batch", "prompt", "group")


@dataclasses.dataclass(frozen=True)
class Options:
    """Hyper-parameters of tuning; the config group ``method``.

    Attributes:
      name: "dpok", or a supervised baseline, see ``sft_loss``.
      prompts: number of prompts.
      guidance: weight w of classifier-free guidance, a part of the policy.
      alpha: weight of the reward.
      beta: weight of the KL divergence to the pretrained model.
      kl: "exact", or "eps_mse", the released code's mean square of the noise difference.
      kl_mode: "grad": the KL of each step has a gradient; "reward": the KLs of later
        steps are also subtracted from the reward.
      kl_target: path KL in nats that beta is adapted to; 0: beta is constant.
      clip: surrogate, see ``ops.policy.clipped_surrogate``.
      clip_eps: half width of its band.
      reduce: of log-probabilities over coordinates, "sum" or "mean".
      advantage: baseline of the reward: the value net, the moments of the batch, of the
        prompt's last rewards, or of the prompt's group in the batch.
      policy_steps: policy steps per update.
      transitions: transitions of each trajectory in a policy step.
      value_steps: value steps per update.
      value_transitions: transitions of each trajectory in a value step.
      rollouts: last rollouts that policy steps use in turn, each with the predictions of
        the policy that drew it.
      lora_rank: rank of the adapters; 0: all parameters are tuned.
      lora_match: regular expression of adapted parameters.
      gamma: weight of the pretrained model in the supervised baselines "kl_d", "kl_o".
      reward_shift: added to rewards of the supervised baselines, whose weights must not
        be negative.

    Raises:
      ValueError: values out of range, or that exclude each other.
    """

    name: str = "dpok"
    prompts: int = 10
    guidance: float = 2.0
    alpha: float = 1.0
    beta: float = 0.01
    kl: str = "exact"
    kl_mode: str = "grad"
    kl_target: float = 0.0
    clip: str = "ppo"
    clip_eps: float = 0.2
    reduce: str = "sum"
    advantage: str = "value"
    policy_steps: int = 5
    transitions: int = 4
    value_steps: int = 20
    value_transitions: int = 5
    rollouts: int = 1
    lora_rank: int = 4
    lora_match: str = "kernel$"
    gamma: float = 1.0
    reward_shift: float = 0.0

    def __post_init__(self) -> None:
        check_choices(
            self, "method", name=NAMES, kl=KLS, kl_mode=KL_MODES, advantage=ADVANTAGES,
            clip=policy.CLIPS, reduce=diffusion.REDUCTIONS,
        )  # fmt: skip
        check_least(
            self, "method", alpha=0, beta=0, gamma=0, kl_target=0, lora_rank=0,
            reward_shift=0, policy_steps=1, transitions=1, value_steps=1,
            value_transitions=1, rollouts=1, prompts=1,
        )  # fmt: skip
        check_positive(self, "method", "clip_eps")
        check_guidance(self.guidance)
        self._check_pairs()

    def _check_pairs(self) -> None:
        by_reward = self.kl_mode == "reward"
        if self.rollouts > 1 and (by_reward or self.advantage != "value"):
            raise ValueError(
                "method.rollouts > 1 needs method.kl_mode='grad' and "
                "method.advantage='value', which old rollouts have too; got "
                f"{self.kl_mode!r} and {self.advantage!r}"
            )
        if by_reward and (self.kl != "exact" or self.advantage != "value"):
            raise ValueError(
                "method.kl_mode='reward' subtracts nats from rewards: it needs "
                "method.kl='exact' and method.advantage='value', got "
                f"{self.kl!r} and {self.advantage!r}"
            )
        if by_reward and self.alpha == 0:
            raise ValueError("method.kl_mode='reward' needs method.alpha > 0")
        if self.kl_target and not self.beta:
            raise ValueError(
                "method.kl_target adapts method.beta, which must be > 0, got 0"
            )


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Hyper-parameters of pretraining; the config group ``method`` of that stage.

    Attributes:
      ema: decay of the parameters' moving average; 0: none.
      drop: share of rows whose tokens become the null token.
      guidance: of the samples drawn in evaluations, see ``Options``.
      stage: "pretrain".

    Raises:
      ValueError: values out of range.
    """

    ema: float = 0.998
    drop: float = 0.1
    guidance: float = 2.0
    stage: str = "pretrain"

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"pretrain.drop must be in [0, 1), got {self.drop}")
        check_guidance(self.guidance)


def check_guidance(guidance: float) -> None:
    """Raises ValueError for a weight that is not finite."""
    if not math.isfinite(guidance):
        raise ValueError(f"method.guidance must be finite, got {guidance}")


def check_vocab(vocab: int) -> None:
    """Raises ValueError for a net without conditioning tokens."""
    if vocab < 2:
        raise ValueError(
            f"net.vocab must be >= 2, the null token and another, got {vocab}"
        )


def check_steps(options: Options, sampler: Sampler) -> None:
    """Raises ValueError for more transitions than a trajectory has."""
    for name in ("transitions", "value_transitions"):
        value = getattr(options, name)
        if value > sampler.steps:
            raise ValueError(
                f"method.{name} must be <= sampler.steps={sampler.steps}, got {value}"
            )


def check_training(config: Any, options: Options, has_reward: bool) -> None:
    """Checks the fields outside of ``Options``: batch, optimizers, reward.

    Raises:
      ValueError: fields that do not fit each other, no reward.
    """
    data, reward = config.data, config.method.get("reward", "task")
    if reward not in REWARDS:
        raise ValueError(f"method.reward must be one of {REWARDS}, got {reward!r}")
    grouped = options.advantage in ("group", "prompt")
    if grouped and data.batch < 2 * options.prompts:
        raise ValueError(
            f"method.advantage={options.advantage!r} compares rewards of one prompt: "
            f"data.batch must be >= 2 method.prompts = {2 * options.prompts}, got "
            f"{data.batch}"
        )
    if config.train.accumulate != 1:
        raise ValueError(
            "train.accumulate must be 1: method.transitions bounds a policy step's "
            f"memory; got {config.train.accumulate}"
        )
    if not config.optim.value_lr > 0:
        raise ValueError(f"optim.value_lr must be > 0, got {config.optim.value_lr}")
    if reward != "none" and not has_reward:
        raise ValueError(
            f"method.reward={reward!r} is built by the task: pass "
            "make(config, reward_fn=...), or method.reward='none' to sample only"
        )
