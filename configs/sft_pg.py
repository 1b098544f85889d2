"""SFT-PG: shortcut fine-tuning of a few-step sampler, after training its denoiser.

    jaxpapers run sft_pg               swiss roll, 10 steps
    jaxpapers run sft_pg:digits        8 x 8 scans, 10 of 1,000 steps
    jaxpapers run sft_pg:fashion --config.data.path=FOLDER   14 x 14, IDX files
    jaxpapers run sft_pg:cifar --config.data.path=FOLDER     CIFAR-10, a U-Net
    jaxpapers run sft_pg:smoke         swiss roll, a few steps

The denoiser is trained first, as a stage of the run, unless
``train.init_from`` names a run with ``method.stage=pretrain``.

Images of ``cifar`` are not flipped at random, unlike the paper's.

Gates, 3 seeds: swiss roll, sliced W2 <= 0.045 within 30 epochs (474 updates), exact W1
down by 30 %; digits, Frechet distance <= 0.7 of that before tuning.
"""

from ml_collections import ConfigDict

PRESETS = ("paper", "digits", "fashion", "cifar", "smoke")


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
            "net": {
                "model": "steps",  # mlp, unet
                "shape": (2,),
                "vocab": 0,
                "widths": (128, 128, 128),
                "width": 192,
                "channels": 128,
                "multipliers": (1, 2, 2, 2),
                "blocks": 2,
                "attention": (1,),
                "groups": 32,
                "dropout": 0.0,
                "dtype": "float32",
                "critic": (256, 256),  # widths; with unet, channels
                "value": (256, 256),
                "value_scale_output": True,
            },
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
            "noise": {
                "betas": "sigmoid",  # linear, scaled_linear, cosine
                "timesteps": 10,
                "beta_start": 1e-5,
                "beta_end": 1e-2,
            },
            "sampler": {
                "name": "ddpm",  # ddim, fastdpm
                "steps": 10,
                "eta": 1.0,  # ddim
                "kappa": 1.0,  # fastdpm
                "kind": "quadratic",  # fastdpm
                "allow_saturation": True,  # fastdpm: as released nets were tuned
            },
            "method": {
                "stage": "tune",  # pretrain
                "n_critic": 5,
                "n_generator": 10,
                "reduce": "sum",  # mean, over coordinates
                "leak": True,  # variant (B)
                "value_weight": 1.0,
                "penalty": 0.0,  # 10 is WGAN-GP's
                "regularizer": "none",  # spectral, clip
                "weight_bound": 0.01,
                "ratio_clip": 0.0,
                "normalize": False,
                "cost_clip": 0.0,
            },
            "train": {
                "steps": 474,  # 30 epochs
                "accumulate": 1,
                "seed": 0,
                "eval_every": 79,
                "save_every": 0,
                "save_minutes": 2.0,
                "keep": 2,
                "init_from": "",
                "sample": 0,
            },
        }
    )
    if preset == "smoke":
        config.data.update(eval_count=1000)
        config.pretrain.update(steps=1000)
        config.train.update(steps=40, eval_every=0)
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
