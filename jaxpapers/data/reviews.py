"""Files of review corpora: letters, NLPeer v2, RottenReviews, citations.

Sizes are bounded, gzipped files are read as they are; what is skipped is counted.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpapers.data import files, lines

MOST_BYTES = 32 * 2**20  # Of a letter; a corpus may have ``files.MAX_BYTES``.
# Fields of a row that hold a review's text, the first that it has.
TEXTS = ("review", "review_text", "text", "comments", "comment", "main", "report")


class Review(NamedTuple):
    """One review with what people said of it.

    Attributes:
      paper, id: of its corpus.
      text: all of it.
      labels: name -> number: scores of the reviewer (NLPeer), or mean human judgements
        of the review (RottenReviews).
    """

    paper: str
    id: str
    text: str
    labels: Mapping[str, float]


class Corpus(NamedTuple):
    """Reviews, and reason -> number of what was skipped."""

    reviews: list[Review]
    skipped: dict[str, int]


def read_file(path: str | Path) -> bytes:
    """Bytes of one letter.

    Raises:
      ValueError: empty, too large, and of ``files.read``.
      FileNotFoundError: no such file.
    """
    data = files.read(path, most=MOST_BYTES)
    if not data:
        raise ValueError(f"{path}: is empty, expected one correspondence")
    return data


def letters(paths: Sequence[str]) -> list[Path]:
    """Files of paths; of a folder its .xml, .txt and .json files, sorted.

    Raises:
      ValueError: a folder without any.
    """
    found: list[Path] = []
    for path in (Path(p).expanduser() for p in paths):
        if path.is_dir():
            own = [
                x for x in files.listing(path) if _kind(x) in (".xml", ".txt", ".json")
            ]
            if not own:
                raise ValueError(f"{path} has no .xml, .txt or .json file")
            found += own
        else:
            found.append(path)
    return found


def _kind(path: Path) -> str:
    """A file's suffix, that of its content where it is gzipped."""
    return Path(path.name.removesuffix(".gz")).suffix


def nlpeer(folder: str | Path) -> Corpus:
    """Reviews of a data set in the form of NLPeer and NLPeer v2.

    Args:
      folder: of one data set: ``data/<paper>/<version>/reviews.json``, each a list of
        objects with rid, report (field -> text) and scores (name -> value).

    Raises:
      ValueError: no reviews.json below it, or none with a text.
    """
    folder = Path(folder).expanduser()
    below = "*/*/reviews.json"
    paths = sorted(folder.glob(f"data/{below}")) or sorted(folder.glob(below))
    if not paths:
        raise ValueError(
            f"{folder} has no data/<paper>/<version>/reviews.json; expected a data set "
            "of NLPeer"
        )
    reviews, skipped = [], {}
    for file in paths:
        items = _json(_text(file, MOST_BYTES), file)
        if not isinstance(items, list):
            _count(skipped, "files that are no list")
            continue
        for item in items:
            report = item.get("report") if isinstance(item, Mapping) else None
            text = _text_of(report)
            if not text:
                _count(skipped, "reviews without text")
                continue
            labels = _numbers(item.get("scores"))
            paper = file.parent.parent.name
            reviews.append(Review(paper, str(item.get("rid")), text, labels))
    if not reviews:
        raise ValueError(f"{folder}: no review has a text ({skipped})")
    return Corpus(reviews, skipped)


def rotten_reviews(path: str | Path, text: str = "", prefix: str = "") -> Corpus:
    """Reviews with human judgements, of a file of JSON lines such as RottenReviews'.

    Every number of a row is a label, of nested objects "group.name"; lists of numbers are
    their mean (several people). Rows of the same review are averaged.

    Args:
      path: human_annotation_data.jsonl, or any file of such rows.
      text: field of the review's text; "": the first of ``TEXTS`` that a row has.
      prefix: only labels whose name begins so.

    Raises:
      ValueError: no JSON lines, or none with a text and a label.
    """
    path = Path(path)
    reviews: dict[tuple[str, str], tuple[str, dict[str, list[float]]]] = {}
    skipped: dict[str, int] = {}
    for row in _rows(path):
        body = row.get(text) if text else next(
            (row[t] for t in TEXTS if row.get(t)), None
        )  # fmt: skip
        body = _text_of(body)
        labels = {k: v for k, v in _numbers(row).items() if k.startswith(prefix)}
        labels = {k: v for k, v in labels.items() if not k.endswith("id")}
        if not body or not labels:
            reason = "rows without text" if not body else "rows without labels"
            _count(skipped, reason)
            continue
        paper = str(row.get("paper_id") or row.get("forum") or row.get("title") or "")
        kept = reviews.setdefault((paper, body), (str(row.get("review_id", "")), {}))
        for k, v in labels.items():
            kept[1].setdefault(k, []).append(v)
    if not reviews:
        raise ValueError(
            f"{path}: no row has a text and a number ({skipped}); name the field of the "
            f"text, expected one of {TEXTS}"
        )
    return Corpus(
        [
            Review(paper, id, body, {k: sum(v) / len(v) for k, v in labels.items()})
            for (paper, body), (id, labels) in reviews.items()
        ],
        skipped,
    )


class Citation(NamedTuple):
    """Metadata of one paper; None where the source does not say.

    Attributes:
      doi, year, field: of the paper.
      by_year: year -> citations; of OpenAlex about the last ten years.
      total: citations of all years.
      authors: their number.
      as_of: year of the data.
    """

    doi: str
    year: int | None
    field: str
    by_year: Mapping[int, int]
    total: int | None
    authors: int | None
    as_of: int | None = None

    def within(self, years: int) -> int | None:
        """Citations from the year of publication to ``years`` later; None: not known.

        They are not where the window has not ended by the year of the data, or begins
        before the first year that is listed while the years do not add up to the total.
        """
        if self.year is None:
            return None
        last = self.year + years
        if self.as_of is not None and last >= self.as_of:
            return None
        if not self.by_year:
            return 0 if self.total == 0 else None
        listed = sum(self.by_year.values())
        if self.year < min(self.by_year) and (
            self.total is None or listed < self.total
        ):
            return None
        return sum(n for y, n in self.by_year.items() if self.year <= y <= last)


class Citations(dict[str, Citation]):
    """DOI in lower case -> metadata; ``skipped``: reason -> number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, int] = {}

    def put(self, c: Citation) -> None:
        """Adds a row; one without a DOI is of no letter."""
        if c.doi:
            self[c.doi] = c
        else:
            _count(self.skipped, "rows without a DOI")


def citations(path: str | Path) -> Citations:
    """Metadata by DOI, of saved JSON of OpenAlex or Crossref, or of a CSV.

    Args:
      path: JSON or JSON lines of OpenAlex works or Crossref messages; or a CSV with
        columns doi, year, field, cites (and authors).

    Raises:
      ValueError: no rows with a DOI; a column that is missing.
    """
    path = Path(path)
    if _kind(path) == ".csv":
        return _citations_of_csv(path)
    found = Citations()
    for row in _rows(path):
        for item in _works(row):
            openalex = "counts_by_year" in item or "doi" in item
            found.put((_openalex if openalex else _crossref)(item))
    if not found:
        raise ValueError(
            f"{path}: no work with a DOI; expected OpenAlex or Crossref JSON"
        )
    return found


def _works(row: Mapping) -> Iterator[Mapping]:
    for key in ("results", "items"):
        if isinstance(row.get(key), list):
            yield from (x for x in row[key] if isinstance(x, Mapping))
            return
    message = row.get("message")
    if isinstance(message, Mapping):
        yield from _works(message)
    else:
        yield row


def _openalex(item: Mapping) -> Citation:
    topic = item.get("primary_topic") or {}
    part = topic.get("field") if isinstance(topic, Mapping) else None
    counts = {
        int(c["year"]): int(c["cited_by_count"])
        for c in item.get("counts_by_year") or []
        if isinstance(c, Mapping) and "year" in c and "cited_by_count" in c
    }
    return Citation(
        bare_doi(item.get("doi")), _int(item.get("publication_year")),
        str((part or {}).get("display_name") or ""), counts,
        _int(item.get("cited_by_count")), len(item.get("authorships") or []) or None,
        _year(str(item.get("updated_date") or "")[:4], counts),
    )  # fmt: skip


def _crossref(item: Mapping) -> Citation:
    issued = (item.get("issued") or {}).get("date-parts") or [[None]]
    indexed = (item.get("indexed") or {}).get("date-parts") or [[None]]
    subject = item.get("subject") or [""]
    return Citation(
        bare_doi(item.get("DOI")), _int(issued[0][0] if issued[0] else None),
        str(subject[0]), {}, _int(item.get("is-referenced-by-count")),
        len(item.get("author") or []) or None,
        _year(indexed[0][0] if indexed[0] else None, {}),
    )  # fmt: skip


def _year(stated: Any, counts: Mapping[int, int]) -> int | None:
    """The year of the data: that of its date, or of a later count; None: no date."""
    year = _int(stated)
    return None if year is None else max((year, *counts))


def _citations_of_csv(path: Path) -> Citations:
    found = Citations()
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    with files.parsing(path, "no CSV"):
        rows = [(reader.line_num, row) for row in reader]
    missing = {"doi", "year", "field", "cites"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path} lacks the columns {sorted(missing)}")
    for number, row in rows:
        year, total = _int(row["year"]), _int(row["cites"])
        if year is None or total is None:
            raise ValueError(
                f"{path}, line {number}: year and cites must be whole numbers, got "
                f"{row['year']!r} and {row['cites']!r}"
            )
        authors = _int(row.get("authors"))
        found.put(
            Citation(bare_doi(row["doi"]), year, row["field"], {}, total, authors)
        )
    if not found:
        raise ValueError(f"{path}: no row has a DOI ({found.skipped})")
    return found


def bare_doi(value: Any) -> str:
    """A DOI without its address, in lower case."""
    text = str(value or "").strip().lower()
    for start in ("https://doi.org/", "http://doi.org/", "https://dx.doi.org/",
                  "http://dx.doi.org/", "doi:"):  # fmt: skip
        text = text.removeprefix(start)
    return text


def _int(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _rows(path: Path) -> Iterator[Mapping]:
    """Objects of JSON lines, or of one JSON document."""
    if _kind(path) == ".jsonl":
        for number, line in lines.numbered(path):
            yield _object(_json(line, f"{path}, line {number}"), path)
        return
    value = _json(_text(path), path)
    for item in value if isinstance(value, list) else [value]:
        yield _object(item, path)


def _object(value: Any, path: Path) -> Mapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: expected objects, got {type(value).__name__}")
    return value


def _text(path: Path, most: int = files.MAX_BYTES) -> str:
    try:
        return files.read(path, most=most).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: no UTF-8 at byte {e.start}") from None


def _json(text: str, where: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: no JSON: {e}") from None


def _text_of(value: Any) -> str:
    """A text, or the texts of an object's fields."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        parts = [v.strip() for v in value.values() if isinstance(v, str)]
        return "\n\n".join(p for p in parts if p)
    return ""


def _numbers(value: Any, name: str = "") -> dict[str, float]:
    """Numbers of nested objects by dotted names; lists of numbers as their mean."""
    if isinstance(value, bool) or value is None:
        return {}
    if isinstance(value, int | float):
        return {name: float(value)} if math.isfinite(value) else {}
    if isinstance(value, str):
        start = value.strip().split(":")[0].split()[0:1]
        try:
            number = float(start[0]) if start and len(value) < 80 else math.nan
        except ValueError:
            return {}
        return {name: number} if math.isfinite(number) else {}
    if isinstance(value, list):
        each = [
            v for v in value if isinstance(v, int | float) and not isinstance(v, bool)
        ]
        return {name: sum(each) / len(each)} if each and len(each) == len(value) else {}
    if isinstance(value, Mapping):
        found = {}
        for k, v in value.items():
            found |= _numbers(v, f"{name}.{k}" if name else str(k))
        return found
    return {}


def _count(skipped: dict[str, int], reason: str) -> None:
    skipped[reason] = skipped.get(reason, 0) + 1
