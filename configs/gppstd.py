"""GPPSTD (reconstructed): exploration by posterior samples of a Gaussian process.

    jaxpapers run gppstd                  Deep Sea 10 x 10, 5 agents of 300 episodes, rows
    jaxpapers run gppstd:mountain_car     MountainCar-v0, with and without demonstrations
    jaxpapers run gppstd:chain            a continuous chain
    jaxpapers run gppstd:demonstrations   variances after demonstrations, no training
    jaxpapers run gppstd:smoke            Deep Sea 5 x 5, seconds

Only the paper's abstract could be read; docs/exploration.md says what is reconstructed. A
step is an episode; ``train.members`` agents run in one program.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.papers import gppstd

PRESETS = ("deep_sea", "mountain_car", "chain", "demonstrations", "smoke")
EXPECTED = {"deep_sea": 1.0, "mountain_car": -149.2, "smoke": 1.0}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: deep_sea), locked."""
    preset = preset or "deep_sea"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset gppstd:{preset}; expected one of {PRESETS}")
    car = preset in ("mountain_car", "demonstrations")
    config = ConfigDict(
        {
            "data": {
                "task": "exploration",
                # mountain_car, mountain_car_continuous, chain, pendulum
                "environment": "mountain_car" if car else "deep_sea",
                "size": 10,  # N of Deep Sea
                "length": 0,  # steps of an episode; 0: the environment's own
                "table": False,  # variances of demonstrations, nothing is trained
            },
            "prior": dataclasses.asdict(gppstd.Prior()),
            "method": dataclasses.asdict(gppstd.Options(buffer=64)),
            "optim": {"name": "adam", "lr": 0.05},  # of the evidence's ascent
            "train": blocks.train(300, members=5),
        }
    )
    if car:
        config.method.update(
            form="stationary",
            gamma=0.99,
            reward_scale=0.1,  # Values lie in [-10, 0].
            clip=(-10.0, 0.0),
            buffer=512,
            sweeps=200,  # A value travels a step in each.
            tolerance=0.01,
            demonstrations="expert",
            demonstration_episodes=3,
        )
        config.prior.mean = -10.0
        config.train.steps = 50
    if preset == "demonstrations":
        config.data.table = True
    elif preset == "chain":
        config.data.environment = "chain"
        config.train.steps = 60
    elif preset == "smoke":
        config.data.size = 5
        config.method.update(features=64, buffer=32)
        config.train.update(steps=40, members=2, alone=True)
    return config.lock()
