"""CODA: contextual goals in a maze, from offline data without rewards.

    jaxpapers run coda                Four Rooms in PointMaze: the learner and baselines
    jaxpapers run coda:cells          Random Cells
    jaxpapers run coda:goals          any position as the goal
    jaxpapers run coda:paper --config.data.path=FILE    the authors' sizes, 2e6 updates
    jaxpapers run coda:smoke          a point mass in a small maze, seconds

PointMaze needs the extra rl. Its data are 40,000 decisions, each held for 5 environment
steps, of a noisy controller that walks between random goals. data.path with
data.source=file: PointMaze transitions of D4RL, Minari or OGBench.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.papers import coda

PRESETS = ("rooms", "cells", "goals", "few", "paper", "smoke")
EXPECTED = {"smoke": 0.333}
ROWS = ("oracle reward", "reward prediction", "UDS", "PDS", "behaviour cloning",
        "hindsight GCRL", "goal prediction", "empirical contexts")  # fmt: skip
SIZES = ("state", "action", "context", "known", "example", "examples")


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: rooms), locked."""
    preset = preset or "rooms"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset coda:{preset}; expected one of {PRESETS}")
    net = dataclasses.asdict(coda.Net(state=4, action=2, context=1, hidden=(128, 128)))
    config = ConfigDict(
        {
            "data": {
                "task": "goals",
                "source": "pointmaze",  # point, file
                "path": "",
                "maze": "medium",  # umaze, large, or rows of 0 and 1 with slashes
                "problem": "rooms",  # cells, goals
                "steps": 200_000,  # environment steps of the walk
                "hold": 5,  # environment steps of a decision
                "noise": 0.5,  # of the controller
                "rows": "coda",  # real, oracle, hindsight
                "sampling": "uniform",  # of contexts; empirical
                "ratio": 0.5,  # of fictitious transitions in a batch
                "per_context": 0,  # examples kept of a context; 0: all
                "perturb": 0.0,  # deviation of the noise on examples
                "ood": False,  # Random Cells: examples that are shifted by 50
                "hard": True,  # Random Cells: tests in the far corner alone
                "batch": 256,
                "episodes": 20,  # of each context
                "ogbench": 50,  # of each of OGBench's tasks; 0: none
                "horizon": 120,  # decisions of an episode
                "seed": 0,
            },
            "net": {k: v for k, v in net.items() if k not in SIZES},
            "optim": {"name": "adam", "lr": 1e-3, "schedule": "cosine", "hold": 4500},
            "method": dataclasses.asdict(
                coda.Options(updates=50, rate=0.05, temperature=3.0)
            ),
            "baselines": {
                "rows": ROWS,  # beside the learner itself
                "model_steps": 40,  # of reward and goal models
                "model_lr": 1e-3,  # their learning rate
                "goals": 8,  # Gaussians of the goal model
            },
            # 120 x 50 updates, of which each moves the targets by 0.05: value travels 300
            # decisions, more than twice the longest path.
            "train": blocks.train(120, eval_every=24),
        }
    )
    if preset in ("cells", "goals"):
        config.data.problem = preset
    elif preset == "few":
        config.data.per_context = 20
    elif preset == "paper":
        _paper(config)
    elif preset == "smoke":
        config.data.update(
            source="point", steps=30_000, maze="medium", horizon=60, episodes=8,
            ogbench=0, batch=64, hold=10,
        )  # fmt: skip
        config.net.hidden = (32, 32)
        config.optim.update(schedule="constant", hold=0)
        config.method.rate = 0.1
        config.train.update(steps=60, eval_every=0, alone=True)
    return config.lock()


def _paper(config: ConfigDict) -> None:
    """The authors' sizes and rates, their vectors, their order."""
    config.data.update(batch=1024, episodes=100, source="file", hold=1, horizon=1000,
                       perturb=0.05)  # fmt: skip
    config.net.update(hidden=(256, 256, 256), encoding="reference")
    config.optim.update(lr=1e-4, schedule="constant", hold=0)
    config.method.update(updates=100, rate=0.005, temperature=10.0)
    config.train.update(steps=20_000, eval_every=1000, save_minutes=30.0)
