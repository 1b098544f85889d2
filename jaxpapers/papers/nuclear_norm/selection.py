"""Choosing a step of a run by what a record of evaluations shows.

A record is an array (evaluations, domains, 2, 2): accuracy and loss of every domain, on
its training part (0) and on its held-out part (1); -1 where there is none. The test
domain's accuracy is that of its training part, the larger one, as in DomainBed.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

INSIDE, OUT = 0, 1
ACCURACY, LOSS = 0, 1


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
      index: of the evaluation.
      validation: the accuracy that it was chosen by.
      accuracy: of the test domain.
    """

    index: int
    validation: float
    accuracy: float


def select_iid(record: np.ndarray, test: tuple[int, ...]) -> Choice:
    """The best mean accuracy on the training domains' held-out parts.

    Args:
      record: of a run.
      test: domains that it was not trained on; the first one is measured.

    Raises:
      ValueError: no such domain, or nothing recorded.
    """
    record = _checked(record, test)
    trained = [e for e in range(record.shape[1]) if e not in test]
    return _best(record, record[:, trained, OUT, ACCURACY].mean(1), test[0])


def select_last(record: np.ndarray, test: tuple[int, ...]) -> Choice:
    """The last evaluation; see ``select_iid``."""
    record = _checked(record, test)
    iid = [e for e in range(record.shape[1]) if e not in test]
    known = np.flatnonzero(_known(record))
    last = int(known[-1])
    mean = record[last, iid, OUT, ACCURACY].mean()
    return Choice(last, float(mean), float(record[last, test[0], INSIDE, ACCURACY]))


def select_oracle(record: np.ndarray, test: tuple[int, ...]) -> Choice:
    """The best accuracy on the test domain's held-out part; see ``select_iid``."""
    record = _checked(record, test)
    return _best(record, record[:, test[0], OUT, ACCURACY], test[0])


def select_loo(
    record: np.ndarray, test: tuple[int, ...], pairs: Mapping[int, np.ndarray]
) -> Choice:
    """The best mean accuracy on domains that are left out in turn.

    Args:
      record: of the run that was trained on all domains but the test's.
      test: see ``select_iid``.
      pairs: every other domain -> record of the run that was not trained on it either.

    Raises:
      ValueError: a domain without such a run, or see ``select_iid``.
    """
    record = _checked(record, test)
    others = [e for e in range(record.shape[1]) if e not in test]
    missing = [e for e in others if e not in pairs]
    if missing:
        raise ValueError(f"no run that leaves out domain {missing[0]} besides {test}")
    left_out = np.stack(
        [_checked(pairs[e], (e,))[:, e, INSIDE, ACCURACY] for e in others]
    )
    values = np.where((left_out >= 0).all(0), left_out.mean(0), -1)
    return _best(record, values, test[0])


def _checked(record, test):
    record = np.asarray(record, float)
    if record.ndim != 4 or record.shape[2:] != (2, 2):
        raise ValueError(
            f"expected a record (evaluations, domains, 2, 2), got {record.shape}"
        )
    if not test or not 0 <= min(test) <= max(test) < record.shape[1]:
        raise ValueError(
            f"test domains must be in 0 .. {record.shape[1] - 1}, got {test}"
        )
    if len({*test}) >= record.shape[1]:
        raise ValueError(f"all domains are test domains, {test}: none chooses a step")
    if not _known(record).any():
        raise ValueError("the record has no evaluation")
    return record


def _known(record):
    return (record[..., ACCURACY] >= 0).all((1, 2))


def _best(record, values, test):
    """The first of the largest values."""
    values = np.where(_known(record) & (values >= 0), values, -np.inf)
    best = int(values.argmax())
    return Choice(
        best, float(values[best]), float(record[best, test, INSIDE, ACCURACY])
    )
