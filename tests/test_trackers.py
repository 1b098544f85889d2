"""Trackers of a run: what each is handed, real clients of each, pictures in training."""

import inspect
import json
import struct
import subprocess
import sys

import numpy as np
import pytest

from jaxpapers import config, extras, measure, papers, plots, tasks, trackers
from jaxpapers import train as trainer
from jaxpapers.study import Study
from tests.toys.command import call, once, register

compile_once = once(trainer.compile)
DRAWN = ("method.drawn=True", "train.log_images=True", "train.eval_every=3")


@pytest.fixture(autouse=True)
def toys(monkeypatch, rendered):
    """The toy papers; one compiled step for the runs of this file."""
    register(monkeypatch.setattr, monkeypatch.setitem)
    monkeypatch.setattr(trainer, "compile", compile_once)


class Kept:
    """Keeps what it is handed."""

    made: list = []

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        self.values, self.pictures, self.closed, self.began = [], [], 0, []
        Kept.made.append(self)

    def start(self, step):
        self.began.append(step)

    def write(self, step, values):
        self.values.append((step, values))

    def picture(self, step, path):
        self.pictures.append((step, path))

    def close(self):
        self.closed += 1


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(Kept, "made", [])
    return Kept.made


def without_time(folder):
    records = plots.read_metrics(folder)
    return [
        {k: v for k, v in r.items() if k not in ("time", "steps_per_second")}
        for r in records
    ]


def test_a_tracker_of_ones_own(tmp_path, kept):
    call(tmp_path / "run", "method.others=True", trackers=[Kept])
    # A tracker for each training run: of this model and of the slow one.
    assert [k.folder for k in kept] == [
        tmp_path / "run",
        next((tmp_path / "run" / "stages").iterdir()),
    ]
    assert [k.config["optim"]["lr"] for k in kept] == [0.1, 0.05]
    for one in kept:
        assert isinstance(one, trackers.Tracker) and one.closed == 1
        names = [(step, name) for step, values in one.values for name in values]
        assert {(8, "loss"), (8, "validation_mse")} <= {*names}
        assert one.pictures == []
    # The same numbers as in the file.
    found = {(r["step"], r["loss"]) for r in plots.read_metrics(kept[0].folder)
             if "loss" in r}  # fmt: skip
    assert {(s, v["loss"]) for s, v in kept[0].values if "loss" in v} == found


def failing(*args, **kwargs):
    raise trainer.NonFiniteError("non-finite")


def test_a_tracker_is_closed_after_an_error(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(trainer, "fit", failing)
    with pytest.raises(trainer.NonFiniteError):
        call(tmp_path / "run", trackers=[Kept])
    assert [k.closed for k in kept] == [1]


def test_trackers_that_fail_leave_no_other_one_open(tmp_path, kept, monkeypatch):
    class Stuck(Kept):
        def close(self):
            raise OSError("no network")

    def none(folder, config):
        raise OSError("no server")

    # One that cannot be opened.
    with pytest.raises(OSError, match="no server"):
        call(tmp_path / "a", trackers=[Kept, none])
    assert [k.closed for k in kept] == [1]
    # One that cannot be closed, alone and after another error, which is the one to see.
    with pytest.raises(OSError, match="no network"):
        call(tmp_path / "b", trackers=[Kept, Stuck, Kept])
    assert [k.closed for k in kept] == [1, 1, 0, 1]
    monkeypatch.setattr(trainer, "fit", failing)
    with pytest.raises(trainer.NonFiniteError):
        call(tmp_path / "c", trackers=[Stuck])


def test_what_is_no_tracker(tmp_path):
    for wrong in (Kept("folder", {}), 3):
        with pytest.raises(
            ValueError, match="or functions .folder, config. -> tracker"
        ):
            call(tmp_path / "run", trackers=[wrong])
    with pytest.raises(ValueError, match="trackers must be a list, got 'wandb'"):
        call(tmp_path / "run", trackers="wandb")
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match="must give a tracker, with start, write"):
        call(tmp_path / "run", trackers=[lambda folder, config: folder])


def test_where_training_begins_and_which_run_it_is(tmp_path, kept):
    run = tmp_path / "run"
    call(run, "train.steps=6", trackers=[Kept])
    call(run, trackers=[Kept])
    call(run, trackers=[Kept])
    assert [k.began for k in kept] == [[0], [6], [8]]
    one = trackers._id(run)
    assert trackers._id(run) == one
    (run / "tracker_id").write_text("")
    two = trackers._id(run)
    assert two and two != one
    # Another run in the place of one that left no checkpoint.
    trackers.open_all(run, {}, ())[0].close()
    assert trackers._id(run) == two
    trackers.open_all(run, {}, (), anew=True)[0].close()
    assert trackers._id(run) not in (one, two)


@pytest.mark.parametrize("name", ["tensorflow", "Wandb", ""])
def test_an_unknown_tracker(tmp_path, name):
    with pytest.raises(ValueError, match=r"of \['tensorboard', 'wandb', 'trackio'\]"):
        call(tmp_path / "run", trackers=[name])
    assert not (tmp_path / "run").exists()


def test_pictures_in_training(tmp_path, kept):
    outcome = call(tmp_path / "run", *DRAWN, trackers=[Kept])
    images = tmp_path / "run" / "images"
    steps = (3, 6, 8)
    expected = [(s, images / f"{s:06d}" / "weights.png") for s in steps]
    assert kept[0].pictures == expected
    assert sorted(images.glob("*/*")) == [path for _, path in expected]
    from matplotlib.image import imread

    pictures = [imread(path) for _, path in expected]
    assert all(x.shape[:2] == (1, 8) for x in pictures)
    assert not np.array_equal(pictures[0], pictures[1])
    # The last state is the one that the study draws.
    np.testing.assert_array_equal(pictures[2], imread(tmp_path / "run" / "weights.png"))
    # Drawing changes no number.
    call(tmp_path / "plain", *DRAWN[:1], *DRAWN[2:])
    assert without_time(tmp_path / "run") == without_time(tmp_path / "plain")
    assert not (tmp_path / "plain" / "images").exists()
    assert outcome is not None


def test_a_run_may_begin_to_draw_when_it_goes_on(tmp_path, kept):
    call(tmp_path / "run", "train.eval_every=3", "method.drawn=True", "train.steps=6")
    call(tmp_path / "run", *DRAWN, trackers=[Kept])
    assert [step for step, _ in kept[0].pictures] == [8]


def test_pictures_that_a_study_lacks():
    study = Study("x", "x", False, lambda seed: [], states=("a.png",))
    with pytest.raises(ValueError, match=r"names \['a.png'\], which are not in its"):
        measure.check_drawing("x", {"train": {"log_images": True}}, study)


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="line has no picture of a model in training"):
        call(tmp_path / "run", "train.log_images=True")
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"jaxpapers\[plot\]"):
        call(tmp_path / "run", *DRAWN)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_grey_picture(tmp_path):
    pytest.importorskip("tensorboardX")
    from PIL import Image

    board = trackers.TensorBoard(tmp_path, {})
    Image.new("L", (30, 20)).save(tmp_path / "grey.png")
    board.picture(1, tmp_path / "grey.png")
    board.close()


# Real clients, which the tests do not install: jaxpapers[tb,wandb,trackio], tensorboard.


@pytest.fixture
def resumed(tmp_path):
    """Runs 6 steps, then on to 8, then again, with a tracker; the folder of the run."""

    def train(name):
        folder = tmp_path / "run"
        call(folder, *DRAWN, "train.steps=6", trackers=[name])
        call(folder, *DRAWN, trackers=[name])
        call(folder, *DRAWN, trackers=[name])  # It is finished: nothing is lost.
        return folder

    return train


@pytest.mark.slow
def test_tensorboard(resumed):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    folder = resumed("tensorboard")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    assert {"loss", "validation_mse"} <= {*found.Tags()["scalars"]}
    wanted = [(r["step"], r["validation_mse"]) for r in plots.read_metrics(folder)
              if "validation_mse" in r]  # fmt: skip
    assert [e.step for e in found.Scalars("loss")] == [6, 8]
    events = {e.step: e.value for e in found.Scalars("validation_mse")}
    assert events == pytest.approx(dict(wanted), rel=1e-6)
    assert [e.step for e in found.Images("weights")] == [3, 6, 8]
    assert found.Images("weights")[0].width == 8


@pytest.mark.slow
def test_tensorboard_drops_what_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    for steps in ((1, 2, 3), (2, 3, 4)):
        board = trackers.TensorBoard(tmp_path, {})
        board.start(steps[0] - 1)
        for step in steps:
            board.write(step, {"loss": float(step)})
        board.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [e.step for e in found.Scalars("loss")] == [1, 2, 3, 4]


def wandb_records(path):
    """Records of a .wandb file: a log of LevelDB after seven bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = path.read_bytes(), 7, b""
    block = 2**15
    while place + 7 <= len(content):
        if block - place % block < 7:  # No header fits: the rest is zeros.
            place += block - place % block
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # Full or last.
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.slow
def test_wandb_offline(resumed, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = resumed("wandb")
    wandb.teardown()
    ids, losses, steps = set(), {}, []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("run"):
                run = record.run
                ids.add((run.run_id, run.display_name, run.project))
            if not record.HasField("history"):
                continue
            item = {
                entry.key or entry.nested_key[0]: json.loads(entry.value_json)
                for entry in record.history.item
            }
            if "validation_mse" in item:
                losses[item["_step"]] = item["validation_mse"]
            if "weights" in item:
                steps.append(item["_step"])
    # Both parts are one run.
    assert ids == {((folder / "tracker_id").read_text().strip(), "run", "jaxpapers")}
    wanted = {r["step"]: r["validation_mse"] for r in plots.read_metrics(folder)
              if "validation_mse" in r}  # fmt: skip
    assert losses == pytest.approx(wanted)
    assert steps == [3, 6, 8]
    assert [*folder.glob("wandb/offline-run-*/files/media/images/weights*.png")]


@pytest.mark.slow
def test_trackio(resumed, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "toys")
    trackio = pytest.importorskip("trackio")
    folder = resumed("trackio")
    name = f"run-{(folder / 'tracker_id').read_text().strip()}"
    (only,) = trackio.Api().runs("toys")
    assert only.name == name
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("toys", name)
    losses = {x["step"]: x["validation_mse"] for x in logs if "validation_mse" in x}
    wanted = {r["step"]: r["validation_mse"] for r in plots.read_metrics(folder)
              if "validation_mse" in r}  # fmt: skip
    assert losses == pytest.approx(wanted)
    assert [x["step"] for x in logs if "weights" in x] == [3, 6, 8]


SYSTEMS = {
    "sft_pg": ("pretrain.steps=2", "data.eval_count=20"),
    "score_wasserstein": ("data.eval_count=20",),
    "dpok": (),
    "looped_transformer": ("train.steps=40", "train.eval_every=20"),
    "poem": ("train.steps=20", "train.eval_every=10"),
    "gppstd": (),
    "mpc_psrl": (),
    "coda": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("name, fields", SYSTEMS.items())
def test_systems_that_draw(name, fields, tmp_path):
    fields = ["train.log_images=True", "train.steps=2", "train.eval_every=1", *fields]
    # On one device: their batches need not divide.
    command = [sys.executable, "-m", "jaxpapers", "run", f"{name}:smoke", "--alone"]
    command += [f"--config.{x}" for x in fields] + [f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = sorted(tmp_path.glob("run/images/*/*.png"))
    assert len({path.parent for path in drawn}) >= 2
    assert min(path.stat().st_size for path in drawn) > 1000


def test_no_system_that_draws_is_left_out():
    """Those whose task names pictures of states are tried above."""
    drawing = set()
    for name in papers.NAMES.keys() - {"line", "none"}:
        task = tasks.load(config.load_config(name))
        if "states=" in inspect.getsource(task):
            drawing.add(name)
    assert drawing == {*SYSTEMS}
