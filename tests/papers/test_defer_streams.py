"""DEFER's event streams, buckets and metrics: NumPy alone, nothing is compiled."""

import functools
import math
import tracemalloc

import numpy as np
import pytest

from jaxpapers.papers import defer


def clicks_and_conversions(n=500, seed=0):
    """Half of the clicks convert; of those some at once, some too late; times tie."""
    draw = np.random.default_rng(seed)
    click = draw.integers(0, 60, n).astype(float)
    z = np.where(draw.random(n) < 0.2, 0.0, np.round(draw.exponential(12, n), 1))
    return click, np.where(draw.random(n) < 0.5, click + z, -1.0)


REAL = ("defer", "vanilla_defer", "fnw_rn", "fnc_rn")


def brute_force(click, conv, w1, w2, method, w3=None, variant="paper"):
    """The table, click by click."""
    events = []
    for i, (t, c) in enumerate(zip(click, conv)):
        z = c - t if c >= 0 else math.inf
        if method == "oracle":
            events.append((t, i, 0, int(z <= w2)))
            continue
        waits = method not in ("fnw", "fnc", "fnw_rn", "fnc_rn")
        early = waits and z <= w1
        events.append((t + w1 if waits else t, i, 0, int(early)))
        if method == "vanilla_win":
            continue
        if z <= w2 and not early:
            events.append((t + z, i, 1, 1))
        if method in REAL and z > (w3 or w2):
            events.append((t + (w3 or w2), i, 3, 0))
        twice = method in ("defer", "vanilla_defer") and variant == "paper"
        if twice and early:
            events.append((t + w2, i, 2, 1))
    return sorted(events, key=lambda e: e[:2])


@pytest.mark.parametrize(
    "method, w3", [*((m, None) for m in defer.STREAMS), *((m, 9.0) for m in REAL)]
)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_stream_is_that_of_the_table(method, variant, w3):
    click, conv = clicks_and_conversions(200)
    s = defer.make_stream(click, conv, 2.0, 30.0, method, w3, variant=variant)
    expected = brute_force(click, conv, 2.0, 30.0, method, w3, variant)
    rows = np.array([(e[0], e[1], e[3]) for e in expected])
    np.testing.assert_array_equal(s.ts, rows[:, 0])
    np.testing.assert_array_equal(s.index, rows[:, 1])
    np.testing.assert_array_equal(s.label, rows[:, 2])
    np.testing.assert_array_equal(s.kind, [e[2] for e in expected])


@pytest.mark.parametrize("seed", range(3))
def test_stream_counts(seed):
    click, conv = clicks_and_conversions(seed=seed)
    z = defer.delays(click, conv)
    n, w1, w2 = len(click), 2.0, 30.0
    converts, late = (z <= w2).sum(), ((z > w1) & (z <= w2)).sum()
    build = functools.partial(defer.make_stream, click, conv, w1, w2)
    count = {m: len(build(m).ts) for m in defer.STREAMS}
    assert count["oracle"] == count["vanilla_win"] == n
    assert count["vanilla"] == count["es_dfm"] == n + late
    assert count["fnw"] == count["fnc"] == n + converts
    assert count["fnw_rn"] == count["fnc_rn"] == count["defer"] == 2 * n
    stream = build("defer")
    np.testing.assert_array_equal(np.bincount(stream.index), 2)
    # The last word about every click is the truth.
    last = dict(zip(stream.index.tolist(), stream.label.tolist()))
    np.testing.assert_array_equal([last[i] for i in range(n)], z <= w2)
    # With w3 who converts after it is a wrong negative and a later positive.
    wrong = ((z > 9) & (z <= w2)).sum()
    assert wrong > 0 and len(build("defer", 9.0).ts) == 2 * n + wrong
    immediate = (z <= w1).sum()
    assert len(build("defer", variant="released").ts) == 2 * n - immediate


def test_without_waiting_es_dfm_has_the_stream_of_fnw():
    click, conv = clicks_and_conversions()
    conv = np.where(conv > click, conv, -1.0)  # Without delays of 0, which FNW delays.
    a = defer.make_stream(click, conv, 0.0, 30.0, "es_dfm")
    b = defer.make_stream(click, conv, 0.0, 30.0, "fnw")
    for x, y in zip(a, b):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_stream_of_criteos_size():
    """16 million clicks: less than 3 GB beside the clicks."""
    draw = np.random.default_rng(0)
    n, day = 16_000_000, 86_400
    click = np.sort(draw.integers(0, 60 * day, n)).astype(float)
    z = np.floor(draw.exponential(3 * day, n))
    conv = np.where(draw.random(n) < 0.23, click + z, -1.0)
    tracemalloc.start()
    s = defer.make_stream(click, conv, 900.0, 30.0 * day, "defer")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(s.ts) == 2 * n and peak < 3e9, peak


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conv_ts": np.array([2.0, 3.0])}, "conversion before its click"),
        ({"w1": 8.0}, "0 <= w1 < w2"),
        ({"w1": -1.0}, "0 <= w1 < w2"),
        ({"w3": 1.0}, r"w3 must lie in \(w1, w2\)"),
        ({"w3": 8.0}, r"w3 must lie in \(w1, w2\)"),
        ({"w3": 3.0, "method": "fnw"}, "no real negatives"),
        ({"click_ts": np.array([1.0, -5.0])}, r"click_ts\[1\]: expected finite"),
        ({"click_ts": np.array([np.nan, 5.0])}, r"click_ts\[0\]"),
        ({"click_ts": np.array([1.0, np.inf])}, r"click_ts\[1\]: expected finite"),
        ({"conv_ts": np.array([np.nan, 6.0])}, r"conv_ts\[0\]"),
        ({"conv_ts": np.array([-7.0, 6.0])}, r"conv_ts\[0\]: .*-1 or inf"),
        ({"conv_ts": np.array([7.0])}, "one length"),
        ({"method": "defr"}, "method must be one of"),
        ({"variant": "beta"}, "paper or released"),
    ],
)
def test_make_stream_refuses(change, message):
    options = {
        "click_ts": np.array([1.0, 5.0]), "conv_ts": np.array([2.0, np.inf]),
        "w1": 1.0, "w2": 7.0, "method": "defer", **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        defer.make_stream(**options)


def test_buckets_refuse():
    click, conv = clicks_and_conversions()
    s = defer.make_stream(click, conv, 2.0, 30.0, "defer")
    with pytest.raises(ValueError, match="sorted by time"):
        defer.make_buckets(s._replace(ts=s.ts[::-1]), click, 0.0, 60.0, 1.0)
    with pytest.raises(ValueError, match=r"label\[0\]: expected 0 or 1"):
        defer.make_buckets(s._replace(label=s.label + 3), click, 0.0, 60.0, 1.0)
    with pytest.raises(ValueError, match="two or more"):
        defer.make_buckets(s, click, 0.0, 1.0, 1.0)
    buckets = defer.make_buckets(s, click, 0.0, 60.0, 20.0)
    with pytest.raises(ValueError, match="ascending start"):
        defer.run_stream(len, len, None, buckets[::-1], {}, click, batch=4)


def test_buckets_part_events_and_clicks():
    click, conv = clicks_and_conversions()
    s = defer.make_stream(click, conv, 2.0, 30.0, "defer")
    buckets = defer.make_buckets(s, click, 5.0, 60.0, 10.0)
    assert [b.start for b in buckets] == [5.0, 15.0, 25.0, 35.0]
    for b in buckets:
        assert (b.events.ts >= b.start).all() and (b.events.ts < b.start + 10).all()
        expected = np.flatnonzero((click >= b.start + 10) & (click < b.start + 20))
        np.testing.assert_array_equal(np.sort(b.clicks), expected)
    trained = sum(len(b.events.ts) for b in buckets)
    assert trained == ((s.ts >= 5) & (s.ts < 45)).sum()


def test_relative_improvement_is_guarded():
    assert defer.relative_improvement(0.5, 0.6, 0.4) == pytest.approx(50)
    assert defer.relative_improvement(1.0, 0.6, 0.4) == pytest.approx(-200)
    assert math.isnan(defer.relative_improvement(0.5, 0.6, 0.6 + 1e-9))
    assert math.isnan(defer.relative_improvement(0.5, math.nan, 0.6))
    assert math.isnan(defer.relative_improvement(0.5, 0.6, math.inf))
