"""What a run gives a notebook: rows, curves, metrics, pictures, and several in one."""

import json
from pathlib import Path

import pytest

from jaxpapers import cli, outcome, run, study
from tests.toys.command import CONFIG, call, register


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    register(monkeypatch.setattr, monkeypatch.setitem)


@pytest.mark.programs(16)  # Two studies of two programs.
def test_rows_curves_pictures_and_the_same_read_back(tmp_path, capsys):
    found = call(tmp_path / "a", "method.others=True", seeds=2)
    assert found.folder == tmp_path / "a" and found.seconds > 0
    own, other = [r for r in found.rows if r["label"] == "this model"]
    assert list(own)[:5] == list(outcome.FIELDS)
    assert [own["seed"], other["seed"]] == [0, 1] and own["trained"]
    assert own["folder"] == tmp_path / "a" / "seed0"
    assert own["mse"] == found.content["rows"][0]["numbers"][0]["mse"]
    zero = next(r for r in found.rows if r["label"] == "zero")
    assert zero["folder"] is None and not zero["trained"]
    points = [c for c in found.curves if c["label"] == "this model" and c["seed"] == 1]
    x, y = next(iter(found.content["rows"][0]["curves"][1].values()))
    assert [(p["x"], p["y"]) for p in points[: len(x)]] == list(zip(x, y))
    steps = [m for m in found.metrics if m["seed"] == 0 and m["label"] == "this model"]
    assert steps and {"step", "loss"} <= set(steps[0]) | set(steps[-1])
    assert [p.name for p in found.pictures] == [
        "comparison.png", "curves.png", "loss.png",
    ]  # fmt: skip
    again = study.load(tmp_path / "a")
    assert again.content == found.content and again.seconds is None
    assert again.rows == found.rows and str(again) == str(found)
    # The table is that of the command line.
    assert "this model" in str(found)
    page = found._repr_html_()
    assert page.count("<img") == 3 and "data:image/png;base64,iVBOR" in page

    call(tmp_path / "b", "method.others=True", "optim.lr=0.02")
    capsys.readouterr()
    runs = [str(tmp_path / x) for x in "ab"]
    assert cli.main(["compare", *runs, "-o", str(tmp_path / "c.png")]) == 0
    shown = capsys.readouterr().out
    for label in ("a: this model", "b: this model", "zero"):
        assert sum(line.startswith(f"{label} ") for line in shown.splitlines()) == 1
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_a_study_that_trains_nothing(tmp_path):
    found = run.run(
        "none", files=["numbers.txt"], config_path=f"{CONFIG}:none",
        workdir=str(tmp_path), quiet=True, seeds=2,
    )  # fmt: skip
    assert {r["column"] for r in found.rows} == {"left", "right"}
    assert all(r["folder"] is None for r in found.rows) and found.metrics == []
    other = run.run(
        "none", files=["numbers.txt"], config_path=f"{CONFIG}:none",
        workdir=str(tmp_path / "x"), quiet=True,
    )  # fmt: skip
    # Not trained, and not the same numbers: both stand, each by its folder.
    for both in ([found, other], [other, found]):
        labels = {r.row.label for r in outcome.together(both)[1]}
        assert {f"{tmp_path.name}: ours", "x: ours"} <= labels and "ours" not in labels


ROW = {
    "label": "a <b>", "column": "", "trained": True, "folders": ["."], "tables": [],
    "numbers": [{"m": None}], "curves": [{"y against x": [[0, 1], [[2, 3], [4, 5]]]}],
}  # fmt: skip
CONTENT = {"title": "t [x]", "metric": "m", "rising": True, "seeds": [0], "rows": [ROW]}


def written(folder: Path, **fields) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(CONTENT | fields))
    return folder


def test_members_escapes_and_numbers_that_are_not(tmp_path):
    found = study.load(written(tmp_path / "a"))
    assert found.rows[0]["m"] is None and "nan" in str(found)
    assert [(c["member"], c["x"], c["y"]) for c in found.curves] == [
        (0, 0, 2), (0, 1, 3), (1, 0, 4), (1, 1, 5),
    ]  # fmt: skip
    page = found._repr_html_()
    assert "a &lt;b&gt;" in page and "t [x]" in page
    large = tmp_path / "a" / "large.png"
    large.write_bytes(bytes(2**20 + 1))
    assert str(large) in found._repr_html_() and "<img" not in found._repr_html_()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rows": 1}, "field 'rows' must be of type list, got 1"),
        ({"rows": [{"label": 3}]}, r"'rows\[0\].label' must be of type str"),
        (
            {"rows": [ROW | {"folders": ["../../etc"]}]},
            "leaves the study's folder",
        ),
    ],
    ids=str,
)
def test_damaged_files_are_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        study.load(written(tmp_path, **fields))


def test_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished study"):
        study.load(tmp_path / "none")
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        study.load(tmp_path)
    (tmp_path / "comparison.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        study.load(tmp_path)
    a, b = written(tmp_path / "a"), written(tmp_path / "b", metric="n")
    with pytest.raises(ValueError, match="b measures .* by 'n'.* by 'm'"):
        run.compare([str(a), str(b)])
    with pytest.raises(ValueError, match="named twice"):
        run.compare([str(a), str(a)])
