"""Values that DPOK's options can have."""

import math
from collections.abc import Callable
from typing import Any

from jaxpapers.ops import diffusion, policy
from jaxpapers.papers.dpok.supervised import MODES

STAGES = ("pretrain", "tune")
NAMES = ("dpok", *MODES)
KLS = ("exact", "eps_mse")
KL_MODES = ("grad", "reward")
REWARDS = ("task", "none")
ADVANTAGES = ("value", "batch", "prompt", "group")


def check_options(config: Any, reward_fn: Callable | None) -> None:
    """Refuses what ``make`` cannot bind.

    Raises:
      ValueError: names the field, what it is and what it must be.
    """
    c = config.method
    for name, choices in {
        "stage": STAGES, "name": NAMES, "kl": KLS, "kl_mode": KL_MODES,
        "advantage": ADVANTAGES,
        "reward": REWARDS, "clip": policy.CLIPS, "reduce": diffusion.REDUCTIONS,
    }.items():  # fmt: skip
        if c[name] not in choices:
            raise ValueError(
                f"config.method.{name} must be one of {choices}, got {c[name]!r}"
            )
    for name in ("alpha", "beta", "gamma", "kl_target", "lora_rank", "reward_shift"):
        if c[name] < 0:
            raise ValueError(f"config.method.{name} must be >= 0, got {c[name]}")
    if c.clip_eps <= 0:
        raise ValueError(f"config.method.clip_eps must be > 0, got {c.clip_eps}")
    for name in ("policy_steps", "transitions", "value_steps", "value_transitions",
                 "rounds", "prompts"):  # fmt: skip
        if c[name] < 1:
            raise ValueError(f"config.method.{name} must be >= 1, got {c[name]}")
    for name in ("transitions", "value_transitions"):
        if c[name] > c.steps:
            raise ValueError(
                f"config.method.{name} must be <= method.steps, the steps of a chain, "
                f"{c.steps}; got {c[name]}"
            )
    if config.net.words < 2:
        raise ValueError(
            "config.net.words must be >= 2, the null word and another, got "
            f"{config.net.words}"
        )
    if not math.isfinite(c.guidance):
        raise ValueError(f"config.method.guidance must be finite, got {c.guidance}")
    if not 0 <= config.pretrain.drop < 1:
        raise ValueError(
            f"config.pretrain.drop must be in [0, 1), got {config.pretrain.drop}"
        )
    if c.stage == "tune":
        _check_tuning(config, reward_fn)


def _check_tuning(config, reward_fn):
    c = config.method
    if c.rounds > 1 and (c.kl_mode == "reward" or c.advantage != "value"):
        raise ValueError(
            "method.rounds > 1 needs method.kl_mode='grad' and method.advantage='value', "
            "which are known for old rounds too; got "
            f"{c.kl_mode!r} and {c.advantage!r}"
        )
    if c.kl_mode == "reward" and (c.kl != "exact" or c.advantage != "value"):
        raise ValueError(
            "method.kl_mode='reward' takes nats from rewards: it needs method.kl='exact' "
            f"and method.advantage='value', got {c.kl!r} and {c.advantage!r}"
        )
    if c.kl_target and not c.beta:
        raise ValueError(
            "method.kl_target adapts method.beta, which must be > 0, got 0"
        )
    if c.advantage in ("group", "prompt") and config.data.batch < 2 * c.prompts:
        raise ValueError(
            f"method.advantage={c.advantage!r} compares rewards of one prompt: "
            f"config.data.batch must be >= 2 method.prompts = {2 * c.prompts}, got "
            f"{config.data.batch}"
        )
    if c.kl_mode == "reward" and c.alpha == 0:
        raise ValueError("method.kl_mode='reward' needs method.alpha > 0")
    if config.train.accumulate != 1:
        raise ValueError(
            "config.train.accumulate must be 1: method.transitions bounds a policy "
            f"step's memory; got {config.train.accumulate}"
        )
    if config.optim.value_lr <= 0:
        raise ValueError(
            f"config.optim.value_lr must be > 0, got {config.optim.value_lr}"
        )
    if c.reward != "none" and reward_fn is None:
        raise ValueError(
            f"config.method.reward={c.reward!r} is built by the task: pass "
            "make(config, reward_fn=...), or method.reward='none' to sample only"
        )
