"""The study of DNW on a table of the user's own, without fetching anything."""

import csv
import io
import json
import pickle

import numpy as np
import pytest

from jaxpapers import run, tasks
from jaxpapers.data import fetch
from jaxpapers.mesh import make_mesh
from jaxpapers.study import with_fields
from jaxpapers.tasks import characters
from tests.papers.dnw_networks import CSV, course, hand_made

LABELS = [
    "DNW, b = 0.35", "usage frequency", "DNW, b = 0.5", "offspring, direct",
    "offspring, all", "level", "frequency / cost", "Loach-Wang", "density greedy",
    "grades",
]  # fmt: skip


def load(*fields):
    fields = ("method.others=(0.5,)", *fields)
    return run.load_config("dnw", [f"--config.{x}" for x in fields], None, (str(CSV),))


def check_own(numbers, text):
    """What the table says of DNW is what sets and loops say of its order.csv."""
    lines = list(csv.DictReader(io.StringIO(text)))
    assert tuple(lines[0]) == characters.CSV_COLUMNS
    assert lines[0]["character"] == "的" and lines[0]["parts"] == "白 勺"
    assert (lines[0]["gloss"], lines[0]["pinyin"]) == ("of", "de")
    assert [line["order"] for line in lines] == [str(i) for i in range(1, 31)]
    net = hand_made()
    order = [net.chars.index(line["character"]) for line in lines]
    cost, usage, _ = course(order, net, "transient")
    shown = [float(line["cumulative_usage"]) for line in lines]
    np.testing.assert_allclose(shown, usage, atol=1e-6)
    for share in (50, 80, 90, 95, 99):
        expected = cost[np.argmax(usage >= share / 100 - 1e-9)]
        assert numbers[f"cost_{share}"] == expected


# Scores and orders are one function each; one simulation for all.
@pytest.mark.programs(20)
def test_rows_of_a_network_of_the_user():
    config = load("fit.steps=0", "method.sweep=0")
    study = tasks.study("dnw", config, tasks.read(config), make_mesh())
    rows = study.rows(0)
    assert [row.label for row in rows] == LABELS
    findings = [row.measure() for row in rows]
    own = findings[0]
    check_own(own.numbers, own.files["order.csv"])
    bound = own.numbers["completion_bound"]
    assert all(bound <= f.numbers["completion"] for f in findings)
    (table,) = own.tables
    assert table.title == "learn credit" and [row[0] for row in table.rows] == LABELS
    # Topological orders cost the same under both credits.
    numbers = {row.label: f.numbers["cost_90"] for row, f in zip(rows, findings)}
    learn = {row[0]: float(row[3]) for row in table.rows}
    same = {label for label in LABELS if learn[label] == numbers[label]}
    assert {"level", "Loach-Wang", "density greedy"} <= same
    assert learn["DNW, b = 0.35"] < numbers["DNW, b = 0.35"] == 26
    x, y = own.curves["share of usage against cost"]
    assert (x[0], y[0]) == (0, 0) and x[-1] <= 44 and y[-1] > 0.97
    assert not findings[2].curves  # Another b: in the table only.


@pytest.mark.matrix
@pytest.mark.programs(40)  # All of the above, the fit, and values of b.
def test_run_writes_and_draws(tmp_path, figures):
    fields = [f"--config.{x}" for x in (
        "fit.steps=2", "fit.top=10", "method.sweep=3", "method.others=(0.5,)")
    ]  # fmt: skip
    summary = run.run("dnw", fields, files=(str(CSV),), workdir=str(tmp_path))
    stored = json.loads((tmp_path / "comparison.json").read_text())
    rows = {row["label"]: row["numbers"][0] for row in stored["rows"]}
    assert stored["rows"] == summary.content["rows"]
    assert set(rows) == {*LABELS, "DNW, b per level"}
    text = (tmp_path / "order.csv").read_text(encoding="utf-8")
    check_own(rows["DNW, b = 0.35"], text)
    assert len(stored["rows"][0]["curves"][0]["area against b"][0]) == 3
    labels = [[axes.get_xlabel() for axes in figure.axes] for figure in figures]
    assert ["cost", "b"] in labels and (tmp_path / "curves.png").exists()


def test_what_is_read():
    config = load()
    data = tasks.read(config)
    assert "30 nodes, 27 links, 16 primitives, 4 levels" in data.summary
    assert data.examples is None and data.shapes == tasks.abstract(config).shapes == {}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The files of all packages, of a few characters each."""
    files = {
        "ids.txt": "U+660E\t明\t⿰日月\nU+6797\t林\t⿰木木\nU+65E5\t日\t日\n",
        "cjk-decomp.txt": "明:a(日,月)\n林:ra(木)\n月:d(冂,二)\n",
        "junda.tsv": "1\t明\t60\t60\tming2\tbright\n2\t林\t30\t90\n3\t日\t10\t100\n",
        "hsk30_chars.tsv": "character\tlevel\n林\t1\n明\t2\n",
        "Unihan_IRGSources.txt": "U+65E5\tkTotalStrokes\t4\nU+660E\tkTotalStrokes\t8\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "data.pkl").write_bytes(pickle.dumps({"明": [["日", "月"]]}))
    monkeypatch.setattr(fetch, "get", lambda name: tmp_path)


@pytest.mark.parametrize(
    "fields, nodes, cost",
    [
        (("data.count=2",), "明林日月木", 7),
        (("data.count=1", "data.grades=False"), "明日月", 4),
        (("data.count=2", "data.source=cjk-decomp"), "明林二冂日月木", 10),
        (("data.count=3", "data.source=chaizi"), "明林日月", 5),
        (("data.count=2", "method.cost=combinations"), "明林日月木", 5),
        # Only primitives cost their strokes; those of 月 and 木 are not known.
        (("data.count=2", "method.primitive=strokes"), "明林日月木", 10),
        (("data.count=2", "method.primitive=tenth_strokes"), "明林日月木", 7.4),
    ],
)
def test_networks_of_packages(packages, fields, nodes, cost):
    config = run.load_config("dnw", [f"--config.{x}" for x in fields])
    facts = tasks.read(config).facts
    net, table = facts["network"], facts["characters"]
    assert set(net.chars) == set(nodes) and net.own_cost.sum() == pytest.approx(cost)
    counts = {"明": 60, "林": 30, "日": 10}
    assert net.freq[0] == pytest.approx(60 / sum(counts.get(c, 0) for c in nodes))
    assert table.grade == ({} if "data.grades=False" in fields else {"林": 1, "明": 2})
    assert table.gloss == {"明": "bright"}


def test_common_characters_and_too_many(packages):
    config = run.load_config("dnw:gb2312", ["--config.data.count=3"])
    net = tasks.read(config).facts["network"]
    assert len(net.chars) == 3755 and net.chars[:3] == ("明", "林", "日")
    with pytest.raises(ValueError, match=r"data.count must be 1 .. 3, got 3500"):
        tasks.read(run.load_config("dnw"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"data.source": "idc"}, "data.source must be one of .*'ids'"),
        ({"data.seeds": "rare"}, "data.seeds must be one of"),
        ({"method.primitive": "one"}, "method.primitive must be one of"),
        ({"method.credit": "half"}, "method.credit must be one of"),
    ],
)
def test_refused_configs(fields, message):
    config = with_fields(load(), fields)
    with pytest.raises(ValueError, match=message):
        tasks.read(config)


def test_a_cycle_is_named(tmp_path):
    path = tmp_path / "cycle.csv"
    path.write_text("character,components,frequency\na,b,1\nb,c,1\nc,a,2\n")
    config = run.load_config("dnw", (), None, (str(path),))
    with pytest.raises(ValueError, match=r"cycle: \w -> \w -> \w -> \w \(each"):
        tasks.read(config)
