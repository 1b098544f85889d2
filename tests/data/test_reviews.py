"""Review corpora and citation metadata in their documented forms."""

import json

import pytest

from jaxpapers.data import reviews


def test_nlpeer(tmp_path):
    folder = tmp_path / "data" / "p1" / "1"
    folder.mkdir(parents=True)
    items = [
        {"rid": "a", "report": {"main": "", "weaknesses": "Too small."},
         "scores": {"overall": "3: weak", "soundness": 4}},
        {"rid": "b", "report": {"main": ""}, "scores": {}},
    ]  # fmt: skip
    (folder / "reviews.json").write_text(json.dumps(items))
    corpus = reviews.nlpeer(tmp_path)
    labels = {"overall": 3.0, "soundness": 4.0}
    assert corpus.reviews == [reviews.Review("p1", "a", "Too small.", labels)]
    assert corpus.skipped == {"reviews without text": 1}
    with pytest.raises(ValueError, match=r"no data/<paper>"):
        reviews.nlpeer(folder)


def test_rotten_reviews_average_people(tmp_path):
    path = tmp_path / "human_annotation_data.jsonl"
    rows = [
        {"paper_id": "x", "review": "Good.", "human": {"Vagueness": 1, "by": "n"}},
        {"paper_id": "x", "review": "Good.", "human": {"Vagueness": 3}},
        {"paper_id": "y", "review": "Bad.", "human": {"Vagueness": [2, 4]}},
        {"paper_id": "z", "review": ""},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    corpus = reviews.rotten_reviews(path)
    found = {r.paper: r.labels for r in corpus.reviews}
    assert found == {"x": {"human.Vagueness": 2.0}, "y": {"human.Vagueness": 3.0}}
    assert corpus.skipped == {"rows without text": 1}
    path.write_text("{")
    with pytest.raises(ValueError, match="line 1: no JSON"):
        reviews.rotten_reviews(path)
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="name the field"):
        reviews.rotten_reviews(path)


def test_citations(tmp_path):
    path = tmp_path / "works.json"
    work = {
        "doi": "https://doi.org/10.1/A", "publication_year": 2015, "cited_by_count": 9,
        "counts_by_year": [{"year": y, "cited_by_count": y - 2014} for y in
                           (2015, 2016, 2017, 2018)],
        "primary_topic": {"field": {"display_name": "Biology"}},
        "authorships": [{}, {}],
    }  # fmt: skip
    path.write_text(json.dumps({"results": [work]}))
    c = reviews.citations(path)["10.1/a"]
    assert (c.year, c.field, c.authors, c.total) == (2015, "Biology", 2, 9)
    assert c.within(2) == 1 + 2 + 3
    message = {"DOI": "10.1/B", "issued": {"date-parts": [[2016, 2]]},
               "is-referenced-by-count": 4, "author": [{}],
               "subject": ["Physics"]}  # fmt: skip
    path.write_text(json.dumps({"message": {"items": [message]}}))
    c = reviews.citations(path)["10.1/b"]
    assert (c.year, c.total, c.field, c.within(2)) == (2016, 4, "Physics", None)
    table = tmp_path / "t.csv"
    table.write_text("doi,year,field,cites\ndoi:10.1/C,2017,Art,3\n")
    assert reviews.citations(table)["10.1/c"].total == 3
    table.write_text("doi,year,field,cites\n10.1/C,x,Art,3\n")
    with pytest.raises(ValueError, match="line 2"):
        reviews.citations(table)
    table.write_text("doi,year\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['cites', 'field'\]"):
        reviews.citations(table)


def test_files_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "x.xml"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        reviews.read_file(path)
    monkeypatch.setattr(reviews, "MOST_BYTES", 3)
    path.write_bytes(b"1234")
    with pytest.raises(ValueError, match="at most 3 are read"):
        reviews.read_file(path)
    with pytest.raises(ValueError, match="is a folder"):
        reviews.read_file(tmp_path)
    assert reviews.letters([str(tmp_path)]) == [path]
    path.unlink()
    with pytest.raises(ValueError, match="has no .xml"):
        reviews.letters([str(tmp_path)])
