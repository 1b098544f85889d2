"""Text loading, splits, windows, shards."""

import bz2
import gzip
import lzma
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from jaxpapers.data import documents, text


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        (tmp_path / f"sub{i % 3}").mkdir(exist_ok=True)
        (tmp_path / f"sub{i % 3}" / f"f{i}.txt").write_text(f"file {i} " * 20)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def test_folder_is_split_by_file_in_path_order(folder):
    corpus = text.load(str(folder), validation_fraction=0.2)
    documents = {
        split: bytes(text.decode(getattr(corpus, split)[0])).split(b"\f")[:-1]
        for split in ("train", "validation")
    }
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("f*.txt"))
    expected = {
        split: [
            (folder / n).read_bytes()
            for n in names
            if text.in_validation(n, 0.2) == flag
        ]
        for split, flag in (("train", False), ("validation", True))
    }
    assert documents == expected
    assert 2 <= len(documents["validation"]) <= 16
    assert corpus.train[0][-1] == text.SEPARATOR


@pytest.mark.matrix
def test_standard_library_is_real_text_without_tests():
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p.relative_to(root) for p in text._python_files(root)]
    assert len(files) > 300
    parts = {part for f in files for part in f.parts}
    assert not parts & {"site-packages", "test", "tests"}
    held = np.array([text.in_validation(f.as_posix(), 0.05) for f in files])
    assert 0.02 < held.mean() < 0.09
    size = np.array([(root / f).stat().st_size for f in files])
    assert 0.04 < size[held].sum() / size.sum() < 0.07


@pytest.mark.matrix
def test_standard_library_is_the_default_corpus():
    corpus = text.load()
    assert corpus.name == "stdlib" and corpus.byte_level
    size = sum(len(s) for s in corpus.validation)
    assert 0.04 < size / (size + sum(len(s) for s in corpus.train)) < 0.07


def test_baselines_against_the_compressors():
    data = bytes(np.random.default_rng(0).integers(0, 4, 4096, dtype=np.uint8))
    stream = np.concatenate([text.encode(data), [text.SEPARATOR]])
    bits = text.baselines(stream)
    assert bits["order0"] == pytest.approx(2.0, abs=0.01)
    assert bits["gzip"] == 8 * len(gzip.compress(data, 9, mtime=0)) / 4096
    size = len(lzma.compress(data, preset=9))
    assert bits["xz"] == 8 * size / 4096


def test_windows_visit_every_window_once_an_epoch():
    streams = [np.arange(103), 1000 + np.arange(55)]
    windows = text.Windows(streams, 10, seed=3)
    for epoch in range(2):
        first = [int(windows[epoch * len(windows) + i][0]) for i in range(len(windows))]
        assert len(set(first)) == len(windows) == 9 + 4
        offsets = {(x % 1000) % 10 for x in first}
        assert len(offsets) == 1  # One cut an epoch, the same in every stream.
    assert all((np.diff(windows[i]) == 1).all() for i in range(2 * len(windows)))
    order = [int(windows[i][0]) for i in range(2 * len(windows))]
    assert order[:13] != sorted(order[:13]) and order[:13] != order[13:]


def test_batch_is_a_function_of_the_global_index():
    windows = text.Windows([np.arange(500)], 8, seed=0)
    whole = windows.batch(16, 8)["tokens"]
    assert whole.dtype == np.int32 and whole.shape == (8, 9)
    halves = [windows.batch(16, 8, slice(a, a + 4))["tokens"] for a in (0, 4)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    again = text.Windows([np.arange(500)], 8, seed=0)
    np.testing.assert_array_equal(again.batch(16, 8)["tokens"], whole)
    other = text.Windows([np.arange(500)], 8, seed=1)
    assert (other.batch(16, 8)["tokens"] != whole).any()


@pytest.mark.parametrize("overlap, context", [(0.0, 0), (0.25, 2), (0.5, 4), (0.9, 7)])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 30, 31, 33])
def test_scores_cover_every_token_once(length, overlap, context):
    streams = [np.arange(length), 100 + np.arange(5)]
    seen = []
    for batch in text.score_windows(streams, 8, 3, overlap):
        assert batch["tokens"].shape == (3, 9)
        for row, weight in zip(batch["tokens"], batch["weight"]):
            targets = row[1:][weight > 0]
            seen += targets.tolist()
            if len(targets) and targets[0] not in (0, 100):
                # That much of the window stands before a target.
                assert np.flatnonzero(weight)[0] == context
    assert seen == [*range(length), *range(100, 105)]


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_an_overlap_that_leaves_nothing_to_score_is_refused(overlap):
    with pytest.raises(ValueError, match=r"overlap must be in \[0, 1\)"):
        next(text.score_windows([np.arange(9)], 8, 3, overlap))


def test_shard_round_trip_is_memory_mapped(tmp_path):
    tokens = np.arange(5000) % 50257
    for name in ("train_0.bin", "train_1.bin", "val_0.bin"):
        text.write_shard(tmp_path / name, tokens)
    read = text.read_shard(tmp_path / "val_0.bin")
    assert isinstance(read, np.memmap) and read.dtype == np.uint16
    np.testing.assert_array_equal(read, tokens)
    corpus = text.load(str(tmp_path))
    assert (len(corpus.train), len(corpus.validation)) == (2, 1)
    assert not corpus.byte_level
    with pytest.raises(
        ValueError, match="token 9 in a training stream, but .*vocab_size=8"
    ):
        text.Windows([np.full(10, 9)], 4, 0, 8)[0]
    single = text.load(str(tmp_path / "train_0.bin"), validation_fraction=0.1)
    assert (len(single.train[0]), len(single.validation[0])) == (4500, 500)


def test_malformed_shards(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="not a token shard"):
        text.read_shard(path)
    text.write_shard(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(
        ValueError, match="truncated shard, header says 100 tokens, file has 99"
    ):
        text.read_shard(path)
    for count in (-100, 0, 40):
        header = np.zeros(256, "<i4")
        header[:3] = text.SHARD_MAGIC, 1, count
        path.write_bytes(header.tobytes() + b"\0" * 90)
        with pytest.raises(
            ValueError, match=f"header says {count} tokens, file has 45"
        ):
            text.read_shard(path)
    header[:2] = text.SHARD_MAGIC, 7
    path.write_bytes(header.tobytes())
    with pytest.raises(ValueError, match="version 7, expected 1"):
        text.read_shard(path)
    with pytest.raises(ValueError, match=r"\[0, 65535\]"):
        text.write_shard(path, np.array([70000]))


def test_one_file_is_cut_at_its_end(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(32, 127)) * 20)
    corpus = text.load(str(path), validation_fraction=0.1)
    joined = text.decode(corpus.train[0])[:-1] + text.decode(corpus.validation[0])[:-1]
    assert joined == path.read_bytes()


BODY = b"def f(x):\n    return x + 1\n\n" * 100


def test_gzipped_and_marked_texts_are_their_text(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_bytes(BODY)
    expected = text.load(str(plain))
    for name, data in {
        "b.txt.gz": gzip.compress(BODY),
        "c.txt": b"\xef\xbb\xbf" + BODY,
        "d.gz": gzip.compress(b"\xef\xbb\xbf" + BODY),
    }.items():
        (tmp_path / name).write_bytes(data)
        corpus = text.load(str(tmp_path / name))
        np.testing.assert_array_equal(corpus.train[0], expected.train[0])
        np.testing.assert_array_equal(corpus.validation[0], expected.validation[0])


OTHERS = {
    "x.parquet": (b"PAR1" + BODY, "a Parquet file"),
    "x.zip": (b"PK\x03\x04" + BODY, "a zip archive"),
    "x.xz": (lzma.compress(BODY), "compressed by xz"),
    "x.bz2": (bz2.compress(BODY), "compressed by bzip2"),
    "x16.txt": (BODY.decode().encode("utf-16"), "UTF-16 text"),
    "x32.txt": (BODY.decode().encode("utf-32"), "UTF-32 text"),
    "x16le.txt": (BODY.decode().encode("utf-16-le"), "UTF-16 text"),
    "x16be.txt": (BODY.decode().encode("utf-16-be"), "UTF-16 text"),
    "x.tar.gz": (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar"), "a tar archive"),
    "x.gz.gz": (gzip.compress(gzip.compress(BODY)), "gzipped twice"),
    "x.raw": (b"\1\2" * 500, "binary .1,000 control characters"),
    "x.dat": (BODY + b"\xff\xfe" + BODY, "no UTF-8 .near byte 2800"),
    "x.gz": (gzip.compress(BODY)[:-9], "unreadable after"),
    "x2.gz": (gzip.compress(lzma.compress(BODY)), "compressed by xz"),
}


def test_other_files_are_named_and_counted(tmp_path):
    for name, (data, kind) in OTHERS.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: (is )?{kind}"):
            text.load(str(tmp_path / name))
    with pytest.raises(
        ValueError, match="empty train split .*skipped 14 of 14 files: x"
    ):
        text.load(str(tmp_path))
    # A folder of one text is cut as the text alone.
    (tmp_path / "a.txt").write_bytes(BODY)
    (tmp_path / ".hidden").write_bytes(b"\0")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "a.txt").write_bytes(BODY)
    os.mkfifo(tmp_path / "pipe.bin")
    corpus = text.load(str(tmp_path))
    assert corpus.notes.startswith("skipped 15 of 16 files: pipe.bin (")
    np.testing.assert_array_equal(
        corpus.train[0], text.load(str(tmp_path / "a.txt")).train[0]
    )
    with pytest.raises(ValueError, match="pipe.bin: is a pipe"):
        text.load(str(tmp_path / "pipe.bin"))
    text.write_shard(tmp_path / "y.bin", np.arange(100))
    assert "skipped 16 of 17 files: a.txt (no token" in text.load(str(tmp_path)).notes


def test_texts_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wb", 1) as f:
        for _ in range(70):
            f.write(b" " * (1 << 20))
    with pytest.raises(ValueError, match="bomb.txt.gz: .* more than 200 times as many"):
        text.load(str(path))
    (tmp_path / "a.txt").write_bytes(BODY)
    monkeypatch.setattr(documents, "MAX_BYTES", 1000)
    with pytest.raises(
        ValueError, match="more than 1,000 bytes of text; write token sh"
    ):
        text.load(str(tmp_path))


def test_validation_tokens_are_within_the_vocabulary():
    corpus = text.Corpus("x", [np.arange(9)], [np.arange(9), np.arange(12)], False)
    text.check_tokens(corpus, 12)
    with pytest.raises(ValueError, match="x: token 11 in the val.*vocab_size=11"):
        text.check_tokens(corpus, 11)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give a text file"):
        text.load(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty train split"):
        text.load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"validation_fraction must be in \(0, 1\)"):
        text.load(validation_fraction=0.0)
    with pytest.raises(ValueError, match="context=64 needs; longest is 20"):
        text.Windows([np.arange(20)], 64)
