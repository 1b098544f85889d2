"""Review corpora and citation metadata in their documented forms."""

import gzip
import json
import os

import pytest

from jaxpapers.data import lines, reviews


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


def test_windows_that_are_not_known(tmp_path):
    """OpenAlex lists some ten years; the year of the data is not over."""

    def within(year, counts, total, updated=None, years=2):
        work = {
            "doi": "10.1/a", "publication_year": year, "cited_by_count": total,
            "counts_by_year": [{"year": y, "cited_by_count": n}
                               for y, n in counts.items()],
            **({"updated_date": f"{updated}-03-01T00:00:00"} if updated else {}),
        }  # fmt: skip
        path = tmp_path / "works.json"
        path.write_text(json.dumps(work))
        return reviews.citations(path)["10.1/a"].within(years)

    later = {2017: 10, 2018: 20}
    assert within(2012, later, 150) is None
    assert within(2012, later, 30) == 0  # All are listed.
    assert within(2012, later, None) is None
    assert within(2017, later, 150) == 30
    assert within(2017, later, 30, 2019) is None
    assert within(2017, later, 30, 2020) == 30
    assert within(2018, {2019: 1, 2021: 1}, 2, 2020) == 1  # 2021 has begun.
    assert within(2015, {}, 0, 2018) == 0 and within(2015, {}, 3) is None


def test_rows_without_a_doi_are_of_no_letter(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text(
        "doi,year,field,cites\n,2017,Art,3\n10.1/C,2017,Art,4\n , 2016,A,1\n"
    )
    found = reviews.citations(table)
    assert list(found) == ["10.1/c"] and found.skipped == {"rows without a DOI": 2}
    table.write_text("doi,year,field,cites\n,2017,Art,3\n")
    with pytest.raises(ValueError, match="no row has a DOI"):
        reviews.citations(table)
    works = tmp_path / "w.json"
    works.write_text(
        json.dumps([{"doi": None, "publication_year": 2000}, {"DOI": "10.1/b"}])
    )
    assert reviews.citations(works).skipped == {"rows without a DOI": 1}


def test_files_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "x.xml"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="x.xml: is empty"):
        reviews.read_file(path)
    path.write_bytes(gzip.compress(b"1234"))
    assert reviews.read_file(path) == b"1234"
    monkeypatch.setattr(reviews, "MOST_BYTES", 3)
    for data in (b"1234", gzip.compress(b"1234")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="x.xml: more than the 3 bytes allowed"):
            reviews.read_file(path)
    with pytest.raises(ValueError, match="is a folder"):
        reviews.read_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for read in (reviews.read_file, reviews.citations, reviews.rotten_reviews):
        with pytest.raises(ValueError, match="pipe: is a pipe"):
            read(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="no file"):
        reviews.citations(tmp_path / "none.csv")
    (tmp_path / "._x.xml").write_bytes(b"1")  # What macOS adds.
    assert reviews.letters([str(tmp_path)]) == [path]
    path.unlink()
    with pytest.raises(ValueError, match="has no .xml"):
        reviews.letters([str(tmp_path)])


def test_corpora_are_gzipped_or_of_one_line(tmp_path):
    """Names tell the format; a line is bounded, and so is a document."""
    row = json.dumps({"DOI": "10.1/a", "is-referenced-by-count": 4})
    texts = {"w.jsonl.gz": row, "w.json.gz": f"[{row}]",
             "w.csv.gz": "doi,year,field,cites\n10.1/a,2017,A,4\n"}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert reviews.citations(tmp_path / name)["10.1/a"].total == 4
    path = tmp_path / "w.csv"
    path.write_bytes(b"doi,year,field,cites\n10.1/a,2017,\xff,4\n")
    with pytest.raises(ValueError, match="w.csv: no UTF-8 at byte 33"):
        reviews.citations(path)
    path.write_text('doi,year,field,cites\n10.1/a,2017,"A\nB",4\n')
    assert reviews.citations(path)["10.1/a"].field == "A\nB"
    path.write_text("doi,year,field,cites\n10.1/a,2017," + "A" * 200_000 + ",4\n")
    with pytest.raises(ValueError, match="w.csv: no CSV .*field larger"):
        reviews.citations(path)
    path = tmp_path / "w.jsonl"
    path.write_text(f'{row}\n{{"DOI": "{"x" * lines.MAX_LINE}"}}')
    with pytest.raises(ValueError, match="w.jsonl, line 2: more than 16,777,216 bytes"):
        reviews.citations(path)
