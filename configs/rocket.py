"""Rocket Launching: a light net trained beside a booster.

    jaxpapers run rocket:digits        residual nets, 8 x 8 scans
    jaxpapers run rocket:ml100k        DIN with MLPs of 16-8 and 200-80, MovieLens-100k
    jaxpapers run rocket:dien          DIEN with states of 8 and 24, MovieLens-100k
    jaxpapers run rocket:smoke         DIN, a few steps
    jaxpapers run rocket --config.data.path=FOLDER     WRN-16-1 in WRN-40-1, CIFAR-10
    jaxpapers run rocket:svhn          the same on SVHN, Adam, dropout

The fields of ``net`` are described at ``jaxpapers.papers.rocket.WrnNet``, ``DinNet`` and
``DienNet``, those of ``method`` at ``jaxpapers.papers.rocket.Options``.

Gates: digits, mean of 5 seeds: error of the light net <= alone + .003. ml100k, mean of 3
seeds, AUC: light net >= alone - .003.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.config import load_config
from jaxpapers.papers import rocket

PRESETS = ("paper", "svhn", "digits", "ml100k", "dien", "smoke")
# AUC of the light net that the paper's own row ends with; seeds and processors differ.
EXPECTED = {"ml100k": 0.825, "smoke": 0.775}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset rocket:{preset}; expected one of {PRESETS}")
    clicks = {"ml100k": "din:ml100k", "dien": "dien:ml100k", "smoke": "din:smoke"}
    if preset in clicks:
        return _clicks(clicks[preset])
    config = ConfigDict(
        {
            "data": {
                "task": "images",
                "source": "cifar-10",  # cifar-100, svhn, digits
                "path": "",
                "batch": 128,
                "eval_batch": 512,
                "seed": 1234,
            },
            "net": {
                "model": "wrn",  # din, dien
                **dataclasses.asdict(rocket.WrnNet()),
            },
            "optim": {
                "name": "sgd",  # adam
                "lr": 0.1,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "schedule": "drop",  # constant, cosine
                # Steps after which lr is multiplied by drop_by: epochs 60, 120, 160.
                "drop_at": (23_460, 46_920, 62_560),
                "drop_by": 0.2,
            },
            "method": dataclasses.asdict(rocket.Options()),
            # 200 epochs of 50,000.
            "train": blocks.train(78_200, eval_every=3_910),
        }
    )
    if preset == "svhn":
        config.data.source = "svhn"
        config.net.update(dropout=0.2, augment=False)
        # Epochs 20, 40 and 60 of 73,257.
        config.optim.update(name="adam", lr=1e-3, weight_decay=0.0)
        config.optim.drop_at = (11_440, 22_880, 34_320)
        config.train.steps = 45_760
    elif preset == "digits":
        config.data.update(source="digits", batch=64)
        config.net.update(size=8, channels=1, base=8, augment=False)
        config.net.update(light_blocks=1, booster_blocks=3)
        # 10 epochs of 1,348.
        config.optim.drop_at = (126, 168)
        config.train.update(steps=210, eval_every=0, save_minutes=1.0)
    return config.lock()


def _clicks(target: str) -> ConfigDict:
    """A click model's config with two nets in the place of its one."""
    config = load_config(target).copy_and_resolve_references().unlock()
    model = target.split(":")[0]
    net = rocket.DinNet if model == "din" else rocket.DienNet
    fields = {f.name for f in dataclasses.fields(net)}
    own = {name: value for name, value in config.net.items() if name in fields}
    config.net = ConfigDict({"model": model, **dataclasses.asdict(net(**own))})
    if model == "dien":
        config.net.booster.state = 24
    config.method = ConfigDict(dataclasses.asdict(rocket.Options()))
    return config.lock()
