"""Clicks with delayed conversions: CDNOW, Criteo's conversion logs, synthetic clicks.

A click has features, a time, and the time of its conversion, infinite without one in the
attribution window. Features are known at the click; ``papers.defer`` makes training
events and labels from the times.
"""

import datetime
import functools
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpapers.data import files
from jaxpapers.data.features import bucketize, stable_hash, standardize
from jaxpapers.data.lines import Progress, number, records, rows, whole

DAY = 86400.0

# Bins of the eight numeric and buckets of the nine categorical columns, as in the ES-DFM
# code for Criteo's logs.
CRITEO_BINS = (64, 16, 128, 64, 128, 64, 512, 512)
CRITEO_BUCKETS = (512, 128, 256, 256, 64, 256, 256, 16, 256)

# Beyond it a number is no count, and float32 loses its sum.
_LARGEST = 1e15
_LEAST = 0.5  # share of the clicks that must lie in the days asked for

_CDNOW = ("customer_id", "date", "number_of_cds", "dollar_value")
_CDNOW_START = datetime.date(1997, 1, 1).toordinal()
_CDNOW_DAYS = 546  # to 1998-06-30


class Conversions(NamedTuple):
    """Clicks sorted by time.

    Attributes:
      features: (N, F) float32 numbers, or int32 categories.
      names: of the F columns.
      sizes: number of categories of each column; () for numbers.
      click_ts: (N,) float64 time of the click, in ``unit``.
      conv_ts: (N,) float64 time of the conversion, inf without one in the window.
      pretrain, stream: (N,) bool: clicks of pretraining and of the stream; a gap between
        them is in neither.
      unit: of the times, "day" or "second".
      window: attribution window w2, in that unit.
    """

    features: np.ndarray
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    click_ts: np.ndarray
    conv_ts: np.ndarray
    pretrain: np.ndarray
    stream: np.ndarray
    unit: str
    window: float


class Synthetic(NamedTuple):
    """Clicks with known conversion probabilities.

    Attributes:
      features: (N, 5) float64.
      click_ts, conv_ts: (N,) float64 days; inf without a conversion.
      p: (N,) probability of a conversion.
      p_dp: (N,) probability of a conversion after the waiting window w1.
    """

    features: np.ndarray
    click_ts: np.ndarray
    conv_ts: np.ndarray
    p: np.ndarray
    p_dp: np.ndarray


def cdnow(
    path: str | Path,
    *,
    window: int = 30,
    pretrain_until: int = 150,
    stream_from: int = 180,
    stream_until: int = 515,
) -> Conversions:
    """Repeat purchases at CDNOW: does another purchase follow within the window?

    A click is all purchases of a customer on a day (67,591), its conversion the
    customer's next click. Clicks of the last ``window`` days are dropped, since their
    labels are not final: 65,636 remain. Day 0 is 1997-01-01.

    Features, standardised on the pretraining rows: log(1 + number of purchases so far),
    days since the previous purchase and whether there is none, days since the first, CDs,
    dollars, dollars so far, the previous gap and whether there is none, mean dollars,
    days since the first purchase per purchase (in units of 30 days), day of the week.

    Args:
      path: CDNOW_master.txt, with a header or without (then customer, date, CDs and
        dollars), or the folder that ``data.fetch.get("cdnow")`` returns.
      window: attribution window w2, days.
      pretrain_until: last day of pretraining.
      stream_from, stream_until: first and last day of the stream (25,110 clicks); the
        last is evaluated but not trained on.

    Raises:
      FileNotFoundError: no such file.
      ValueError: days out of order, or a malformed line (its number is in the message):
        a date outside CDNOW's, a negative number, more than a million CDs or dollars.
    """
    final = _CDNOW_DAYS - 1 - window
    if not 0 <= pretrain_until < stream_from <= stream_until <= final or window < 1:
        raise ValueError(
            "expected 0 <= pretrain_until < stream_from <= stream_until <= "
            f"{final} (the last day whose label is final at window={window}), got "
            f"{pretrain_until}, {stream_from}, {stream_until}"
        )
    path = Path(path).expanduser()
    path = path / "CDNOW_master.txt" if files.is_folder(path) else path
    purchases = list(rows(path, _CDNOW, _purchase, split=str.split))
    if not purchases:
        raise ValueError(f"{path}: no purchases")
    customer, day, cds, dollars = (np.array(column) for column in zip(*purchases))
    # Their order alone counts: numbers of 64 bits times days are too large.
    customer = np.unique(customer, return_inverse=True)[1]
    merged, where = np.unique(customer * _CDNOW_DAYS + day, return_inverse=True)
    customer, day = np.divmod(merged, _CDNOW_DAYS)
    cds, dollars = np.bincount(where, cds), np.bincount(where, dollars)
    again = np.append(customer[1:] == customer[:-1], False)
    following = np.where(again, np.append(day[1:], 0), np.inf)
    conv_ts = np.where(following - day <= window, following, np.inf)
    features = _cdnow_features(customer, day, cds, dollars)
    kept = np.flatnonzero(day <= final)
    kept = kept[np.argsort(day[kept], kind="stable")]
    day, values = day[kept], np.column_stack(list(features.values()))[kept]
    pretrain = day <= pretrain_until
    if not pretrain.any():
        raise ValueError(f"{path}: no purchase until day {pretrain_until}")
    return Conversions(
        standardize(values, pretrain),
        tuple(features),
        (),
        day.astype(np.float64),
        conv_ts[kept],
        pretrain,
        (day >= stream_from) & (day <= stream_until),
        "day",
        float(window),
    )


def _purchase(customer: str, date: str, cds: str, dollars: str) -> tuple:
    who, count = whole(customer), whole(cds)
    if len(date) != 8 or not 0 <= who < 1 << 63 or not 0 <= count <= 1_000_000:
        raise ValueError(f"customer {customer}, date {date}, {cds} CDs")
    day = datetime.datetime.strptime(date, "%Y%m%d").toordinal() - _CDNOW_START
    if not 0 <= day < _CDNOW_DAYS:
        raise ValueError(f"date {date}, expected 19970101 to 19980630")
    return who, day, count, number(dollars, 0.0, 1e6)


def _cdnow_features(customer, day, cds, dollars) -> dict[str, np.ndarray]:
    """Features of purchases sorted by customer and day, causal in time."""
    place = np.arange(len(day))
    first = np.searchsorted(customer, customer)
    count = place - first + 1
    total = np.cumsum(dollars)
    total = total - (total - dollars)[first]
    gap = np.where(count > 1, day - day[place - 1], 0)
    before = np.where(count > 2, gap[place - 1], 0)
    age = day - day[first]
    weekday = (_CDNOW_START + day + 6) % 7  # The ordinal 1 is a Monday.
    return {
        "log_count": np.log1p(count),
        "gap": gap,
        "no_gap": count == 1,
        "age": age,
        "cds": cds,
        "dollars": dollars,
        "total_dollars": total,
        "gap_before": before,
        "no_gap_before": count <= 2,
        "mean_dollars": total / count,
        "age_per_purchase": age / (count * 30),
        **{f"weekday_{i}": weekday == i for i in range(7)},
    }


def criteo(
    path: str | Path,
    *,
    pretrain_days: float = 30.0,
    days: float = 60.0,
    window_days: float = 30.0,
    progress: Progress | None = None,
) -> Conversions:
    """Criteo's conversion logs (data.txt) with the 17 features of the ES-DFM code.

    A line has, separated by tabs, click seconds, conversion seconds (empty without one),
    eight integers and nine categories. Missing integers are -1; integers are scaled to
    [0, 1] by their range over the pretraining clicks (in the code: over all clicks).

    Args:
      path: data.txt, or gzipped.
      pretrain_days: day that ends pretraining and starts the stream.
      days: day that ends the stream.
      window_days: attribution window w2; later conversions are ignored.
      progress: called with (bytes read, size of the file).

    Raises:
      FileNotFoundError: no such file.
      ValueError: a malformed line, a conversion before its click, a negative or NaN time
        (the line's number is in the message); no clicks, none to pretrain on, or more
        than half of them after ``days``.
    """
    if not 0 < pretrain_days < days or window_days <= 0:
        raise ValueError(
            "expected 0 < pretrain_days < days and window_days > 0, got "
            f"{pretrain_days}, {days}, {window_days}"
        )
    n = len(CRITEO_BINS)
    width = 2 + n + len(CRITEO_BUCKETS)
    # Categories repeat.
    bucket = functools.lru_cache(maxsize=1 << 20)(stable_hash)
    times, numbers, hashed = array("d"), array("f"), array("i")

    def click(line: str) -> None:
        parts = line.split("\t")
        if len(parts) != width:
            raise ValueError(f"{len(parts)} columns instead of {width}")
        clicked, converted = float(parts[0]), float(parts[1] or "inf")
        if "_" in "".join(parts[: 2 + n]):
            raise ValueError("an underscore in a number")
        # Also refuses NaN.
        if not 0 <= clicked < np.inf or not clicked <= converted:
            raise ValueError(f"clicked at {clicked}, converted at {converted}")
        row = [float(x or -1) for x in parts[2 : 2 + n]]
        if not all(-_LARGEST <= x <= _LARGEST for x in row):
            raise ValueError("a number is not finite, or beyond 1e15")
        categories = zip(parts[2 + n :], CRITEO_BUCKETS)
        buckets = [bucket(x, b, i) for i, (x, b) in enumerate(categories)]
        times.extend((clicked, converted))
        numbers.extend(row)
        hashed.extend(buckets)

    for _ in records(path, click, progress=progress):
        pass
    if not times:
        raise ValueError(f"{path}: no clicks, so no click before day {pretrain_days}")
    click_ts, conv_ts = np.array(times).reshape(-1, 2).T
    _check_days(path, click_ts, pretrain_days, days)
    order = np.argsort(click_ts, kind="stable")
    click_ts, conv_ts = click_ts[order], conv_ts[order]
    pretrain = click_ts < pretrain_days * DAY
    raw = np.array(numbers).reshape(-1, n)[order]
    categorical = np.array(hashed).reshape(-1, len(CRITEO_BUCKETS))[order]
    window = window_days * DAY
    return Conversions(
        criteo_features(raw, categorical, pretrain),
        tuple(f"number_{i}" for i in range(n))
        + tuple(f"category_{i}" for i in range(len(CRITEO_BUCKETS))),
        CRITEO_BINS + CRITEO_BUCKETS,
        click_ts,
        np.where(conv_ts - click_ts <= window, conv_ts, np.inf),
        pretrain,
        ~pretrain & (click_ts < days * DAY),
        "second",
        window,
    )


def _check_days(path, click_ts, pretrain_days, days) -> None:
    seen = f"clicks are at seconds {click_ts.min():.0f} to {click_ts.max():.0f}"
    hint = "times are seconds from the log's start, neither unix times nor milliseconds"
    if click_ts.min() >= pretrain_days * DAY:
        raise ValueError(f"{path}: no click before day {pretrain_days}; {seen}; {hint}")
    share = (click_ts < days * DAY).mean()
    if share < _LEAST:
        raise ValueError(
            f"{path}: only {share:.1%} of {len(click_ts):,} clicks lie in the {days:g} "
            f"days, expected at least {_LEAST:.0%}; {seen}; {hint}"
        )


def criteo_features(
    numbers: np.ndarray, categories: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Criteo's 17 features, int32: bins of 8 numbers, hash buckets of 9 categories.

    Args:
      numbers: (N, 8), -1 where missing.
      categories: (N, 9) strings, or their buckets as integers.
      rows: (N,) bool, clicks over whose range the bins are.

    Raises:
      ValueError: another number of columns.
    """
    shape = (len(CRITEO_BINS), len(CRITEO_BUCKETS))
    if (numbers.shape[1:], categories.shape[1:]) != ((shape[0],), (shape[1],)):
        raise ValueError(
            f"criteo_features needs {shape[0]} numbers and {shape[1]} categories per "
            f"click, got shapes {numbers.shape} and {categories.shape}"
        )
    bins = [bucketize(x, n, rows) for x, n in zip(numbers.T, CRITEO_BINS)]
    if not np.issubdtype(categories.dtype, np.integer):
        categories = np.array([
            [stable_hash(x, n, i) for i, (x, n) in enumerate(zip(row, CRITEO_BUCKETS))]
            for row in categories
        ]).reshape(categories.shape)  # fmt: skip
    return np.column_stack([*bins, categories]).astype(np.int32)


def synthetic(
    n: int, *, seed: int = 0, w1: float = 1.0, w2: float = 30.0, span: float = 100.0
) -> Synthetic:
    """Clicks with conversion probabilities in closed form.

    x ~ N(0, I_5), p = sigmoid(a.x - 1); a conversion's delay is exponential with rate
    r = exp(b.x / 2), truncated at w2, so
    p_dp = p (e^{-r w1} - e^{-r w2}) / (1 - e^{-r w2}).

    Args:
      n: clicks.
      seed: of the draws.
      w1: waiting window, days.
      w2: attribution window, days.
      span: days; click times are uniform in [0, span) and sorted.

    Raises:
      ValueError: n < 1, or windows or a span out of range.
    """
    if n < 1 or not 0 <= w1 < w2 < np.inf or not 0 < span < np.inf:
        raise ValueError(
            "expected n >= 1, 0 <= w1 < w2 < inf and span > 0, got "
            f"n={n}, w1={w1}, w2={w2}, span={span}"
        )
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 5))
    p = 1 / (1 + np.exp(1 - x @ np.array([1, -0.5, 0.5, 0, 0])))
    rate = np.exp(0.5 * (x @ np.array([0, 0.5, 0, 1, -1])))
    kept = -np.expm1(-rate * w2)  # Exponential's probability of z < w2.
    delay = -np.log1p(-rng.random(n) * kept) / rate
    click_ts = np.sort(rng.uniform(0, span, n))
    converts = rng.random(n) < p
    conv_ts = np.where(converts, click_ts + np.minimum(delay, w2), np.inf)
    p_dp = p * (np.exp(-rate * w1) - np.exp(-rate * w2)) / kept
    return Synthetic(x, click_ts, conv_ts, p, p_dp)
