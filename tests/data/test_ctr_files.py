"""Readers on tiny files that the tests write, malformed lines included."""

import gzip
import json
import pickle

import numpy as np
import pytest

from jaxpapers.data import amazon as amazon_rows
from jaxpapers.data import ctr, ctr_files, ids, lines, movielens

# user -> products in time; written in another order, with single quotes.
REVIEWS = {"U2": "b a d", "U1": "a b c", "U3": "c", "U4": "d e"}
META = {
    "a": [["Electronics", "Cables"], ["Home", "Lamps"]],
    "b": [["Electronics", "Cables"]],
    "c": [["Electronics", "Phones"], ["Office", "Cables"]],
    "d": [["Electronics", "Zoom"]],
    "zz": [["Never", "Reviewed"]],
}


@pytest.fixture
def amazon(tmp_path):
    rows = [
        {
            "reviewerID": user,
            "asin": asin,
            "unixReviewTime": 1000 + t,
            "summary": "it's",
        }
        for user, items in REVIEWS.items()
        for t, asin in enumerate(items.split())
    ]
    reviews = tmp_path / "reviews_E_5.json.gz"
    with gzip.open(reviews, "wt") as f:
        for i, row in enumerate(reversed(rows)):
            f.write((json.dumps(row) if i % 2 else repr(row)) + "\n")
    meta = tmp_path / "meta_E.json.gz"
    with gzip.open(meta, "wt") as f:
        for asin, paths in META.items():
            f.write(f"{ {'asin': asin, 'categories': paths, 'also': None} }\n")
    return reviews, meta


def unpack(clicks, split):
    """(user, item, cate, time, label, history); 1 is the first known id, 0 unknown."""
    samples, log = getattr(clicks, split), clicks.log
    return [
        (u - 1, i - 1, c - 1, t, y, (log.item[start:stop] - 1).tolist())
        for u, i, c, t, y, start, stop in zip(*(x.tolist() for x in samples))
    ]


def test_amazon_in_din_protocol(amazon):
    clicks = ctr_files.amazon(*amazon)
    assert clicks.rows == {"user": 6, "item": 7, "cate": 6}
    item = dict(zip("abcde", range(1, 6)))
    # Last name of the last path: a Lamps, b and c Cables, d Zoom, e has no meta.
    cate = dict(zip("abcde", (2, 1, 1, 3, 4)))
    pairs = zip((clicks.log.item - 1).tolist(), (clicks.log.cate - 1).tolist())
    assert dict(pairs) == {item[x]: cate[x] for x in "abcde"}
    positive = {}
    for split in ("train", "test"):
        rows = unpack(clicks, split)
        positive[split] = [(r[0], r[1], r[5]) for r in rows[::2]]
        for yes, no in zip(rows[::2], rows[1::2]):
            assert (yes[4], no[4]) == (1, 0)
            assert yes[5] == no[5] and yes[3] == no[3]
            user = sorted(REVIEWS)[yes[0] - 1]
            assert no[1] not in [item[x] for x in REVIEWS[user].split()]
            assert no[2] == cate["abcde"[no[1] - 1]]
    assert positive["train"] == [(1, 2, [1]), (2, 1, [2])]
    assert positive["test"] == [(1, 3, [1, 2]), (2, 4, [2, 1]), (4, 5, [4])]
    assert clicks.test.time[0] == 1002
    batch = ctr.Examples(clicks, 4, negatives=True, times=True).batch(0, 4)
    assert sorted(batch["length"].tolist()) == [1, 1, 1, 1]


def test_amazon_in_dien_protocol(amazon):
    seeds = [ctr_files.amazon(*amazon, protocol="dien", seed=s) for s in range(30)]
    clicks = next(
        x for x in seeds if len(x.test.label) == 2 and x.test.user[0] == ctr.OOV
    )
    assert len(clicks.train.label) == 4  # U1, U2 or U4, one pair each.
    rows = unpack(clicks, "train") + unpack(clicks, "test")
    assert [r[4] for r in rows] == [1, 0] * 3
    assert all(yes[1] != no[1] for yes, no in zip(rows[::2], rows[1::2]))
    # Ids by frequency: row 1 is the most frequent, counted over candidates and histories.
    count = np.zeros(clicks.rows["item"])
    for row in unpack(clicks, "train"):
        for item in [row[1], *row[5]]:
            count[item] += 1
    known = count[1:-1]
    assert (np.diff(known) <= 0).all() and known.min() > 0 and count[0] == 0
    shares = [len(x.test.label) / 6 for x in seeds]
    assert abs(np.mean(shares) - 0.1) < 4 * np.sqrt(0.09 / 90)
    with pytest.raises(ValueError, match="protocol must be 'din' or 'dien', got 'x'"):
        ctr_files.amazon(*amazon, protocol="x")


@pytest.mark.parametrize(
    "line",
    [
        "{'asin': 'a', 'reviewerID': 'U1'}",
        "{'asin': 'a', 'reviewerID': 'U1', 'unixReviewTime': 'soon'}",
        "{'asin': 'a', 'reviewerID': 'U1', 'unixReviewTime': 99999999999}",
        "__import__('os').system('true')",
        "{'asin': ",
        "[1, 2]",
        '{"asin": 1, "unixReviewTime": NaN}',
        "\udcff",
    ],
)
def test_malformed_review(tmp_path, line):
    good = "{'asin': 'a', 'reviewerID': 'U1', 'unixReviewTime': 1}\n"
    path = tmp_path / "reviews.json"
    path.write_bytes(f"{good}\n{line}\n{good}".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="reviews.json, line 3 is malformed"):
        ctr_files.amazon(path, path)


@pytest.mark.parametrize(
    "line",
    [
        "{'title': 'x'}",
        "{'asin': 'a', 'categories': 'Lamps'}",
        "{'asin': 'a', 'categories': [['Lamps'], 'x']}",
        "{'asin': 'a', 'category': [None]}",
        "{'asin': 1, 'categories': [['x']]}",
    ],
)
def test_malformed_product(amazon, tmp_path, line):
    path = tmp_path / "meta.json"
    path.write_text(f"{{'asin': 'a', 'categories': [['x']]}}\n{line}\n")
    with pytest.raises(ValueError, match="meta.json, line 2 is malformed"):
        ctr_files.amazon(amazon[0], path)


RELEASES = {
    "2014": (("reviewerID", "asin", "unixReviewTime"), 1, "asin", "categories", True),
    "2018": (("reviewerID", "asin", "unixReviewTime"), 1, "asin", "category", False),
    "2023": (
        ("user_id", "parent_asin", "timestamp"), 1000, "parent_asin", "categories", False
    ),
}  # fmt: skip


def release(tmp_path, name, meta=META, mark=b""):
    """The reviews and products of ``amazon`` as another release has them."""
    keys, unit, product, category, nested = RELEASES[name]
    rows = [
        dict(zip(keys, (user, asin, (1000 + t) * unit)))
        for user, items in REVIEWS.items()
        for t, asin in enumerate(items.split())
    ]
    products = [
        {product: asin, category: paths if nested else paths[-1]}
        for asin, paths in meta.items()
    ]
    files = []
    for kind, lines_ in (("reviews", rows), ("meta", products)):
        files.append(tmp_path / f"{kind}_{name}.jsonl")
        text = "\r\n".join(map(json.dumps, lines_))
        content = text.encode()
        files[-1].write_bytes(mark + content if mark else gzip.compress(content))
    return files


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("protocol", ["din", "dien"])
def test_amazon_releases_give_the_same(tmp_path, name, protocol):
    one = {asin: paths[:1] for asin, paths in META.items()}
    clicks = [
        ctr_files.amazon(*release(tmp_path, x, one, mark), protocol=protocol)
        for x, mark in (("2014", b""), (name, b"\xef\xbb\xbf"))
    ]
    for split in ("train", "test"):
        assert unpack(clicks[0], split) == unpack(clicks[1], split)
    assert (
        name in clicks[1].notes and "88.9% of the reviews have a cat" in clicks[1].notes
    )


def test_amazon_refuses_other_files(tmp_path):
    reviews, meta = release(tmp_path, "2014")
    _, other = release(tmp_path, "2018", {f"X{asin}": x for asin, x in META.items()})
    with pytest.raises(ValueError, match="meta_2018.* only 0.0% of the 9 reviews in"):
        ctr_files.amazon(reviews, other)
    few = {asin: META[asin] if asin == "a" else [[]] for asin in META}
    _, few = release(tmp_path, "2023", few)
    with pytest.raises(
        ValueError, match="only 22.2% of .* at least 50%; give the meta"
    ):
        ctr_files.amazon(reviews, few)
    assert ctr_files.amazon(reviews, few, least=0.2).rows["cate"] == 4
    with pytest.raises(ValueError, match="line 1 is malf.*expected a review of one of"):
        ctr_files.amazon(meta, meta)
    mixed = tmp_path / "mixed.json"
    newer, _ = release(tmp_path, "2023", mark=b"\xef\xbb\xbf")
    older, _ = release(tmp_path, "2018", mark=b"\xef\xbb\xbf")
    mixed.write_bytes(older.read_bytes() + b"\n" + newer.read_bytes()[3:])
    with pytest.raises(ValueError, match="line 10 is malformed.*of 2014 or 2018, by"):
        ctr_files.amazon(mixed, meta)
    for least in (-0.1, 2.0, float("nan")):
        with pytest.raises(ValueError, match="least must be in"):
            ctr_files.amazon(reviews, meta, least=least)
    text = newer.read_text(encoding="utf-8-sig")
    newer.write_text(text.replace("1000000", "1400000000", 1))  # Of the older releases.
    with pytest.raises(ValueError, match="expected a time in milliseconds, got 14000"):
        ctr_files.amazon(newer, meta)


@pytest.mark.parametrize(
    "line, paths",
    [
        ({"categories": [], "category": ["a", "b"]}, (("a", "b"),)),
        ({"categories": None, "category": [["a"], []]}, (("a",),)),
        ({"categories": [["a"]], "category": ["b"]}, (("a",),)),
    ],
)
def test_categories_under_either_name(line, paths):
    assert amazon_rows.product(json.dumps({"asin": "x", **line})).paths == paths


@pytest.mark.parametrize("line", ["a,b,5.0,1", "[1]", "{", "{'a': f()}", "{1, 2}"])
def test_lines_that_are_no_dict_say_so_without_addresses(line):
    with pytest.raises(ValueError, match="neither JSON nor a Python|not a dict") as e:
        lines.literal(line)
    assert "0x" not in str(e.value)


HEADERS = [
    ("userId,movieId,rating,timestamp", (0, 1, 2, 3)),
    ("\ufefftimestamp,rating,movieId,userId", (3, 2, 1, 0)),
    (",user_id,movie_id,rating,timestamp", (3, 0, 1, 2, 3)),
    (None, (0, 1, 2, 3)),
]


@pytest.mark.parametrize("header, order", HEADERS)
def test_columns_are_read_by_their_names(tmp_path, header, order):
    movies, ratings = tmp_path / "movies.csv", tmp_path / "ratings.csv"
    movies.write_text("1,Film,Drama\n2,Film,Comedy\n" if header is None else
                      "genres,movieId,title\nDrama,1,F\nComedy,2,F\n")  # fmt: skip
    rows = [(u, m, 4, 10 * u + m) for u in (1, 2, 3) for m in (1, 2)]
    text = [] if header is None else [header]
    text += [",".join(f'"{row[i]}"' for i in order) for row in rows]
    ratings.write_text("\n".join(text))
    clicks = movielens.movielens_20m(ratings, movies, train_users=2)
    read = sorted(unpack(clicks, "train") + unpack(clicks, "test"))
    assert [(r[0], r[1], r[3]) for r in read] == [(u, m, t) for u, m, _, t in rows]
    assert "films of 100.0% of the ratings" in clicks.notes


@pytest.mark.parametrize(
    "text, message",
    [
        ("userId,film,rating,timestamp\n", "line 1: the column 'movieId' is missing"),
        ("userId,userId,movieId,rating,timestamp\n", "'userId' is there twice"),
        ("user,film,stars,time\n1,1,4,9\n", "line 1 .*by name or, without a header"),
        ("1,1,4\n", "line 1 is malformed .*3 fields, expected 4"),
        ("userId,movieId,rating,timestamp\n1,1,4,1112486027000\n", "milliseconds"),
        ("1,1,4,9\n3000000000,1,4,9\n", "line 2 is malformed .*got 3000000000"),
        ("1,1,4,9\n1_0,1,4,9\n", "line 2 is malformed .*an integer, got '1_0'"),
        ("1,1,4,9\n20000000,1,4,9\n", "ratings.csv: users: the id 20,000,000 needs a"),
    ],
)
def test_other_columns_and_values_are_refused(tmp_path, text, message):
    movies, ratings = tmp_path / "movies.csv", tmp_path / "ratings.csv"
    movies.write_text("1,Film,Drama\n")
    ratings.write_text(text)
    with pytest.raises(ValueError, match=message):
        movielens.movielens_20m(ratings, movies, train_users=1)


def test_highest_id_can_be_raised(tmp_path):
    movies, ratings = tmp_path / "movies.csv", tmp_path / "ratings.csv"
    movies.write_text("1,Film,Drama\n2000000,Film,Drama\n")
    ratings.write_text("1,1,4,9\n2,2000000,4,9\n")
    with pytest.raises(ValueError, match=r"films: the id 2,000,000 .*raise max_id"):
        movielens.movielens_20m(ratings, movies, train_users=1)
    clicks = movielens.movielens_20m(ratings, movies, train_users=1, max_id=2_000_000)
    assert clicks.rows["item"] == 2_000_002
    movies.write_text("1,Film,Drama\n3,Film,Drama\n")
    ratings.write_text("1,1,4,9\n2,2,4,9\n3,2,4,9\n")
    with pytest.raises(ValueError, match="only 33.3% of 3 ratings are of films in the"):
        movielens.movielens_20m(ratings, movies, train_users=1)


def test_malformed_film(tmp_path):
    ratings, movies = tmp_path / "ratings.csv", tmp_path / "movies.csv"
    ratings.write_text("userId,movieId,rating,timestamp\n1,1,4.0,10\n")
    movies.write_text("movieId,title,genres\n1,Film,Drama\nx,Film,Drama\n")
    with pytest.raises(ValueError, match="movies.csv, line 3 is malformed"):
        movielens.movielens_20m(ratings, movies)
    (tmp_path / "ml-100k.item").write_text("item_id:token\n1\tFilm\t1995\n")
    (tmp_path / "ml-100k.inter").write_text("user_id:token\n")
    with pytest.raises(ValueError, match="line 1: the column 'class' is missing"):
        movielens.ml_100k(tmp_path)


def test_progress_of_large_files_alone_is_printed(capsys):
    lines.print_progress(10, 20)
    assert not capsys.readouterr().err
    lines.print_progress(150_000_000, 300_000_000)
    lines.print_progress(300_000_000, 300_000_000)
    assert capsys.readouterr().err.endswith("\r300 of 300 MB read\n")


def test_broken_gzip_and_progress(amazon, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_REPORT_LINES", 2)
    calls = []
    ctr_files.amazon(*amazon, progress=lambda done, total: calls.append((done, total)))
    sizes = [path.stat().st_size for path in amazon]
    assert [c for c in calls if c[0] == c[1]][-1] == (sizes[1],) * 2
    assert {total for _, total in calls} == set(sizes) and len(calls) > 4
    assert all(0 < done <= total for done, total in calls)
    broken = tmp_path / "cut.json.gz"
    broken.write_bytes(amazon[0].read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut.json.gz: unreadable after line"):
        ctr_files.amazon(broken, amazon[1])


def taobao_file(tmp_path, rows):
    path = tmp_path / "UserBehavior.csv"
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def test_taobao(tmp_path):
    rows, expected = [], {}
    for user in range(100, 140):
        items = [(user * 7 + k * k) % 31 + 500 for k in range(4)]
        for k, item in enumerate(items):
            rows.append((user, item, item % 3 + 9, "pv", 10 * user + k))
        expected[user - 99] = [item - 499 for item in items]
    rows.append((140, 500, 500 % 3 + 9, "buy", 5))  # One action: left out.
    rng = np.random.default_rng(0)
    path = taobao_file(tmp_path, [rows[i] for i in rng.permutation(len(rows))])
    clicks = ctr_files.taobao(path)
    named = tmp_path / "named.csv"
    named.write_text(f"user_id,item_id,category_id,behavior_type,timestamp\n"
                     f"{path.read_text()}")  # fmt: skip
    assert unpack(ctr_files.taobao(named), "train") == unpack(clicks, "train")
    items = sorted({row[1] for row in rows})
    ids = {item - 499: i for i, item in enumerate(items, 1)}
    for split in ("train", "test"):
        for user, item, cate, time, label, hist in unpack(clicks, split):
            *earlier, last = [ids[x] for x in expected[user]]
            assert hist == earlier  # The candidate is not in it.
            assert (item == last) == (label == 1)
            assert cate == items[item - 1] % 3 + 1
            assert time == 10 * (user + 99) + 3
    assert (len(clicks.train.label), len(clicks.test.label)) == (29, 11)
    assert clicks.train.time.max() < clicks.test.time.min()
    labels = np.concatenate(
        [ctr_files.taobao(path, seed=s).train.label for s in range(20)]
    )
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(labels))


@pytest.mark.parametrize(
    "row", ["1,2,3,pv", "1,2,3,look,5", "1,2,x,pv,5", "1,2,3,pv,5000000000"]
)
def test_malformed_action(tmp_path, row):
    path = taobao_file(tmp_path, [(1, 2, 3, "pv", 4), row.split(",")])
    with pytest.raises(ValueError, match="UserBehavior.csv, line 2 is malformed"):
        ctr_files.taobao(path)


def test_taobao_of_one_time_has_no_test_split(tmp_path):
    path = taobao_file(tmp_path, [(u, i, 1, "pv", 7) for u in (1, 2) for i in (1, 2)])
    with pytest.raises(ValueError, match="second 7: no test split"):
        ctr_files.taobao(path)


def test_movielens_20m(tmp_path):
    movies = tmp_path / "movies.csv"
    movies.write_text(
        "movieId,title,genres\r\n"
        '3,"American President, The (1995)",Comedy|Drama\r\n'
        "7,Heat (1995),Action\r\n9,X,(no genres listed)\r\n"
    )
    ratings = tmp_path / "ratings.csv"
    header = "userId,movieId,rating,timestamp\r\n"
    lines = [f"{u},{m},{r},{t}" for u in (1, 2, 5) for m, r, t in
             ((3, 4.5, 10), (7, 3.5, 20), (9, 4.0, 20))]  # fmt: skip
    ratings.write_text(header + "\r\n".join(lines))
    clicks = movielens.movielens_20m(ratings, movies, train_users=2)
    rows = unpack(clicks, "train") + unpack(clicks, "test")
    assert [r[1:] for r in rows] == [
        (3, 3, 10, 1, []), (7, 2, 20, 0, [3]), (9, 1, 20, 1, [3])
    ] * 3  # fmt: skip
    assert len(set(clicks.train.user)) == 2
    combined = movielens.movielens_20m(
        ratings, movies, train_users=2, category="combination"
    )
    assert combined.rows["cate"] == 5
    with pytest.raises(ValueError, match="train_users must be between 1 and 2"):
        movielens.movielens_20m(ratings, movies)
    with pytest.raises(ValueError, match="category must be 'first' or 'combination'"):
        movielens.movielens_20m(ratings, movies, category="last")
    for line in (
        "1,10,4,10",
        "1,3,6,10",
        "1,3,nan,10",
        "1,3,4",
        "0,3,4,1",
        "1,3,4,1.5",
    ):
        ratings.write_text(f"{header}1,3,4,10\n{line}\n")
        with pytest.raises(ValueError, match="ratings.csv, line 3 is malformed"):
            movielens.movielens_20m(ratings, movies, train_users=1)


def test_ml_100k_files(tmp_path):
    (tmp_path / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Comedy\n2\tHeat\t1995\tAction\n"
    )
    inter = tmp_path / "ml-100k.inter"
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    inter.write_text(head + "2\t1\t3\t881250949\n1\t2\t5\t891717742\n")
    ratings = movielens.ml_100k(tmp_path)
    assert ratings.rows == {"user": 4, "item": 4, "cate": 4}
    assert ratings.cate.tolist() == [0, 1, 3, 2]
    assert ratings.user.tolist() == [3, 2] and ratings.item.tolist() == [2, 3]
    assert ratings.rating.tolist() == [3, 5] and ratings.time[1] == 891717742
    inter.write_text(head + "2\t1\t3\n")
    with pytest.raises(ValueError, match="ml-100k.inter, line 2 is malformed"):
        movielens.ml_100k(tmp_path)


DIEN_TRAIN = (
    "0\tu1\tm9\tc2\tm1\x02m2\tc1\x02c1\n1\tu1\tm1\tc1\tm1\x02m2\tc1\x02c1\n"
    "1\tu2\tm3\tc2\tm1\tc1\n"
)
DIEN_TEST = "1\tu3\tm7\tc1\tm1\x02m8\tc1\x02c3\n0\tu3\tm2\tc1\tm1\x02m8\tc1\x02c3\n"


def test_dien_text(tmp_path):
    train, test = tmp_path / "local_train", tmp_path / "local_test"
    train.write_text(DIEN_TRAIN)
    test.write_text(DIEN_TEST)
    clicks = ctr_files.dien_text(train, test)
    # m1 4 times, m2 2, then m9 and m3 once; m7 and m8 are not in training.
    assert clicks.rows == {"user": 4, "item": 6, "cate": 4}
    rows = unpack(clicks, "train")
    assert [(r[0], r[4], r[5]) for r in rows] == [
        (1, 0, [1, 2]),
        (1, 1, [1, 2]),
        (2, 1, [1]),
    ]
    assert rows[1][1] == 1 and {rows[0][1], rows[2][1]} == {3, 4}
    assert [(r[0], r[1], r[4], r[5]) for r in unpack(clicks, "test")] == [
        (0, 0, 1, [1, 0]), (0, 2, 0, [1, 0])
    ]  # fmt: skip
    assert len(clicks.log.item) == 5 and len(clicks.pool) == 3
    vocabularies = {
        "user": {"u1": 0, "u2": 1},
        "item": {"default_mid": 0, "m1": 1, "m2": 2, "m3": 3},
        "cate": {"default_cat": 0, "c1": 1, "c2": 2},
    }
    known = ctr_files.dien_text(train, test, vocabularies=vocabularies)
    assert known.rows == {"user": 4, "item": 6, "cate": 5}
    assert unpack(known, "train")[0] == (1, 0, 3, 0, 0, [2, 3])
    assert unpack(known, "test")[0] == (0, 0, 2, 0, 1, [2, 0])
    ctr.Examples(known, 3, negatives=True).batch(0, 3)
    with pytest.raises(ValueError, match="'cate' is missing or empty"):
        ctr_files.dien_text(train, test, vocabularies={**vocabularies, "cate": {}})
    assert "cate 100.0%" in known.notes
    with pytest.raises(ValueError, match="'item' has the names of only 0.0% of the"):
        ctr_files.dien_text(
            train, test, vocabularies={**vocabularies, "item": {"x": 1}}
        )
    with pytest.raises(ValueError, match="two names of 'user' have one number"):
        twice = {**vocabularies, "user": {"u1": 0, "u2": 0}}
        ctr_files.dien_text(train, test, vocabularies=twice)


def test_ids_have_room_for_one_more(tmp_path):
    path, line = tmp_path / "train", "{}\t1\t1\t1\t1\t1\t1\t1"
    path.write_text(line.format(2**31 - 1))
    with pytest.raises(ValueError, match=r"line 1 .*an id in \[1, 2147483646\]"):
        ctr_files.mimn_text(path, path, max_id=2**31)
    path.write_text(line.format(2**31 - 2))
    assert ctr_files.mimn_text(path, path, max_id=2**31).rows["user"] == 2**31


@pytest.mark.parametrize(
    "line",
    [
        "2\tu\tm\tc\tm1\tc1",
        "1\tu\tm\tc\tm1\x02m2\tc1",
        "1\tu\tm\tc\tm1",
        "nan\tu\tm\tc\tm1\tc1",
    ],
)
def test_malformed_dien_line(tmp_path, line):
    path = tmp_path / "local_train"
    path.write_text(DIEN_TRAIN + line)
    with pytest.raises(ValueError, match="local_train, line 4 is malformed"):
        ctr_files.dien_text(path, path)


def test_vocabulary_reads_plain_pickles_only(tmp_path):
    words = {"m1": 1, "é": 2}
    for protocol in (0, 2, 4):
        path = tmp_path / f"mid{protocol}.pkl"
        path.write_bytes(pickle.dumps(words, protocol))
        assert ids.vocabulary(path) == words
    python2 = tmp_path / "uid_voc.pkl"
    python2.write_bytes(b"(dp0\nS'A1'\np1\nI5\ns.")
    assert ids.vocabulary(python2) == {"A1": 5}
    plain = tmp_path / "mid.json"
    plain.write_text(json.dumps(words))
    assert ids.vocabulary(plain) == words
    evil = tmp_path / "evil.pkl"
    evil.write_bytes(
        b"cos\nsystem\n(S'touch " + str(tmp_path / "x").encode() + b"'\ntR."
    )
    with pytest.raises(ValueError, match="asks for os.system.*convert .* to a .json"):
        ids.vocabulary(evil)
    assert not (tmp_path / "x").exists()
    for bad in (b"", b"nonsense", pickle.dumps([1]), pickle.dumps({"a": -1})):
        evil.write_bytes(bad)
        with pytest.raises(ValueError, match="evil.pkl: "):
            ids.vocabulary(evil)


def test_mimn_text(tmp_path):
    train, test = tmp_path / "train", tmp_path / "test"
    train.write_text("1\t5\t9\t1\t0,0,6,7\t0,0,9,10\t0,0,7,5\t0,0,10,9\n")
    test.write_text("2\t7\t10\t0\t0,0,0,0\t0,0,0,0\t0,0,0,0\t0,0,0,0\n")
    clicks = ctr_files.mimn_text(train, test)
    assert clicks.rows == {"user": 12, "item": 12, "cate": 12}
    assert unpack(clicks, "train") == [(1, 5, 9, 0, 1, [6, 7])]
    assert unpack(clicks, "test") == [(2, 7, 10, 0, 0, [])]
    batch = ctr.Examples(clicks, 3, negatives=True).batch(0, 1)
    assert batch["neg_hist_item"].tolist() == [[8, 6, 0]]
    assert batch["neg_hist_cate"].tolist() == [[11, 10, 0]]
    for line in (
        "1\t5\t9\t1\t6,7\t9,10\t7,5\t10",
        "1\t5\t9\t1\t6,0\t9,10\t7,5\t10,9",
        "1\t5\t9\t3\t6\t9\t7\t10",
        "0\t5\t9\t1\t6\t9\t7\t10",
        "1\t5\t9\t1\t6\t9\t7",
    ):
        test.write_text(line)
        with pytest.raises(ValueError, match="test, line 1 is malformed"):
            ctr_files.mimn_text(train, test)
