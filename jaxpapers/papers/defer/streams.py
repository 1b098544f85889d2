"""Event streams of continuous training (NumPy, on the host).

A click at ``t_c`` converts after a delay ``z``, infinite without conversion. It is an
immediate positive if z <= w1, a delayed positive if w1 < z <= w2, a real negative if
z > w2. All times have one unit, any.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Values of ``Stream.kind``.
FIRST, DELAYED, AGAIN, REAL = range(4)
# Methods whose first event is at the click, with label 0, instead of at t_c + w1.
_NO_WAIT = ("fnw", "fnc", "fnw_rn", "fnc_rn")
_WAIT = ("vanilla", "es_dfm", "dfm", "fsiw", "defer", "vanilla_defer")
STREAMS = ("oracle", "vanilla_win", *_NO_WAIT, *_WAIT)


class Stream(NamedTuple):
    """Training events sorted by (ts, index); arrays of one length.

    Attributes:
      index: int32, row of the click.
      ts: float64, time of the event.
      label: int8, 0 or 1.
      kind: int8: FIRST event of the click, DELAYED positive, second copy of an immediate
        positive (AGAIN), REAL negative.
    """

    index: np.ndarray
    ts: np.ndarray
    label: np.ndarray
    kind: np.ndarray


def delays(click_ts: np.ndarray, conv_ts: np.ndarray) -> np.ndarray:
    """Delay of each conversion, infinite without one.

    Args:
      click_ts: times of the clicks, >= 0.
      conv_ts: times of their conversions; -1 or inf for none.

    Raises:
      ValueError: shapes that differ, negative or NaN times, a conversion before its
        click.

    Example:
      >>> delays(np.array([0.0, 5.0]), np.array([2.0, -1.0]))
      array([ 2., inf])
    """
    click_ts, conv_ts = np.asarray(click_ts), np.asarray(conv_ts)
    if click_ts.ndim != 1 or click_ts.shape != conv_ts.shape:
        raise ValueError(
            "click_ts and conv_ts: expected two vectors of one length, got shapes "
            f"{click_ts.shape} and {conv_ts.shape}"
        )
    none = (conv_ts == -1) | np.isposinf(conv_ts)
    valid = np.isfinite(click_ts) & (click_ts >= 0)
    _check_rows(valid, "click_ts", click_ts, "finite times >= 0; shift the clock")
    valid = none | (conv_ts >= 0)
    _check_rows(valid, "conv_ts", conv_ts, "times >= 0, or -1 or inf for none")
    valid = none | (conv_ts >= click_ts)
    _check_rows(valid, "conv_ts", conv_ts, "no conversion before its click; drop it")
    return np.where(none, np.inf, conv_ts - click_ts.astype(np.float64))


def make_stream(
    click_ts: np.ndarray,
    conv_ts: np.ndarray,
    w1: int | float,
    w2: int | float,
    method: str,
    w3: int | float | None = None,
    *,
    variant: str = "paper",
) -> Stream:
    """Training events of a method (table in ``jaxpapers.papers.defer``).

    Args:
      click_ts: times of the clicks.
      conv_ts: times of their conversions; -1 or inf for none.
      w1: waiting window; ``fnw``, ``fnc``, ``fnw_rn`` and ``fnc_rn`` do not wait.
      w2: attribution window; later conversions do not count.
      method: one of ``STREAMS``.
      w3: time until a click without conversion is inserted as a real negative, for
        ``defer``, ``vanilla_defer``, ``fnw_rn`` and ``fnc_rn``; None: w2. A conversion
        between w3 and w2 makes it a false negative and a later positive. ``rnwin`` of
        the released code.
      variant: "released" for ``defer`` without the second copy of immediate positives,
        as ES-DFM10 of the authors' repository; no other method's stream differs.

    Returns:
      Events sorted by (ts, index).

    Raises:
      ValueError: unknown method or variant, windows out of order, bad times.

    Example:
      >>> s = make_stream(np.array([0.0, 1.0]), np.array([0.5, -1.0]), 1, 7, "defer")
      >>> s.index.tolist(), s.ts.tolist(), s.label.tolist()
      ([0, 1, 0, 1], [1.0, 2.0, 7.0, 8.0], [1, 0, 1, 0])
    """
    if method not in STREAMS:
        raise ValueError(f"method must be one of {STREAMS}, got {method!r}")
    if variant not in ("paper", "released"):
        raise ValueError(f"variant must be paper or released, got {variant!r}")
    if not 0 <= w1 < w2:
        raise ValueError(
            f"windows: expected 0 <= w1 < w2 in the unit of the times, got w1={w1}, "
            f"w2={w2}"
        )
    waits = 0.0 if method in _NO_WAIT or method == "oracle" else w1
    if w3 is not None:
        if method not in ("defer", "vanilla_defer", "fnw_rn", "fnc_rn"):
            raise ValueError(f"w3: {method} has no real negatives; leave it None")
        if not w1 < w3 < w2:
            raise ValueError(f"w3 must lie in (w1, w2) = ({w1}, {w2}), got {w3}")
    z = delays(click_ts, conv_ts)
    click = np.asarray(click_ts, np.float64)
    index = np.arange(len(z), dtype=np.int32)

    if method == "oracle":
        first = z <= w2
    elif method in _NO_WAIT:
        first = np.zeros(len(z), bool)
    else:
        first = z <= w1
    parts = [(index, click + waits, first, FIRST)]

    def add(rows, after, label, kind):
        rows = np.flatnonzero(rows).astype(np.int32)
        after = after[rows] if isinstance(after, np.ndarray) else after
        parts.append((rows, click[rows] + after, np.full(len(rows), label), kind))

    if method not in ("oracle", "vanilla_win"):
        # Without waiting no positive is immediate, not even at z = 0.
        late = z <= w2 if method in _NO_WAIT else (z > w1) & (z <= w2)
        add(late, z, True, DELAYED)
    if method in ("defer", "vanilla_defer", "fnw_rn", "fnc_rn"):
        final = w2 if w3 is None else w3
        add(z > final, final, False, REAL)
    if method in ("defer", "vanilla_defer") and variant == "paper":
        add(z <= w1, w2, True, AGAIN)

    index = np.concatenate([p[0] for p in parts])
    ts = np.concatenate([p[1] for p in parts])
    label = np.concatenate([p[2] for p in parts]).astype(np.int8)
    kind = np.repeat(np.arange(4, dtype=np.int8)[[p[3] for p in parts]],
                     [len(p[0]) for p in parts])  # fmt: skip
    # The sort is stable: among ties a click's first event stays first.
    order = np.lexsort((index, ts))
    return Stream(index[order], ts[order], label[order], kind[order])


class Bucket(NamedTuple):
    """One interval (hour, day) of the streaming protocol.

    Attributes:
      start: time.
      events: training events of the interval.
      clicks: rows of the clicks of the NEXT interval, for evaluation.
    """

    start: float
    events: Stream
    clicks: np.ndarray


def make_buckets(
    stream: Stream,
    click_ts: np.ndarray,
    start: int | float,
    stop: int | float,
    width: int | float,
) -> list[Bucket]:
    """Divides events and clicks into buckets of equal width.

    Args:
      stream: sorted by time.
      click_ts: time of every click.
      start: of the first bucket.
      stop: end of the last interval that is evaluated; its events are not used.
      width: of a bucket.

    Raises:
      ValueError: an unsorted stream, fewer than two buckets, labels other than 0 and 1.
    """
    if len(stream.ts) and not (np.diff(stream.ts) >= 0).all():
        raise ValueError("stream: expected events sorted by time; see make_stream")
    _check_rows(
        (stream.label == 0) | (stream.label == 1), "label", stream.label, "0 or 1"
    )
    if not width > 0 or not stop - start >= 2 * width:
        raise ValueError(
            f"buckets: expected two or more of width > 0 in [start, stop), got start="
            f"{start}, stop={stop}, width={width}"
        )
    edges = start + width * np.arange(int((stop - start) / width + 1e-9) + 1)
    cut = np.searchsorted(stream.ts, edges)
    order = np.argsort(click_ts, kind="stable")
    clicks = np.searchsorted(np.asarray(click_ts)[order], edges)
    return [
        Bucket(
            float(edges[h]),
            Stream(*(x[cut[h] : cut[h + 1]] for x in stream)),
            order[clicks[h + 1] : clicks[h + 2]],
        )
        for h in range(len(edges) - 2)
    ]


def event_rows(
    events: Stream, features: Mapping[str, np.ndarray], click_ts: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns of a training batch: features, label, elapsed time, weight 1."""
    elapsed = events.ts - np.asarray(click_ts, np.float64)[events.index]
    return {
        **{k: v[events.index] for k, v in features.items()},
        "label": events.label.astype(np.float32),
        "elapsed": elapsed.astype(np.float32),
        "weight": np.ones(len(events.ts), np.float32),
    }


def pad_rows(rows: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Pads all columns, ``weight`` included, with zeros to a multiple of ``size``.

    Example:
      >>> pad_rows({"weight": np.ones(3)}, 2)["weight"]
      array([1., 1., 1., 0.])
    """

    def pad(x):
        return np.concatenate([x, np.zeros((-len(x) % size, *x.shape[1:]), x.dtype)])

    return {k: pad(v) for k, v in rows.items()}


def run_stream(
    step: Callable[[Any, dict], tuple[Any, Any]],
    predict: Callable[[Any, dict], Any],
    state: Any,
    buckets: Sequence[Bucket],
    features: Mapping[str, np.ndarray],
    click_ts: np.ndarray,
    *,
    batch: int,
) -> tuple[Any, list[np.ndarray]]:
    """Streaming protocol: train on a bucket's events, predict the next one's clicks.

    All batches have one shape, the last of a bucket padded with rows of weight 0, so the
    step is compiled once.

    Args:
      step: (state, batch) -> (state, metrics); may donate the state.
      predict: (state, batch of features) -> probabilities, last axis over the batch.
      state: of the pretrained model.
      buckets: sorted by time.
      features: columns, one row per click.
      click_ts: time of every click.
      batch: rows of a step.

    Returns:
      The final state, and for each bucket the probabilities of its ``clicks``.

    Raises:
      ValueError: buckets out of order.
    """
    starts = [b.start for b in buckets]
    if any(b <= a for a, b in zip(starts, starts[1:])):
        raise ValueError("buckets: expected ascending start times; sort them")
    predictions = []
    for bucket in buckets:
        rows = pad_rows(event_rows(bucket.events, features, click_ts), batch)
        for i in range(0, len(rows["weight"]), batch):
            state, _ = step(state, {k: v[i : i + batch] for k, v in rows.items()})
        predictions.append(predict_rows(predict, state, features, bucket.clicks, batch))
    return state, [
        np.concatenate([np.asarray(x) for x in parts], -1)[..., : len(b.clicks)]
        for parts, b in zip(predictions, buckets)
    ]


def predict_rows(
    predict: Callable, state: Any, features: Mapping, index: np.ndarray, batch: int
) -> list:
    """Probabilities of the clicks ``index``, in padded batches of one shape."""
    rows = pad_rows({k: v[index] for k, v in features.items()}, batch)
    count = max(len(index), 1)
    if not len(index):
        rows = {k: np.zeros((batch, *v.shape[1:]), v.dtype) for k, v in rows.items()}
    return [
        predict(state, {k: v[i : i + batch] for k, v in rows.items()})
        for i in range(0, count, batch)
    ]


def _check_rows(
    valid: np.ndarray, name: str, values: np.ndarray, expected: str
) -> None:
    if not np.all(valid):
        row = int(np.argmin(valid))
        raise ValueError(f"{name}[{row}]: expected {expected}; got {values[row]}")
