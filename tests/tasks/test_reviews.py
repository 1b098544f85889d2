"""``run peer_review``: the generated study, letters of one's own, the same bytes."""

import json

import numpy as np
import pytest

from jaxpapers import run, tasks
from jaxpapers.data import chat
from jaxpapers.papers import peer_review as pr
from jaxpapers.papers.peer_review import extraction
from jaxpapers.tasks import letters, model_coder
from tests.papers.test_peer_review_extraction import TEXT, reply_of

SMALL = [
    "--config.data.papers=90", "--config.data.texts=6", "--config.method.bootstrap=64",
    "--config.method.fields=30",
]  # fmt: skip


@pytest.mark.programs(90)  # Six kinds of fits, two bootstraps, permutations, measures.
def test_generated_study(call, tmp_path):
    code, out, err = call("run", "peer_review:smoke", *SMALL, f"--workdir={tmp_path}/a")
    assert code == 0, err
    for words in ("rule extractor", "length only", "coefficients against the truth",
                  "replications", "tenths of strength", "fields compared"):  # fmt: skip
        assert words in out, words
    first = json.loads((tmp_path / "a" / "comparison.json").read_text())
    rows = {r["label"]: r["numbers"][0] for r in first["rows"]}
    assert rows["rule extractor"]["structure"] == 1
    assert (
        rows["rule extractor"]["spearman"] > 0.5 + rows["length only"]["spearman"] / 2
    )
    assert r"\begin{tabular}" in (tmp_path / "a" / "regressions.tex").read_text()
    code, _, err = call("run", "peer_review:smoke", *SMALL, f"--workdir={tmp_path}/b")
    assert code == 0, err
    for name in (
        "comparison.json",
        "regressions.txt",
        "regressions.tex",
        "deciles.npz",
    ):
        one, two = ((tmp_path / x / name).read_bytes() for x in "ab")
        assert one == two, name


@pytest.mark.programs(40)  # The measures' program at two shapes.
def test_letters_of_the_user(call, tmp_path):
    (tmp_path / "one.txt").write_text(TEXT)
    code, out, err = call(
        "run", "peer_review", tmp_path / "one.txt", f"--workdir={tmp_path}/run"
    )
    assert code == 0, err
    assert "1 letters, 2 points, 0 files skipped" in out
    made = json.loads((tmp_path / "run" / "one.json").read_text())
    assert [len(q["answers"]) for q in made["points"]] == [1, 0]
    lines = (tmp_path / "run" / "points.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[1].startswith("one,1.1.1,1,1,")
    (tmp_path / "two.xml").write_text("<a></a>")
    code, out, err = call("run", "peer_review", tmp_path, f"--workdir={tmp_path}/run")
    assert code == 0 and "1 files skipped" in out and "no sub-article" in out
    code, _, err = call("run", "peer_review", tmp_path / "two.xml")
    assert code == 1 and "no sub-article" in err


def test_no_letter_is_lost_to_its_name(tmp_path):
    paths = []
    for x in "abcd":
        paths.append(tmp_path / x / "x" / "1.txt")
        paths[-1].parent.mkdir(parents=True)
    paths += [tmp_path / f"p.{x}" for x in ("txt", "xml", "json")]
    paths += [tmp_path / "y.txt", tmp_path / "y.txt", tmp_path / "all letters.txt"]
    for path in paths:
        path.write_text(TEXT)
    wanted = ["a/x/1", "b/x/1", "c/x/1", "d/x/1", "p.txt", "p.xml", "p.json",
              "y.txt (1)", "y.txt (2)"]  # fmt: skip
    labels = letters.labels_of(paths)
    assert labels[:-1] == wanted and labels[-1] not in (*wanted, "all letters")
    data = letters.read([str(x) for x in paths if x.suffix == ".txt"])
    assert len(data.facts["files"]) == 8


def options(**fields):
    config = run.load_config("peer_review:smoke", [], None, ())
    config.unlock()
    for name, value in fields.items():
        group, _, field = name.partition("_")
        config[group][field] = value
    return config


def test_citations_of_one_kind(tmp_path):
    """Of a window of years, or of all years, and how many letters have neither."""
    works = [
        {"doi": "10.1/0", "publication_year": 2012, "cited_by_count": 150,
         "counts_by_year": [{"year": 2017, "cited_by_count": 9}]},
        {"doi": "10.1/1", "publication_year": 2017, "cited_by_count": 9,
         "counts_by_year": [{"year": 2018, "cited_by_count": 9}]},
        {"DOI": "10.1/2", "issued": {"date-parts": [[2016]]},
         "is-referenced-by-count": 4},
        {"DOI": "10.1/3", "issued": {"date-parts": [[2016]]},
         "is-referenced-by-count": 5},
        {"publication_year": 2016, "doi": ""},
    ]  # fmt: skip
    path = tmp_path / "w.json"
    numbers = {k: np.array([0.5, 0.5, 0.5, np.nan])
               for k in ("strength", "quality", "burden")}  # fmt: skip

    class File:
        def __init__(self, doi):
            self.paper = {"doi": doi}

    files = {str(i): File(f"10.1/{i}") for i in range(4)}
    notes = []
    for given in (works, works[2:]):
        path.write_text(json.dumps(given))
        config = options(data_citations=str(path))
        ((table,), _) = letters._regressions(config, files, numbers)
        notes.append(table.rows[0][0])
    assert notes[0].startswith(
        "1 of 4 letters have citations within 2 years, of 3 they are not known, 1 rows "
        "without a DOI"
    )
    assert notes[1].startswith(
        "1 of 4 letters have citations of all years, 1 have no rev"
    )


# The measures' program.
@pytest.mark.programs(12)
def test_what_a_model_left_out_is_told(tmp_path, monkeypatch):
    """Estimate before; failed reports, dropped opinions and usage after."""

    def answer(self, messages, schema):
        if "links" in schema["properties"]:
            return chat.Reply('{"links": []}', 10, 5)
        if "Figure 2" in messages[1]["content"]:
            return chat.Reply("I cannot.", 10, 5)
        one = reply_of("The sample is far too small")
        return chat.Reply(json.dumps({"opinions": [one, one]}), 10, 5)

    monkeypatch.setattr(chat.Endpoint, "__call__", answer)
    (tmp_path / "one.txt").write_text(TEXT)
    config = options(extract_model="m", extract_cache=str(tmp_path / "cache"),
                     data_path=(str(tmp_path / "one.txt"),))  # fmt: skip
    data = tasks.read(config)
    assert "m codes them, at first 2 requests, 0 cached" in data.summary
    study = tasks.study("peer_review", config, data, None)
    tables = {t.title: t.rows for t in study.rows(0)[0].measure().tables}
    assert "5 requests, 0 cached, 2 repairs" in tables["language model"][0][0]
    failed, dropped = tables["2 reports failed or opinions dropped"]
    assert failed[:2] == ("one", "round 1, reviewer 2") and "no JSON" in failed[2]
    assert dropped[1:] == ("opinion 'The sample is far too small'",
                           "the same quote again")  # fmt: skip


def test_coder_asks_through_the_chat_client(tmp_path):
    """A provider whose first reply is wrong is asked again; the cache answers later."""

    class Provider:
        identity = {"model": "toy"}

        def __init__(self):
            self.asked = 0

        def __call__(self, messages, schema):
            self.asked += 1
            if "links" in schema["properties"]:
                value = {"links": []}
            elif "Figure 2" in messages[1]["content"]:
                value = {"opinions": [reply_of("Figure 2 should be redrawn")]}
            elif len(messages) == 2:
                value = {"opinions": [reply_of("words that are not there at all, no")]}
            else:
                value = {"opinions": [reply_of("The sample is far too small")]}
            return chat.Reply(json.dumps(value))

    class Options:
        model, url, key, cache, recorded = "toy", "", "", str(tmp_path), False

    provider = Provider()
    coder = model_coder.Coder(Options, provider)
    file = pr.parse_review_file(TEXT)
    assert "2 requests" in coder.estimate([file])
    made = coder(file)
    assert [o.reviewer for o in made.opinions] == [1, 2] and not made.failed
    assert "1 repairs" in coder.usage()
    asked = provider.asked
    again = model_coder.Coder(Options, provider)(file)
    assert again.opinions == made.opinions and provider.asked == asked
    assert len(extraction.requests(file)) == 2
