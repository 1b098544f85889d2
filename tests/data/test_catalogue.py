"""Catalogues and sequences: the protocol by hand, tiny files of every source."""

import gzip
import json

import numpy as np
import pytest

from jaxpapers.data import catalogue, sequences


def write_amazon(folder):
    reviews = [
        {
            "reviewerID": f"u{u}",
            "asin": f"b{i}",
            "overall": 1.0,
            "unixReviewTime": 100 - t,
        }
        for u in range(3)
        for t, i in enumerate([0, 1, 2])
    ]
    lines = "".join(json.dumps(r) + "\n" for r in reviews)
    (folder / "reviews_Beauty_5.json.gz").write_bytes(gzip.compress(lines.encode()))
    meta = [
        {"asin": "b0", "title": "It's", "brand": "Ä", "price": 1.5,
         "categories": [["Beauty", "Hair"], ["Beauty", "Skin"]]},
        {"asin": "b1", "title": "Two"}, {"asin": "zz", "title": "unused"},
    ]  # fmt: skip
    lines = "".join(f"{m!r}\n" for m in meta)
    (folder / "meta_Beauty.json.gz").write_bytes(gzip.compress(lines.encode()))


def test_amazon_is_sorted_by_time_and_has_texts(tmp_path):
    write_amazon(tmp_path)
    found = catalogue.read("amazon", tmp_path, core=2)
    assert found.names == ("b0", "b1", "b2")
    # The latest line is the earliest event.
    assert found.sequences.of(0).tolist() == [2, 1, 0]
    assert found.texts == (
        "Title: It's; Brand: Ä; Categories: Beauty, Hair, Skin; Price: 1.5;",
        "Title: Two;",
        "",
    )
    assert found.notes == "1 of 3 items have no text"
    (tmp_path / "meta_Other.json.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="several files"):
        catalogue.read("amazon", tmp_path)


def test_p5_keeps_its_sequences(tmp_path):
    (tmp_path / "sequential_data.txt").write_text("1 2 1 3\n2 3 3 1 2\n")
    maps = {"item2id": {"b": "1", "a": "2", "c": "3"}}
    (tmp_path / "datamaps.json").write_text(json.dumps(maps))
    meta = b"{'asin': 'a', 'title': 'A'}\n"
    (tmp_path / "meta.json.gz").write_bytes(gzip.compress(meta))
    found = catalogue.read("p5", tmp_path)
    assert found.names == ("b", "a", "c") and found.texts == ("", "Title: A;", "")
    assert [found.sequences.of(u).tolist() for u in (0, 1)] == [[1, 0, 2], [2, 2, 0, 1]]
    (tmp_path / "sequential_data.txt").write_text("1 2 4\n")
    with pytest.raises(ValueError, match=r"line 1 is malformed .*items in \[1, 3\]"):
        catalogue.read("p5", tmp_path)
    (tmp_path / "datamaps.json").write_text('{"item2id": {"b": 2}}')
    with pytest.raises(ValueError, match="without gaps"):
        catalogue.read("p5", tmp_path)


def test_plain_tables_and_own_vectors(tmp_path):
    rows = ["user,item,time"] + [
        f"u{u},i{(u + t) % 3},{t}" for u in (0, 1) for t in (2, 1, 0)
    ]
    (tmp_path / "events.csv").write_text("\n".join(rows))
    with pytest.raises(FileNotFoundError, match="neither items.csv nor vectors.npy"):
        catalogue.read("csv", tmp_path, core=1)
    (tmp_path / "items.csv").write_text('item,text\ni0,"a, b"\n')
    found = catalogue.read("csv", tmp_path, core=1)
    assert found.texts == ("a, b", "", "") and found.sequences.of(1).tolist() == [
        1,
        2,
        0,
    ]
    np.save(tmp_path / "vectors.npy", np.eye(3, dtype=np.float32))
    assert catalogue.read("csv", tmp_path, core=1).vectors.shape == (3, 3)
    np.save(tmp_path / "vectors.npy", np.eye(4, dtype=np.float32))
    with pytest.raises(ValueError, match=r"vectors of 3 items, got float32 \(4, 4\)"):
        catalogue.read("csv", tmp_path, core=1)


def test_titles_and_the_generated_catalogue():
    assert catalogue.title_in_order("Postino, Il (1994)") == "Il Postino (1994)"
    assert catalogue.title_in_order("Associate, The (L'Associe)(1982)")
    assert catalogue.title_in_order("Welcome, Stranger") == "Welcome, Stranger"
    found = catalogue.read("generated", "", items=60, users=40, features=8, core=2)
    assert found.vectors.shape == (60, 8)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-5)
    assert found.sequences.count == 60 and found.sequences.users == 40
    with pytest.raises(ValueError, match="config.data.source"):
        catalogue.read("netflix", "")


def test_cores_and_ties_by_hand():
    # Item 2 has one event; without it user 1 has one and goes, then item 1 has one.
    user, item = [0, 0, 0, 1, 1, 2, 2], [0, 3, 1, 2, 1, 3, 0]
    found = sequences.from_events(user, item, [5, 5, 4, 0, 1, 9, 8], 4, 2)
    assert found.users == 2 and found.candidates.tolist() == [0, 3]
    assert found.of(0).tolist() == [0, 3] and found.of(1).tolist() == [0, 3]
    with pytest.raises(ValueError, match="lower config.data.core"):
        sequences.from_events(user, item, [0] * 7, 4, 5)
    with pytest.raises(ValueError, match=r"items must be in \[0, 3\)"):
        sequences.from_events(user, item, [0] * 7, 3, 1)


OWN = sequences.Sequences(np.int32([0, 1, 2, 3, 4, 1, 2]), np.array([0, 5, 7]), 6)


def test_leave_one_out():
    assert [x.tolist() for x in sequences.training(OWN)] == [[0, 1, 2], [1, 2]]
    rows = sequences.targets(OWN, "test", 6)
    assert rows.user.tolist() == [0] and rows.target.tolist() == [4]
    assert rows.history.tolist() == [[-1, -1, 0, 1, 2, 3]]
    rows = sequences.targets(OWN, "validation", 2)
    assert rows.target.tolist() == [3] and rows.history.tolist() == [[1, 2]]
    assert rows.seen[0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="config.data.split"):
        sequences.targets(OWN, "train", 2)


def test_windows_end_at_the_drawn_item_and_need_no_history_of_batches():
    items = [np.arange(10), np.arange(100, 102)]
    windows = sequences.Windows(items, 4, seed=1)
    batch = windows.batch(0, 400)
    assert len(windows) == 12 and abs((batch["user"] == 0).mean() - 10 / 12) < 0.08
    for row, user in zip(batch["items"], batch["user"]):
        kept = row[row >= 0]
        own = items[user].tolist()
        end = own.index(kept[-1]) + 1
        assert kept.tolist() == own[max(0, end - 4) : end]
        assert len(kept) == min(4, len(own))
    ends = batch["items"][batch["user"] == 0, -1]
    assert set(ends) == set(range(3, 10))
    part = windows.batch(0, 400, slice(100, 103))
    np.testing.assert_array_equal(part["items"], batch["items"][100:103])


def test_baselines_by_hand():
    train = [np.array([0, 1, 0, 1, 2]), np.array([3, 2])]
    np.testing.assert_array_equal(sequences.popularity(train, 5), [2, 2, 2, 1, 0])
    table = sequences.markov(train, 5)
    assert table[0].argsort()[::-1][0] == 1 and table[0, 1] > 2
    assert table[4, 0] > table[4, 3] > table[4, 4] and table[4].max() < 1
    rows = sequences.Targets(
        np.array([0]), np.zeros((1, 1)), np.array([2]), [np.array([0])]
    )
    scores, candidates = np.array([5.0, 5, 1, 9, 9]), np.array([0, 1, 2, 3])
    ranked = sequences.ranked(scores, rows, candidates, 5, True)
    assert ranked.tolist() == [[3, 1, 2, -1, -1]]
    assert sequences.ranked(scores, rows, candidates, 2, False).tolist() == [[3, 0]]
    assert sequences.seen_table(rows, 3).tolist() == [[True, False, False]]
