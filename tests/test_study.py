"""The verb of all papers, on toy papers: rows, stages, programs, refreshes, files."""

import json
import os
import signal
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from jaxpapers import checkpoint, papers, plots, run, stages, tasks
from jaxpapers import mesh as meshes
from jaxpapers import study as studies
from jaxpapers import train as trainer
from jaxpapers.folder import load_run
from jaxpapers.method import State
from tests.toys.command import CONFIG, call, register


def config_of_line():
    return run.load_config("line", (), CONFIG)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Two papers and two tasks more."""
    register(monkeypatch.setattr, monkeypatch.setitem)


def values(summary, label):
    (row,) = [r for r in summary.content["rows"] if r["label"] == label]
    return [numbers["mse"] for numbers in row["numbers"]]


def final(workdir):
    with checkpoint.open_manager(workdir / "checkpoints", read_only=True) as manager:
        return manager.latest_step()


@pytest.fixture
def compiled(monkeypatch):
    """Methods whose step was compiled, in order."""
    methods, compile = [], trainer.compile

    def counting(method, *args, **kwargs):
        methods.append(method)
        return compile(method, *args, **kwargs)

    monkeypatch.setattr(trainer, "compile", counting)
    return methods


@pytest.mark.programs(16)  # A study of two programs, three times.
def test_equal_stages_run_once_and_seeds_share_a_program(
    tmp_path, compiled, monkeypatch
):
    fits, fit = [], trainer.fit
    monkeypatch.setattr(
        trainer, "fit", lambda *a, **k: (fits.append(k["workdir"]), fit(*a, **k))[1]
    )
    summary = call(tmp_path, "method.others=True", seeds=3)
    # This model and its twin are one run; three seeds of two runs.
    assert len(fits) == len(set(fits)) == 6
    assert len(compiled) == 2
    assert values(summary, "twin") == values(summary, "this model")
    assert len(set(values(summary, "this model"))) == 3
    assert values(summary, "zero")[0] > 2 * max(values(summary, "this model"))
    assert values(summary, "slow")[0] != values(summary, "this model")[0]
    # Alone: the same numbers, without the others.
    alone = call(tmp_path / "alone", "method.others=True", alone=True)
    field = call(tmp_path / "field", "method.others=True", "train.alone=True")
    assert field.content["rows"] == alone.content["rows"]
    assert values(alone, "this model") == values(summary, "this model")[:1]
    assert {r["label"] for r in alone.content["rows"]} == {
        "this model",
        "twin",
        "zero",
        "mean",
    }


def test_files_of_a_run(tmp_path, rendered):
    summary = call(tmp_path, "method.others=True", seeds=2)
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert stored == summary.content
    assert stored["metric"] == "mse" and stored["seeds"] == [0, 1]
    own, _, slow, *_ = stored["rows"]
    assert own["folders"] == ["seed0", "seed1"]
    assert own["tables"][0]["columns"] == ["index", "weight"]
    for row in (own, slow):
        for folder in row["folders"]:
            config = json.loads((tmp_path / folder / "config.json").read_text())
            assert config["label"] in (row["label"], "this model")
            assert (tmp_path / folder / "note.txt").read_text() == "done"
            assert final(tmp_path / folder) == 8
    for name in ("loss.png", "comparison.png", "curves.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    records = plots.read_metrics(tmp_path / "seed1")
    (last,) = [r for r in records if "validation_mse" in r]
    assert last["validation_mse"] == values(summary, "this model")[1]
    assert last["baseline_zero"] == values(summary, "zero")[1]


def test_same_command_continues_and_another_model_is_refused(tmp_path, compiled):
    first = call(tmp_path / "a", "train.steps=5")
    assert final(tmp_path / "a") == 5
    longer = call(tmp_path / "a")
    whole = call(tmp_path / "b")
    assert values(longer, "this model") == values(whole, "this model")
    assert values(first, "this model") != values(whole, "this model")
    again = call(tmp_path / "a")
    assert values(again, "this model") == values(whole, "this model")
    with pytest.raises(ValueError, match="config.optim.lr=0.1, got 0.2"):
        call(tmp_path / "a", "optim.lr=0.2")
    with pytest.raises(ValueError, match="holds checkpoints"):
        call(tmp_path / "a", fresh=True)


# Two runs of two programs, and the checkpoints' own.
@pytest.mark.programs(30)
@pytest.mark.parametrize(
    "cut",
    [
        "this model",
        *(pytest.param(x, marks=pytest.mark.matrix) for x in ("first stage", "slow")),
    ],
)
def test_a_stopped_study_continues(tmp_path, monkeypatch, cut):
    """SIGTERM in any of its runs; the same call ends with the same numbers."""
    fields = ("method.staged=True", "method.others=True")
    whole = call(tmp_path / "whole", *fields, seeds=2)
    sums = tasks.load(config_of_line()).Sums
    batch, state = (
        sums.batch,
        {"left": {"first stage": 2, "this model": 5, "slow": 27}[cut]},
    )

    def stopping(self, *args):
        state["left"] -= 1
        if state["left"] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, *args)

    monkeypatch.setattr(sums, "batch", stopping)
    with pytest.raises(trainer.Preempted):
        call(tmp_path / "cut", *fields, seeds=2)
    monkeypatch.setattr(sums, "batch", batch)
    rest = call(tmp_path / "cut", *fields, seeds=2)
    assert rest.content["rows"] == whole.content["rows"]


def test_a_folder_of_another_run_is_refused_before_any_training(tmp_path, compiled):
    call(tmp_path, "method.staged=True", "train.steps=1")
    assert len(compiled) == 2
    with pytest.raises(ValueError, match="config.method.half=False, got True"):
        call(tmp_path, "method.staged=True", "train.steps=1", "method.half=True")
    assert len(list((tmp_path / "stages").iterdir())) == 1
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        call(tmp_path, "method.staged=True", "train.steps=1")
    # Without it the checkpoints say what the run is.
    (tmp_path / "config.json").unlink()
    call(tmp_path, "method.staged=True", "train.steps=1")
    assert json.loads((tmp_path / "config.json").read_text())["paper"] == "line"


def test_workdirs_of_older_versions_are_refused(tmp_path):
    call(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["version"]
    path.write_text(json.dumps(stored))
    for action in (call, lambda w: load_run(str(w)), lambda w: run.evaluate(str(w))):
        with pytest.raises(ValueError, match=r"written by jaxpapers 0\.1"):
            action(tmp_path)


def test_a_stage_starts_from_another_ones_checkpoint(tmp_path, compiled):
    fields = ("method.staged=True", "method.half=True", "method.others=True")
    summary = call(tmp_path, *fields, "train.steps=1", "optim.lr=1e-9")
    (before,) = [r for r in summary.content["rows"] if r["label"] == "before"]
    first = load_run(str(tmp_path / before["folders"][0]))[-1]
    second = load_run(str(tmp_path))[-1]
    np.testing.assert_allclose(second.params["w"], first.params["w"] / 2, rtol=1e-6)
    # Two rows start from the first stage, and their seeds share what is compiled.
    assert len(compiled) == 3
    assert len(list((tmp_path / "stages").iterdir())) == 2


@pytest.mark.matrix
@pytest.mark.programs(20)  # Three runs.
def test_init_from_and_parts_of_one_run(tmp_path):
    whole = call(tmp_path / "parts", "method.parts=True")
    steps = [r["step"] for r in plots.read_metrics(tmp_path / "parts") if "loss" in r]
    assert steps == [4, 8] and final(tmp_path / "parts") == 8
    # Stopped inside the first part and in the second one, it goes on.
    call(tmp_path / "cut", "method.parts=True", "train.steps=4")
    call(tmp_path / "cut", "method.parts=True", "train.steps=6")
    call(tmp_path / "cut", "method.parts=True")
    ends = [load_run(str(tmp_path / w))[-1].params for w in ("parts", "cut")]
    chex.assert_trees_all_equal(*ends)
    start = f"train.init_from={tmp_path / 'parts'}"
    same = call(tmp_path / "from", start, "train.steps=0")
    assert values(same, "this model") == values(whole, "this model")


def test_a_start_of_another_shape_is_refused_before_compiling(tmp_path, compiled):
    state = State(np.int32(3), {"w": np.zeros(4, np.float32)}, (), (), np.int32(0))
    with checkpoint.open_manager(tmp_path / "four" / "checkpoints") as manager:
        checkpoint.save(manager, state, 0, {})
        checkpoint.wait(manager)
    for fields in ((), ("method.half=True",)):
        with pytest.raises(ValueError, match=r"leaf 'w' has shape \(4,\), .* \(8,\)"):
            call(tmp_path / "run", f"train.init_from={tmp_path / 'four'}", *fields)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        call(tmp_path / "run", f"train.init_from={tmp_path / 'five'}")
    assert not compiled


@pytest.mark.parametrize(
    "mesh", [pytest.param("data:1", marks=pytest.mark.matrix), "data:8"]
)
def test_refreshed_examples_resume_bitwise(tmp_path, mesh, monkeypatch):
    """Cut inside an interval, at its edge, and not at all."""
    config = run.load_config(
        "line", ["--config.method.mined=3", "--config.train.steps=8"], CONFIG
    )
    data = tasks.read(config)
    refreshed = []
    every, refresh = data.refresh
    method = papers.load("line").make(config, **data.facts)
    count = int(mesh[-1])
    grid = meshes.make_mesh({"data": count}, jax.devices()[:count])
    compiled = trainer.compile(method, grid, data.shapes)

    def fit(steps, workdir):
        def counted(state):
            refreshed.append(int(state.step))
            return refresh(state)

        return trainer.fit(
            method, data.examples, compiled=compiled, refresh=(every, counted),
            steps=steps, batch=8, mesh=grid, workdir=workdir,
        )  # fmt: skip

    whole = fit(8, tmp_path / "whole")
    assert refreshed == [0, 3, 6]
    assert len(set(np.asarray(whole.extra["chosen"]).tolist())) == 16
    for name, cuts in {"inside": (2, 4), "edge": (3, 6), "both": (1, 3, 7)}.items():
        refreshed.clear()
        for steps in (*cuts, 8):
            state = fit(steps, tmp_path / name)
        assert refreshed == [0, 3, 6], name
        chex.assert_trees_all_equal(
            *(jax.device_get(s._replace(key=0)) for s in (whole, state))
        )


def test_a_jitted_refresh_and_one_that_shares_a_buffer():
    config = run.load_config("line", ["--config.method.mined=3"], CONFIG)
    data = tasks.read(config)
    method = papers.load("line").make(config, **data.facts)

    def init(key, batch):
        state = method.init(key, batch)
        return state._replace(extra={**state.extra, "w": state.params["w"] * 0})

    kept = method._replace(init=init)
    compiled = trainer.compile(kept, meshes.make_mesh(), data.shapes)

    def shared(state):
        return state._replace(extra={**state.extra, "w": state.params["w"]})

    def fit(refresh, steps):
        return trainer.fit(
            kept, data.examples, compiled=compiled, refresh=(2, refresh), steps=steps,
            batch=8,
        )  # fmt: skip

    states = [fit(refresh, 3) for refresh in (shared, jax.jit(shared))]
    chex.assert_trees_all_equal(*(jax.device_get(s._replace(key=0)) for s in states))
    before = fit(shared, 2)
    chex.assert_trees_all_equal(states[0].extra["w"], before.params["w"])


def test_examples_of_every_step():
    """Without a refresh a function of the state is called before each step."""
    seen = []

    def examples(state):
        seen.append(int(state.step))
        return tasks.load(config_of_line()).Sums()

    method = papers.load("line").make(config_of_line())
    data = tasks.abstract(config_of_line())
    compiled = trainer.compile(method, meshes.make_mesh(), data.shapes)
    state = trainer.fit(method, examples, compiled=compiled, steps=3, batch=8)
    plain = trainer.fit(
        method, tasks.load(config_of_line()).Sums(), compiled=compiled, steps=3, batch=8
    )
    assert seen == [0, 1, 2]
    chex.assert_trees_all_equal(state.params, plain.params)


def test_what_a_refresh_may_not_change(tmp_path):
    config = run.load_config("line", ["--config.method.mined=3"], CONFIG)
    data = tasks.read(config)
    method = papers.load("line").make(config, **data.facts)
    compiled = trainer.compile(method, meshes.make_mesh(), data.shapes)

    def longer(state):
        return state._replace(extra={"chosen": np.zeros(17, np.int32)})

    fit = {"compiled": compiled, "steps": 2, "batch": 8}
    with pytest.raises(ValueError, match="not their shapes or dtypes"):
        trainer.fit(method, data.examples, refresh=(1, longer), **fit)
    with pytest.raises(ValueError, match="at least 1 step"):
        trainer.fit(method, data.examples, refresh=(0, longer), **fit)
    with pytest.raises(ValueError, match="pass compiled="):
        trainer.fit(method, data.examples, steps=1, batch=8)


def test_an_environment_in_the_state_needs_no_examples():
    def init(key, batch):
        assert batch == {}
        zero = jax.numpy.zeros(())
        return trainer.State(
            jax.numpy.zeros((), int), {"w": zero}, (), {"at": zero}, key
        )

    def update(state, batch):
        assert batch == {}
        at = state.extra["at"] + 1
        new = state._replace(step=state.step + 1, extra={"at": at})
        return new, {"loss": at}

    method = trainer.Method(init, lambda *args: (0.0, {}), update)
    compiled = trainer.compile(method, meshes.make_mesh(), {})
    state = trainer.fit(method, None, compiled=compiled, steps=5, batch=1)
    assert float(state.extra["at"]) == 5


def test_a_paper_that_trains_nothing(tmp_path, capsys):
    summary = run.run(
        "none", files=["numbers.txt"], config_path=f"{CONFIG}:none",
        workdir=str(tmp_path), seeds=2,
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "Tests 2026" in shown and "numbers of 'numbers.txt'" in shown
    # The best first, a column a fold and their mean.
    lines = [line.split() for line in shown.splitlines()]
    assert ["ours", "3.0000", "3.0000", "3.0000"] in lines
    assert lines.index(["ours", "3.0000", "3.0000", "3.0000"]) < lines.index(
        ["theirs", "1.5000", "1.5000", "1.5000"]
    )
    assert ["a[b]", "3"] in lines
    assert [r["numbers"] for r in summary.content["rows"]][0] == [
        {"value": 2.0},
        {"value": 4.0},
    ]
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}"
        assert (folder / "order.csv").read_text() == "a,b\n"
        assert np.load(folder / "arrays.npz")["x"] == [2.0 + 2 * seed]
        for label in ("ours-right", "theirs-left", "theirs-right"):
            assert (
                tmp_path / "rows" / label / folder.name / "raw"
            ).read_bytes() == b"\0"
    assert (tmp_path / "curves.png").exists() and (tmp_path / "comparison.png").exists()
    assert not list(tmp_path.glob("**/checkpoints"))
    with pytest.raises(ValueError, match="trains nothing"):
        run.plan("none", config_path=f"{CONFIG}:none")
    with pytest.raises(ValueError, match="none trains nothing"):
        run.evaluate(str(tmp_path))


def test_dry_run_and_refused_calls(tmp_path, capsys):
    assert call(tmp_path / "x", dry_run=True) is None
    assert "nothing written" in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="--seeds must be >= 1"):
        call(tmp_path, seeds=0)
    with pytest.raises(ValueError, match="optim.lr must be > 0"):
        call(tmp_path, "optim.lr=-1.0")
    with pytest.raises(ValueError, match="reads no files"):
        call(tmp_path, files=["a"])
    assert not list(tmp_path.iterdir())


def test_rows_that_cannot_be_compared():
    row = studies.Row("a", None, lambda: studies.Finding({}))
    for rows, message in (
        ([[]], "no rows"),
        ([[row, row]], "two rows"),
        ([[row], [row._replace(label="b")]], "same labels"),
    ):
        with pytest.raises(ValueError, match=message):
            studies.check_rows(rows)
    studies.check_rows([[row, row._replace(column="x")]] * 2)


def test_names_of_stages_go_by_content():
    config = run.load_config("line", (), CONFIG)
    stage = studies.Stage("line", config)
    later = studies.Stage("line", studies.with_fields(config, {"train.steps": 99}))
    other = studies.Stage("line", studies.with_fields(config, {"optim.lr": 1.0}))
    assert studies.stage_name(stage) == studies.stage_name(later)
    assert studies.stage_key(stage) != studies.stage_key(later)
    assert studies.stage_name(stage) != studies.stage_name(other)
    after = studies.Stage("line", config, after=other)
    assert studies.stage_name(after) != studies.stage_name(stage)
    ranks = [studies.with_fields(config, {"train.accumulate": n}) for n in (1, 2, 4)]
    lengths = [studies.with_fields(config, {"train.steps": n}) for n in (3, 4, 4)]
    # Other fields make other runs of one name, however long.
    watched = [studies.with_fields(config, {"train.eval_every": n}) for n in (1, 2, 3)]
    some = [studies.Stage("line", c) for c in (*ranks, *lengths, *watched)]
    trainers = stages.Stages(Path("root"), meshes.make_mesh())
    assert len({trainers.folder(x) for x in some}) == 8
    chain = studies.Stage("line", config, stage, continues=True)
    assert stages.unique([chain, after, None, after]) == [chain, other, after]
