"""Hyper-parameters of GPPSTD."""

import dataclasses
import math

from jaxpapers.ops import gaussian_process as gp
from jaxpapers.options import check_choices, check_least, check_positive

FORMS = ("staged", "stationary")
LIKELIHOODS = ("regression", "temporal")
EXPLORE = ("sample", "mean", "epsilon", "rlsvi")
EVICTIONS = ("variance", "none")
DEMONSTRATIONS = ("none", "expert", "noisy", "random", "partial")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prior:
    """The process's prior and its noise; the config group ``prior``.

    Inputs are scaled to [0, 1], so that lengths are shares of a range.

    Attributes:
      kind: "rbf" or "matern52".
      variance: v, of values in units of scaled rewards.
      lengths: of each input; one number is that of all.
      action_length: of each component of a continuous action.
      noise: s2.
      mean: m0. 0 is optimism where rewards are costs.
    """

    kind: str = "rbf"
    variance: float = 1.0
    lengths: tuple[float, ...] = (0.1,)
    action_length: float = 0.5
    noise: float = 0.01
    mean: float = 0.0

    def __post_init__(self):
        check_choices(self, "prior", kind=gp.KINDS)
        check_positive(self, "prior", "variance", "noise", "action_length")
        for length in self.lengths:
            if not length > 0:
                raise ValueError(f"prior.lengths must be > 0, got {self.lengths}")
        if not math.isfinite(self.mean):
            raise ValueError(f"prior.mean must be finite, got {self.mean}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Hyper-parameters of the agent; the config group ``method``.

    Attributes:
      form: "staged": a process for each step of an episode, each factorised once per
        episode; "stationary": one process, factorised once per episode, whose targets
        are swept until they settle.
      likelihood: "regression" on targets of the sampled function; "temporal", of rewards
        as differences of values (stationary only).
      noise: of the temporal likelihood, "deterministic" (Engel 2003) or "monte_carlo"
        (2005).
      explore: "sample": greedy on a function drawn each episode; "mean": greedy on the
        posterior mean; "epsilon": the same with uniform actions in between; "rlsvi": a
        drawn function of linear regression on the same random features.
      epsilon: share of uniform actions of "epsilon".
      gamma: discount.
      sweeps: at most, of the stationary form.
      tolerance: change of all targets below which sweeps end.
      relinearise: of the temporal likelihood: times that next actions are replaced by
        the best of the sample, each with a factorisation. 0: those taken (SARSA).
      features: F, of a drawn function.
      buffer: transitions kept, of each stage.
      eviction: "variance": those of the largest conditional variance are kept; "none":
        a run whose data do not fit is refused.
      reward_scale: rewards are multiplied by it, returns are not.
      clip: targets are kept between these, in units of scaled rewards; () for not at all.
      candidates: uniform actions that are tried, where actions are continuous.
      ascent: gradient steps from the best of them.
      evidence_every: episodes between ascents of the evidence; 0: fixed prior.
      evidence_steps: of gradient, each.
      demonstrations: what is in the buffer at the start.
      demonstration_episodes: how many.
    """

    form: str = "staged"
    likelihood: str = "regression"
    noise: str = "deterministic"
    explore: str = "sample"
    epsilon: float = 0.1
    gamma: float = 1.0
    sweeps: int = 50
    tolerance: float = 1e-3
    relinearise: int = 0
    features: int = 256
    buffer: int = 256
    eviction: str = "variance"
    reward_scale: float = 1.0
    clip: tuple[float, ...] = ()
    candidates: int = 64
    ascent: int = 5
    evidence_every: int = 0
    evidence_steps: int = 50
    demonstrations: str = "none"
    demonstration_episodes: int = 0

    def __post_init__(self):
        check_choices(
            self, "method", form=FORMS, likelihood=LIKELIHOODS, noise=gp.NOISES,
            explore=EXPLORE, eviction=EVICTIONS, demonstrations=DEMONSTRATIONS,
        )  # fmt: skip
        check_least(
            self, "method", sweeps=1, tolerance=0, relinearise=0, features=1, buffer=1,
            candidates=1, ascent=0, evidence_every=0, evidence_steps=0,
            demonstration_episodes=0,
        )  # fmt: skip
        check_positive(self, "method", "reward_scale")
        for name in ("gamma", "epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"method.{name} must be in [0, 1], got {getattr(self, name)}"
                )
        self._check_pairs()

    def _check_pairs(self) -> None:
        temporal = self.likelihood == "temporal"
        if temporal and (self.form == "staged" or self.explore == "rlsvi"):
            raise ValueError(
                "method.likelihood='temporal' needs method.form='stationary' and no "
                f"method.explore='rlsvi', got {self.form!r} and {self.explore!r}"
            )
        if self.form == "stationary" and not self.gamma < 1 and not temporal:
            raise ValueError(
                "method.form='stationary' sweeps discounted values: method.gamma must be "
                f"< 1, got {self.gamma}"
            )
        if self.clip and (len(self.clip) != 2 or not self.clip[0] < self.clip[1]):
            raise ValueError(
                f"method.clip must be () or (low, high) with low < high, got {self.clip}"
            )
        none = self.demonstrations == "none"
        if none != (self.demonstration_episodes == 0):
            raise ValueError(
                "method.demonstrations and method.demonstration_episodes belong "
                f"together, got {self.demonstrations!r} and {self.demonstration_episodes}"
            )
