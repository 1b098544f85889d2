"""Tasks against plain loops, batches as functions of the position, ids in range."""

import numpy as np
import pytest

from jaxpapers.data import ctr, ctr_tasks, fetch, movielens
from jaxpapers.ops import ranking

USERS, ITEMS, CATES = 12, 40, 5


@pytest.fixture(scope="module")
def ratings():
    """Each user rates 14 items, in pages of one time, in a shuffled file."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(1, USERS + 1):
        times = np.sort(rng.integers(100, 106, 14))
        for item, time in zip(rng.permutation(ITEMS)[:14] + 1, times):
            rows.append((user, item, rng.integers(1, 6), time))
    user, item, rating, time = np.array(rows, np.int32)[rng.permutation(len(rows))].T
    cate = np.concatenate([[0], np.arange(ITEMS) % CATES + 1, [CATES + 1]])
    sizes = {"user": USERS + 2, "item": ITEMS + 2, "cate": CATES + 2}
    return ctr_tasks.Ratings(
        user, item, rating.astype(np.float32), time, cate.astype(np.int32), sizes
    )


@pytest.fixture(scope="module")
def clicks(ratings):
    return ctr_tasks.task_next_item(ratings, test=3)


def of_user(ratings, user, key):
    rows = [i for i in range(len(ratings.user)) if ratings.user[i] == user]
    return sorted(rows, key=key)


def history(clicks, samples, i):
    return clicks.log.item[samples.start[i] : samples.stop[i]].tolist()


@pytest.mark.parametrize("order", ["row", "id"])
def test_next_item_is_what_a_loop_gives(ratings, order):
    clicks = ctr_tasks.task_next_item(ratings, order=order, test=3)
    expected = {"train": [], "test": []}
    for user in range(1, USERS + 1):
        tie = (lambda i: i) if order == "row" else (lambda i: ratings.item[i])
        rows = of_user(ratings, user, lambda i: (ratings.time[i], tie(i)))  # noqa: B023
        items = ratings.item[rows].tolist()
        for k in range(1, len(items)):
            split = "test" if k >= len(items) - 3 else "train"
            expected[split].append((user, items[k], items[:k]))
    for split, each in (("train", 2), ("test", 5)):
        samples = getattr(clicks, split)
        rows = [
            (samples.user[i], samples.item[i], history(clicks, samples, i))
            for i in range(0, len(samples.label), each)
        ]
        assert rows == expected[split]
        label = samples.label.reshape(-1, each)
        assert (label[:, 0] == 1).all() and (label[:, 1:] == 0).all()
        np.testing.assert_array_equal(
            samples.start[::each], samples.start[each - 1 :: each]
        )
        np.testing.assert_array_equal(samples.cate, ratings.cate[samples.item])
        owned = set(zip(ratings.user.tolist(), ratings.item.tolist()))
        pairs = zip(samples.user, samples.item, samples.label)
        assert all(((u, i) in owned) == (y == 1) for u, i, y in pairs)
    # The pool of auxiliary negatives has no test positive's row.
    assert len(clicks.pool) == USERS * 11
    assert not set(clicks.pool) & set(clicks.test.stop[::5])


def test_negatives_follow_popularity():
    """One item has half of the log: others that lack it get it half of the time."""
    n = 400
    user = np.repeat(np.arange(1, n + 1), 2)
    item = np.tile([1, 2], n)
    item[: n // 2] = np.arange(n // 2) % 50 + 3  # A quarter of the users has others.
    item = item.astype(np.int32)
    sizes = {"user": n + 2, "item": 54, "cate": 3}
    ones = np.ones(54, np.int32)
    data = ctr_tasks.Ratings(
        user.astype(np.int32), item, np.ones(2 * n, np.float32),
        np.tile([1, 2], n).astype(np.int32), ones, sizes,
    )  # fmt: skip
    clicks = ctr_tasks.task_next_item(data, test=1, test_negatives=8)
    drawn = clicks.test.item.reshape(-1, 9)[: n // 4, 1:]
    assert abs((drawn <= 2).mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / drawn.size)
    again = ctr_tasks.task_next_item(data, test=1, test_negatives=8, seed=1)
    assert (again.test.item != clicks.test.item).any()


def test_generated_histories_tell_the_category():
    clicks = ctr_tasks.task_next_item(ctr_tasks.generated())
    test, log = clicks.test, clicks.log
    assert (len(clicks.train.label), len(test.label)) == (11_600, 10_000)
    share = [
        (log.cate[a:b] == c).mean() for a, b, c in zip(test.start, test.stop, test.cate)
    ]
    assert ranking.auc(test.label, np.array(share)) > 0.8
    assert abs(ranking.auc(test.label, ctr.popularity(clicks)) - 0.5) < 0.03
    other = ctr_tasks.generated(seed=1)
    assert (other.item != ctr_tasks.generated().item).any()


def test_rating_history_is_liked_and_strictly_earlier(ratings):
    clicks = ctr_tasks.task_rating(ratings, test_users=4)
    tested = set((np.random.default_rng(1234).permutation(USERS)[:4] + 1).tolist())
    for split in ("train", "test"):
        samples = getattr(clicks, split)
        users = set(samples.user.tolist())
        assert users == (tested if split == "test" else set(range(1, 13)) - tested)
        rows = [i for i in range(len(ratings.user)) if ratings.user[i] in users]
        np.testing.assert_array_equal(samples.label, ratings.rating[rows] >= 4)
        for n, i in enumerate(rows):
            earlier = of_user(ratings, ratings.user[i], lambda j: (ratings.time[j], j))
            expected = [
                ratings.item[j]
                for j in earlier
                if ratings.time[j] < ratings.time[i] and ratings.rating[j] >= 4
            ]
            assert history(clicks, samples, n) == expected
    with pytest.raises(ValueError, match="test_users must be between 1 and 11, got 12"):
        ctr_tasks.task_rating(ratings, test_users=12)


@pytest.mark.parametrize("length", [1, 4, 50])
def test_batch_holds_the_last_behaviours_left_aligned(clicks, length):
    examples = ctr.Examples(clicks, length, shuffle=False, times=True)
    batch = examples.batch(0, len(examples))
    assert {k: v.dtype for k, v in batch.items()} == {
        k: np.dtype(np.float32 if k == "label" else np.int32) for k in batch
    }
    for i in range(len(examples)):
        rows = slice(clicks.train.start[i], clicks.train.stop[i])
        for name in ("item", "cate", "time"):
            kept = getattr(clicks.log, name)[rows][-length:].tolist()
            expected = kept + [0] * (length - len(kept))
            assert batch[f"hist_{name}"][i].tolist() == expected
            assert batch[name][i] == getattr(clicks.train, name)[i]
        assert batch["length"][i] == len(kept)


def test_batch_is_a_function_of_the_position(clicks):
    examples = ctr.Examples(clicks, 8, seed=3, negatives=True)
    n = len(examples)
    whole = examples.batch(n - 10, 20)  # Over an epoch's end.
    for rows in (slice(0, 10), slice(10, 20)):
        part = ctr.Examples(clicks, 8, seed=3, negatives=True).batch(n - 10, 20, rows)
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][rows])
    other = ctr.Examples(clicks, 8, seed=4, negatives=True).batch(n - 10, 20)
    assert (other["item"] != whole["item"]).any()
    keys = [
        list(
            zip(
                *(
                    examples.batch(e * n, n)[k].tolist()
                    for k in ("user", "item", "length")
                )
            )
        )
        for e in range(2)
    ]
    split = list(zip(clicks.train.user.tolist(), clicks.train.item.tolist()))
    assert sorted((u, i) for u, i, _ in keys[0]) == sorted(split)
    assert sorted(keys[0]) == sorted(keys[1]) and keys[0] != keys[1]


def test_auxiliary_negatives_differ_from_their_step(clicks):
    examples = ctr.Examples(clicks, 8, negatives=True, shuffle=False)
    batch, later = (examples.batch(e * len(examples), len(examples)) for e in range(2))
    valid = np.arange(8) < batch["length"][:, None]
    assert (batch["neg_hist_item"] != batch["hist_item"])[valid].all()
    assert not batch["neg_hist_item"][~valid].any()
    assert set(batch["neg_hist_item"][valid]) <= set(clicks.log.item[clicks.pool])
    items = clicks.log.item
    cates = dict(zip(items.tolist(), clicks.log.cate.tolist()))
    pairs = zip(batch["neg_hist_item"][valid].tolist(), batch["neg_hist_cate"][valid])
    assert all(cates[item] == cate for item, cate in pairs)
    np.testing.assert_array_equal(batch["hist_item"], later["hist_item"])
    assert (batch["neg_hist_item"] != later["neg_hist_item"]).mean() > 0.5
    # In proportion to the pool, over many draws.
    count = np.zeros(ITEMS + 2)
    for e in range(40):
        drawn = examples.batch(e * len(examples), len(examples))["neg_hist_item"]
        count += np.bincount(drawn[valid], minlength=ITEMS + 2)
    pool = np.bincount(items[clicks.pool], minlength=ITEMS + 2)
    assert np.corrcoef(count, pool)[0, 1] > 0.95


def test_a_pool_of_nearly_one_item(clicks):
    rare = np.flatnonzero(clicks.log.item != clicks.log.item[0])[0]
    common = np.zeros(10_000, np.int64)
    one = clicks._replace(pool=np.append(common, rare))
    batch = ctr.Examples(one, 8, negatives=True).batch(0, 200)
    valid = np.arange(8) < batch["length"][:, None]
    assert (batch["neg_hist_item"] != batch["hist_item"])[valid].all()
    with pytest.raises(ValueError, match="need two items in the pool"):
        ctr.Examples(clicks._replace(pool=common), 8, negatives=True)


def test_negatives_of_the_source_are_taken(clicks):
    negatives = clicks.log.item % ITEMS + 1, clicks.log.cate % CATES + 1
    given = ctr.Examples(clicks._replace(negatives=negatives), 8, negatives=True)
    batch = given.batch(0, 30)
    valid = np.arange(8) < batch["length"][:, None]
    expected = np.where(valid, batch["hist_item"] % ITEMS + 1, 0)
    np.testing.assert_array_equal(batch["neg_hist_item"], expected)


def test_score_batches_have_every_sample_once(clicks):
    examples = ctr.Examples(clicks, 8, split="test")
    batches = list(examples.score_batches(64))
    assert {b["label"].shape for b in batches} == {(64,)}
    weight = np.concatenate([b["weight"] for b in batches]) > 0
    item = np.concatenate([b["item"] for b in batches])[weight]
    np.testing.assert_array_equal(item, clicks.test.item)


@pytest.mark.parametrize("length", [2, 50])
def test_occurrences_count_samples(clicks, length):
    counts = ctr.occurrences(clicks, length)
    expected = {name: np.zeros(n, np.int64) for name, n in clicks.rows.items()}
    for i in range(len(clicks.train.label)):
        expected["user"][clicks.train.user[i]] += 1
        for name in ("item", "cate"):
            rows = slice(clicks.train.start[i], clicks.train.stop[i])
            ids = set(getattr(clicks.log, name)[rows][-length:].tolist())
            ids.add(int(getattr(clicks.train, name)[i]))
            expected[name][list(ids)] += 1
    for name in expected:
        np.testing.assert_array_equal(counts[name], expected[name])


def test_baselines_see_training_only(ratings):
    clicks = ctr_tasks.task_rating(ratings, test_users=4)
    train, test = clicks.train, clicks.test
    for i, item in enumerate(test.item[:20]):
        labels = train.label[train.item == item]
        score = np.log1p(labels.sum(dtype=np.float64))
        np.testing.assert_allclose(ctr.popularity(clicks)[i], score, rtol=1e-12)
        mean = (labels.sum() + 5 * train.label.mean()) / (len(labels) + 5)
        np.testing.assert_allclose(ctr.item_mean(clicks)[i], mean, rtol=1e-6)
    shuffled = ctr.shuffle_labels(clicks, 1)
    assert shuffled.train.label.sum() == train.label.sum()
    assert (shuffled.train.label != train.label).any()
    assert shuffled.test is test


def test_hold_out_takes_users_of_the_training_part(clicks):
    held = ctr.hold_out(clicks, 0.25, seed=1)
    left, users = set(held.train.user), set(held.test.user)
    assert not left & users and left | users == set(clicks.train.user)
    assert len(users) == round(0.25 * len(left | users))
    assert len(held.train.label) + len(held.test.label) == len(clicks.train.label)
    other = ctr.hold_out(clicks, 0.25, seed=1)
    np.testing.assert_array_equal(held.test.item, other.test.item)
    with pytest.raises(ValueError, match="users on both sides"):
        ctr.hold_out(clicks, 1.0)


def test_errors_name_field_and_bound(clicks, ratings):
    with pytest.raises(
        ValueError, match="length of hist_item must be at least 1, got 0"
    ):
        ctr.Examples(clicks, 0)
    with pytest.raises(
        ValueError, match="split must be 'train' or 'test', got 'valid'"
    ):
        ctr.Examples(clicks, split="valid")
    with pytest.raises(ValueError, match="order must be 'row' or 'id', got 'time'"):
        ctr_tasks.task_next_item(ratings, order="time")
    train, log = clicks.train, clicks.log
    for wrong, match in (
        (train._replace(label=train.label + 0.5), "label must be 0 or 1"),
        (train._replace(label=train.label * np.nan), "label must be 0 or 1"),
        (train._replace(item=train.item + 40), r"item must be in \[1, 41\].*got 80"),
        (train._replace(user=train.user * 0), r"user must be in \[1, 13\].*got 0"),
        (train._replace(cate=train.cate[1:]), "cate has .* values, expected"),
        (train._replace(stop=train.stop + len(log.item)), "ranges of the 168 log rows"),
        (train._replace(start=train.stop + 1), "ranges of the 168 log rows"),
        (ctr.Samples(*(x[:0] for x in train)), "no samples"),
    ):
        with pytest.raises(ValueError, match=match):
            ctr.Examples(clicks._replace(train=wrong))
    timeless = clicks._replace(train=train._replace(time=train.time * 0))
    with pytest.raises(ValueError, match="has no times"):
        ctr.Examples(timeless, times=True)
    everything = np.arange(1, 7, dtype=np.int32)
    one = ctr_tasks.Ratings(
        everything * 0 + 1, everything, everything.astype(np.float32), everything,
        np.ones(8, np.int32), {"user": 3, "item": 8, "cate": 3},
    )  # fmt: skip
    with pytest.raises(ValueError, match="has rated every item of the log"):
        ctr_tasks.task_next_item(one, test=2)


def test_empty_histories_alone(clicks):
    none = np.zeros(0, np.int32)
    samples = clicks.train._replace(
        stop=clicks.train.start * 0, start=clicks.train.start * 0
    )
    empty = clicks._replace(train=samples, log=ctr.Log(none, none, none))
    batch = ctr.Examples(empty, 4).batch(0, 3)
    assert not batch["hist_item"].any() and not batch["length"].any()


def auc(label, score):
    """Mann-Whitney with half a point for ties."""
    order = np.sort(score[label == 0])
    above = np.searchsorted(order, score[label == 1], "left")
    above = above + np.searchsorted(order, score[label == 1], "right")
    return above.mean() / 2 / len(order)


def grouped_auc(user, label, score):
    groups = [user == u for u in np.unique(user)]
    groups = [g for g in groups if 0 < label[g].mean() < 1]
    size = [g.sum() for g in groups]
    return np.average([auc(label[g], score[g]) for g in groups], weights=size)


@pytest.mark.slow
def test_ml_100k_is_as_the_digest_says():
    try:
        folder = fetch.get("ml-100k")
    except FileNotFoundError as e:
        pytest.skip(str(e))
    ratings = movielens.ml_100k(folder)
    assert ratings.rows == {"user": 945, "item": 1684, "cate": 21}
    combined = movielens.ml_100k(folder, category="combination")
    assert combined.rows["cate"] == 216 + 2
    nexts = ctr_tasks.task_next_item(ratings)
    assert len(nexts.train.label) == 179_254 and len(nexts.test.label) == 47_150
    score = ctr.popularity(nexts)
    assert abs(auc(nexts.test.label, score) - 0.5) < 0.02
    assert abs(grouped_auc(nexts.test.user, nexts.test.label, score) - 0.5) < 0.02
    rating = ctr_tasks.task_rating(ratings)
    assert len(rating.train.label) == 75_994 and len(rating.test.label) == 24_006
    np.testing.assert_allclose(rating.train.label.mean(), 0.549, atol=5e-4)
    np.testing.assert_allclose(rating.test.label.mean(), 0.569, atol=5e-4)
    test, mean = rating.test, ctr.item_mean(rating)
    np.testing.assert_allclose(auc(test.label, mean), 0.7084, atol=5e-5)
    value = grouped_auc(test.user, test.label, mean)
    np.testing.assert_allclose(value, 0.7098, atol=5e-5)
    value = auc(test.label, ctr.popularity(rating))
    np.testing.assert_allclose(value, 0.6660, atol=5e-5)
