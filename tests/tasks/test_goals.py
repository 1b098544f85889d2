"""Contextual goals: sampling of the augmented data, goal sets, episodes, the study."""

import functools

import jax
import numpy as np
import pytest

from jaxpapers import run, tasks
from jaxpapers.data import mazes
from jaxpapers.tasks import goal_data, goal_evaluation, goals
from tests.contract import grid

SMALL = (
    "--config.data.steps=6000", "--config.data.hold=10", "--config.data.episodes=2",
    "--config.data.horizon=4", "--config.data.batch=16", "--config.net.hidden=(8, 8)",
    "--config.method.updates=2", "--config.train.steps=3",
)  # fmt: skip


@functools.cache
def config(*arguments):
    return run.load_config("coda:smoke", [*SMALL, *arguments])


@functools.cache
def problem(kind="rooms", **options):
    """Random states of the medium maze, one after the other, with their examples."""
    maze, count = mazes.Maze("medium"), 3000
    rng = np.random.default_rng(0)
    xy = maze.centre(maze.free[rng.integers(len(maze.free), size=count + 1)])
    xy = xy + rng.uniform(-0.4, 0.4, xy.shape)
    states = np.float32(np.concatenate([xy, rng.normal(size=xy.shape)], 1))
    actions = np.float32(rng.uniform(-1, 1, (count, 2)))
    walk = goal_data.transitions.Transitions(
        states[:-1], actions, states[1:], np.zeros(count, np.float32),
        rng.random(count) < 0.1, np.full(count, count - 1), 0,
    )  # fmt: skip
    examples = goal_data.examples_of(kind, maze, walk, rng, **options)
    return goal_data.Problem(maze, kind, *walk[:3], walk.ends, *examples)


def inside(p, batch):
    return goal_data.truth(p, batch["state"][..., :2], batch["context"])


def test_a_batch_has_exactly_its_share_of_fictitious_transitions():
    p = problem()
    batches = goal_data.Batches(p, ratio=0.25, updates=3, seed=1)
    batch = batches.batch(0, 16)
    assert {k: x.shape[:2] for k, x in batch.items()} == {k: (16, 3) for k in batch}
    assert (batch["fictitious"].sum(0) == 4).all()
    np.testing.assert_array_equal(batch["goal"], batch["fictitious"])
    fictitious = batch["fictitious"] > 0
    assert inside(p, batch)[fictitious].all()
    assert not batch["action"][fictitious].any()
    # Real rows are transitions of the data, whatever their context.
    index = {tuple(x): i for i, x in enumerate(p.states)}
    for state, action, following in zip(
        *(batch[k][~fictitious] for k in ("state", "action", "next"))
    ):
        i = index[tuple(state)]
        np.testing.assert_array_equal(action, p.actions[i])
        np.testing.assert_array_equal(following, p.next_states[i])
    again = batches.batch(0, 16, slice(4, 9))
    np.testing.assert_array_equal(again["state"], batch["state"][4:9])
    assert not np.array_equal(batches.batch(16, 16)["state"], batch["state"])


@pytest.mark.parametrize("sampling", ["uniform", "empirical"])
def test_contexts_are_independent_of_transitions(sampling):
    """Chi-square of the room that a state is in against the context of its row."""
    from scipy.stats import chi2_contingency, chisquare

    p = problem()
    batches = goal_data.Batches(p, sampling=sampling, updates=40, seed=2)
    batch = batches.batch(0, 200)
    real = batch["fictitious"] == 0
    context = batch["context"][real][:, 0]
    place = np.minimum(mazes.room_of(batch["state"][real][:, :2], p.maze), 2)
    table = [
        [np.sum((context == c) & (place == r)) for r in (0, 1, 2)] for c in (2, 3, 4)
    ]
    assert chi2_contingency(table).pvalue > 1e-3
    sizes = np.diff(p.groups)
    share = np.ones(3) / 3 if sampling == "uniform" else sizes / sizes.sum()
    for rows in (real, ~real):
        counts = [np.sum(batch["context"][rows][:, 0] == c) for c in (2, 3, 4)]
        assert chisquare(counts, share * np.sum(counts)).pvalue > 1e-3
    told = batch["policy_context"][..., 0]
    counts = [np.sum(told == c) for c in (2, 3, 4)]
    assert chisquare(counts, share * np.sum(counts)).pvalue > 1e-3


def test_oracle_and_unlabelled_rows():
    p = problem()
    oracle = goal_data.Batches(p, rows="oracle", updates=20).batch(0, 64)
    np.testing.assert_array_equal(oracle["goal"], inside(p, oracle))
    assert oracle["goal"].any() and not oracle["fictitious"].any()
    real = goal_data.Batches(p, rows="real").batch(0, 64)
    assert not real["goal"].any() and not real["fictitious"].any()


def test_hindsight_goals_lie_ahead():
    p = problem()
    p = p._replace(
        ends=np.where(np.arange(len(p.states)) < 300, 299, len(p.states) - 1)
    )
    batches = goal_data.Batches(p, rows="hindsight", updates=50, discount=0.9)
    batch = batches.batch(0, 40)
    index = {tuple(x): i for i, x in enumerate(p.states)}
    place = {tuple(x[:2]): i for i, x in enumerate(p.states)}

    def ahead(state, goal):
        at = np.array([index[tuple(x)] for x in state.reshape(-1, 4)])
        to = np.array([place[tuple(x)] for x in goal.reshape(-1, 2)])
        return at, to

    at, to = ahead(batch["policy_state"], batch["policy_context"])
    assert (to >= at).all() and (p.ends[to] == p.ends[at]).all()
    inner = (at > 300) & (p.ends[at] - at > 100)
    assert abs((to - at)[inner].mean() - 10) < 1.0  # Geometric with mean 1 / (1 - 0.9).
    at, to = ahead(batch["state"], batch["context"])
    np.testing.assert_array_equal(batch["goal"].ravel(), at == to)
    assert abs(batch["goal"].mean() - 0.2) < 0.04


def test_examples_are_goals():
    for kind in goal_data.PROBLEMS:
        p = problem(kind)
        assert len(p.examples) == len(p.contexts) == p.groups[-1]
        assert goal_data.truth(p, p.examples[:, :2], p.contexts).all()
        assert p.examples.dtype == p.contexts.dtype == np.float32
    # Rooms: every state inside is an example.
    p = problem()
    counts = np.bincount(mazes.room_of(p.states[:, :2], p.maze), minlength=5)
    np.testing.assert_array_equal(np.diff(p.groups), counts[2:])
    few = problem("rooms", per_context=5)
    np.testing.assert_array_equal(np.diff(few.groups), [5, 5, 5])
    far = problem("cells", ood=True)
    assert (far.examples[:, :2] > 40).all(1).any()


def test_refused_data():
    p = problem()
    walk = goal_data.transitions.Transitions(
        p.states[:2], p.actions[:2], p.next_states[:2], np.zeros(2, np.float32),
        np.zeros(2, bool), np.full(2, 1), 0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no examples of the contexts"):
        goal_data.examples_of("rooms", p.maze, walk, rng)
    with pytest.raises(ValueError, match="no examples of the contexts goals"):
        goal_data.examples_of("goals", p.maze, walk, rng)
    for fields, message in [
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\)"),
        ({"ratio": 1.0}, r"ratio must be in \(0, 1\)"),
        ({"rows": "x"}, "data.rows must be one of"),
        ({"sampling": "x"}, "data.sampling must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            goal_data.Batches(p, **fields)
    with pytest.raises(ValueError, match="has 0 fictitious rows"):
        goal_data.Batches(p, ratio=0.01).batch(0, 16)
    for argument, message in [
        ("data.source=x", "data.source must be one of"),
        ("data.hold=0", "data.hold must be >= 1"),
        ("data.path=a.npz", "data.path is read with data.source=file"),
        ("data.maze=11111/10001/11111", "rooms are those of"),
        ("data.problem=x", "data.problem must be one of"),
        ("data.ratio=0.0", "ratio must be in"),
    ]:
        with pytest.raises(ValueError, match=message):
            tasks.read(config(f"--config.{argument}"))


def test_files_of_other_mazes_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    z = {"observations": np.float32(rng.uniform(-3.4, 3.4, (50, 4))),
         "actions": np.float32(rng.uniform(-1, 1, (50, 2))),
         "terminals": np.float32(np.arange(50) % 10 == 9)}  # fmt: skip
    np.savez(tmp_path / "a.npz", **z)
    where = ["--config.data.source=file", f"--config.data.path={tmp_path / 'a.npz'}"]
    with pytest.raises(ValueError, match="positions lie in walls"):
        tasks.read(config(*where))
    z["observations"] = z["observations"][:, :3]
    np.savez(tmp_path / "a.npz", **z)
    goal_data._load.cache_clear()
    with pytest.raises(ValueError, match="states of 3 and actions of 2"):
        tasks.read(config(*where))


def test_goal_sets_of_episodes():
    """What ends an episode is what labels the data."""
    rng = np.random.default_rng(0)
    for kind in goal_data.PROBLEMS:
        p = problem(kind)
        contexts = p.values[rng.integers(len(p.values), size=2000)]
        xy = np.float32(rng.uniform(-4, 4, (2000, 2)))
        r = goal_evaluation.regions(p, contexts)
        got = jax.jit(goal_evaluation.inside)(r, xy)
        np.testing.assert_array_equal(got, goal_data.truth(p, xy, contexts), kind)


@pytest.mark.parametrize("kind", goal_data.PROBLEMS)
def test_protocols(kind):
    p = problem(kind)
    ours = goal_evaluation.authors_protocol(p, 3, hard=True, seed=0)
    assert len(ours.labels) == len(ours.starts) == (9 if kind == "rooms" else 15)
    assert (np.abs(ours.starts - p.maze.centre((1, 1))) <= 0.25).all()
    theirs = goal_evaluation.ogbench_protocol(p, 4, seed=0)
    cells = p.maze.cell(theirs.starts)
    assert [tuple(x) for x in cells[::4]] == [s for s, _ in mazes.TASKS["medium"]]
    # No episode begins in its goal set.
    for episodes in (ours, theirs):
        r = episodes.regions
        assert not np.asarray(goal_evaluation.inside(r, episodes.starts)).any()


def go_right(params, states, contexts):
    return jax.numpy.broadcast_to(params, (len(states), 2))


@pytest.mark.parametrize("source", ["point", "pointmaze"])
def test_episodes_end_where_their_goal_is_reached(source):
    """A policy that goes right along the upper corridor, towards a circle and away."""
    p = problem()
    start = p.maze.centre((1, 1))
    circles = np.array([[start[0] + 1, start[1]], [start[0], start[1] - 1.0]])
    far = np.full((2, 2), np.inf)
    episodes = goal_evaluation.Episodes(
        np.stack([start, start]), np.float32([[2], [3]]),
        goal_evaluation.Regions(-far, far, circles, np.full(2, 0.3)), ("a", "b"),
    )  # fmt: skip
    place = goal_evaluation.arena(source, "medium")
    paths = goal_evaluation.roll_out(
        go_right, np.float32([0.5, 0]), episodes, place, horizon=12, hold=5
    )
    assert paths.reached.tolist() == [True, False]
    end = paths.decisions[0]
    assert 3 <= end < 12 and paths.decisions[1] == 12
    assert (
        np.isfinite(paths.xy[: end + 1, 0]).all()
        and np.isnan(paths.xy[end + 1 :, 0]).all()
    )
    assert np.isfinite(paths.xy[:, 1]).all()
    assert np.linalg.norm(paths.xy[end, 0] - circles[0]) < 0.35
    rates = goal_evaluation.success(episodes, paths)
    assert rates["a"] == (1.0, end) and rates["b"][0] == 0.0


# A run has an evaluation's rollout, a table of parameters and figures beside its step.
@pytest.mark.programs(40)
def test_the_study_and_one_compile_for_a_run(tmp_path, call):
    """All updates and evaluations of a run use one step and one rollout program."""
    from jaxpapers.papers import coda

    traces = []
    update = coda.iql_update
    coda.iql_update = lambda *a, **k: traces.append(1) or update(*a, **k)
    try:
        arguments = [f"--workdir={tmp_path}", *SMALL, "--config.train.eval_every=1"]
        code, out, err = call("run", "coda:smoke", *arguments)
    finally:
        coda.iql_update = update
    assert code == 0, err
    assert len(traces) == 1
    assert "room 2" in out and "95 % interval" in out
    names = {p.name for p in tmp_path.iterdir()}
    assert {"learning.png", "paths.png", "loss.png", "paths.npz"} <= names


def test_rows_of_the_study():
    whole = config("--config.train.alone=False")
    rows = goals.study("coda", whole, goals.abstract(whole), grid("1x1")).rows(0)
    assert [row.label for row in rows][:2] == ["CODA", "oracle reward"]
    by_label = {row.label: row.stage for row in rows}
    assert by_label["UDS"].after.config.method.learn == "reward"
    assert by_label["goal prediction"] == by_label["hindsight GCRL"]
    assert not by_label["reward prediction"].after.config.method.negatives
    with pytest.raises(ValueError, match="baselines.rows must be among"):
        bad = run.load_config("coda:smoke", ["--config.baselines.rows=('x',)"])
        goals.study("coda", bad, goals.abstract(bad), None).rows(0)


@pytest.mark.parametrize("label", ["PDS", "goal prediction", "behaviour cloning"])
def test_baselines_run(label):
    """A step of each and its episodes, from a fresh model."""
    whole = config("--config.train.alone=False", "--config.method.members=2")
    row = next(
        r
        for r in goals.study("coda", whole, goals.abstract(whole), grid("1x1")).rows(0)
        if r.label == label
    )
    from jaxpapers.papers import coda

    data = tasks.read(row.stage.config)
    method = coda.make(row.stage.config, **data.facts)
    batch = data.examples.batch(0, 16)
    key = jax.random.wrap_key_data(np.zeros(2, np.uint32))

    @jax.jit
    def both(key):
        state = method.init(key, data.shapes)
        return method.update(state, batch)

    state, metrics = both(key)
    assert all(np.isfinite(float(x)) for x in metrics.values())
    numbers = row.watch(method, state)
    assert 0 <= numbers["success"] <= 1
