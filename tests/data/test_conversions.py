"""Delayed conversions: features known at the click, final labels, closed forms."""

import datetime
import math

import numpy as np
import pytest

from jaxpapers.data import conversions, features, fetch

DAY0 = datetime.date(1997, 1, 1)


def purchases():
    """60 customers; (customer, day, cds, dollars), some twice on a day."""
    rng = np.random.default_rng(0)
    rows = []
    for customer in range(1, 61):
        days = np.cumsum(rng.integers(0, 40, rng.integers(1, 30))) + rng.integers(60)
        rows += [
            (
                customer,
                int(d),
                int(rng.integers(1, 5)),
                round(float(rng.gamma(2, 20)), 2),
            )
            for d in days
            if d < 546
        ]
    return rows


def write(path, rows):
    lines = [" customer_id  date number_of_cds  dollar_value\r\n"]
    for customer, day, cds, dollars in rows:
        date = (DAY0 + datetime.timedelta(day)).strftime("%Y%m%d")
        lines.append(f" {customer:05d} {date}  {cds}  {dollars:.2f}\r\n")
    path.write_text("".join(lines))
    return path


def test_cdnow_is_what_a_loop_gives(tmp_path):
    rows = purchases()
    data = conversions.cdnow(write(tmp_path / "CDNOW_master.txt", rows))
    merged: dict = {}
    for customer, day, cds, dollars in rows:
        old = merged.get((customer, day), (0, 0.0))
        merged[customer, day] = (old[0] + cds, old[1] + dollars)
    expected, seen = [], {}
    for (customer, day), (cds, dollars) in sorted(merged.items()):
        past = seen.setdefault(customer, [])
        past.append((day, dollars))
        days, n = [d for d, _ in past], len(past)
        later = [d for c, d in merged if c == customer and d > day]
        converts = bool(later) and min(later) - day <= 30
        spent = sum(x for _, x in past)
        weekday = (DAY0 + datetime.timedelta(day)).weekday()
        values = [
            math.log(1 + n), days[-1] - days[-2] if n > 1 else 0, n == 1, day - days[0],
            cds, dollars, spent, days[-2] - days[-3] if n > 2 else 0, n < 3, spent / n,
            (day - days[0]) / (30 * n), *(weekday == i for i in range(7)),
        ]  # fmt: skip
        if day <= 515:
            expected.append((day, customer, min(later) if converts else np.inf, values))
    expected.sort(key=lambda row: row[:2])
    day = np.array([row[0] for row in expected])
    np.testing.assert_array_equal(data.click_ts, day)
    np.testing.assert_array_equal(data.conv_ts, [row[2] for row in expected])
    np.testing.assert_array_equal(data.pretrain, day <= 150)
    np.testing.assert_array_equal(data.stream, day >= 180)
    raw = np.array([row[3] for row in expected], np.float64)
    first = raw[day <= 150]
    scaled = (raw - first.mean(0)) / np.where(first.std(0) > 0, first.std(0), 1)
    np.testing.assert_allclose(data.features, scaled, rtol=1e-4, atol=1e-5)
    assert data.features.dtype == np.float32 and len(data.names) == scaled.shape[1]
    assert (data.unit, data.window, data.sizes) == ("day", 30.0, ())
    assert (data.conv_ts >= data.click_ts).all()


def test_the_future_changes_no_feature(tmp_path):
    """Pretraining rows, scale included, are the same without what came after them."""
    rows = purchases()
    path = tmp_path / "CDNOW_master.txt"
    whole = conversions.cdnow(write(path, rows))
    cut = conversions.cdnow(write(path, [row for row in rows if row[1] <= 150]))
    np.testing.assert_array_equal(cut.features, whole.features[whole.pretrain])


@pytest.mark.parametrize(
    "line", ["1 19961231 1 2.0", "1 19980701 1 2.0", "1 19970230 1 2.0", "1 19970101 1",
             "1 19970101 1 nan", "1 19970101 1 -2", "x 19970101 1 2",
             "1 19970101 -1 2.0", "1 19970101 1 1e308", "1 19970101 1_0 2.0",
             "-1 19970101 1 2.0", f"{2**63} 19970101 1 2.0", "1 1997111 1 2.0"],
)  # fmt: skip
def test_malformed_purchase(tmp_path, line):
    path = write(tmp_path / "CDNOW_master.txt", purchases()[:3])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="CDNOW_master.txt, line 5 is malformed"):
        conversions.cdnow(tmp_path)


def test_numbers_of_customers_do_not_count(tmp_path):
    """Of 64 bits, times days they would wrap; nor does the order of the columns."""
    rows = purchases()
    plain = conversions.cdnow(write(tmp_path / "plain.txt", rows))
    large = [(2**63 - 100 + row[0], *row[1:]) for row in rows]
    for path in (write(tmp_path / "large.txt", large), tmp_path / "turned.txt"):
        if path.name == "turned.txt":
            lines = (tmp_path / "plain.txt").read_text().splitlines()
            path.write_text("\n".join(" ".join(line.split()[::-1]) for line in lines))
        read = conversions.cdnow(path)
        np.testing.assert_array_equal(read.features, plain.features)
        np.testing.assert_array_equal(read.conv_ts, plain.conv_ts)
    bare = (tmp_path / "plain.txt").read_text().partition("\n")[2]
    (tmp_path / "bare.txt").write_text(bare)
    assert len(conversions.cdnow(tmp_path / "bare.txt").conv_ts) == len(plain.conv_ts)


def test_days_out_of_order(tmp_path):
    path = write(tmp_path / "CDNOW_master.txt", [(1, 200, 1, 2.0)])
    for bad in (
        {"window": 40},
        {"pretrain_until": 180},
        {"stream_from": 520},
        {"window": 0},
    ):
        with pytest.raises(
            ValueError, match="expected 0 <= pretrain_until < stream_fr"
        ):
            conversions.cdnow(path, **bad)
    with pytest.raises(ValueError, match="no purchase until day 150"):
        conversions.cdnow(path)


def criteo_line(click, conversion, numbers=range(8), names="abcdefghi"):
    return "\t".join(map(str, [click, conversion, *numbers, *names])) + "\n"


def test_criteo(tmp_path):
    path = tmp_path / "data.txt"
    day = 86400
    path.write_text(
        criteo_line(31 * day, 31 * day, [99] * 8)
        + criteo_line(0, 30 * day, [10] + [0] * 7)
        + criteo_line(10, "", [""] * 8, ["", *"bcdefghi"])
        + criteo_line(61 * day, "", [4] * 8)
        + criteo_line(day, 31 * day + 1, [10] * 8)
    )
    data = conversions.criteo(path)
    assert data.click_ts.tolist() == [0, 10, day, 31 * day, 61 * day]
    # The third is 30 days and a second late.
    assert data.conv_ts.tolist() == [30 * day, np.inf, np.inf, 31 * day, np.inf]
    assert data.pretrain.tolist() == [True] * 3 + [False] * 2
    assert data.stream.tolist() == [False] * 3 + [True, False]
    assert data.features.dtype == np.int32 and data.features.shape == (5, 17)
    # Scaled over pretraining: -1 (missing) -> 0, 10 -> 1; the 99 is above the range.
    assert data.features[:, 0].tolist() == [63, 1, 63, 63, 1 + int(63 * 5 / 11)]
    assert data.features[:, 1].tolist() == [
        1 + int(15 / 11),
        1,
        15,
        15,
        1 + int(75 / 11),
    ]
    assert data.sizes == conversions.CRITEO_BINS + conversions.CRITEO_BUCKETS
    assert (data.features < np.array(data.sizes)).all() and (data.features >= 0).all()
    assert (data.features[:, 9:] == data.features[0, 9:]).all(1).tolist() == [True] * 5
    assert data.features[0, 8] != data.features[1, 8]
    assert (data.unit, data.window) == ("second", 30 * day)
    late = conversions.criteo(path, pretrain_days=40.0, window_days=31.0)
    assert late.pretrain.tolist() == [True] * 4 + [False]
    assert late.conv_ts[2] == 31 * day + 1
    with pytest.raises(ValueError, match="0 < pretrain_days < days"):
        conversions.criteo(path, days=20.0)


@pytest.mark.parametrize(
    "line, match",
    [
        (criteo_line(10, 9), "clicked at 10.0, converted at 9.0"),
        (criteo_line(-1, ""), "clicked at -1.0"),
        (criteo_line("nan", ""), "clicked at nan"),
        (criteo_line(5, "nan"), "converted at nan"),
        (criteo_line("", ""), "could not convert"),
        (criteo_line(5, "", range(7)), "18 columns instead of 19"),
        (criteo_line(5, "", ["inf"] * 8), "a number is not finite"),
        (criteo_line(5, "", ["x"] * 8), "could not convert"),
    ],
)
def test_malformed_criteo_line(tmp_path, line, match):
    path = tmp_path / "data.txt"
    path.write_text(criteo_line(1, 2) + line)
    with pytest.raises(ValueError, match=f"data.txt, line 2 is malformed.*{match}"):
        conversions.criteo(path)


def test_python_s_numbers_are_none_of_a_log(tmp_path):
    path = tmp_path / "data.txt"
    line = criteo_line(86400, "").strip("\n").split("\t")
    for place in (0, 2, 9):
        changed = [*line[:place], "1_0", *line[place + 1 :]]
        path.write_text("\n".join(["\t".join(line), "\t".join(changed)]))
        with pytest.raises(ValueError, match="line 2 .*underscore in a number"):
            conversions.criteo(path)


def test_no_early_click(tmp_path):
    path = tmp_path / "data.txt"
    for text in ("", criteo_line(31 * 86400, "")):
        path.write_text(text)
        with pytest.raises(ValueError, match="no click before day 30.0"):
            conversions.criteo(path)
    days = [1, 61, 62, 63]
    path.write_text("\n".join(criteo_line(day * 86400, "") for day in days))
    with pytest.raises(
        ValueError, match="only 25.0% of 4 clicks lie in .*milliseconds"
    ):
        conversions.criteo(path)


def test_bins_are_equal_parts_of_the_range():
    values, everywhere = np.linspace(0, 10, 9001)[:-1], np.ones(9000, bool)
    bins = features.bucketize(np.append(values, 10.0), 10, np.append(everywhere, True))
    # As boundaries begin at 0 itself, bin 0 is for what is below the range.
    assert np.bincount(bins, minlength=11).tolist() == [0] + [1000] * 8 + [1001, 0]
    constant = features.bucketize(np.full(3, 7.0), 4, np.ones(3, bool))
    assert constant.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="bins must be at least 2, got 1"):
        features.bucketize(values, 1, everywhere)


def test_hash_is_stable_and_even():
    # In every process: Python's own hash of texts is another in each.
    hashes = [features.stable_hash(str(i), 512, 3) for i in range(5)]
    assert hashes == [170, 36, 34, 511, 249]
    for buckets in (16, 100):
        n = 100 * buckets
        hashes = [features.stable_hash(f"{i:x}", buckets) for i in range(n)]
        count = np.bincount(hashes, minlength=buckets)
        assert len(count) == buckets
        chi2 = ((count - 100) ** 2 / 100).sum()
        assert abs(chi2 - buckets) < 5 * np.sqrt(2 * buckets)


def test_criteo_features_of_texts_and_of_buckets():
    draw = np.random.default_rng(0)
    numbers, rows = draw.uniform(-1, 9, (6, 8)), np.arange(6) < 4
    texts = np.array([[f"{i}{j % 2}" for j in range(9)] for i in range(6)])
    columns = conversions.criteo_features(numbers, texts, rows)
    assert columns.shape == (6, 17) and columns.dtype == np.int32
    for i, bins in enumerate(conversions.CRITEO_BINS):
        expected = features.bucketize(numbers[:, i], bins, rows)
        np.testing.assert_array_equal(columns[:, i], expected)
    for i, count in enumerate(conversions.CRITEO_BUCKETS):
        expected = [features.stable_hash(x, count, i) for x in texts[:, i]]
        assert columns[:, 8 + i].tolist() == expected
    again = conversions.criteo_features(numbers, columns[:, 8:], rows)
    np.testing.assert_array_equal(again, columns)
    with pytest.raises(ValueError, match="9 categories"):
        conversions.criteo_features(numbers, texts[:, :8], rows)


@pytest.mark.parametrize("w1", [0.25, 1.0, 5.0])
def test_synthetic_probabilities(w1):
    data = conversions.synthetic(100_000, seed=1, w1=w1)
    delay = data.conv_ts - data.click_ts
    converted, late = np.isfinite(delay), np.isfinite(delay) & (delay > w1)
    assert (delay > 0).all() and delay[converted].max() <= 30 + 1e-9
    assert (data.p_dp <= data.p).all() and (data.p_dp > 0).all()
    # Calibrated in bins of the probability, and along features that move the delay only.
    groups = [
        data.p > np.median(data.p),
        data.features[:, 3] > 0,
        data.features[:, 4] > 1,
    ]
    for rows in [g for group in groups for g in (group, ~group)]:
        for event, p in ((converted, data.p), (late, data.p_dp)):
            error = math.sqrt((p[rows] * (1 - p[rows])).sum())
            assert abs(event[rows].sum() - p[rows].sum()) < 4 * error
    assert (np.diff(data.click_ts) >= 0).all()
    assert 0 <= data.click_ts[0] and 99 < data.click_ts[-1] < 100


def test_synthetic_closed_form_at_a_point():
    data = conversions.synthetic(3, seed=2, w1=2.0, w2=7.0)
    x = data.features[0]
    p = 1 / (1 + math.exp(-(x[0] - 0.5 * x[1] + 0.5 * x[2] - 1)))
    rate = math.exp(0.5 * (0.5 * x[1] + x[3] - x[4]))
    survive = math.exp(-2 * rate) - math.exp(-7 * rate)
    np.testing.assert_allclose(data.p[0], p, rtol=1e-12)
    expected = p * survive / (1 - math.exp(-7 * rate))
    np.testing.assert_allclose(data.p_dp[0], expected, rtol=1e-10)
    again = conversions.synthetic(3, seed=2, w1=2.0, w2=7.0)
    np.testing.assert_array_equal(data.conv_ts, again.conv_ts)
    for bad in ({"w1": 7.0}, {"w1": -1.0}, {"w2": np.nan}, {"span": 0.0}):
        with pytest.raises(ValueError, match="expected n >= 1, 0 <= w1 < w2 < inf"):
            conversions.synthetic(3, **{"w2": 7.0, **bad})


@pytest.mark.slow
def test_cdnow_is_as_the_digest_says():
    try:
        data = conversions.cdnow(fetch.get("cdnow"))
    except FileNotFoundError as e:
        pytest.skip(str(e))
    converted = np.isfinite(data.conv_ts)
    delay = (data.conv_ts - data.click_ts)[converted]
    assert len(data.click_ts) == 65_636 and data.stream.sum() == 25_110
    np.testing.assert_allclose(converted.mean(), 0.308, atol=5e-4)
    np.testing.assert_allclose(converted[data.stream].mean(), 0.376, atol=1e-3)
    np.testing.assert_allclose(delay.mean(), 12.7, atol=0.05)
    assert np.percentile(delay, [25, 50, 75]).tolist() == [5, 11, 20]
    np.testing.assert_allclose((delay > 3).mean(), 0.83, atol=5e-3)
    path = fetch.get("cdnow") / "CDNOW_master.txt"
    last = {
        line[:15] for line in path.read_text().splitlines() if line[7:15] == "19980630"
    }
    all_but_last = conversions.cdnow(path, window=1, stream_until=544)
    assert len(all_but_last.click_ts) + len(last) == 67_591
