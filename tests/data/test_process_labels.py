"""Loaders of step labels: each format by hand, what they skip, what they refuse."""

import gzip
import json
import sys

import pytest

from jaxpapers.data import process_labels
from jaxpapers.data.process_labels import read


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


NESTED = {
    "id": 7,
    "question": "2+3?",
    "options": ["4", "5"],
    "answer": "B",
    "chain_of_thoughts": [
        {"steps": ["a", "b"], "labels": [1, -1], "parsed_answer": "B",
         "parsed_answer_correctness": True, "prm_reward": [0.5, 0.25]},
        {"steps": ["a"], "labels": None},
        {"steps": [], "labels": []},
    ],
    "metadata": {"category": "physics"},
}  # fmt: skip


def test_nested(tmp_path):
    as_list = tmp_path / "rows.json"
    as_list.write_text(json.dumps([NESTED]))
    packed = tmp_path / "rows.gz"
    packed.write_bytes(gzip.compress(json.dumps(NESTED).encode()))
    for path in (as_list, packed, write(tmp_path, [NESTED])):
        loaded = read(path)
        [record] = loaded.records
        assert record["question"] == "Question: 2+3?\nA. 4\nB. 5"
        assert (record["id"], record["category"]) == (7, "physics")
        first, second = record["chain_of_thoughts"]
        assert first == {
            "steps": ["a", "b"], "labels": [1, -1], "parsed_answer": "B",
            "parsed_answer_correctness": True, "prm_reward": [0.5, 0.25],
        }  # fmt: skip
        assert second == {"steps": ["a"], "labels": None}
        assert loaded.skipped == {
            "solutions without labels": 1, "solutions without steps": 1,
        }  # fmt: skip
        assert "left out: 1 solutions without labels" in loaded.summary


def test_flat_rows_with_other_columns(tmp_path):
    row = {"problem": "q", "cot": ["a"], "marks": [0.5]}
    columns = {"question": "problem", "steps": "cot", "labels": "marks"}
    [record] = read(write(tmp_path, [row]), columns=columns).records
    assert record["question"] == "q"
    assert record["chain_of_thoughts"] == [{"steps": ["a"], "labels": [0.5]}]
    with pytest.raises(ValueError, match="columns has \\['text'\\]"):
        read(tmp_path / "rows.jsonl", columns={"text": "x"})
    with pytest.raises(ValueError, match="row 0: question must be a text.*by columns"):
        read(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="a solution lacks labels"):
        read(tmp_path / "rows.jsonl", columns={"question": "problem", "steps": "cot"})


def completion(text, rating):
    return {"text": text, "rating": rating, "flagged": None}


def test_prm800k(tmp_path):
    steps = [
        {"completions": [completion("a", 1), completion("x", -1)],
         "human_completion": None, "chosen_completion": 0},
        {"completions": [completion("y", None)],
         "human_completion": {"text": "b"}, "chosen_completion": None},
        {"completions": [completion("c", -1), completion("z", 0)],
         "human_completion": None, "chosen_completion": None},
    ]  # fmt: skip
    question = {"problem": "q", "ground_truth_answer": "4"}
    rows = [
        {"question": question,
         "label": {"steps": steps, "finish_reason": "found_error"}},
        {"question": question, "label": {"steps": steps, "finish_reason": "give_up"}},
    ]  # fmt: skip
    loaded = read(write(tmp_path, rows), "prm800k")
    [record] = loaded.records
    assert record["answer"] == "4"
    assert record["chain_of_thoughts"] == [
        {
            # The first error, at which phase 2 stops, is the last step.
            "steps": ["a", "b", "c"], "labels": [1, 1, -1],
            "augs": [{"aug_step": "x", "aug_idx": 0, "aug_type": -1},
                     {"aug_step": "z", "aug_idx": 2, "aug_type": 0}],
        }
    ]  # fmt: skip
    assert loaded.skipped == {
        "completions without a rating or a text": 1,
        "problems given up (give_up)": 1,
    }
    wrong = {"steps": [steps[2]], "finish_reason": "found_error"}
    rows = [{"question": question, "label": wrong}]
    [record] = read(write(tmp_path, rows), "prm800k").records
    assert record["chain_of_thoughts"][0]["labels"] == [-1]


def test_math_shepherd(tmp_path):
    given = "How many? Step 1: two. ки\nStep 2: four. ки"
    label = "How many? Step 1: two. +\nStep 2: four. -"
    rows = [{"input": given, "label": label, "task": "GSM8K"},
            {"input": "no tag", "label": "no tag", "task": "GSM8K"}]  # fmt: skip
    loaded = read(write(tmp_path, rows), "math-shepherd")
    [record] = loaded.records
    assert (record["question"], record["category"]) == ("How many?", "GSM8K")
    [solution] = record["chain_of_thoughts"]
    assert solution == {"steps": ["Step 1: two.", "Step 2: four."], "labels": [1, -1]}
    assert loaded.skipped == {"rows without the tag ки": 1}
    # A question may speak of steps, too; what has no tag is counted.
    longer = ("How many?", "In Step 1 of a game, how many?")
    row = {
        "input": given.replace(*longer) + " x",
        "label": label.replace(*longer) + " x",
    }
    rows = [row]
    loaded = read(write(tmp_path, rows), "math-shepherd")
    assert loaded.records[0]["question"] == "In Step 1 of a game, how many?"
    assert loaded.skipped == {"texts after the last tag ки": 1}
    bad = [{"input": given, "label": label.replace("two", "six"), "task": "x"}]
    with pytest.raises(ValueError, match="not the input with"):
        read(write(tmp_path, bad), "math-shepherd")


def test_trl_and_processbench(tmp_path):
    row = {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}
    [record] = read(write(tmp_path, [row]), "trl").records
    assert record["chain_of_thoughts"] == [{"steps": ["a", "b"], "labels": [1, -1]}]
    rows = [{"problem": "q", "steps": ["a", "b"], "label": label} for label in (1, -1)]
    one, none = read(write(tmp_path, rows), "processbench").records
    assert one["chain_of_thoughts"][0]["labels"] == [1, -1]
    assert none["chain_of_thoughts"][0] == {
        "steps": ["a", "b"], "labels": [1, 1], "first_error": -1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind, row, message",
    [
        ("trl", {"prompt": "q", "completions": ["a"], "labels": [1]}, "of booleans"),
        (
            "trl",
            {"prompt": "q", "completions": ["a"], "labels": []},
            "of booleans|have 0",
        ),
        (
            "processbench",
            {"problem": "q", "steps": ["a"], "label": 1},
            "index of one of 1",
        ),
        ("processbench", {"problem": "q", "steps": "a", "label": 0}, "list of texts"),
        (
            "nested",
            {"question": "q", "steps": ["a"], "labels": [1, 1]},
            "1 steps have 2",
        ),
        (
            "nested",
            {"question": "q", "steps": ["a"], "labels": [True]},
            "labels must be",
        ),
        ("nested", {"question": "q", "steps": ["a"], "labels": [3]}, "labels must be"),
        ("nested", ["q"], "expected an object"),
        ("nested", {"question": "q", "steps": [], "labels": []}, "no record is left"),
        ("prm800k", {"question": "q"}, "expected question.problem"),
        ("csv", {}, "kind must be one of"),
    ],
)
def test_refused(tmp_path, kind, row, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, [row]), kind)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("nested", {"question": "q", "steps": ["a", " "], "labels": [1, -1]}),
        ("trl", {"prompt": "q", "completions": ["a", ""], "labels": [True, False]}),
        ("processbench", {"problem": "q", "steps": ["", "b"], "label": -1}),
    ],
)
def test_solutions_with_an_empty_step_are_left_out(tmp_path, kind, row):
    """They have no place for a label, and would end a run."""
    steps = "completions" if kind == "trl" else "steps"
    good = {**row, steps: [x.strip() or "c" for x in row[steps]]}
    loaded = read(write(tmp_path, [row, good]), kind)
    assert len(loaded.records) == 1
    assert loaded.skipped == {"solutions with an empty step": 1}


def test_broken_files(tmp_path):
    path = tmp_path / "x.jsonl"
    for text in ('{"question": ', "[" * 100_000, '[{"question"', "nonsense"):
        path.write_text(text)
        with pytest.raises(ValueError, match="x.jsonl"):
            read(path)
    path.write_text('[{"question": "q", "steps": ["a"], "labels": [1]}, 3]')
    with pytest.raises(ValueError, match="x.jsonl, row 1: expected an object"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.jsonl")


def test_parquet_says_what_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1" + b"\0" * 32)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        read(path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"question": "q", "steps": ["a", "b"], "labels": [1, -1]}
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    assert len(read(path).records) == 2
    assert read(path).records[0]["chain_of_thoughts"][0]["labels"] == [1, -1]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="not a Parquet file"):
        read(path)


def test_options_have_letters():
    with pytest.raises(ValueError, match="at most 26"):
        process_labels.with_options("q", ["x"] * 27)
