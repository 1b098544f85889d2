"""Papers, reviews and citations with known truth. Host, NumPy, one seed.

Opinions are drawn by reviewers of papers with effects of both; citations follow a
negative binomial model with chosen coefficients of the measures of these opinions.
``rendering`` writes the opinions as letters.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxpapers.options import check_least
from jaxpapers.papers.peer_review import measuring, schema
from jaxpapers.papers.peer_review.measuring import Opinions

REGRESSORS = ("strength", "quality", "burden", "log_team", "pages")
"""Columns of the models, z-scores; ``pages`` has no effect."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is drawn.

    Attributes:
      papers: number of papers.
      fields: number of fields.
      first, years: years of publication.
      strength, quality, burden, log_team: coefficients of the z-scores in the log of
        the mean citation count; ``pages`` has 0.
      alpha: overdispersion, Var = mu + alpha mu^2.
      reviewer_effect, paper_effect: deviations of the latent strength.
      seed: of all draws.
    """

    papers: int = 2000
    fields: int = 6
    first: int = 2017
    years: int = 8
    strength: float = 0.15
    quality: float = 0.08
    burden: float = 0.05
    log_team: float = 0.1
    alpha: float = 0.6
    reviewer_effect: float = 0.5
    paper_effect: float = 0.5
    seed: int = 0

    def __post_init__(self):
        check_least(self, "data", papers=10, fields=2, years=1, alpha=0, seed=0)

    @property
    def truth(self) -> np.ndarray:
        """Coefficients of ``REGRESSORS``."""
        return np.array([self.strength, self.quality, self.burden, self.log_team, 0.0])


class World(NamedTuple):
    """Drawn papers.

    Attributes:
      opinions: of all papers; reviewers from 0.
      measures: of ``measuring.measures``.
      x: (papers, 5) z-scores of ``REGRESSORS``.
      field, year, cell: (papers,) codes, years, codes of field and year.
      eta: (papers,) log of the mean citation count.
      cites: (papers,) counts.
      reviewers, rounds: (papers,) numbers.
    """

    opinions: Opinions
    measures: dict[str, np.ndarray]
    x: np.ndarray
    field: np.ndarray
    year: np.ndarray
    cell: np.ndarray
    eta: np.ndarray
    cites: np.ndarray
    reviewers: np.ndarray
    rounds: np.ndarray


MOST_REVIEWERS, MOST_ROUNDS = 4, 3


def simulate(options: Options) -> World:
    """Draws papers; equal options give equal bytes."""
    rng = np.random.default_rng([options.seed, 1])
    n = options.papers
    field = rng.integers(0, options.fields, n)
    year = options.first + rng.integers(0, options.years, n)
    cell = np.unique(field * 10_000 + year, return_inverse=True)[1]
    reviewers = rng.choice([2, 3, 4], n, p=[0.3, 0.55, 0.15])
    rounds = rng.choice([1, 2, 3], n, p=[0.25, 0.55, 0.2])
    # Fields differ in style.
    style = np.linspace(-0.3, 0.3, options.fields)[field]
    paper = rng.normal(0, options.paper_effect, n) + style
    given = _opinions(rng, options, paper, reviewers, rounds)
    found = measuring.measures(given, n, MOST_ROUNDS, MOST_REVIEWERS)
    team, pages = rng.poisson(8, n) + 1, rng.normal(12, 3, n)
    columns = measuring.standardise(
        {k: found[k] for k in REGRESSORS[:3]}
        | {"log_team": np.log(team), "pages": pages}
    )
    x = np.stack([columns[k] for k in REGRESSORS], 1)
    level = (
        2.2
        + rng.normal(0, 0.3, cell.max() + 1)
        - 0.08 * (np.arange(cell.max() + 1) % options.years)
    )
    eta = x @ options.truth + level[cell]
    cites = draw_counts(rng, eta, options.alpha)
    return World(given, found, x, field, year, cell, eta, cites, reviewers, rounds)


def draw_counts(rng: np.random.Generator, eta: np.ndarray, alpha: float) -> np.ndarray:
    """Negative binomial counts (NB2) with means exp(eta); Poisson where alpha is 0."""
    mu = np.exp(eta)
    if alpha:
        mu = mu * rng.gamma(1 / alpha, alpha, mu.shape)
    return rng.poisson(mu).astype(np.float64)


def draw_outcome(rng: np.random.Generator, world: World) -> np.ndarray:
    """A continuous outcome, linear in x, whose noise grows with |x|."""
    spread = 0.4 * (1 + 0.6 * np.abs(world.x[:, 0]))
    return world.eta + rng.normal(size=len(spread)) * spread


def _opinions(rng, options, paper, reviewers, rounds) -> Opinions:
    """Opinions of every reviewer in every round: fewer and weaker in later ones."""
    columns = []
    for i in range(options.papers):
        own = rng.normal(0, options.reviewer_effect, reviewers[i])
        for r in range(1, rounds[i] + 1):
            for j in range(reviewers[i]):
                count = 1 + rng.poisson(2.5) if r == 1 else rng.binomial(2, 0.45)
                latent = paper[i] + own[j] - 0.6 * (r - 1) + rng.normal(0, 0.6, count)
                columns += [(i, r, j, v) for v in latent]
    table = np.array(columns)
    latent, m = table[:, 3], len(table)

    def step(value):
        return np.clip(np.round(2 + 1.3 * value), 0, 4) / 4

    strength = step(latent)
    helpful = step(rng.normal(0, 0.8, m))
    quality = step(0.5 * helpful + rng.normal(-0.2, 0.7, m))
    cost = step(0.6 * latent + rng.normal(-0.2, 0.7, m))
    kind = rng.integers(0, len(schema.TYPES) - 1, m)
    target = (rng.random(m) > 0.2 + 0.6 * strength) * 1
    polarity = np.where(strength >= 0.5, 0, rng.integers(0, 3, m))
    response = rng.choice(
        len(schema.RESPONSES), m, p=[0.55, 0.15, 0.14, 0.1, 0.04, 0.02]
    )
    settled = (response <= 1) * (table[:, 1] + 1)
    scores = np.stack([strength, helpful, quality, cost], 1)
    codes = np.stack([kind, target, polarity, response], 1).astype(np.int32)
    ints = table[:, :3].astype(np.int32)
    paper_of, rounds_of, seat = ints.T
    settled = settled.astype(np.int32)
    return Opinions(paper_of, rounds_of, seat, scores, codes, settled)
