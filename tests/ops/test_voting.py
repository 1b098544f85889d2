"""Votes, rewards, the recorded evaluation of the authors' code, and what is refused."""

import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import voting
from jaxpapers.ops.voting import Solution
from tests.programs import together


@pytest.mark.parity("lm", only=lambda entry: entry.get("kind") == "versaprm")
def test_recorded_curves(case):
    """Accuracy of every rule, aggregation, n and seed, to the last digit."""
    record = json.loads((case.folder / case.entry["file"]).read_text())
    questions = [voting.solutions_of(q["chain_of_thoughts"]) for q in record["data"]]
    seeds, n_max = record["seeds"], record["n_max"]
    recorded = {("majority", "min"): record["majority"]}
    for rule in ("best_of_n", "weighted"):
        recorded |= {(rule, how): x for how, x in record[rule].items()}
    for (rule, how), curve in recorded.items():
        counts = [int(n) for n in curve]
        found = voting.subsample_curve(
            questions, rule, how, counts=counts, n_max=n_max, seeds=seeds
        )
        assert found == {int(n): x for n, x in curve.items()}, (rule, how)


def test_no_step_at_all():
    scores = jnp.zeros((2, 3, 0))
    for how in voting.HOW:
        value = voting.aggregate(scores, jnp.zeros(scores.shape, bool), how)
        assert value.shape == (2, 3) and not value.any()


def test_aggregates_by_hand():
    scores = np.float32([[0.9, 0.2, 0.5, np.nan], [0.3, np.nan, np.nan, np.nan]])
    scores = np.concatenate([scores, np.full((1, 4), np.nan, np.float32)])
    valid = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    got = together(
        lambda s, v: {how: voting.aggregate(s, v, how) for how in voting.HOW},
        scores,
        valid,
    )
    expected = {
        "min": [0.2, 0.3, 0], "max": [0.9, 0.3, 0], "last": [0.5, 0.3, 0],
        "mean": [1.6 / 3, 0.3, 0], "prod": [0.09, 0.3, 0],
    }  # fmt: skip
    for how, values in expected.items():
        np.testing.assert_allclose(got[how], values, rtol=1e-6)
        host = voting.reward([0.9, 0.2, 0.5], how)
        assert host == pytest.approx(values[0], rel=1e-6)


# Ties go to the answer that was seen first, not to the smaller number.
ANSWERS = np.int32([[3, 1, 1, 3], [2, 0, 0, 2], [-1, -1, 0, 2], [0, 1, 1, 2]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
REWARDS = np.float32([[0.5, 0.5, 0.5, 0.5], [0.1, 0.9, 0.2, 0.2], [1, 1, 1, 1],
                      [0.9, 0.4, 0.4, 0.9]])  # fmt: skip


def test_rules_and_ties():
    got = together(
        lambda a, r, m: (
            voting.majority(a, m, 4),
            voting.weighted_majority(a, r, m, 4),
            voting.best_of_n(a, r, m, 4),
            voting.weighted_majority(a, r.at[3, 0].set(jnp.nan), m, 4),
        ),
        ANSWERS,
        jnp.asarray(REWARDS),
        MASK,
    )
    assert got[0].tolist() == [3, 2, -1, 1]
    assert got[1].tolist() == [3, 0, -1, 0]
    assert got[2].tolist() == [3, 0, -1, 0]
    # A question with a NaN has no answer, rather than that of its NaN.
    assert got[3].tolist() == [3, 0, -1, -1]


def test_jitted_rules_agree_with_the_host():
    """The same choices as the recorded evaluation makes with all solutions."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 4, (60, 7)).astype(np.int32)
    rewards = (rng.integers(1, 8, (60, 7)) / 8).astype(np.float32)  # Exact sums, ties.
    mask = np.ones((60, 7), bool)
    chosen = together(
        lambda a, r, m: {
            "majority": voting.majority(a, m, 4),
            "weighted": voting.weighted_majority(a, r, m, 4),
            "best_of_n": voting.best_of_n(a, r, m, 4),
        },
        answers,
        rewards,
        mask,
    )
    for rule, got in chosen.items():
        for truth in range(4):
            questions = [
                [Solution(int(a), bool(a == truth), [float(r)]) for a, r in zip(*row)]
                for row in zip(answers, rewards)
            ]
            # All n solutions, but in another order: rows whose best is tied may differ.
            for i, question in enumerate(questions):
                expected = voting._choose(
                    [(s.answer, s.correct, s.rewards[0]) for s in question], rule
                )
                assert expected == (got[i] == truth), (rule, i)


def test_pass_at_by_counting():
    for n, c, k in ((5, 2, 3), (4, 0, 2), (4, 4, 1), (6, 1, 6)):
        draws = list(itertools.combinations(range(n), k))
        share = sum(any(i < c for i in d) for d in draws) / len(draws)
        assert voting.pass_at(c, n, k) == pytest.approx(share)


def test_interval_covers_the_mean():
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    low, high = voting.interval(values)
    error = 1.96 / math.sqrt(400)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * error, rel=0.15)
    assert voting.interval([1.0, 1.0]) == (1.0, 1.0)


def test_missing_solutions_are_wrong():
    """One right solution of two: the other is filled up with a wrong one."""
    questions = [[Solution("A", True, [0.5])], [Solution("A", True, [0.5])] * 2]
    curve = voting.subsample_curve(
        questions, "weighted", counts=[1, 2], seeds=range(20)
    )
    assert 0.5 < np.mean(curve[1]) < 1.0
    assert curve[2] == [1.0] * 20
    # Of two answers with one vote each the first drawn one wins.
    assert set(voting.subsample_curve(questions, "majority", counts=[2])[2]) == {
        0.5,
        1.0,
    }


def refusals():
    good = [[Solution("A", True, [0.5])]]
    bad = [[Solution("A", True, [math.nan])]]
    empty = [[Solution("A", True, [])]]
    ones = jnp.ones((1, 2))
    answers, rewards, mask = map(jnp.asarray, (ANSWERS, REWARDS, MASK))
    return {
        "aggregation must be one of": lambda: voting.aggregate(
            ones, ones > 0, "median"
        ),
        "rule must be one of": lambda: voting.subsample_curve(good, "x", counts=[1]),
        "solutions available": lambda: voting.subsample_curve(
            good, "majority", counts=[2]
        ),
        "question 0, solution 0": lambda: voting.subsample_curve(
            bad, "majority", counts=[1]
        ),
        "rewards must be finite": lambda: voting.subsample_curve(
            empty, "majority", counts=[1]
        ),
        "at least one question": lambda: voting.subsample_curve(
            [], "majority", counts=[1]
        ),
        "n_max is 1": lambda: voting.subsample_curve(
            [good[0] * 2], "majority", counts=[1], n_max=1
        ),
        "lacks prm_reward": lambda: voting.solutions_of(
            [{"parsed_answer": "A", "parsed_answer_correctness": True}]
        ),
        "answers must be in": lambda: voting.majority(answers, mask, 3),
        "rewards are NaN": lambda: voting.best_of_n(
            answers, rewards * jnp.nan, mask, 4
        ),
        "pass_at needs": lambda: voting.pass_at(1, 2, 3),
        "interval needs finite": lambda: voting.interval([1.0, math.nan]),
        "one a step": lambda: voting.reward([]),
    }


@pytest.mark.parametrize("message", refusals())
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        refusals()[message]()
