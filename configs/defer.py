"""Delayed conversions: DEFER and its family on one stream of clicks.

    jaxpapers run defer:cdnow          repeat purchases of CDNOW
    jaxpapers run defer:smoke          synthetic clicks
    jaxpapers run defer --config.data.path=data.txt    Criteo's conversion logs
    --config.method.name=es_dfm          another method of the family

``jaxpapers.tasks.delayed_family.table`` has the whole family by the streaming protocol.
Expected on CDNOW, mean of 3 seeds: NLL .570 for DEFER (RI 71), .563 for ES-DFM (RI 89,
the best of the family there), .558 for the oracle, .608 for the pretrained model.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.papers import defer
from jaxpapers.tasks.delayed_family import FAMILY

PRESETS = ("paper", "smoke", "cdnow")
# NLL that the paper's own row ends with; seeds and processors differ.
EXPECTED = {"cdnow": 0.57, "smoke": 0.518}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset defer:{preset}; expected one of {PRESETS}")
    config = ConfigDict(
        {
            "data": {
                "task": "conversions",
                "source": "criteo",  # synthetic, cdnow
                "path": "",  # data.txt of Criteo; elsewhere unused
                "clicks": 0,  # of the synthetic stream
                "batch": 1024,
                "epochs": 5,  # of pretraining
                "w1": 0.25 / 24,  # days, as all times here
                "w2": 30.0,  # days in which a conversion counts
                "w3": 0.0,  # 0: real negatives are known at w2
                "bucket": 1 / 24,  # days of the stream between updates
                "pretrain_until": 30.0,  # day; clicks before it pretrain
                "stream_from": 30.0,  # day of the first event that trains
                "stream_until": 60.0,  # day of the last one
                "baselines": ("pretrained", "oracle"),  # methods trained beside it
                "holdout": 1.0,  # days at the end that are kept for evaluation
                "seed": 0,
            },
            "net": dataclasses.asdict(defer.Net()),
            "method": dataclasses.asdict(defer.Options()),
            "optim": {"name": "adam", "lr": 1e-3},
            # Steps after the stream's end change nothing.
            "train": blocks.train(55_000, save_minutes=10.0),
        }
    )
    if preset == "smoke":
        config.data.update(source="synthetic", clicks=20_000, batch=256, epochs=3)
        config.data.update(w1=1.0, bucket=1.0, pretrain_until=40.0, stream_from=70.0)
        config.data.update(stream_until=100.0, holdout=5.0)
        config.train.update(steps=136, alone=True)
        config.net.update(features=5, bins=(), buckets=(), widths=(32, 16))
        config.net.update(slope=0.01, batch_norm=False)
    elif preset == "cdnow":
        config.data.update(source="cdnow", batch=256, w1=3.0, bucket=1.0)
        config.data.baselines = FAMILY
        config.data.update(pretrain_until=151.0, stream_from=180.0)
        config.data.update(stream_until=516.0, holdout=30.0)
        config.net.update(features=18, bins=(), buckets=(), widths=(64, 32))
        config.net.update(slope=0.01, batch_norm=False, init="fan_in")
        config.method.update(l2=0.0)
        config.train.update(steps=926)
    return config.lock()
