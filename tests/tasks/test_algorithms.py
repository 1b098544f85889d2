"""Streams of problems, curricula, measurements by length and by stopping rule."""

import json

import jax
import numpy as np
import pytest

from jaxpapers import figures as plotted
from jaxpapers import mesh as meshes
from jaxpapers import papers, tasks
from jaxpapers.config import load_config
from jaxpapers.method import State
from jaxpapers.study import Finding, Result, Row, last_step, lineage, with_fields
from jaxpapers.tasks import algorithms
from tests.contract import grid

SMALL = with_fields(
    load_config("looped_transformer:smoke"),
    {
        "net.width": 16, "net.heads": 2, "data.batch": 6, "data.eval_batch": 8,
        "data.eval_count": 16, "data.length": 2, "data.lengths": (2,),
    },
)  # fmt: skip


def data(**fields):
    return with_fields(SMALL, {f"data.{k}": v for k, v in fields.items()}).data


def test_the_stream_is_a_function_of_the_position():
    c = data(problem="copy", length=4)
    stream = algorithms.Problems(c, 3)
    first, again, other = (stream.batch(i, 6) for i in (0, 0, 6))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        np.testing.assert_array_equal(array[2:4], stream.batch(0, 6, slice(2, 4))[name])
    assert not np.array_equal(first["tokens"], other["tokens"])
    assert first["tokens"].shape == (6, 9)
    seen = {int(stream.batch(6 * i, 6)["n_steps"][0]) for i in range(20)}
    assert seen == {1, 2, 3}


def test_a_batch_of_many_lengths():
    c = data(problem="multi", length=3, operand=2, mixed=True)
    batch = algorithms.Problems(c, 3).batch(0, 6)
    assert len(set(batch["n_steps"].tolist())) > 1
    ends = (batch["tokens"] == 1).argmax(1)
    first = (batch["tokens"] == 5).argmax(1)
    np.testing.assert_array_equal(batch["n_steps"], first * (ends - first - 1))
    np.testing.assert_array_equal(batch["weights"].sum(1), ends)  # n1 + n2 + 1 places.


def test_facts():
    facts = tasks.abstract(
        with_fields(SMALL, {"data.length": 10, "data.buckets": 4})
    ).facts
    assert facts["buckets"] == ((3, 5), (5, 7), (8, 10), (10, 12))
    assert facts["vocab_size"] == 8
    other = tasks.abstract(with_fields(SMALL, {"data.problem": "dict"}))
    assert other.facts["vocab_size"] == 56
    assert other.shapes["tokens"].shape == (6, 5)


@pytest.mark.parametrize("preset", ["parity", "copy", "multi-20", "dict-20", "smoke"])
def test_presets_make_their_rows(preset):
    """A stage for each training length with the rule interval; methods of all rows."""
    config = load_config(f"looped_transformer:{preset}")
    found = tasks.abstract(config)
    study = tasks.study("looped_transformer", config, found, grid("1x1"))
    rows = study.rows(7)
    assert len({r.label for r in rows}) == len(rows) > 3
    for row in rows:
        parts = lineage(row.stage)
        every = [p.config.data.length for p in parts]
        if config.data.rule == "accuracy":
            assert every == [config.data.length]
        else:
            assert every == list(range(1, config.data.length + 1))
            ends = [last_step(p) for p in parts]
            assert ends == sorted(set(ends)) and ends[-1] == config.train.steps
        last = row.stage.config
        assert "baselines" not in last and last.train.seed == 7
        facts = tasks.abstract(last).facts
        method = papers.load("looped_transformer").make(last, **facts)
        state = jax.eval_shape(method.init, jax.random.key(0), found.shapes)
        layers = state.params["layers"]["mlp_norm"]["scale"].shape[0]
        deep = row.label in ("NTP", "NTP-pause")
        assert layers == (config.baselines.depth if deep else config.net.layers)


def test_the_curriculum_goes_on_when_its_length_is_solved(monkeypatch):
    config = with_fields(SMALL, {"data.rule": "accuracy", "data.interval": 5})
    found = tasks.read(config)
    every, grow = found.refresh
    assert every == 5
    state = State(np.int32(0), {}, (), {"length": np.int32(1)}, None)
    lengths_after = []
    for solved in (0.98, 0.99, 1.0):
        monkeypatch.setattr(
            algorithms, "_accuracy", lambda net, steps, x=solved: lambda *args: x
        )
        state = grow(state)
        lengths_after.append(int(state.extra["length"]))
    assert lengths_after == [1, 2, 2]
    assert found.examples(state).most == 2


# The generator and the model's loop, at the training length, its double and its fourfold.
@pytest.mark.programs(20)
def test_measurement_of_an_untrained_model():
    found = tasks.read(SMALL)
    study = tasks.study("looped_transformer", SMALL, found, grid("4x2"))
    own, ntp = (r for r in study.rows(0) if r.label in ("looped", "NTP-loop"))
    results = []
    for row in (own, ntp):
        config = row.stage.config
        facts = tasks.abstract(config).facts
        method = papers.load("looped_transformer").make(config, **facts)
        shapes = {
            k: np.zeros(x.shape, x.dtype)
            for k, x in tasks.abstract(config).shapes.items()
        }
        with jax.set_mesh(grid("4x2")):
            state = jax.jit(method.init)(jax.random.key(0), shapes)
        results.append(Result(row, [row.measure(method, state)], []))
    numbers, ntp = (r.findings[0].numbers for r in results)
    assert {"length_2", "length_4", "length_8", "length_4_fixed point"} <= set(numbers)
    assert {"length_2", "length_4", "length_8"} == set(ntp)
    assert all(0 <= x <= 1 for x in numbers.values())
    table = results[0].findings[0].tables[0]
    assert tuple(table.columns) == ("length", *algorithms.STOPS)
    assert [r[0] for r in table.rows] == [2, 4, 8]
    curve = results[0].findings[0].curves["exact match against step, length 4"]
    assert curve[0] == [1, 2, 3, 4, 5, 6]
    assert curve[1][3] == numbers["length_4"]
    json.dumps([dict(numbers), results[0].findings[0].curves])


def test_figures(tmp_path, figures):
    x, name = [2, 4, 8], "exact match against length"
    curves = {name: (x, [1, 0.5, 0.1]), f"{name}, stop: batch": (x, [1, 0.4, 0.1])}
    step = {"exact match against step, length 4": ([1, 2], [0.1, 1])}
    own = Row("looped", None, lambda: None)
    results = [
        Result(own, [Finding({}, (), {**curves, **step})] * 2, []),
        Result(own._replace(label="NTP"), [Finding({}, (), curves)], []),
    ]
    plotted.by_length(results, tmp_path / "lengths.png", trained=4)
    plotted.by_step(results, tmp_path / "steps.png")
    first, second = (figure.axes[0] for figure in figures)
    labels = {t.get_text() for t in first.get_legend().get_texts()}
    assert labels == {"training lengths", "looped", "NTP", "looped, stop: batch"}
    assert (tmp_path / "steps.png").exists()
    assert second.get_title() == "length 4"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.problem": "sorting"}, "the problem must be one of"),
        ({"data.length": 0}, "length of a problem must be >= 1, got 0"),
        ({"data.rule": "never"}, "data.rule must be one of"),
        ({"data.layout": "half"}, "data.layout must be one of"),
        ({"data.first": 5}, "data.first must be in 1 to data.length=2, got 5"),
        ({"data.pauses": 3}, "data.pauses=3 needs data.layout=next"),
        ({"data.lengths": (4, 0)}, r"data.lengths must be >= 1, got \(4, 0\)"),
        ({"data.tolerance": -1.0}, "data.tolerance must be >= 0, got -1"),
        (
            {"data.problem": "multi", "data.operand": 0},
            "length of a problem's first operand must be >= 1, got 0",
        ),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.read(with_fields(SMALL, fields))


def test_refuses_unknown_baselines():
    config = with_fields(SMALL, {"baselines.rows": ("RNN",)})
    mesh = meshes.make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    study = tasks.study("looped_transformer", config, tasks.abstract(config), mesh)
    with pytest.raises(ValueError, match=r"must be among .*'NTP'.*, got \('RNN',\)"):
        study.rows(0)
    config = with_fields(SMALL, {"baselines.pauses": -1})
    with pytest.raises(ValueError, match="baselines.pauses must be >= 0, got -1"):
        algorithms.baselines(config)
