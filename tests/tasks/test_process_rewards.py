"""Process rewards: the stream, the rows, what is refused, numbers without a model."""

import itertools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxpapers import run, tasks
from jaxpapers.ops import reasoning
from jaxpapers.papers import versaprm
from jaxpapers.study import with_fields
from jaxpapers.tasks import process_examples, process_rewards, process_search
from tests.contract import grid


def smoke(**fields):
    config = run.load_config("versaprm:smoke", [])
    return with_fields(config, {k.replace("__", "."): v for k, v in fields.items()})


def test_stream_is_a_function_of_its_place():
    config = smoke()
    stream = tasks.read(config).examples
    one, again = stream.batch(16, 16), stream.batch(16, 16, slice(4, 8))
    for name, array in one.items():
        np.testing.assert_array_equal(array[4:8], again[name])
    assert not np.array_equal(one["ids"], stream.batch(32, 16)["ids"])
    # Every solution has a label for each word of its steps; the last step's may be 0.
    separators = one["ids"] == reasoning.VOCABULARY[reasoning.STEP]
    assert (one["labels"][separators] >= 0).all()
    assert set(np.unique(one["labels"])) == {-100, 0, 1}
    few = tasks.read(smoke(data__label_last_n=1)).examples.batch(16, 16)
    assert ((few["labels"] >= 0) == separators).all()


def test_base_model_sees_right_solutions_only():
    config = smoke(method__objective="language")
    batch = tasks.read(config).examples.batch(0, 16)
    assert set(np.unique(batch["labels"])) == {-100, 1}


def test_words_after_the_first_error_are_left_out():
    row = process_examples.sequence(
        [], [["1", reasoning.STEP], ["2", reasoning.STEP], ["3", reasoning.STEP]],
        [1, -1, -1],
    )  # fmt: skip
    kept = reasoning.ids(["1", reasoning.STEP, "2", reasoning.STEP])
    np.testing.assert_array_equal(row.ids, kept)
    assert row.labels.tolist() == [-100, 1, -100, 0]


def test_rows_and_their_stages():
    """Both models start from one base model of all domains."""
    config = smoke(data__domains=("arithmetic", "logic"), base__steps=5)
    study = tasks.study("versaprm", config, tasks.read(config), grid("1x1"))
    many, math, *others = study.rows(3)
    assert [r.label for r in others] == [
        "majority", "one solution", "pass@N (a perfect choice)",
    ]  # fmt: skip
    assert many.stage.after == math.stage.after
    base = many.stage.after.config
    assert (base.method.objective, base.train.steps) == ("language", 5)
    assert math.stage.config.data.domains == ("arithmetic",)
    assert many.stage.config.train.seed == math.stage.config.train.seed == 3
    numbers = {r.label: r.measure().numbers["accuracy"] for r in others}
    # Sampling more and choosing perfectly is the best of the three.
    assert numbers["pass@N (a perfect choice)"] == max(numbers.values())


def test_untrained_numbers_by_counting():
    config = smoke(data__questions=20)
    solved = process_examples.test_set(config.data)
    found = process_rewards._untrained(config.data, solved, "one").numbers
    for domain, problems in solved.items():
        share = np.mean([t.correct for s in problems for t in s.traces])
        assert found[f"accuracy_{domain}"] == pytest.approx(share)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("data__path", "x", "generated, not read"),
        ("data__domains", ("law",), "data.domains must be among"),
        ("data__test_domains", (), "data.test_domains must be among"),
        ("data__error", 1.5, "are shares"),
        ("data__solutions", 0, "data.solutions must be >= 1"),
    ],
)
def test_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        tasks.read(smoke(**{field: value}))


def test_solutions_longer_than_a_row_are_counted_or_refused():
    assert "left out" not in tasks.read(smoke()).summary
    assert (
        "% of them longer than a row, left out"
        in tasks.read(smoke(data__length=60)).summary
    )
    with pytest.raises(ValueError, match="data.length=8: solutions have"):
        tasks.read(smoke(data__length=8))


def test_words_are_labelled_by_whether_the_step_is_right_so_far():
    words = [["1", "plus", "2", reasoning.STEP]]
    row = process_examples.sequence(["x"], words, [-1], 0, 2)
    assert row.labels.tolist() == [-100, 1, 1, 0, 0]
    row = process_examples.sequence(["x"], words, [-1], 1, 2)
    assert row.labels.tolist() == [-100, -100, -100, -100, 0]


@pytest.mark.parametrize("rows", [1, 2])
def test_equal_beginnings_have_equal_scores(rows):
    """Where a sequence lies in a batch rounds it otherwise, which votes must not see."""
    steps = [["1", reasoning.STEP], ["2", reasoning.STEP], ["3", reasoning.STEP]]
    places = [("x", (0, 1)), ("x", (0, 2, 1)), ("=", (0, 1)), ("x", (0, 1))]
    made = [
        process_examples.sequence([question], [steps[i] for i in chosen])
        for question, chosen in places
    ]
    made.insert(1, versaprm.encoding.NONE)
    calls = itertools.count(1)

    def run(params, extra, batch):
        numbers = np.arange(batch["ids"].size).reshape(batch["ids"].shape)
        return numbers + 100.0 * next(calls)

    # Of rows that hold one sequence, and two.
    c = smoke(data__eval_length=rows * len(made[2].ids), data__eval_batch=1).data
    a, none, b, other, same = process_examples.scores(c, grid("1x1"), made, run, {}, {})
    assert list(map(len, (a, none, b, other, same))) == [2, 0, 3, 2, 2]
    np.testing.assert_array_equal(a, same)
    assert a[0] == b[0]
    # One number each for: x0, x01, x02, x021, =0, =01.
    assert len({*a, *b, *other}) == 6


def test_a_search_sees_one_score_of_each_beginning():
    """Beams that share their least step are equal, in one call and in later ones."""
    steps = [[str(i), reasoning.STEP] for i in range(3)]
    calls = itertools.count(1)

    def scores(ids, segments):
        valid = (ids == reasoning.ids([reasoning.STEP])[0]) & (segments > 0)
        order = np.argsort(~valid, axis=1, kind="stable")
        numbers = np.arange(ids.size).reshape(ids.shape) / 1e3 + next(calls)
        take = np.take_along_axis
        return versaprm.Scores(take(numbers, order, 1), take(valid, order, 1))

    def step_scores(paths):
        rows = [
            process_examples.sequence(["x"], [steps[i] for i in path]) if path else none
            for path in paths
        ]
        return process_search.step_scores(rows, 7, scores, seen)

    none, seen = versaprm.encoding.NONE, {}
    a, empty, b = step_scores([(0, 1), (), (0, 2)])
    assert empty == [] and a[0] == b[0] and a[1] != b[1]
    c, d = step_scores([(0, 2, 1), (1,)])
    assert c[:2] == b and len({*a, *b, *c, *d}) == 5


def test_a_solver_remembers_the_scores_of_its_search():
    calls = itertools.count(1)

    def scores(ids, segments):
        first = np.arange(ids.shape[1]) == 0
        valid = np.broadcast_to(first, ids.shape) & (segments > 0)
        return versaprm.Scores(np.full(ids.shape, float(next(calls))), valid)

    c = smoke().data
    problem = process_examples.draw(c, "arithmetic", 0, process_examples.TEST)
    solver = process_search.Solver(c, problem, scores, 0)
    [(step, _)] = solver.extend([()], [True])
    once, again = (solver.score([(step,), ()], [True, False]) for _ in range(2))
    assert once == again == [[1.0], []]


def test_scores_that_are_not_finite_stay_where_they_are():
    made = [process_examples.sequence(["x"], [["1", reasoning.STEP]])] * 3
    calls = iter([1.0, np.nan, 2.0])
    c = smoke(data__eval_length=len(made[0].ids), data__eval_batch=1).data
    found = process_examples.scores(
        c,
        grid("1x1"),
        made,
        lambda p, e, b: np.full(b["ids"].shape, next(calls)),
        {},
        {},
    )
    np.testing.assert_array_equal(np.concatenate(found), [1, np.nan, 1])


def test_metrics_stop_at_the_first_error():
    told = process_examples.step_metrics(
        [1, -1, 0],
        [np.array([0.9, 0.2, 0.9]), np.array([0.8, 0.7]), np.zeros(0)],
    )
    assert told["steps"] == 4 and told["right"] == 0.75
    assert told["auc"] == 1 and told["f1_index"] == 1
    none = process_examples.step_metrics([-1], [np.zeros(0)])
    assert none["steps"] == 0 and np.isnan(none["auc"])


@pytest.mark.slow  # Three minutes.
def test_learns_to_tell_right_steps_of_arithmetic(tmp_path):
    """The digest's gates in one domain: AUC 0.9, five points above the majority."""
    fields = {
        "data.domains": ("arithmetic",), "data.test_domains": ("arithmetic",),
        "data.questions": 40, "data.search_questions": 0, "data.seed": 3,
        "train.seed": 3, "train.steps": 1500, "train.alone": True,
    }  # fmt: skip
    overrides = [f"--config.{k}={v}" for k, v in fields.items()]
    command = [sys.executable, "-m", "jaxpapers", "run", "versaprm", "--quiet"]
    # On one device: eight of them share two cores.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run(
        [*command, "--workdir", str(tmp_path), *overrides], env=environment, check=True
    )
    summary = json.loads((tmp_path / "comparison.json").read_text())
    numbers = summary["rows"][0]["numbers"][0]
    assert numbers["auc_trained"] >= 0.9
    assert numbers["gain"] >= 0.05


def test_optimizer_knows_how_its_matrices_are_split():
    """Without it Muon warns, an error here, and its step may gather whole matrices."""
    config = smoke()
    data = tasks.read(config)
    method = versaprm.make(config, vocab_size=data.facts["vocab_size"])
    batch = data.examples.batch(0, 16)
    with jax.set_mesh(grid("4x2")):
        state = jax.eval_shape(lambda k: method.init(k, batch), jax.random.key(0))
        jax.eval_shape(method.update, state, batch)
