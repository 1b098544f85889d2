"""The task of control: rows, findings, random actions, frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import frames, papers, tasks
from jaxpapers.config import load_config
from jaxpapers.method import State
from jaxpapers.papers import mpc_psrl
from jaxpapers.stages import same
from jaxpapers.study import Finding, Result, Row, with_fields
from jaxpapers.tasks import control
from tests.contract import grid

SMOKE = load_config("mpc_psrl:smoke")
WHOLE = load_config("mpc_psrl:cartpole-light")


@pytest.mark.parametrize(
    "preset",
    ["cartpole", "pendulum", "cartpole-paper", "pendulum-paper", "reacher3d", "pusher"],
)
def test_presets_make_their_rows(preset):
    config = load_config(f"mpc_psrl:{preset}")
    data = tasks.read(config)
    assert data.examples is None and data.shapes == {}
    study = tasks.study("mpc_psrl", config, data, grid("1x1"))
    rows = study.rows(1)
    assert [row.label for row in rows] == [
        "this model", "certainty equivalence", "H-UCRL", "PETS", "random shooting",
        "learned reward", "random actions",
    ]  # fmt: skip
    trained = [row.stage for row in rows if row.stage]
    assert all(s.config.train.seed == 1 for s in trained)
    assert not any(same(a, b) for i, a in enumerate(trained) for b in trained[:i])
    for stage in trained:
        papers.load(stage.paper).make(stage.config, **data.facts)
    features = {"cartpole": 10, "pendulum": 8, "reacher3d": 48, "pusher": 54}
    problem, net = data.facts["problem"], mpc_psrl.Net(**config.net)
    world = preset.removesuffix("-paper")
    assert net.sizes(problem.inputs, net.hidden)[-1] == features[world]
    if preset.endswith("-paper"):
        assert config.train.steps == 15 and config.planner.iterations == 5
        assert config.planner.population == (500 if "cartpole" in preset else 100)


def test_an_unknown_environment_is_named():
    for field, value, message in (
        ("data.environment", "acrobot", "data.environment must be one of"),
        ("data.length", -1, "data.length must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.read(with_fields(SMOKE, {field: value}))


def test_shorter_episodes_have_no_threshold():
    assert control.world(SMOKE).solved is None
    assert control.world(SMOKE).environment.horizon == 50
    assert control.world(WHOLE).solved == 195


def finding(returns, capacity, done):
    """What is measured of a run whose buffer has these returns."""
    study = tasks.study("mpc_psrl", WHOLE, tasks.read(WHOLE), grid("1x1"))
    x = np.arange(capacity * 200 * 5, dtype=np.float32).reshape(-1, 5)
    extra = {
        "x": x, "y": np.zeros((len(x), 4), np.float32), "r": x[:, 0],
        "returns": np.float32(returns),
    }  # fmt: skip
    state = State(jnp.asarray(done), {}, (), extra, jax.random.key(0))
    return study.rows(0)[0].measure(None, state)


def test_what_is_measured():
    found = finding([10, 200, 190, 20], capacity=4, done=3)
    numbers = {
        "return": 400 / 3,
        "total": 400.0,
        "episodes": 3.0,
        "solved": 1.0,
        "steps_to_solve": 400.0,
    }
    assert found.numbers == pytest.approx(numbers)
    curve = found.curves["return against environment steps"]
    assert curve == ([200, 400, 600], [10, 200, 190])
    episode = found.files["episode.npz"]
    assert episode["observations"].shape == (200, 4)
    assert episode["observations"][0, 0] == 400 * 5
    # Five episodes in four slots: the first one is gone.
    found = finding([5, 2, 3, 4], capacity=4, done=5)
    curve = found.curves["return against environment steps"]
    assert curve == ([400, 600, 800, 1000], [2, 3, 4, 5])
    assert found.files["episode.npz"]["observations"][0, 0] == 0
    assert "steps_to_solve" not in found.numbers and found.numbers["solved"] == 0
    assert finding([0] * 4, capacity=4, done=0).numbers["return"] == 0


def test_random_actions():
    config = load_config("mpc_psrl:pendulum")
    rows = tasks.study("mpc_psrl", config, tasks.read(config), grid("1x1")).rows(0)
    numbers = rows[-1].measure().numbers
    assert -2000 < numbers["return"] < -1000


@pytest.mark.parametrize("kind, width", [("cartpole", 4), ("pendulum", 3)])
def test_frames_are_drawn_from_observations(kind, width, tmp_path, figures, rendered):
    angle = np.linspace(0, 3, 30)
    episode = np.zeros((30, width))
    if kind == "cartpole":
        episode[:, 2] = angle
    else:
        episode[:, 0], episode[:, 1] = np.cos(angle), np.sin(angle)
    file = {"episode.npz": {"observations": episode, "rewards": np.ones(30)}}
    results = [
        Result(Row("this model", None, None), [Finding({}, files=file)], ()),
        Result(Row("random actions", None, None), [Finding({})], ()),
    ]
    out = frames.episodes(results, tmp_path / "frames.png", kind=kind)
    assert out.stat().st_size > 1000
    (figure,) = figures
    assert len(figure.axes) == frames.SHOWN
    first, last = (axes.lines[-2 if kind == "pendulum" else -1].get_xydata()
                   for axes in (figure.axes[0], figure.axes[-1]))  # fmt: skip
    # Upright at first; then the tip is where the angle says.
    assert first[1, 0] == pytest.approx(first[0, 0]) and first[1, 1] > 0.9
    length = np.linalg.norm(last[1] - last[0])
    sign = 1 if kind == "cartpole" else -1
    assert last[1, 0] - last[0, 0] == pytest.approx(sign * length * np.sin(3))
    assert figure.axes[0].get_ylabel() == "this model\n30.0"
    assert frames.episodes(results[1:], tmp_path / "none.png", kind=kind) is None


@pytest.mark.parametrize(
    "kind, width", [("swing_up", 4), ("reacher3d", 17), ("pusher", 20)]
)
def test_frames_of_mujoco_are_drawn_without_it(kind, width, tmp_path):
    observations = np.random.default_rng(0).uniform(-0.3, 0.3, (9, width))
    file = {"episode.npz": {"observations": observations, "rewards": np.ones(9)}}
    result = Result(Row("this model", None, None), [Finding({}, files=file)], ())
    assert frames.episodes([result], tmp_path / "frames.png", kind=kind)
