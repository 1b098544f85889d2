"""MPC-PSRL: contract; recorded regressions; networks, models and episodes by hand."""

import numpy as np

from tests.contract import Contract


def transitions(config):
    """A batch of the loss: a linear system."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 5)).astype(np.float32)
    return {"x": x, "y": 0.1 * x[:, :4], "r": x[:, 0]}


CONTRACT = Contract(
    small={
        "data.length": 8, "net.hidden": 6, "net.reward_hidden": 4, "train.steps": 20,
        "optim.name": "sgd", "optim.lr": 0.02, "method.epochs": 3, "method.batch": 8,
        "planner.population": 8, "planner.elites": 2, "planner.iterations": 2,
        "planner.horizon": 3, "method.reward": "learned", "method.reward_epochs": 3,
        "method.noise": 0.01,
    },
    refused={
        "method.noise": (0.0, "method.noise must be > 0"),
        "method.agent": ("greedy", "method.agent must be one of"),
        "planner.elites": (9, "planner.elites must be at most the population 8"),
        "train.accumulate": (2, "train.accumulate divides a batch"),
        "method.particles": (7, "method.particles must be a multiple of the 5"),
    },
    falling=("loss", 0.8),
    batch=transitions,
)  # fmt: skip
