"""Values that SFT-PG's options can have."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxpapers.ops import diffusion
from jaxpapers.ops.diffusion import Chain

REGULARIZERS = ("none", "spectral", "clip")
STAGES = ("pretrain", "tune")


def check_batch(x: Array, shape: tuple[int, ...], rounds: int) -> None:
    """Refuses data of another shape than the samples', or that rounds do not divide.

    Nor does it take a round that the mesh axis ``data`` does not divide, which every
    device would compute whole.
    """
    if x.shape[1:] != shape or len(x) % rounds:
        raise ValueError(
            f"a cycle needs x of shape (n, {', '.join(map(str, shape))}) with n a "
            f"multiple of method.n_critic={rounds}, got {x.shape}"
        )
    devices = dict(jax.sharding.get_abstract_mesh().shape).get("data", 1)
    if len(x) // rounds % devices:
        raise ValueError(
            f"config.data.batch={len(x)} makes rounds of {len(x) // rounds} chains, one "
            f"of method.n_critic={rounds} parts: they must be a multiple of the "
            f"{devices} devices of the mesh axis data"
        )


def check_options(config: Any, chain: Chain) -> None:
    """Refuses what ``make`` cannot bind when tuning.

    Raises:
      ValueError: names the field, what it is and what it must be.
    """
    c, optim = config.method, config.optim
    if c.regularizer not in REGULARIZERS:
        raise ValueError(
            f"config.method.regularizer must be one of {REGULARIZERS}, got "
            f"{c.regularizer!r}"
        )
    for name in ("n_critic", "n_generator"):
        if c[name] < 1:
            raise ValueError(f"config.method.{name} must be >= 1, got {c[name]}")
    if config.data.batch % c.n_critic:
        raise ValueError(
            f"config.data.batch must be a multiple of method.n_critic, which is "
            f"{c.n_critic}, got {config.data.batch}"
        )
    if c.n_generator > c.n_critic * c.steps:
        raise ValueError(
            "config.method.n_generator must be <= n_critic * steps, "
            f"{c.n_critic * c.steps}, so that no transition comes twice; got "
            f"{c.n_generator}"
        )
    if c.reduce not in diffusion.REDUCTIONS:
        raise ValueError(
            f"config.method.reduce must be one of {diffusion.REDUCTIONS}, got "
            f"{c.reduce!r}"
        )
    if c.regularizer == "clip" and c.weight_bound == 0:
        raise ValueError(
            "config.method.weight_bound must be > 0 to clip weights, got 0"
        )
    whole = (chain.time == np.round(chain.time)).all()
    if config.net.model == "steps" and not whole:
        raise ValueError(
            "config.net.model='steps' has a vector for each whole step; the times of "
            f"method.sampler={c.sampler!r} are not whole: use mlp or unet"
        )
    for name in ("penalty", "value_weight", "ratio_clip", "cost_clip", "weight_bound"):
        if c[name] < 0:
            raise ValueError(f"config.method.{name} must be >= 0, got {c[name]}")
    for name in ("critic_lr", "value_lr"):
        if optim[name] <= 0:
            raise ValueError(f"config.optim.{name} must be > 0, got {optim[name]}")
    if config.train.accumulate != 1:
        raise ValueError(
            "config.train.accumulate must be 1: a cycle's rounds are its parts, got "
            f"{config.train.accumulate}"
        )
    diffusion.check_density(chain)
