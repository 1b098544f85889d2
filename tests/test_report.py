"""Metric files, the parameter table, figures of a comparison."""

import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

from jaxpapers import mesh as meshes
from jaxpapers import method, outputs, plots, report, tables, trackers, train
from jaxpapers.figures import comparison as draw_comparison
from jaxpapers.study import Finding, Result, Row, Stage, Study

pytestmark = pytest.mark.usefixtures("rendered")


def write(path, *records):
    writer = trackers.Jsonl(path)
    for step, values in records:
        writer.write(step, values)
    writer.close()


def test_jsonl_round_trip(tmp_path):
    write(tmp_path, (1, {"loss": 2.5}), (2, {"loss": 0.1 + 0.2}), (2, {"bits": 1.0}))
    found = plots.read_metrics(tmp_path)
    assert found == plots.read_metrics(tmp_path / "metrics.jsonl")
    assert [x.pop("time") > 1e9 for x in found] == [True] * 3
    # Metrics and evaluation of one step are two records.
    assert sorted(found, key=str) == sorted(
        [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 0.1 + 0.2},
         {"step": 2, "bits": 1.0}], key=str,
    )  # fmt: skip


def test_of_a_repeated_step_the_last_counts(tmp_path):
    write(tmp_path, *((i, {"loss": float(i)}) for i in (1, 2, 3)))
    write(tmp_path, *((i, {"loss": 10.0 * i}) for i in (2, 3, 4)))
    found = [(x["step"], x["loss"]) for x in plots.read_metrics(tmp_path)]
    assert found == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]


def test_a_line_cut_off_by_a_kill_costs_itself_only(tmp_path):
    write(tmp_path, (1, {"loss": 1.0}), (2, {"loss": 2.0}))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [x["step"] for x in plots.read_metrics(tmp_path)] == [1]
    write(tmp_path, (3, {"loss": 3.0}))
    assert [x["step"] for x in plots.read_metrics(tmp_path)] == [1, 3]


def test_no_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match="no metrics.jsonl in"):
        plots.read_metrics(tmp_path)


def text(renderable):
    console = Console(width=140, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return [" ".join(x.split()) for x in capture.get().splitlines()]


def test_parameter_table():
    mesh = meshes.make_mesh({"data": 4, "model": 2})
    split = jax.NamedSharding(mesh, P("data", "model"))
    params = {
        "w": {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=split)},
        "a": jax.ShapeDtypeStruct((1000,), jnp.bfloat16),
    }
    found = text(report.parameter_table(params, {"w": {"kernel": "dion"}, "a": "lion"}))
    assert found == [
        "parameter shape dtype partition bytes/device optimizer",
        "a 1000 bfloat16 whole 2,000 lion",
        "w/kernel 16x8 float32 (data, model) 64 dion",
        "total 1,128 parameters",
    ]
    assert text(report.parameter_table(params))[1] == "a 1000 bfloat16 whole 2,000"


class Kept:
    def __init__(self):
        self.records, self.closed = [], False

    def start(self, step):
        pass

    def write(self, step, values):
        self.records.append((step, values))

    def picture(self, step, path):
        pass

    def close(self):
        self.closed = True


def compiled():
    """What ``Report.start`` asks of a compiled step."""

    def loss(params, batch, key):
        return jnp.square(params["w"] * batch["x"]).mean(), {}

    m = method.gradient(lambda key, batch: {"w": jnp.ones(())}, loss, optax.adam(0.1))
    return train.compile(m, meshes.make_mesh(), {"x": jnp.ones(8)}), m


def test_report_writes_every_tenth_and_the_last_step(capsys):
    kept = Kept()
    lines = report.Report(tokens_per_step=1000, trackers=[kept], every=10)
    lines.start(*compiled(), 5, 25)
    for i in range(6, 26):
        lines.step(i, {"loss": float(i)})
    lines.evaluation(25, {"validation_bits": 1.25})
    lines.close()
    assert [s for s, _ in kept.records] == [10, 20, 25, 25]
    assert kept.records[0][1]["loss"] == 10.0
    assert kept.records[0][1]["steps_per_second"] > 0
    assert kept.records[-1][1] == {"validation_bits": 1.25} and kept.closed
    out = capsys.readouterr().out
    assert "continuing from step 5" in out and "per device: parameters 4 B" in out
    assert "25/25 loss 25.0000" in " ".join(out.split())
    assert "validation_bits 1.2500" in out


@pytest.mark.parametrize("quiet", [False, True])
def test_a_notebook_has_one_line_that_changes(monkeypatch, quiet):
    shown = []

    class Handle:
        def update(self, data, raw):
            assert raw
            shown[-1].append(data["text/plain"])

    def display(data, raw, display_id):
        assert raw and display_id
        shown.append([data["text/plain"]])
        return Handle()

    module = types.SimpleNamespace(display=display)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    console = Console(force_jupyter=True, quiet=True)
    lines = report.Report(tokens_per_step=1, console=console, quiet=quiet)
    for first in (0, 3):  # Two parts of a run.
        lines.start(*compiled(), first, first + 3)
        for step in range(first, first + 3):
            lines.step(step + 1, {"loss": 1.0})
    lines.close()
    assert [[x.split()[0] for x in cell] for cell in shown] == (
        [] if quiet else [["1/3", "2/3", "3/3", "4/6", "5/6", "6/6"]]
    )


def test_quiet_prints_nothing(capsys):
    lines = report.Report(tokens_per_step=1, quiet=True)
    lines.start(*compiled(), 0, 1)
    lines.step(1, {"loss": 1.0})
    lines.close()
    assert not capsys.readouterr().out


def test_plot(tmp_path):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        run.mkdir()
        write(run, *((i, {"loss": 1 / i, "bits": 2 / i}) for i in range(1, 31)))
        write(run, (30, {"validation_bits": 0.5}))
    panel = plots.Panel(runs, "bits", "bits per byte", {"gzip": 1.5})
    out = plots.draw([panel], tmp_path / "x.png")
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and out.stat().st_size > 5000
    plots.plot(runs[:1], "loss", tmp_path / "y.png")
    with pytest.raises(ValueError, match=r"no metric 'acc'; it has \['bits', 'loss'"):
        plots.plot(runs, "acc", tmp_path / "z.png")
    assert not (tmp_path / "z.png").exists()
    assert "matplotlib.pyplot" not in sys.modules  # A notebook keeps its backend.


def test_papers_have_panels_of_their_own(tmp_path, figures):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, (1, {"loss": 1.0}), (2, {"loss": 0.5}))
        stored = {"paper": "din" if name == "c" else "dion"}
        (tmp_path / name / "config.json").write_text(json.dumps(stored))
    plots.plot([tmp_path / x for x in "abc"], "loss", tmp_path / "x.png")
    first, second = figures[0].axes
    assert first.get_ylabel() == "dion: loss" and second.get_ylabel() == "din: loss"
    assert len(first.lines) == 2 and len(second.lines) == 1


@pytest.mark.parametrize(
    "value, short",
    [
        (0, "0 "), (7.4, "7 "), (999, "999 "), (1000, "1 k"), (1234, "1.23 k"),
        (999_900, "1 M"), (5.1e6, "5.1 M"), (2.5e9, "2.5 G"), (3e12, "3 T"),
        (4.2e15, "4.2e+03 T"),
    ],
)  # fmt: skip
def test_short_numbers(value, short):
    assert report._short(value) == short


def test_records_are_plain_json(tmp_path):
    write(tmp_path, (1, {"loss": 1.0}))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == ["step", "time", "loss"]


def compared(title, rows, baselines, out):
    """``comparison.png`` of trained rows and of baselines that are not."""
    stage = Stage("paper", None)
    given = [(k, stage, v) for k, v in rows.items()]
    given += [(k, None, [v]) for k, v in baselines.items()]
    results = [
        Result(Row(label, stage, None), [Finding({"m": x}) for x in values], ())
        for label, stage, values in given
    ]
    study = Study(title, "m", rising=False, rows=None)
    assert draw_comparison(study, results, out).stat().st_size > 1000


def test_rounding_is_not_magnified(tmp_path, figures):
    compared("auc", {"a": [0.8350], "b": [0.8351]}, {}, tmp_path / "comparison.png")
    low, high = figures[0].axes[0].get_xlim()
    assert low < 0.8350 and 0.8351 < high and high - low >= 0.0167 * (1 - 1e-6)


def test_the_metric_is_drawn_beside_another_curve(tmp_path):
    write(tmp_path, (1, {"loss": 1.0}), (2, {"loss": 0.5}))
    study = Study("AUC", "auc", True, None)
    panels = outputs._panels(study, [tmp_path], {"popularity": 0.5})
    assert [p.metric for p in panels] == ["loss"]
    write(tmp_path, (2, {"validation_auc": 0.7}))
    panels = outputs._panels(study, [tmp_path], {"popularity": 0.5})
    assert [p.metric for p in panels] == ["loss", "validation_auc"]
    assert panels[1].levels == {"popularity": 0.5} and not panels[0].levels
    same = study._replace(curve="auc", unit="share")
    (panel,) = outputs._panels(same, [tmp_path], {"popularity": 0.5})
    assert panel.label == "share" and panel.levels


@pytest.mark.parametrize("rising, ahead", [(True, ["top"]), (False, ["low"])])
def test_the_verdict_names_what_is_better(rising, ahead):
    values = {"this model": [0.5, 0.7], "top": [0.9], "low": [0.1], "same": [0.6]}
    values["failed"] = [math.nan]
    results = [
        Result(Row(k, None, None), [Finding({"m": x}) for x in v], ())
        for k, v in values.items()
    ]
    study = Study("title", "m", rising, rows=None)
    first, second = tables.verdict(study, results, 0.55)
    assert first == "expected of this model: about 0.55"
    (label,) = ahead
    assert second.endswith(f"in this run: {label} ({values[label][0]:.4f})")
    assert tables.verdict(study, results[:1], None) == []
    header = tables.comparison(study, results).columns[0].header
    assert str(header) == f"title ({'higher' if rising else 'lower'} is better)"


def test_a_far_baseline_does_not_squeeze_the_models(tmp_path, figures):
    rows = {"a": [0.010, 0.012], "b": [0.011, 0.013]}
    compared("error", rows, {"near": 0.015, "far": 0.9}, tmp_path / "comparison.png")
    axes = figures[0].axes[0]
    low, high = axes.get_xlim()
    assert low < 0.010 and 0.015 < high < 0.03
    texts = [t.get_text() for t in figures[0].legends[0].get_texts()]
    assert texts == ["near 0.015", "far 0.900 (beyond the axis)"]
    assert axes.get_xlabel() == "error (lower is better)"


def test_a_single_model_is_drawn_beside_its_baselines(tmp_path, figures):
    levels = {"popularity": 0.513, "item mean": 0.475}
    compared("auc", {"a": [0.562, 0.572]}, levels, tmp_path / "comparison.png")
    low, high = figures[0].axes[0].get_xlim()
    assert low < 0.475 and high > 0.572
    texts = [t.get_text() for t in figures[0].legends[0].get_texts()]
    assert texts == ["popularity 0.513", "item mean 0.475"]


def test_a_far_model_does_not_squeeze_the_others(tmp_path, figures):
    rows = {name: [0.5 + i / 100] for i, name in enumerate("abcd")}
    rows |= {"far": [5.0], "low": [-4.0]}
    compared("loss", rows, {}, tmp_path / "comparison.png")
    axes = figures[0].axes[0]
    low, high = axes.get_xlim()
    assert 0.4 < low < 0.5 and 0.53 < high < 0.6
    assert {t.get_text() for t in axes.texts} == {"5 →", "← -4"}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["low", *"abcd", "far"]


def test_models_that_agree_look_as_if_they_did(tmp_path, figures):
    compared("W2", {"a": [0.1560], "b": [0.1577]}, {}, tmp_path / "comparison.png")
    low, high = figures[0].axes[0].get_xlim()
    assert low < 0.1531 and high > 0.1606
