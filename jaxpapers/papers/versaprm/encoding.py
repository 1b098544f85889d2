"""Sequences of tokens with a label at the end of every step; host code.

A sequence is the question and, after each step, a separator that is one token. Labels
are 1, 0, or a probability, at the separators (or the last tokens) of steps, and
``IGNORE`` elsewhere. After the first wrong step nothing follows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

IGNORE = -100
QUESTION_END, STEP_END = " \n\n", " \n\n\n\n"
GOOD_TYPES = (0, 1)  # Ratings of PRM800K that count as good.


class Encoded(NamedTuple):
    """A sequence.

    Attributes:
      ids: (L,) int32.
      labels: (L,) float32: probability that the step is right, or ``IGNORE``.
    """

    ids: np.ndarray
    labels: np.ndarray


NONE = Encoded(np.zeros(0, np.int32), np.zeros(0, np.float32))
"""An empty sequence."""


class Counts(NamedTuple):
    """What ``encode_all`` made, and what it left out."""

    encoded: int = 0
    unlabelled: int = 0
    too_long: int = 0
    augmentations: int = 0


def encode_example(
    tokenize: Callable[[str], Sequence[int]],
    question: str,
    steps: Sequence[str],
    labels: Sequence[int | float] | None,
    augs: Sequence[Mapping[str, Any]] = (),
    *,
    max_length: int = 0,
    label_last_n: int | None = 1,
    stop_at_error: bool = True,
    last_only: bool = False,
    separator: int | None = None,
    strip: bool = True,
) -> list[Encoded]:
    """The sequence of a solution, and one for each of its augmentations.

    Args:
      tokenize: text -> ids, without special tokens.
      question: text.
      steps: texts.
      labels: of the steps: 1 right; 0 or -1 wrong; between 0 and 1 soft. None: the
        solution has no labels and gives no sequence.
      augs: wrong steps (or rated ones) in place of one: ``aug_step``, ``aug_idx`` from
        0, ``aug_type``, of which 0 and 1 are good.
      max_length: longer sequences are left out; 0: none.
      label_last_n: labelled tokens of a step, its last ones; None: all.
      stop_at_error: leave out what follows the first step whose label is below 0.5.
      last_only: label the last step only, as for an outcome reward.
      separator: id that must end every step and occur nowhere else; None: not checked.
      strip: remove spaces at the end of steps. Otherwise a step that ends in one may
        merge with the separator, and then has no score.

    Raises:
      ValueError: no steps, an empty step, another number of labels than of steps, labels
        out of range or of type bool, augmentations that do not fit, a step that does not
        end in the separator or has it inside.

    Example:
      >>> [x] = encode_example(lambda text: [len(text)], "1+1?", ["2", "3"], [1, -1])
      >>> x.ids.tolist(), x.labels.tolist()
      ([7, 6, 6], [-100.0, 1.0, 0.0])
    """
    if label_last_n is not None and label_last_n < 1:
        raise ValueError(f"label_last_n must be >= 1 or None, got {label_last_n}")
    if not len(steps):
        raise ValueError(f"a solution needs at least one step, got none: {question!r}")
    if labels is None:
        return []
    targets = _targets(labels, len(steps))
    if strip:
        steps = [s.rstrip() for s in steps]
    for i, step in enumerate(steps):
        if not step.strip():
            raise ValueError(f"step {i} of {len(steps)} is empty: {question!r}")
    head = list(tokenize(question + QUESTION_END))
    parts = [list(tokenize(step + STEP_END)) for step in steps]
    if separator is not None:
        if separator in head:
            raise ValueError(
                f"the question has the separator {separator} inside; remove it from "
                f"{question!r}"
            )
        for i, part in enumerate(parts):
            check_separator(part, separator, f"step {i}, {steps[i]!r}")
    count = len(parts)
    wrong = [i for i, y in enumerate(targets) if y < 0.5]
    if stop_at_error and wrong:
        count = wrong[0] + 1
    kept: list[float] = targets[:count]
    if last_only:
        kept = [float(IGNORE)] * (count - 1) + kept[-1:]
    rows = [_row(head, parts[:count], kept, label_last_n)]
    for aug in augs:
        text, at, good = _augmentation(aug, len(steps))
        part = list(tokenize((text.rstrip() if strip else text) + STEP_END))
        if separator is not None:
            check_separator(part, separator, f"augmentation {text!r}")
        masked = [float(IGNORE)] * at + [float(good)]
        rows.append(_row(head, [*parts[:at], part], masked, label_last_n))
    return [r for r in rows if not max_length or len(r.ids) <= max_length]


def encode_all(
    tokenize: Callable[[str], Sequence[int]],
    records: Sequence[Mapping[str, Any]],
    **fields: Any,
) -> tuple[list[Encoded], Counts]:
    """Sequences of the paper's records, and the counts of what was left out.

    Args:
      tokenize: text -> ids.
      records: ``question`` and ``chain_of_thoughts``: ``steps``, ``labels``, ``augs``.
      fields: of ``encode_example``.

    Raises:
      ValueError: see ``encode_example``, with the record's number.
    """
    rows: list[Encoded] = []
    counts = dict.fromkeys(Counts._fields, 0)
    for i, record in enumerate(records):
        for j, solution in enumerate(record["chain_of_thoughts"]):
            augs = solution.get("augs") or ()
            try:
                made = encode_example(
                    tokenize, record["question"], solution["steps"],
                    solution.get("labels"), augs, **fields,
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"record {i}, solution {j}: {error}") from None
            if solution.get("labels") is None:
                counts["unlabelled"] += 1
                continue
            counts["too_long"] += 1 + len(augs) - len(made)
            counts["augmentations"] += len(augs)
            counts["encoded"] += len(made)
            rows += made
    return rows, Counts(**counts)


def check_separator(ids: Sequence[int], separator: int, what: str) -> None:
    """Refuses a step that does not have one separator, at its end.

    Raises:
      ValueError: with the last ids, and what to do.
    """
    count = list(ids).count(separator)
    if count != 1 or ids[-1] != separator:
        raise ValueError(
            f"{what} must end in the separator {separator} and have it nowhere else, got "
            f"{count} in ids that end with {list(ids)[-4:]}; a space at the end of a "
            "step merges with it: strip steps, and remove empty lines inside of them"
        )


def pack(
    rows: Sequence[Encoded], length: int, pad: int = 0, *, count: int = 0
) -> dict[str, np.ndarray]:
    """A batch of sequences, one or several of them in a row.

    Args:
      rows: sequences.
      length: L; rows are padded on the right.
      pad: id.
      count: rows of the batch, into which the sequences are put with as little padding
        as first fit gives; those that fit nowhere are left out, see ``bins``. 0: one row
        for each.

    Returns:
      ``ids`` int32, ``labels`` float32, and ``segments`` int32, each (B, L): the number
      of a position's sequence in its row from 1, 0 for padding.

    Raises:
      ValueError: a sequence that is longer than L, or one without labels.
    """
    for i, row in enumerate(rows):
        n = len(row.ids)
        if n > length or n != len(row.labels):
            raise ValueError(
                f"sequence {i} has {n} ids and {len(row.labels)} labels; expected as "
                f"many of both, at most {length}"
            )
        if not (row.labels >= 0).any():
            raise ValueError(
                f"all labels of sequence {i} are {IGNORE}: nothing can be learned of it; "
                "were its separators found?"
            )
    sizes = [len(row.ids) for row in rows]
    places = bins(sizes, length, count) if count else [[i] for i in range(len(rows))]
    return fill(rows, places, length, pad)


def fill(
    rows: Sequence[Encoded], places: Sequence[Sequence[int]], length: int, pad: int = 0
) -> dict[str, np.ndarray]:
    """The batch whose row i has the sequences of numbers ``places[i]``; see ``pack``."""
    ids = np.full((len(places), length), pad, np.int32)
    labels = np.full((len(places), length), IGNORE, np.float32)
    segments = np.zeros((len(places), length), np.int32)
    for i, numbers in enumerate(places):
        at = 0
        for j, number in enumerate(numbers):
            end = at + len(rows[number].ids)
            ids[i, at:end], labels[i, at:end] = rows[number]
            segments[i, at:end] = j + 1
            at = end
    return {"ids": ids, "labels": labels, "segments": segments}


def bins(sizes: Sequence[int], length: int, count: int = 0) -> list[list[int]]:
    """Numbers of the sequences of each row, long ones first (first fit decreasing).

    Args:
      sizes: of the sequences.
      length: of a row.
      count: rows; sequences that fit into none are left out. 0: as many as it takes.

    Example:
      >>> bins([3, 5, 2, 4], 7)
      [[1, 2], [3, 0]]
    """
    left: list[int] = [length] * count
    places: list[list[int]] = [[] for _ in left]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((k for k, room in enumerate(left) if room >= sizes[i]), -1)
        if row < 0:
            if count:
                continue
            row = len(left)
            left.append(length)
            places.append([])
        places[row].append(i)
        left[row] -= sizes[i]
    return places


def _targets(labels, count) -> list[float]:
    values = list(labels)
    if len(values) != count:
        raise ValueError(f"got {len(values)} labels for {count} steps")
    if any(isinstance(y, (bool, np.bool_)) for y in values):
        raise ValueError(
            "labels must be numbers, got booleans, of which -100 would become True; "
            "give 1 and 0"
        )
    values = [float(y) for y in values]
    if not all(y == -1 or 0 <= y <= 1 for y in values):
        raise ValueError(f"labels must be -1 or in 0 to 1, got {values[:8]}")
    return [max(y, 0.0) for y in values]


def _augmentation(aug, count):
    """(text, index, whether it is good) of an augmentation."""
    lacks = {"aug_step", "aug_idx", "aug_type"} - set(aug)
    if lacks:
        raise ValueError(f"an augmentation lacks {sorted(lacks)}; got {sorted(aug)}")
    text, at = aug["aug_step"], aug["aug_idx"]
    if not str(text).strip() or not 0 <= at < count:
        raise ValueError(
            f"an augmentation needs a text and an index in 0 to {count - 1}, got "
            f"{text!r} and {at}"
        )
    return text, at, aug["aug_type"] in GOOD_TYPES


def _row(head, parts, targets, label_last_n) -> Encoded:
    labels = [float(IGNORE)] * len(head)
    for part, y in zip(parts, targets):
        n = len(part) if label_last_n is None else min(label_last_n, len(part))
        labels += [float(IGNORE)] * (len(part) - n) + [y] * n
    ids = np.array([*head, *(t for part in parts for t in part)], np.int32)
    return Encoded(ids, np.array(labels, np.float32))
