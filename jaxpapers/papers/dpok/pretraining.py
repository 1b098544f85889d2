"""The run that tuning starts from: a denoiser trained on pairs of images and prompts."""

import functools
from typing import Any

from jaxpapers import optim
from jaxpapers.method import Method, averaged, gradient, stages
from jaxpapers.nets import diffusion as nets
from jaxpapers.nets.diffusion import Denoiser
from jaxpapers.ops import diffusion, trajectories
from jaxpapers.ops.schedules import NoiseSchedule, Sampler, reverse_schedule
from jaxpapers.options import from_config
from jaxpapers.papers.dpok.options import Pretraining, check_vocab


def pretraining(config: Any) -> Any:
    """Config of the run whose checkpoint the tuning starts from.

    None for that run itself, and where ``train.init_from`` names a checkpoint. Configs
    that differ in tuning only have equal ones, see ``method.stages.pretraining``.
    """
    if config.method.stage == "pretrain" or config.train.init_from:
        return None
    return stages.pretraining(config, Denoiser, Pretraining)


def make_pretraining(config: Any) -> Method:
    """The denoiser's own training, with prompts dropped for guidance."""
    net = from_config(Denoiser, config.net, "net")
    noise = from_config(NoiseSchedule, config.noise, "noise")
    steps = from_config(Sampler, config.sampler, "sampler")
    options = from_config(Pretraining, config.method, "method")
    check_vocab(net.vocab)
    schedule = reverse_schedule(noise, steps)
    eps, init_net = nets.denoiser(net, noise.timesteps)

    def sample(params, key, tokens, guidance=None, schedule=schedule):
        weight = options.guidance if guidance is None else guidance
        of_net = functools.partial(eps, params["net"])
        return sample_guided(of_net, key, tokens, net.shape, weight, schedule)

    method = gradient(
        lambda key, batch: {"net": init_net(key)},
        functools.partial(
            nets.denoising_loss,
            eps=eps,
            drop=options.drop,
            alpha_bar=noise.alpha_bars(),
        ),
        optim.from_config(config.optim, config.train.steps),
        sampler=sample,
        rules=nets.RULES[net.model],
        accumulate=config.train.accumulate,
    )
    return averaged(method, options.ema)


def sample_guided(eps, key, tokens, shape, guidance, schedule):
    """Images of prompts (B, K) by the chain of a schedule, with guidance."""
    guided = diffusion.guided(eps, guidance)
    return trajectories.rollout(
        key, lambda x, time: guided(x, time, tokens), schedule, (len(tokens), *shape)
    ).sample
