"""SFT-PG: shortcut fine-tuning of a few-step sampler, after training its denoiser.

    jaxpapers run sft_pg               swiss roll, 10 steps
    jaxpapers run sft_pg:digits        8 x 8 scans, 10 of 1,000 steps
    jaxpapers run sft_pg:fashion --config.data.path=FOLDER   14 x 14, IDX files
    jaxpapers run sft_pg:cifar --config.data.path=FOLDER     CIFAR-10, a U-Net
    jaxpapers run sft_pg:smoke         swiss roll, a few steps

The denoiser is trained first, as a stage of the run, unless
``train.init_from`` names a run with ``method.stage=pretrain``.

Images of ``cifar`` are not flipped at random, unlike the paper's.

The fields of the groups are described at ``Net``, ``NoiseSchedule``, ``Sampler``
and ``Options`` of ``jaxpapers.papers.sft_pg``.

Gates, 3 seeds: swiss roll, sliced W2 <= 0.045 within 30 epochs (474 updates), exact W1
down by 30 %; digits, Frechet distance <= 0.7 of that before tuning.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.papers import sft_pg

PRESETS = ("paper", "digits", "fashion", "cifar", "smoke")
# Sliced W2 that the paper's own row ends with; seeds and processors differ.
EXPECTED = {"paper": 0.019, "smoke": 0.6}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset sft_pg:{preset}; expected one of {PRESETS}")
    config = ConfigDict(
        {
            "data": {
                "task": "generation",
                "source": "swiss_roll",  # moons, clusters, gaussian, or images:
                # digits, fashion, mnist-5k, cifar-10
                "path": "",
                "spread": 0.05,  # noise of a synthetic source
                "batch": 640,  # data of an update: n_critic rollouts
                "count": 10_000,  # points of a synthetic source
                "eval_count": 10_000,
                "seed": 0,
            },
            "net": dataclasses.asdict(sft_pg.NET),
            "pretrain": {
                "batch": 128,
                "steps": 23_700,  # 300 epochs of 10,000
                "optim": {
                    "name": "rmsprop",
                    "lr": 1e-3,
                    "weight_decay": 0.0,
                    "schedule": "constant",
                    "clip": 1.0,
                },
                "ema": 0.0,
                "eval_every": 0,
            },
            "optim": {
                "name": "adam",
                "lr": 5e-5,
                "clip": 0.0,
                "critic_lr": 1e-3,
                "value_lr": 1e-3,
            },
            "noise": dataclasses.asdict(sft_pg.NOISE),
            "sampler": dataclasses.asdict(sft_pg.SAMPLER),
            "method": {
                "stage": "tune",  # or pretrain
                **dataclasses.asdict(sft_pg.OPTIONS),
            },
            # 30 epochs.
            "train": blocks.train(474, eval_every=79, save_minutes=2.0),
        }
    )
    if preset == "smoke":
        config.data.update(eval_count=500, batch=160)
        config.net.update(blocks=1, critic=(64, 64), value=(64, 64))
        config.pretrain.update(steps=400)
        config.train.update(steps=20, eval_every=0, alone=True)
    if preset in ("digits", "fashion", "cifar"):
        _images(config)
    if preset == "digits":
        config.data.update(source="digits", eval_count=1000)
        config.net.update(model="mlp", shape=(8, 8, 1), blocks=3)
        config.net.update(critic=(256, 256), value=(256, 256))
        config.pretrain.update(steps=4000, ema=0.998)
        config.pretrain.optim.update(lr=2e-3, schedule="cosine")
        config.optim.update(lr=1e-5, critic_lr=1e-4, value_lr=1e-4)
        config.train.update(steps=300, eval_every=100)
    elif preset == "fashion":
        config.data.update(source="fashion", eval_count=1000)
        config.net.update(model="unet", shape=(14, 14, 1), channels=32)
        config.net.update(multipliers=(1, 2), blocks=1, groups=8, critic=(64, 128))
        config.pretrain.update(steps=10_000, ema=0.999)
        config.pretrain.optim.lr = 2e-4
        config.optim.update(lr=1e-6, critic_lr=1e-4, value_lr=1e-4)
        config.train.update(steps=500, eval_every=100)
    elif preset == "cifar":
        config.data.update(source="cifar-10")
        config.net.update(model="unet", shape=(32, 32, 3), dropout=0.1)
        config.net.update(critic=(128, 256, 512), value=(1024, 1024, 256))
        config.pretrain.update(steps=800_000, ema=0.9999, eval_every=50_000)
        config.pretrain.optim.lr = 2e-4
        config.optim.update(lr=1e-6, critic_lr=1e-4, value_lr=1e-4)
        config.train.update(steps=78, eval_every=0)
    return config.lock()


def _images(config: ConfigDict) -> None:
    """Fields that the paper's image experiments share."""
    config.noise.update(betas="linear", timesteps=1000, beta_start=1e-4, beta_end=0.02)
    config.sampler.update(name="fastdpm", steps=10)
    config.method.update(reduce="mean", value_weight=10.0)
    config.net.value_scale_output = False
    config.pretrain.batch = 128
    config.pretrain.optim.name = "adam"
    config.optim.clip = 0.1
