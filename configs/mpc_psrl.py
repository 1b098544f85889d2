"""MPC-PSRL: posterior sampling over models with model-predictive control.

    jaxpapers run mpc_psrl               stochastic cart-pole, 8 episodes of 200 steps
    jaxpapers run mpc_psrl:pendulum      swing-up, 10 episodes of 200 steps
    jaxpapers run mpc_psrl:cartpole-paper, :pendulum-paper    as the authors' code: 15
        episodes, for the cart-pole 500 plans an iteration
    jaxpapers run mpc_psrl:smoke         the agent alone on short episodes, seconds

A step is an episode. --config.method.reward=learned plans without an oracle;
--config.planner.name is cem, icem, mppi or shooting.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.ops import planning
from jaxpapers.papers import mpc_psrl

PRESETS = ("cartpole", "pendulum", "cartpole-paper", "pendulum-paper", "smoke")
EXPECTED = {"smoke": 42.8}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: cartpole), locked."""
    preset = preset or "cartpole"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset mpc_psrl:{preset}; expected one of {PRESETS}")
    world = "pendulum" if preset.startswith("pendulum") else "cartpole"
    config = ConfigDict(
        {
            "data": {
                "task": "control",
                "environment": world,  # cartpole, pendulum
                "length": 0,  # steps of an episode; 0: the environment's own
            },
            "net": dataclasses.asdict(mpc_psrl.Net()),
            "optim": {"name": "adam", "lr": 1e-3},
            "method": dataclasses.asdict(mpc_psrl.Options()),
            "planner": dataclasses.asdict(planning.Options()),
            "train": blocks.train(8),
        }
    )
    if world == "pendulum":
        config.net.reward_hidden = 200
        config.method.update(prior=10.0, reward_epochs=150)
        config.planner.update(population=100, elites=5, alpha=0.0, variance=3.0)
        config.train.steps = 10
    elif preset == "cartpole":
        config.planner.update(population=150, elites=15)
    if preset.endswith("-paper"):
        config.train.steps = 15
    else:
        config.method.particles = 5  # one for each network of PETS; its paper has 20
    if preset == "smoke":
        config.data.length = 50
        config.net.hidden = 64
        config.method.epochs = 50
        config.planner.update(population=100, elites=10, iterations=3, horizon=20)
        config.train.update(steps=5, alone=True)
    return config.lock()
