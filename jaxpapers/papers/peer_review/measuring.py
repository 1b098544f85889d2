"""Measures of a paper's review from its coded opinions, on the device in float64.

Opinions are arrays: paper, round and reviewer by number, four scores, four codes. Sums
over opinions are segment sums; papers are rows of the result.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpapers.papers.peer_review import schema
from jaxpapers.papers.peer_review.schema import Opinion

PRAISE = schema.POLARITIES.index("praise")
AGREE, PARTIAL, REBUT, NONE = (
    schema.RESPONSES.index(x)
    for x in ("agree_and_revise", "agree_partial", "rebut", "no_response")
)


class Opinions(NamedTuple):
    """Coded opinions of many papers.

    Attributes:
      paper: 0 .. papers - 1.
      round: from 1.
      reviewer: 0 .. the most reviewers of a paper - 1.
      scores: strength, constructiveness, quality, revision cost in [0, 1].
      codes: indices of opinion type, target, polarity, response type.
      resolved: round in which it was settled; 0: it was not.
    """

    paper: Int[Any, " M"]
    round: Int[Any, " M"]
    reviewer: Int[Any, " M"]
    scores: Float[Any, "M 4"]
    codes: Int[Any, "M 4"]
    resolved: Int[Any, " M"]


def opinions(papers: Sequence[Sequence[Opinion]]) -> Opinions:
    """Arrays of the opinions of each paper; an empty list is a paper without any."""
    each = [(i, o) for i, own in enumerate(papers) for o in own]
    codes = [
        (schema.TYPES.index(o.opinion_type), schema.TARGETS.index(o.target),
         schema.POLARITIES.index(o.polarity), schema.RESPONSES.index(o.response_type))
        for _, o in each
    ]  # fmt: skip
    scores = [[getattr(o, name) for name in schema.SCORES] for _, o in each]

    def ints(values):
        return np.array(list(values), np.int32).reshape(len(each), -1)

    return Opinions(
        ints(i for i, _ in each)[:, 0] if each else np.zeros(0, np.int32),
        np.array([o.round for _, o in each], np.int32),
        np.array([o.reviewer for _, o in each], np.int32),
        np.array(scores, np.float64).reshape(-1, 4),
        ints(codes) if each else np.zeros((0, 4), np.int32),
        np.array([o.resolved_round or 0 for _, o in each], np.int32),
    )


def measures(
    given: Opinions, papers: int, rounds: int, reviewers: int, *, editor: bool = False
) -> dict:
    """Measures of every paper; NaN where one is not defined (no opinions, one reviewer).

    With critical opinions those that are no praise: ``pressure`` is the sum of their
    strength, ``share_r`` the part of round r, ``core_share`` the part on core claims.
    ``strength``, ``quality`` and ``constructiveness`` are means over reviewers of their
    means, ``strength_pooled`` over opinions. ``burden`` is the sum of revision cost.
    ``disagreement`` is the mean distance of reviewers' mean strengths in round 1,
    ``spread`` their standard deviation, ``types_apart`` 1 - Jaccard of opinion types.
    ``agreement`` counts partial agreement half, of answered opinions; ``rebuttal`` and
    ``resolved_2`` are shares.

    Args:
      given: opinions.
      papers: number of papers.
      rounds, reviewers: the most of any paper.
      editor: reviewer 0 is the editor, as in parsed letters: counted in sums, and no
        reviewer in means over reviewers and in their disagreement.

    Returns:
      Name -> (papers,) float64 NumPy; ``share`` (papers, rounds).

    Raises:
      ValueError: numbers out of range, scores outside [0, 1].
    """
    for name, values, low, high in (
        ("paper", given.paper, 0, papers - 1), ("round", given.round, 1, rounds),
        ("reviewer", given.reviewer, 0, reviewers - 1), ("score", given.scores, 0, 1),
    ):  # fmt: skip
        values = np.asarray(values)
        if values.size and not ((values >= low) & (values <= high)).all():
            raise ValueError(
                f"{name} must be in [{low}, {high}], got {values.min()} to {values.max()}"
            )
    with jax.enable_x64(True):
        return jax.device_get(_measures(given, papers, rounds, reviewers, editor))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _measures(
    given: Opinions, papers: int, rounds: int, reviewers: int, editor: bool
) -> dict:
    paper = jnp.asarray(given.paper)
    scores = jnp.asarray(given.scores, jnp.float64)
    kind, target, polarity, response = jnp.asarray(given.codes).T
    critical = (polarity != PRAISE) * 1.0
    strength, helpful, quality, cost = scores.T

    def total(values):
        return jax.ops.segment_sum(values, paper, papers)

    def per(values, *keys_and_sizes):
        """Sums (papers, ...) by further keys."""
        index, sizes = paper, [papers]
        for key, size in keys_and_sizes:
            index, sizes = index * size + key, [*sizes, size]
        return jax.ops.segment_sum(values, index, int(np.prod(sizes))).reshape(sizes)

    one = jnp.ones_like(strength)
    count, asked = total(one), total(critical)
    by_round = per(critical * strength, (given.round - 1, rounds))
    pressure = by_round.sum(1)
    seats = (given.reviewer, reviewers)
    # Those that a reviewer wrote.
    theirs = (jnp.asarray(given.reviewer) > 0) * 1.0 if editor else one
    n = per(theirs, seats)
    means = {
        name: _mean(_ratio(per(theirs * v, seats), n))
        for name, v in (("strength", strength), ("quality", quality),
                        ("constructiveness", helpful))
    }  # fmt: skip
    first = (given.round == 1) * theirs
    in_first = per(first, seats)
    reviewer_means = _ratio(per(first * strength, seats), in_first)
    used = per(first, seats, (kind, len(schema.TYPES))) > 0
    answered = (response != NONE) * critical
    return {
        "opinions": count,
        "critical": asked,
        "pressure": pressure,
        "share": _ratio(by_round, pressure[:, None]),
        "core_share": _ratio(total(critical * strength * (target == 0)), pressure),
        "strength_pooled": _ratio(total(strength), count),
        **means,
        "burden": total(cost),
        "burden_mean": _ratio(total(cost), count),
        **_disagreement(reviewer_means, used),
        "agreement": _ratio(
            total(answered * ((response == AGREE) + 0.5 * (response == PARTIAL))),
            total(answered),
        ),
        "rebuttal": _ratio(total(answered * (response == REBUT)), total(answered)),
        "resolved_2": _ratio(
            total(critical * ((given.resolved > 0) & (given.resolved <= 2))), asked
        ),
    }


def _disagreement(means: Float[Array, "P R"], used: Array) -> dict[str, Array]:
    """Distances between reviewers of a paper; NaN with fewer than two."""
    seen = ~jnp.isnan(means)
    pair = (
        seen[:, :, None] & seen[:, None, :] & ~jnp.eye(means.shape[1], dtype=bool)[None]
    )
    value = jnp.where(seen, means, 0.0)
    count = pair.sum((1, 2))
    apart = jnp.abs(value[:, :, None] - value[:, None, :])
    both = (used[:, :, None] & used[:, None]).sum(-1)
    either = (used[:, :, None] | used[:, None]).sum(-1)
    jaccard = 1 - both / jnp.maximum(either, 1)
    k = seen.sum(1)
    centre = value.sum(1) / jnp.maximum(k, 1)
    square = jnp.where(seen, jnp.square(value - centre[:, None]), 0.0).sum(1)
    return {
        "disagreement": _ratio((apart * pair).sum((1, 2)), count),
        "spread": jnp.where(k > 1, jnp.sqrt(square / jnp.maximum(k - 1, 1)), jnp.nan),
        "types_apart": _ratio((jaccard * pair).sum((1, 2)), count),
    }


def _ratio(a: Array, b: Array) -> Array:
    """a / b; NaN where b is 0."""
    return jnp.where(b == 0, jnp.nan, a / jnp.where(b == 0, 1, b))


def _mean(x: Float[Array, "P R"]) -> Float[Array, " P"]:
    """Mean over reviewers that have a value."""
    seen = ~jnp.isnan(x)
    return _ratio(jnp.where(seen, x, 0.0).sum(1), seen.sum(1))


def disagreement_null(
    key: Key[Array, ""],
    reviewer_means: Any,
    paper: Any,
    within: Any,
    papers: int,
    replicates: int = 999,
    mesh: Any = None,
) -> tuple[float, float, np.ndarray]:
    """Tests the mean distance of reviewers against reviewers dealt anew among papers.

    Scores are bounded, so that their spread depends on their mean: reviewers change
    places within groups of papers (field, year, round) only.

    Args:
      key: of the permutations.
      reviewer_means: (n,) mean strengths, one for each reviewer of each paper.
      paper: (n,) its paper.
      within: (n,) labels of the groups.
      papers: number of papers.
      replicates, mesh: see ``ops.regression.permutation_test``.

    Returns:
      Observed mean squared distance from the paper's mean, p-value, the null's values.
    """
    from jaxpapers.ops.regression import permutation_test

    paper = np.asarray(paper, np.int32)
    return permutation_test(
        key, _apart_within(papers), np.asarray(reviewer_means, np.float64), paper,
        replicates, within=within, mesh=mesh,
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def _apart_within(papers: int) -> Callable[[Any, Any], Array]:
    """Mean squared distance from the paper's mean; one function, one program."""

    def statistic(x, paper):
        n = jnp.maximum(jax.ops.segment_sum(jnp.ones_like(x), paper, papers), 1)
        mean = jax.ops.segment_sum(x, paper, papers) / n
        return jnp.square(x - mean[paper]).mean()

    return statistic


def outcomes(cites: Any, cell: Any) -> dict[str, np.ndarray]:
    """Citations within cells of field and year: those of ``ranked``, and normalised.

    Args:
      cites: (n,) counts.
      cell: (n,) labels.

    Returns:
      ``norm``: count / mean of the cell; and of ``ranked``.

    Raises:
      ValueError: negative counts, a cell whose counts are all 0.
    """
    made = ranked(cites, cell)
    cites = np.asarray(cites, np.float64)
    labels, code = np.unique(np.asarray(cell), return_inverse=True)
    mean = np.bincount(code, cites) / np.bincount(code)
    if (mean == 0).any():
        empty = labels[mean == 0][:3].tolist()
        raise ValueError(
            f"cells without any citation have no normalised count: {empty}"
        )
    return {"norm": cites / mean[code], **made}


def ranked(cites: Any, cell: Any) -> dict[str, np.ndarray]:
    """Citations within cells, which may have none.

    Args:
      cites: (n,) counts.
      cell: (n,) labels.

    Returns:
      ``log``: log(1 + count); ``percentile``: average rank / n of the cell; ``top``: 1
      in the top tenth by percentile, with at least one citation.

    Raises:
      ValueError: negative counts.
    """
    from jaxpapers.ops.hypothesis import average_ranks

    cites = np.asarray(cites, np.float64)
    if not (cites >= 0).all():
        raise ValueError(f"counts must be >= 0, got {cites.min()}")
    labels, code = np.unique(np.asarray(cell), return_inverse=True)
    percentile = np.empty(len(cites))
    for i in range(len(labels)):
        rows = code == i
        percentile[rows] = average_ranks(cites[rows]) / rows.sum()
    top = (percentile > 0.9) & (cites > 0)
    return {"log": np.log1p(cites), "percentile": percentile, "top": top * 1.0}


def standardise(table: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """z-scores of columns, missing values aside.

    Raises:
      ValueError: a constant column.
    """
    result = {}
    for name, values in table.items():
        values = np.asarray(values, np.float64)
        spread = np.nanstd(values)
        if not spread > 0:
            raise ValueError(f"{name} is constant: it has no z-score")
        result[name] = (values - np.nanmean(values)) / spread
    return result
