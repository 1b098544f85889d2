"""The task of exploration: rows, findings, pictures, the table of demonstrations."""

import numpy as np
import pytest

from jaxpapers import frames, papers, tasks, value_figures
from jaxpapers.config import load_config
from jaxpapers.method import State
from jaxpapers.stages import same
from jaxpapers.study import Finding, Result, Row, with_fields
from jaxpapers.tasks import demonstrations, exploration
from tests.contract import grid

SEA = ["GPPSTD", "GPPSTD, one process", "GPPSTD, temporal", "GPPSTD, temporal (2005)",
       "RLSVI, same features", "posterior mean", "epsilon-greedy"]  # fmt: skip
SHOWN = ["noisy shown", "partial shown", "random shown"]


def rows_of(preset, seed=1, **fields):
    config = load_config(f"gppstd:{preset}")
    config = with_fields(config, {k.replace("__", "."): v for k, v in fields.items()})
    data = tasks.read(config)
    assert data.examples is None and data.shapes == {}
    return tasks.study("gppstd", config, data, grid("1x1")).rows(seed), data


@pytest.mark.parametrize("preset", ["deep_sea", "mountain_car", "chain"])
def test_presets_make_their_rows(preset):
    rows, data = rows_of(preset)
    labels = [row.label for row in rows]
    if preset == "deep_sea":
        assert labels == SEA
    else:
        first = "GPPSTD, expert shown" if preset == "mountain_car" else "GPPSTD"
        assert labels[0] == first and len(set(labels)) == len(labels)
        assert {"GPPSTD", "posterior mean", "RLSVI", "epsilon-greedy"} <= set(labels)
        assert all(f"GPPSTD, {kind}" in labels for kind in SHOWN)
    stages = [row.stage for row in rows]
    assert all(s.config.train.seed == 1 for s in stages)
    assert not any(same(a, b) for i, a in enumerate(stages) for b in stages[:i])
    for stage in stages:
        papers.load("gppstd").make(stage.config, **data.facts)


def test_other_environments():
    rows, _ = rows_of("chain", data__environment="pendulum")
    assert not any("shown" in row.label for row in rows)
    car, data = rows_of("mountain_car", data__environment="mountain_car_continuous")
    assert data.facts["environment"].horizon == 999
    for row in car:
        papers.load("gppstd").make(row.stage.config, **data.facts)


def test_what_is_not_there_is_named():
    config = load_config("gppstd:smoke")
    for field, value, message in (
        ("data.environment", "acrobot", "data.environment must be one of"),
        ("data.length", 3, "episodes of deep_sea have data.size steps"),
        ("data.size", 0, "size must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.read(with_fields(config, {field: value}))
    chain = with_fields(config, {"data.environment": "chain", "data.length": -1})
    with pytest.raises(ValueError, match="data.length must be >= 0"):
        tasks.read(chain)
    with pytest.raises(ValueError, match="unknown preset gppstd:ocean"):
        load_config("gppstd:ocean")


def measured(preset, returns, steps, done):
    """What is measured of agents with these histories."""
    rows, data = rows_of(preset)
    horizon = data.facts["environment"].horizon
    steps = np.int32(steps)
    extra = {
        "returns": np.float32(returns), "steps": steps, "reached": steps < horizon,
        "path": np.zeros((len(steps), horizon + 1, 2), np.float32),
        "done": np.full(len(steps), done, np.int32),
        "rewards": np.zeros((len(steps), horizon), np.float32),
    }  # fmt: skip
    state = State((), {}, (), extra, ())
    return rows[1].measure(None, state)


def test_findings_of_deep_sea():
    """Solved: 8 of the last 10; counted from the first time that it held."""
    late = [0.0] * 5 + [1.0] * 15 + [9.0] * 5
    lost = [0.0] * 5 + [1.0] * 10 + [0.0] * 5 + [9.0] * 5
    found = measured("deep_sea", [late, lost, 25 * [0.0]], np.full((3, 25), 10), 20)
    assert found.numbers == {
        "episodes done": 20, "solved": pytest.approx(1 / 3),
        # Twice after 13 episodes, of the third never.
        "episodes": pytest.approx((13 + 13 + 20) / 3), "return": pytest.approx(0.5),
    }  # fmt: skip
    ((name, (x, y)),) = found.curves.items()
    assert name == "return (mean of 10) against episode"
    assert x == list(range(10, 21)) and np.shape(y) == (3, 11) and y[0][-1] == 1
    none = measured("deep_sea", [late], np.full((1, 25), 10), 0)
    assert set(none.numbers.values()) == {0.0} and not none.curves


def test_findings_of_mountain_car():
    steps = [[200] * 3 + [150] * 9, [200] * 12]
    found = measured("mountain_car", -np.float32(steps), steps, 12)
    assert found.numbers["reached"] == 0.5
    assert found.numbers["first"] == (4 + 12) / 2
    assert found.numbers["steps"] == pytest.approx((155 + 200) / 2)
    episode = found.files["episode.npz"]
    assert episode["observations"].shape == (151, 2)
    np.testing.assert_allclose(episode["observations"][0], [-1.2, -0.07])
    assert len(episode["rewards"]) == 150


@pytest.mark.parametrize("kind", ["sea", "car", "one"])
def test_pictures(kind, tmp_path, figures):
    size = 1 if kind == "one" else 4
    width = 1 if kind == "one" else 2
    arrays = {
        "values": np.arange(4.0 * size).reshape(size, 4),
        "actions": np.arange(4.0 * size).reshape(size, 4) % 3,
        "visited": np.int32([[0, 0], [1, 1], [3, 2]])[:, :width],
        "path": np.int32([[0, 0], [1, 1], [2, 2]])[:, :width],
        "steps": np.asarray(2), "low": np.zeros(width), "high": np.full(width, 3.0),
        "sea": np.asarray(kind == "sea"), "title": np.asarray("drawn value"),
        "names": np.asarray(["x", "v"][:width]),
    }  # fmt: skip
    episode = {"observations": np.zeros((5, 2)), "rewards": -np.ones(4)}
    files = {"values.npz": arrays, "episode.npz": episode}
    result = Result(Row("a", None, print), [Finding({}, files=files)], [])
    assert value_figures.values([result], tmp_path / "values.png").exists()
    names = [axes.get_title() for axes in figures[0].axes]
    assert "transitions kept" in names and "drawn value" in names
    if kind != "sea":
        assert figures[0].axes[0].get_xlabel() == "x"
    if kind == "sea":
        (line,) = figures[0].axes[0].lines
        np.testing.assert_array_equal(line.get_xdata(), [0, 1])
        # What lies beyond the step cannot be reached.
        shown = figures[0].axes[1].images[0].get_array()
        assert np.ma.getmaskarray(np.ma.masked_invalid(shown)).sum() == 6
    other = Result(Row("b", None, print), [Finding({})], [])
    assert value_figures.values([other], tmp_path / "none.png") is None
    drawn = frames.episodes([result], tmp_path / "f.png", kind="mountain_car")
    assert drawn.exists()
    assert frames.episodes([result], tmp_path / "g.png", kind="deep_sea") is None


@pytest.mark.slow
def test_the_digests_table_of_demonstrations():
    """Of as many points: expert below uniform below random; with random ones least."""
    rows, _ = rows_of("demonstrations")
    found = {row.label: row.measure().numbers for row in rows}
    assert list(found) == list(demonstrations.SOURCES)
    expected = {
        "expert": (0.012, 0.001), "uniform": (0.069, 0.025),
        "expert and random": (0.009, 0.001),
    }  # fmt: skip
    for source, values in expected.items():
        for k, value in zip((3, 5), values):
            assert found[source][f"{k} episodes"] == pytest.approx(value, abs=0.03)
    for k in (1, 3, 5):
        order = [found[s][f"{k} episodes"] for s in (
            "expert and random", "expert", "uniform", "random policy")]  # fmt: skip
        assert order == sorted(order)


def test_solved_is_what_the_issue_says():
    assert (exploration.SOLVED, exploration.LAST) == ((0.5, 8), 10)
