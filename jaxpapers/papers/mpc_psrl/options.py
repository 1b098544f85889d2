"""What an agent is, and the problem that it is given."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpapers.options import check_choices, check_least, check_positive

AGENTS = ("sample", "mean", "ensemble", "optimistic")


class Problem(NamedTuple):
    """An environment, and the reward that a planner with an oracle maximises.

    Attributes:
      environment: see ``ops.environments``; its actions are a ``Box``.
      oracle: (observations (B, S), actions (B, A)) -> rewards (B,), of the state before
        the step. None: the reward has to be learned.
    """

    environment: Any
    oracle: Callable | None = None

    @property
    def inputs(self) -> int:
        """S + A."""
        return self.outputs + self.actions

    @property
    def outputs(self) -> int:
        """S."""
        return len(self.environment.observation_space.low)

    @property
    def actions(self) -> int:
        """A."""
        return len(self.environment.action_space.low)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The agent, its regression and its training.

    Attributes:
      agent: sample: one model drawn from the posterior for an episode; mean: that of
        the posterior's mean, certainty equivalence; ensemble: PETS, returns averaged
        over networks that are bootstrapped; optimistic: H-UCRL, the planner also chooses
        where within the posterior's spread the next state lies.
      reward: oracle: ``Problem.oracle``; learned: by a network and a regression of its
        own.
      prior: sigma, standard deviation of the weights.
      noise: sigma_n, standard deviation of the targets.
      noise_from: given: ``noise``; evidence: the deviation of the largest evidence, after
        every refit of the features.
      plan_noise: whether predictions have noise in planning.
      random_episodes: first ones, of uniform actions.
      refit_every: episodes between refits of the features; the posterior is that of all
        data after every episode.
      epochs: of a refit of the dynamics.
      reward_epochs: of the learned reward.
      batch: rows of a minibatch.
      capacity: episodes that are kept, the oldest are overwritten; 0: all.
      members: ensemble: networks.
      particles: ensemble: trajectories of a plan, a multiple of ``members``.
      propagation: ensemble: ts_inf: a trajectory keeps its network; ts1: it changes it
        in every step.
      optimism: optimistic: half-width of the set of models, in standard deviations.

    Raises:
      ValueError: a value out of range, named.
    """

    agent: str = "sample"
    reward: str = "oracle"
    prior: float = 1e-2
    noise: float = 1e-3
    noise_from: str = "given"
    plan_noise: bool = True
    random_episodes: int = 1
    refit_every: int = 1
    epochs: int = 100
    reward_epochs: int = 100
    batch: int = 32
    capacity: int = 0
    members: int = 5
    particles: int = 20
    propagation: str = "ts_inf"
    optimism: float = 1.0

    def __post_init__(self):
        check_choices(
            self, "method", agent=AGENTS, reward=("oracle", "learned"),
            noise_from=("given", "evidence"), propagation=("ts_inf", "ts1"),
        )  # fmt: skip
        check_positive(self, "method", "prior", "noise", "optimism")
        check_least(
            self, "method", random_episodes=1, refit_every=1, epochs=1,
            reward_epochs=1, batch=1, capacity=0, members=1, particles=1,
        )  # fmt: skip
        if self.particles % self.members:
            raise ValueError(
                f"method.particles must be a multiple of the {self.members} members, "
                f"got {self.particles}"
            )
        if self.capacity and self.refit_every > 1:
            raise ValueError(
                "method.capacity overwrites episodes that a posterior between two "
                "refits still holds; use method.refit_every=1, got "
                f"{self.refit_every}"
            )
