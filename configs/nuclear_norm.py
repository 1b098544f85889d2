"""The nuclear norm of features against shortcuts: ERM-NU, SWAD-NU and what they beat.

    jaxpapers run nuclear_norm             signs that mislead, beside ten methods, 1 min
    jaxpapers run nuclear_norm:rotated     digits turned by 0 and by 75 degrees, 3 min
    jaxpapers run nuclear_norm:coloured    digits whose colour misleads, 1 min
    jaxpapers run nuclear_norm:fonts       letters, a family of fonts left out, 4 min
    jaxpapers run nuclear_norm:folder FOLDER   PACS, VLCS, office_home, ...: ResNet-50
    jaxpapers run nuclear_norm:smoke       ERM-NU alone, a few hundred steps

The fields of ``net`` are described at ``jaxpapers.papers.nuclear_norm.LinearNet``,
``CnnNet`` and ``ResNet``, those of ``method`` at ``Options``.

The presets of digits and letters compare with ERM; --config.data.rows="()" adds the rest.

Gates: signs, 5 seeds: ERM-NU >= .99 on each, L2 <= .40, mean of ERM <= .95. rotated, mean
of both domains and 3 seeds: ERM-NU >= ERM - .01.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.papers import nuclear_norm as nu

PRESETS = ("paper", "rotated", "coloured", "fonts", "folder", "smoke")
# Accuracy on the test domain that the paper's own row ends with.
EXPECTED = {"paper": 1.0, "smoke": 1.0}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(
            f"unknown preset nuclear_norm:{preset}; expected one of {PRESETS}"
        )
    config = ConfigDict(
        {
            "data": {
                "task": "domains",
                "source": "latent",  # rotated, coloured, fonts, folder
                "path": "",  # of all but latent: your own files, else fetched
                "names": (),  # of the folders that are domains; (): all
                "test": (3,),  # domains that no batch has
                "folds": (3,),  # test domains of the comparison; (): every one
                "rows": (),  # methods of the comparison; (): all
                "selection": "last",  # iid, oracle: which step is measured
                "loo": False,  # also runs without each further domain, for loo.csv
                "held_out": 0.2,  # share of each domain
                "validate_every": 100,  # updates between evaluations of all domains
                "trials": 1,  # random hyper-parameters of each method; 1: the defaults
                "l2": 0.01,  # weight decay of the row L2
                "backbone": "",  # safetensors of torchvision's resnet
                "mixed": True,  # of latent: mix the coordinates
                "resample": "bilinear",  # of rotated: bicubic
                "count": 40,  # of fonts: images of a letter
                "batch": 96,  # 32 of each training domain
                "eval_batch": 512,
                "seed": 0,
            },
            "net": {
                "model": "linear",  # cnn, resnet
                **dataclasses.asdict(nu.LinearNet()),
            },
            "method": dataclasses.asdict(nu.Options()),
            "optim": {"name": "adam", "lr": 0.01, "weight_decay": 0.0},
            "train": blocks.train(1500, eval_every=100, save_minutes=1.0),
        }
    )
    if preset in ("rotated", "coloured", "fonts"):
        _small_images(config, preset)
    elif preset == "folder":
        _photographs(config)
    elif preset == "smoke":
        config.train.update(steps=600, alone=True)
    return config.lock()


def _small_images(config: ConfigDict, source: str) -> None:
    """The small convolutional net on images of 14 or 16 pixels."""
    sizes = {
        "rotated": {"size": 14, "classes": 10, "channels": 1},
        "coloured": {"size": 14, "classes": 2, "channels": 2},
        "fonts": {"size": 16, "classes": 26, "channels": 1},
    }
    net = nu.CnnNet(widths=(16, 32, 32, 32), **sizes[source])
    config.net = ConfigDict({"model": "cnn", **dataclasses.asdict(net)})
    config.optim.lr = 1e-3
    config.data.update(
        source=source, selection="iid", validate_every=50, l2=1e-4,
        rows=("ERM-NU", "ERM-NU, theta 0.1", "ERM"),
    )  # fmt: skip
    config.train.update(steps=250, eval_every=50)
    if source == "rotated":
        config.data.update(batch=160, test=(0,), folds=(0, 5))
    elif source == "coloured":
        config.data.update(batch=64, test=(2,), folds=(2,))
    else:
        config.data.update(test=(0,), folds=())
        config.data.rows = ("ERM-NU", "ERM")
        config.train.steps = 300


def _photographs(config: ConfigDict) -> None:
    """The paper's protocol: ResNet-50 with frozen normalisation, 5,000 updates."""
    config.net = ConfigDict({"model": "resnet", **dataclasses.asdict(nu.ResNet())})
    config.optim.lr = 5e-5
    config.data.update(
        source="folder", selection="iid", validate_every=100, test=(0,), folds=(),
        eval_batch=64, l2=1e-4,
    )  # fmt: skip
    config.train.steps = 5000
