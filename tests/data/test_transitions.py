"""D4RL, Minari and OGBench files, written here: transitions, boundaries, refusals."""

import numpy as np
import pytest

from jaxpapers.data import transitions

h5py = pytest.importorskip("h5py")


def arrays(count, rng, size=3):
    return {
        "observations": rng.normal(size=(count, size)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (count, 2)).astype(np.float32),
        "rewards": rng.normal(size=count).astype(np.float32),
        "terminals": np.zeros(count, bool),
    }


def write(path, content):
    with h5py.File(path, "w") as file:
        for name, x in content.items():
            file[name] = x
    return path


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_d4rl(tmp_path, rng):
    """Rows at a timeout and the last one begin no transition."""
    z = arrays(10, rng)
    z["terminals"][2] = True
    z["timeouts"] = np.arange(10) == 5
    read = transitions.read(write(tmp_path / "a.hdf5", z))
    kept = [0, 1, 2, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(read.states, z["observations"][kept])
    following = z["observations"][np.add(kept, 1)]
    np.testing.assert_array_equal(read.next_states, following)
    np.testing.assert_array_equal(read.actions, z["actions"][kept])
    np.testing.assert_array_equal(read.rewards, z["rewards"][kept])
    assert read.terminals.tolist() == [False, False, True] + [False] * 5
    assert read.ends.tolist() == [2, 2, 2, 4, 4, 7, 7, 7] and read.skipped == 2
    assert np.flatnonzero(read.last).tolist() == [2, 4, 7]
    assert {x.dtype for x in read[:4]} == {np.dtype(np.float32)}


def test_old_d4rl_files_have_no_timeouts(tmp_path, rng):
    path = write(tmp_path / "a.hdf5", arrays(9, rng))
    with pytest.raises(ValueError, match="no array 'timeouts'.*horizon="):
        transitions.read(path)
    read = transitions.read(path, horizon=4)
    assert len(read.states) == 6 and read.ends.tolist() == [2, 2, 2, 5, 5, 5]
    whole = transitions.read(path, horizon=0)
    assert len(whole.states) == 8 and (whole.ends == 7).all()


def test_minari(tmp_path, rng):
    """Episodes in the order of their numbers, one observation more than actions."""
    content, states = {}, {}
    for number, length in {0: 3, 10: 2, 2: 4}.items():
        z, where = arrays(length, rng), f"episode_{number}"
        states[number] = rng.normal(size=(length + 1, 3))
        content[f"{where}/observations/observation"] = states[number]
        content[f"{where}/observations/desired_goal"] = np.zeros((length + 1, 2))
        content[f"{where}/actions"] = z["actions"]
        content[f"{where}/rewards"] = z["rewards"]
        content[f"{where}/terminations"] = np.arange(length) == length - 1
        content[f"{where}/truncations"] = np.zeros(length, bool)
    folder = tmp_path / "toy-v0"
    (folder / "data").mkdir(parents=True)
    write(folder / "data" / "main_data.hdf5", content)
    read = transitions.read(folder)
    expected = np.concatenate([states[n][:-1] for n in (0, 2, 10)])
    np.testing.assert_array_equal(read.states, expected.astype(np.float32))
    following = np.concatenate([states[n][1:] for n in (0, 2, 10)])
    np.testing.assert_array_equal(read.next_states, following.astype(np.float32))
    assert read.ends.tolist() == [2, 2, 2, 6, 6, 6, 6, 8, 8] and read.skipped == 3
    np.testing.assert_array_equal(read.terminals, read.last)
    with pytest.raises(ValueError, match="no 'pixels'.*observation="):
        transitions.read(folder, observation="pixels")


def ogbench_rule(z):
    """OGBench's regular view, as its ``load_dataset`` has it."""
    mask = 1.0 - z["terminals"]
    following = np.concatenate([[0.0], mask[:-1]])
    ends = np.concatenate([z["terminals"][1:], [1.0]])
    return {
        "observations": z["observations"][mask > 0],
        "next_observations": z["observations"][following > 0],
        "actions": z["actions"][mask > 0],
        "terminals": ends[mask > 0],
    }


def test_ogbench(tmp_path, rng):
    z = arrays(12, rng)
    z["terminals"] = np.isin(np.arange(12), [3, 7, 11]).astype(np.float32)
    np.savez(tmp_path / "a.npz", **z, qpos=np.zeros((12, 2)))
    read, expected = transitions.read(tmp_path / "a.npz"), ogbench_rule(z)
    np.testing.assert_array_equal(read.states, expected["observations"])
    np.testing.assert_array_equal(read.next_states, expected["next_observations"])
    np.testing.assert_array_equal(read.actions, expected["actions"])
    np.testing.assert_array_equal(read.last, expected["terminals"])
    assert read.skipped == 3 and not read.terminals.any()


# Minari warns of each thing about a data set that it is not told.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_round_trip_through_minari(tmp_path, rng, monkeypatch):
    """A data set that the package itself writes."""
    minari = pytest.importorskip("minari")
    gymnasium = pytest.importorskip("gymnasium")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    from minari.data_collector.episode_buffer import EpisodeBuffer

    episodes = []
    for number, length in enumerate((4, 6)):
        z = arrays(length, rng)
        episodes.append(
            EpisodeBuffer(
                id=number,
                observations=rng.normal(size=(length + 1, 3)).astype(np.float32),
                actions=z["actions"], rewards=list(map(float, z["rewards"])),
                terminations=[False] * length,
                truncations=[False] * (length - 1) + [True],
            )
        )  # fmt: skip
    box = gymnasium.spaces.Box
    minari.create_dataset_from_buffers(
        "toy/toy-v0", buffer=episodes, observation_space=box(-10, 10, (3,)),
        action_space=box(-1, 1, (2,)), algorithm_name="none", author="none",
        author_email="none", code_permalink="none", description="made by a test",
    )  # fmt: skip
    read = transitions.read(tmp_path / "toy" / "toy-v0")
    expected = np.concatenate([e.observations[:-1] for e in episodes])
    np.testing.assert_array_equal(read.states, expected)
    np.testing.assert_array_equal(
        read.actions, np.concatenate([e.actions for e in episodes])
    )
    assert np.flatnonzero(read.last).tolist() == [3, 9] and read.skipped == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"actions": None}, "no array 'actions', has"),
        ({"actions": np.zeros((9, 2), np.float32)}, r"actions must be \(10, size\)"),
        ({"actions": np.zeros((10, 2), int)}, "floating point, got int64; discrete"),
        ({"rewards": np.zeros((10, 2), np.float32)}, r"rewards must be \(10,\)"),
        ({"terminals": np.full(10, 2)}, "terminals must be 0 or 1"),
        ({"observations": np.full((10, 3), np.nan)}, "observations must be finite"),
        ({"observations": np.full((10, 3), 1e300)}, "beyond float32"),
        ({"timeouts": np.ones(10, bool)}, "no transitions in 10 rows"),
        ({"observations": np.zeros((0, 3), np.float32)}, "observations must be"),
    ],
)
def test_refused_d4rl(tmp_path, rng, change, message):
    z = {**arrays(10, rng), "timeouts": np.zeros(10, bool), **change}
    path = write(tmp_path / "a.hdf5", {k: x for k, x in z.items() if x is not None})
    with pytest.raises(ValueError, match=message) as error:
        transitions.read(path)
    assert str(path) in str(error.value)


def test_refused_files(tmp_path, rng):
    with pytest.raises(FileNotFoundError):
        transitions.read(tmp_path / "none.hdf5")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="expected .hdf5"):
        transitions.read(tmp_path / "a.txt")
    for name in ("b.hdf5", "b.npz"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(ValueError, match=rf"{name}: cannot be read"):
            transitions.read(tmp_path / name)
    np.savez(tmp_path / "c.npz", observations=np.zeros((3, 1)))
    with pytest.raises(ValueError, match="no array 'actions'"):
        transitions.read(tmp_path / "c.npz")


def test_small_files_of_large_arrays(tmp_path):
    """Chunks that are not written are zeros: a file of kilobytes may stand for all."""
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        shapes = {"observations": (10**8, 29), "actions": (10**8, 8),
                  "rewards": (10**8,), "terminals": (10**8,)}  # fmt: skip
        for name, shape in shapes.items():
            file.create_dataset(name, shape, np.float32, chunks=True)
    with pytest.raises(ValueError, match="MiB of arrays"):
        transitions.read(path, horizon=0)


def test_links_to_other_files_are_not_followed(tmp_path, rng):
    z = arrays(10, rng)
    other = write(tmp_path / "other.hdf5", z)
    path = write(tmp_path / "a.hdf5", {k: z[k] for k in ("actions", "rewards")})
    with h5py.File(path, "a") as file:
        file["observations"] = h5py.ExternalLink(str(other), "observations")
        file["terminals"] = z["terminals"]
    with pytest.raises(ValueError, match="link to another file"):
        transitions.read(path, horizon=0)
