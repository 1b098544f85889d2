"""What a planner is told, what it gives, and what it hands on."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

NAMES = ("cem", "icem", "mppi", "shooting")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a planner does; one reads the fields that it has.

    Attributes:
      name: one of ``NAMES``.
      horizon: H, actions of a plan.
      population: P, plans of an iteration.
      iterations: of an update; shooting: the plans of all are drawn at once.
      elites: cem, icem: E.
      alpha: cem, icem: share of the old mean and variance that an iteration keeps.
      variance: of the first draw, of every action; mppi: of all.
      stop: cem: variance below which no further iteration is done.
      execute: cem, icem, mppi: the first action of the last mean, or of the best plan.
      colour: icem: exponent beta of the noise's spectrum, 1 / f^beta; 0: white.
      reuse: icem: share of the elites that the next iteration and the next step evaluate
        again.
      decay: icem: an iteration has so many times fewer plans than the one before.
      temperature: mppi: plans are weighted by exp(return / temperature).

    Raises:
      ValueError: a value out of range, named.
    """

    name: str = "cem"
    horizon: int = 30
    population: int = 500
    iterations: int = 5
    elites: int = 50
    alpha: float = 0.1
    variance: float = 1.0
    stop: float = 0.01
    execute: str = "mean"
    colour: float = 2.0
    reuse: float = 0.3
    decay: float = 1.25
    temperature: float = 1.0

    def __post_init__(self):
        choices = {"name": NAMES, "execute": ("mean", "best")}
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"planner.{field} must be one of {known}, got "
                    f"{getattr(self, field)!r}"
                )
        for field in ("horizon", "population", "iterations", "elites"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"planner.{field} must be >= 1, got {getattr(self, field)}"
                )
        if self.elites > self.population:
            raise ValueError(
                f"planner.elites must be at most the population {self.population}, got "
                f"{self.elites}"
            )
        for field in ("variance", "temperature"):
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"planner.{field} must be > 0, got {getattr(self, field)}"
                )
        bounds = {"alpha": (0, 1), "reuse": (0, 1), "decay": (1, math.inf),
                  "stop": (0, math.inf), "colour": (0, math.inf)}  # fmt: skip
        for field, (low, high) in bounds.items():
            if not low <= getattr(self, field) <= high:
                raise ValueError(
                    f"planner.{field} must lie in [{low}, {high}], got "
                    f"{getattr(self, field)}"
                )

    @property
    def kept(self) -> int:
        """Plans that an iteration hands on."""
        return math.ceil(self.reuse * self.elites) if self.name == "icem" else 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Plans that each iteration draws."""
        if self.name != "icem":
            return (self.population,) * self.iterations
        least = min(2 * self.elites, self.population)
        return tuple(
            max(round(self.population / self.decay**i), least)
            for i in range(self.iterations)
        )


class Warm(NamedTuple):
    """What the plan of the next step starts from.

    Attributes:
      mean: (H, A), the last mean.
      kept: (K, H, A), good plans; none but for icem.
    """

    mean: Any
    kept: Any


class Trace(NamedTuple):
    """What happened in the iterations; compiled away where it is not looked at.

    Attributes:
      returns: (I, P), -inf where a return was not finite, or none was asked for.
      elites: (I, E), indices of the best, the best first.
      means: (I, H, A), after each iteration.
      variances: (I, H, A).
    """

    returns: Any
    elites: Any
    means: Any
    variances: Any


class Planned(NamedTuple):
    """A plan.

    Attributes:
      action: (A,), to execute.
      warm: for the next step.
      value: (), return of the best plan that was evaluated.
      trace: see ``Trace``; of icem, whose iterations have different sizes, None.
    """

    action: Any
    warm: Warm
    value: Any
    trace: Trace | None


Evaluate = Callable[[Any, Any, Any], Any]
"""(state, plans (P, H, A), key) -> returns (P,)."""
