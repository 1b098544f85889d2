"""Damaged files of a run: named, passed over where an older one is whole, never used."""

import functools
import json
import shutil
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxpapers import checkpoint, checksums, folder, plots, run, workdir
from jaxpapers.method import State
from tests.toys.command import CONFIG, register

pytestmark = pytest.mark.usefixtures("rendered")

MESH = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def state(step):
    rng = np.random.default_rng(step)
    put = functools.partial(jax.device_put, device=MESH)
    params = {
        "w": put(rng.normal(size=(64, 64)).astype(np.float32)),
        "b": put(rng.normal(size=8).astype(np.float32)),
    }
    key = jax.random.wrap_key_data(put(np.arange(2, dtype=np.uint32) + step))
    return State(put(np.int32(step)), params, {"m": put(np.ones(64))}, (), key)


TARGET = checkpoint.abstract(state(1), jax.tree.map(lambda x: MESH, state(1)))


def assert_same(a, b):
    plain = [jax.device_get(x._replace(key=jax.random.key_data(x.key))) for x in (a, b)]
    chex.assert_trees_all_equal(*plain)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Checkpoints of steps 4 and 8."""
    place = tmp_path_factory.mktemp("run") / "checkpoints"
    with checkpoint.open_manager(place) as manager:
        for step in (4, 8):
            checkpoint.save(manager, state(step), 10 * step, {"optim": {"lr": 0.5}})
    return place


@pytest.fixture
def copy(stored, tmp_path):
    return shutil.copytree(stored, tmp_path / "checkpoints")


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(bytes(data))


def cut(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: rng.integers(len(data))])


def remove(path, rng):
    path.unlink()


def empty(path, rng):
    shutil.rmtree(path.parent)
    path.parent.mkdir()


def files(place):
    return sorted(
        p for p in (place / "8").rglob("*") if p.is_file() and p.stat().st_size
    )


def restored(place):
    """State, position and warnings of a restore."""
    with checkpoint.open_manager(place, read_only=True) as manager:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found, position = checkpoint.restore(manager, TARGET)
    return found, position, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    "damage",
    [flip, remove, *(pytest.param(x, marks=pytest.mark.matrix) for x in (cut, empty))],
)
def test_one_file_of_the_newest(stored, tmp_path, damage):
    """Every file in turn: the right state, or the one before it and a warning."""
    rng = np.random.default_rng(0)
    count, passed_over = len(files(stored)), 0
    for i in range(count):
        place = shutil.copytree(stored, tmp_path / str(i))
        file = files(place)[i]
        damage(file, rng)
        found, position, said = restored(place)
        step = int(found.step)
        assert_same(found, state(step))
        assert position == 10 * step
        if damage is not empty and file.name in checksums.LATER:
            continue  # Written after the checksums, and nothing is read from it.
        if damage is remove and file.name == checksums.NAME:
            assert step == 8 and not said
            continue
        assert step == 4, file
        passed_over += 1
        assert len(said) == 1 and f"{place}/8 is damaged" in said[0]
        assert "going on from step 4" in said[0]
    assert passed_over >= 12


def test_a_run_puts_the_damaged_one_aside_and_saves_its_step_again(copy):
    cut(max(files(copy), key=lambda p: p.stat().st_size), np.random.default_rng(1))
    with checkpoint.open_manager(copy) as manager:
        with pytest.warns(UserWarning, match=r"8 \(now 8.damaged\) is damaged"):
            found, _ = checkpoint.restore(manager, TARGET)
        checkpoint.save(manager, state(8), 80, {"optim": {"lr": 0.5}})
    assert int(found.step) == 4
    assert sorted(p.name for p in copy.iterdir()) == ["4", "8", "8.damaged"]
    with checkpoint.open_manager(copy, read_only=True) as manager:
        assert_same(checkpoint.restore(manager, TARGET)[0], state(8))
        assert checkpoint.read_config(manager) == {"optim": {"lr": 0.5}}


def test_all_damaged_is_an_error_that_names_each(copy):
    for step in (4, 8):
        (copy / str(step) / "data" / "metadata").unlink()
    with checkpoint.open_manager(copy) as manager:
        with pytest.raises(
            ValueError, match=r"every .* is damaged: 8: data.*; 4: data"
        ):
            checkpoint.restore(manager, TARGET)
    assert sorted(p.name for p in copy.iterdir()) == ["4", "8"]
    with pytest.raises(ValueError, match="every checkpoint"):
        checkpoint.restore_params(copy, TARGET.params)
    assert checkpoint.steps(copy) == [4, 8]


def test_without_checksums_it_is_read_as_before(copy):
    """Of an older version; what orbax finds damaged is passed over all the same."""
    for step in ("4", "8"):
        (copy / step / checksums.NAME).unlink()
    assert int(restored(copy)[0].step) == 8
    shutil.rmtree(copy / "8" / "state")
    found, _, said = restored(copy)
    assert int(found.step) == 4 and len(said) == 1


@pytest.mark.parametrize("content", ["[" * 100_000, '{"crc32": {}}', "[]", b"\xff"])
def test_checksums_that_are_none(copy, content):
    data = content if isinstance(content, bytes) else content.encode()
    (copy / "8" / checksums.NAME).write_bytes(data)
    found, _, said = restored(copy)
    assert int(found.step) == 4 and len(said) == 1
    assert "cannot be read" in said[0] or "has no checksum" in said[0]


def test_a_renamed_checkpoint_is_none_of_its_new_step(copy):
    (copy / "8").rename(copy / "80")
    for name in ("08", "²", "-3", "9_old"):
        (copy / name).mkdir()
    (copy / "4" / ".DS_Store").write_bytes(b"x")
    found, _, said = restored(copy)
    assert int(found.step) == 4
    assert len(said) == 1 and "it was written as 8 and renamed" in said[0]
    assert checkpoint.steps(copy) == [4, 80]


def test_another_config_is_no_damage(copy):
    small = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=MESH)
    other = TARGET._replace(params={"w": small})
    with checkpoint.open_manager(copy) as manager:
        with pytest.raises(ValueError, match="use the config that wrote it"):
            checkpoint.restore(manager, other)
    assert sorted(p.name for p in copy.iterdir()) == ["4", "8"]


def test_parts_and_latest_step_pass_over_it(copy):
    remove(copy / "8" / "state" / "_METADATA", None)
    with pytest.warns(UserWarning, match="_METADATA"):
        params = checkpoint.restore_params(copy, TARGET.params)
    chex.assert_trees_all_equal(params, state(4).params)
    with pytest.warns(UserWarning, match="_METADATA"):
        assert checkpoint.latest_step(copy) == 4


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A workdir of a toy paper without training: what `eval` and others look at first."""
    register(monkeypatch.setattr, monkeypatch.setitem)
    config = run.load_config("line", (), CONFIG)
    folder.write_config(tmp_path, "line", json.loads(config.to_json_best_effort()))
    return tmp_path


@pytest.mark.parametrize(
    "change, message",
    [
        ("{", r"config.json is damaged: .*line 1"),
        ("", r"config.json is damaged"),
        (b"\xff\xfe", r"config.json is damaged"),
        ("[" * 100_000, r"config.json is damaged"),
        ("[1]", r"no config of a run: expected an object .*got '\[1\]'"),
        ('{"name": "other"}', r"no config of a run"),
        ({"version": 3}, r"field 'version' must be of type str, got 3"),
        ({"version": "99.0.1"}, r"jaxpapers 99.0.1, newer than this .*update"),
        ({"version": "0.1.7"}, r"jaxpapers 0.1.7, whose runs .* does not read"),
        ({"version": "main"}, r"field 'version' must be one like .*, got 'main'"),
        ({"config": {"data": {"batch": 0}}}, r"config.json: data.batch must be >= 1"),
        ({"paper": None}, r"field 'paper' must be of type str, got None"),
        (
            {"paper": "lime"},
            r"field 'paper': unknown paper 'lime'.*did you mean 'line'",
        ),
        ({"config": []}, r"field 'config' must be of type dict, got \[\]"),
        ({"config": {"data": 3}}, r"field 'config.data' must be an object"),
        ({"config": {}}, r"config.json: field 'data' is missing"),
        (
            {"config": {"data": {"task": "lines"}}},
            r"config.json: field 'batch' is missing",
        ),
    ],
    ids=str,
)
def test_a_config_file_that_is_none(finished, change, message):
    path = finished / "config.json"
    if isinstance(change, dict):
        change = json.dumps({**json.loads(path.read_text()), **change})
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    actions = [run.evaluate, run.sample, lambda w: run.export(w, f"{w}/x")]
    if "is missing" not in message:  # A figure needs no fields.
        actions.append(lambda w: run.plot([w], "loss", f"{w}/x"))
    for action in actions:
        with pytest.raises(ValueError, match=message):
            action(str(finished))
    assert not (finished / "x").exists()


def test_a_config_file_with_a_byte_order_mark(finished):
    path = finished / "config.json"
    before = folder.read_stored(finished)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert folder.read_stored(finished) == before


def test_a_field_that_only_an_evaluation_needs(finished):
    with pytest.raises(ValueError, match="config.json: field 'seed' is missing"):
        with folder.named_fields(finished):
            _ = ConfigDict({"train": {}}).train.seed
    with pytest.raises(ValueError, match="^no file"):
        with folder.named_fields(finished):
            raise ValueError("no file")


def test_fields_of_another_type(finished, monkeypatch):
    config = run.load_config("dion:smoke")
    stored = json.loads(config.to_json_best_effort())
    stored["data"]["batch"] = "8"
    folder.write_config(finished, "dion", stored)
    with pytest.raises(
        ValueError, match=r"'config.data.batch' must be of type int, got"
    ):
        run.evaluate(str(finished))


@pytest.mark.parametrize("line", ["[1]", "3", '{"loss": 1}', '{"step": "4"}', "null"])
def test_a_metrics_line_that_is_none(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: no record"):
        plots.plot([tmp_path], "loss", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_metric_that_is_no_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "low"}\n')
    with pytest.raises(ValueError, match="'loss' is str, no number, at step 1"):
        plots.plot([tmp_path], "loss", tmp_path / "x.png")


@pytest.mark.parametrize(
    "name, problem", [("x.xyz", "has the suffix 'xyz'"), ("", "folder")]
)
def test_a_figure_of_no_kind(tmp_path, name, problem):
    workdir.write(tmp_path / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ValueError, match=f"{problem}.*, expected a file that ends in"):
        plots.plot([tmp_path], "loss", tmp_path / name)


def test_a_failed_figure_leaves_the_old_one(tmp_path, monkeypatch):
    workdir.write(tmp_path / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n')
    out = plots.plot([tmp_path], "loss", tmp_path / "x.png")
    before = out.read_bytes()

    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="No space"):
        plots.plot([tmp_path], "loss", out)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "x.png"]
