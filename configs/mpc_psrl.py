"""MPC-PSRL: posterior sampling over models with model-predictive control.

    jaxpapers run mpc_psrl               stochastic cart-pole, 8 episodes of 200 steps
    jaxpapers run mpc_psrl:pendulum      swing-up, 10 episodes of 200 steps
    jaxpapers run mpc_psrl:cartpole-paper, :pendulum-paper    as the authors' code: 15
        episodes, for the cart-pole 500 plans an iteration
    jaxpapers run mpc_psrl:cartpole-light, :pendulum-light    the same comparisons with
        a smaller network and fewer plans, a tenth of the time
    jaxpapers run mpc_psrl:reacher3d, :pusher    PETS' arm on MuJoCo (pip install
        'jaxpapers[rl]'), 30 and 200 episodes of 150 steps
    jaxpapers run mpc_psrl:smoke         the agent alone on short episodes, seconds

A step is an episode. --config.method.reward=learned plans without an oracle;
--config.planner.name is cem, icem, mppi or shooting.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.ops import planning
from jaxpapers.papers import mpc_psrl

PRESETS = (
    "cartpole", "pendulum", "cartpole-light", "pendulum-light", "cartpole-paper",
    "pendulum-paper", "reacher3d", "pusher", "smoke",
)  # fmt: skip
EXPECTED = {
    "cartpole": 172.4, "pendulum": -581.8, "cartpole-light": 139.5,
    "pendulum-light": -365.2, "smoke": 42.8,
}  # fmt: skip


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: cartpole), locked."""
    preset = preset or "cartpole"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset mpc_psrl:{preset}; expected one of {PRESETS}")
    world = "cartpole" if preset == "smoke" else preset.partition("-")[0]
    config = ConfigDict(
        {
            "data": {
                "task": "control",
                "environment": world,  # cartpole, pendulum, swing_up, reacher3d, pusher
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
    elif world in ("reacher3d", "pusher"):
        _arm(config, world)
    elif not preset.endswith("-paper"):
        config.planner.update(population=150, elites=15)
    if preset.endswith("-paper"):
        config.train.steps = 15
    elif world in ("cartpole", "pendulum"):
        config.method.particles = 5  # one for each network of PETS; its paper has 20
    if preset == "smoke" or preset.endswith("-light"):
        config.net.update(hidden=64, reward_hidden=10)
        config.method.update(epochs=50, reward_epochs=50)
        config.planner.update(population=100, iterations=3)
    if preset in ("smoke", "cartpole-light"):
        config.planner.update(elites=10, horizon=20)
    if preset == "smoke":
        config.data.length = 50
        config.train.update(steps=5, alone=True)
    return config.lock()


def _arm(config: ConfigDict, world: str) -> None:
    """The settings of the authors' code for the two tasks of the arm."""
    reacher = world == "reacher3d"
    config.net.update(depth=3, reward_hidden=200)
    config.method.update(
        prior=1e-4 if reacher else 1e-3, noise=1e-4, epochs=100 if reacher else 50,
        reward_epochs=100 if reacher else 50,
    )  # fmt: skip
    config.planner.update(
        horizon=25, population=400 if reacher else 500, elites=40 if reacher else 50,
        variance=10.0 if reacher else 1.0,
    )  # fmt: skip
    config.train.steps = 30 if reacher else 200
