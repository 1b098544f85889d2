"""Solutions with a label for every step, from the files of others.

Each reader gives the paper's records: ``id``, ``question``, ``category``, ``answer`` and
``chain_of_thoughts`` of ``steps``, ``labels`` (+1, -1, or None: unknown), ``augs`` and
what else a solution has. What is left out is counted by reason, never silent.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxpapers.data import files, lines

SHEPHERD_TAG = "ки"
MAX_ROWS = 2_000_000
NESTED = {
    "id": "id", "question": "question", "options": "options", "answer": "answer",
    "category": "category", "solutions": "chain_of_thoughts", "steps": "steps",
    "labels": "labels", "augs": "augs", "parsed_answer": "parsed_answer",
    "correct": "parsed_answer_correctness", "rewards": "prm_reward",
}  # fmt: skip
"""Columns of the nested form: our name -> theirs; ``read`` takes others."""
_BY_SOLUTION = ("augs", "parsed_answer", "correct", "rewards")
_NAMES = {
    "correct": "parsed_answer_correctness", "rewards": "prm_reward",
}  # fmt: skip


class Loaded(NamedTuple):
    """Records, and what was left out.

    Attributes:
      records: see the module.
      skipped: reason -> number of rows, solutions or steps.
    """

    records: list[dict[str, Any]]
    skipped: dict[str, int]

    @property
    def summary(self) -> str:
        """One line about both."""
        solutions = sum(len(r["chain_of_thoughts"]) for r in self.records)
        left = ", ".join(f"{n:,} {reason}" for reason, n in self.skipped.items())
        return (
            f"{len(self.records):,} questions, {solutions:,} solutions"
            f"{'; left out: ' + left if left else ''}"
        )


def read(
    path: str | Path,
    kind: str = "nested",
    columns: Mapping[str, str] | None = None,
) -> Loaded:
    """Reads a file, JSON, JSON lines or Parquet by its first bytes, gzipped or not.

    Args:
      path: of the file.
      kind: one of ``KINDS``.
      columns: our name -> the file's, for those that differ: of ``NESTED``, or of the
        kind's own columns.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown kind or column, a broken file, a row that lacks a column, a
        number of labels that is not that of the steps; with the row's number. No record
        that is left.
      ModuleNotFoundError: a Parquet file without pyarrow.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
    names, parse = KINDS[kind]
    columns = dict(columns or {})
    unknown = sorted(set(columns) - set(names))
    if unknown:
        raise ValueError(
            f"columns has {unknown}, {kind} knows {sorted(names)}; give ours -> theirs"
        )
    names = {**names, **columns}
    records, skipped = [], {}

    def skip(reason: str) -> None:
        skipped[reason] = skipped.get(reason, 0) + 1

    for number, row in _rows(path):
        try:
            record = parse(row, names, skip)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
        if record is None:
            continue
        solutions = record["chain_of_thoughts"]
        whole = [x for x in solutions if all(step.strip() for step in x["steps"])]
        for _ in range(len(solutions) - len(whole)):
            skip("solutions with an empty step")
        if whole:
            record["chain_of_thoughts"] = whole
            records.append({"id": str(number), "category": "", **record})
    if not records:
        raise ValueError(
            f"{path}: no record is left of it; left out: {skipped or 'all'}"
        )
    return Loaded(records, skipped)


def _nested(row, names, skip):
    """A question with its solutions, or a flat row with one."""
    record = {k: row[names[k]] for k in ("id", "answer", "category") if names[k] in row}
    metadata = row.get("metadata")
    if "category" not in record and isinstance(metadata, dict):
        record["category"] = metadata.get("category", "")
    question = _text(row, names, "question")
    options = row.get(names["options"])
    if options and "\nA. " not in question:
        question = with_options(question, options)
    record["question"] = question
    given = row.get(names["solutions"])
    solutions = [row] if given is None else given
    if not isinstance(solutions, list) or not all(map(_is_dict, solutions)):
        raise ValueError(f"{names['solutions']} must be a list of objects")
    kept = []
    for solution in solutions:
        steps = _steps(solution, names)
        if not steps:
            skip("solutions without steps")
            continue
        labels = solution.get(names["labels"])
        if labels is None and names["labels"] not in solution:
            raise ValueError(
                f"a solution lacks {names['labels']}; it has {sorted(solution)}: name "
                "the column by columns={'labels': ...}, or give null"
            )
        if labels is None:
            skip("solutions without labels")
        kept.append(
            {
                "steps": steps,
                "labels": _labels(labels, len(steps)),
                **{
                    _NAMES.get(k, k): solution[names[k]]
                    for k in _BY_SOLUTION
                    if solution.get(names[k]) is not None
                },
            }
        )
    return {**record, "chain_of_thoughts": kept} if kept else None


def _prm800k(row, names, skip):
    """Chosen completions are the steps, the others augmentations with their rating.

    Ratings 0 and 1 count as good. Where none was chosen the solution ends: phase 2 stops
    at the first error, whose first rated completion is the last step.
    """
    question = row.get(names["question"]) or {}
    text = question.get("problem") if isinstance(question, dict) else question
    label = row.get(names["label"])
    if not isinstance(text, str) or not isinstance(label, dict):
        raise ValueError(f"expected question.problem and label, got {sorted(row)}")
    reason = str(label.get("finish_reason", ""))
    if reason in ("give_up", "bad_problem"):
        skip(f"problems given up ({reason})")
        return None
    steps, labels, augs = [], [], []
    for i, step in enumerate(label.get("steps") or []):
        rated = [c for c in step.get("completions") or [] if _rated(c)]
        for _ in range(len(step.get("completions") or []) - len(rated)):
            skip("completions without a rating or a text")
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        given = step.get("completions") or []
        best = given[chosen] if chosen is not None and chosen < len(given) else None
        if best is not None and not _rated(best):
            skip("chosen steps without a rating or a text")
            break
        if (
            best is None
            and isinstance(human, dict)
            and str(human.get("text", "")).strip()
        ):
            best = {"text": human["text"], "rating": 1}
        # None was chosen: the solution ends with its first error, whose ratings are here.
        last = best is None
        if last and not rated:
            break
        best = rated[0] if last else best
        steps.append(best["text"])
        labels.append(1 if best["rating"] >= 0 else -1)
        augs += [
            {"aug_step": c["text"], "aug_idx": i, "aug_type": c["rating"]}
            for c in rated
            if c is not best
        ]
        if last:
            break
    if not steps:
        skip("solutions without a rated step")
        return None
    return {
        "question": text,
        "answer": question.get("ground_truth_answer") if _is_dict(question) else None,
        "chain_of_thoughts": [{"steps": steps, "labels": labels, "augs": augs}],
    }


def _rated(completion) -> bool:
    text = str(completion.get("text", "")).strip()
    return bool(text) and completion.get("rating") is not None


def _shepherd(row, names, skip):
    """The input has a tag after each step, the label the same text with + or -."""
    given, label = _text(row, names, "input"), _text(row, names, "label")
    parts = given.split(SHEPHERD_TAG)
    if len(parts) < 2:
        skip(f"rows without the tag {SHEPHERD_TAG}")
        return None
    head, found = parts[0], [p.strip() for p in parts[1:-1]]
    if parts[-1].strip():
        skip(f"texts after the last tag {SHEPHERD_TAG}")
    # The question ends where the first step begins.
    at = head.rfind("Step 1")
    question, first = (head[:at], head[at:]) if at > 0 else _last_line(head)
    steps = [first.strip(), *found]
    marks, place = [], 0
    for part in parts[:-1]:
        if not label.startswith(part, place) or label[place + len(part):][:1] not in (
            "+", "-",
        ):  # fmt: skip
            raise ValueError("the label is not the input with + and - for its tags")
        place += len(part)
        marks.append(1 if label[place] == "+" else -1)
        place += 1
    if not all(steps) or not question.strip():
        skip("rows with an empty question or step")
        return None
    solution = {"steps": steps, "labels": marks}
    category = str(row.get(names["task"], ""))
    return {
        "question": question.strip(), "category": category,
        "chain_of_thoughts": [solution],
    }  # fmt: skip


def _trl(row, names, skip):
    """Columns prompt, completions and labels, which are booleans."""
    steps = _strings(row, names["completions"])
    labels = row.get(names["labels"])
    if not steps:
        skip("rows without completions")
        return None
    if not isinstance(labels, list) or not all(isinstance(y, bool) for y in labels):
        raise ValueError(f"{names['labels']} must be a list of booleans")
    numbers = _labels([1 if y else -1 for y in labels], len(steps))
    solution = {"steps": steps, "labels": numbers}
    return {"question": _text(row, names, "prompt"), "chain_of_thoughts": [solution]}


def _processbench(row, names, skip):
    """The label is the index of the first wrong step, -1 for none."""
    steps, label = _strings(row, names["steps"]), row.get(names["label"])
    if not steps:
        skip("rows without steps")
        return None
    if type(label) is not int or not -1 <= label < len(steps):
        raise ValueError(
            f"{names['label']} must be -1 or the index of one of {len(steps)} steps, got "
            f"{label!r}"
        )
    good = len(steps) if label < 0 else label
    solution = {
        "steps": steps,
        "labels": [1] * good + [-1] * (len(steps) - good),
        "first_error": label,
    }
    return {"question": _text(row, names, "problem"), "chain_of_thoughts": [solution]}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


KINDS: dict[str, tuple[dict[str, str], Callable]] = {
    "nested": (NESTED, _nested),
    "prm800k": (_same("question", "label"), _prm800k),
    "math-shepherd": (_same("input", "label", "task"), _shepherd),
    "trl": (_same("prompt", "completions", "labels"), _trl),
    "processbench": (_same("problem", "steps", "label"), _processbench),
}
"""Name -> its columns, and the parser of a row."""


def with_options(question: str, options: list) -> str:
    """The question as the paper asks it: a line with a letter for each option.

    Example:
      >>> with_options("2+3?", ["4", "5"])
      'Question: 2+3?\\nA. 4\\nB. 5'
    """
    if len(options) > 26:
        raise ValueError(f"at most 26 options have letters, got {len(options)}")
    told = "".join(f"\n{chr(65 + i)}. {x}" for i, x in enumerate(options))
    return f"Question: {question}{told}"


def _rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    with files.opened(path) as (_, content):
        first = content.read(64)
    if first[:4] == b"PAR1":
        yield from _parquet(path)
        return
    if first.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        text = files.read(path)
        with files.parsing(path, "not JSON"):
            rows = json.loads(text)
        for number, row in enumerate(rows):
            try:
                yield number, _object(row)
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from None
        return
    yield from enumerate(lines.records(path, lambda x: _object(_parse(x))))


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parquet(path):
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is a Parquet file: pip install pyarrow, or convert it to JSON lines",
            name="pyarrow",
        ) from None
    path, _ = files.check(path)
    with files.parsing(path, "not a Parquet file"):
        file = parquet.ParquetFile(path)
        count = file.metadata.num_rows
        if count > MAX_ROWS:
            raise ValueError(f"{path}: {count:,} rows, at most {MAX_ROWS:,} are read")
        batches = [batch.to_pylist() for batch in file.iter_batches()]
    yield from enumerate(row for batch in batches for row in batch)


def _object(row: Any) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    return row


def _is_dict(x: Any) -> bool:
    return isinstance(x, dict)


def _text(row, names, name) -> str:
    value = row.get(names[name])
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{names[name]} must be a text, got {value!r:.60}; the row has "
            f"{sorted(row)}: name the column by columns={{{name!r}: ...}}"
        )
    return value


def _strings(row, column) -> list[str]:
    value = row.get(column)
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise ValueError(f"{column} must be a list of texts; the row has {sorted(row)}")
    return value


def _steps(solution, names) -> list[str]:
    if names["steps"] not in solution:
        raise ValueError(
            f"a solution lacks {names['steps']}; it has {sorted(solution)}: name the "
            "column by columns={'steps': ...}"
        )
    return _strings(solution, names["steps"])


def _labels(labels, count) -> list | None:
    if labels is None:
        return None
    if not isinstance(labels, list) or len(labels) != count:
        size = len(labels) if isinstance(labels, list) else labels
        raise ValueError(f"{count} steps have {size!r} labels")
    if any(type(y) not in (int, float) or not (y == -1 or 0 <= y <= 1) for y in labels):
        raise ValueError(f"labels must be -1 or in 0 to 1, got {labels[:8]}")
    return labels


def _last_line(text: str) -> tuple[str, str]:
    question, _, step = text.rstrip().rpartition("\n")
    return question, step
