"""Broken files of every reader give sound data or a refusal that names the file."""

import gzip
import resource

import numpy as np
import pytest

from jaxpapers.data import ctr_files, files, image_files, lines, text
from tests import fuzz


def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# Where several readers share a kind of data.
CASES = {
    "text": 700, "shards": 300, "dien": 500, "mimn": 500, "cdnow": 400, "criteo": 600,
    "pictures": 300, "idx": 250, "svhn": 250, "cifar": 250,
}  # fmt: skip


@pytest.mark.parametrize("name", fuzz.GROUPS)
def test_a_few_broken_files(tmp_path, name):
    pytest.importorskip("PIL")
    count = fuzz.run(name, tmp_path, 6, seed=1)
    assert sum(count.values()) == 6


@pytest.mark.matrix
@pytest.mark.parametrize("name", fuzz.GROUPS)
def test_broken_files(tmp_path, name):
    """A thousand of each kind of data, in at most 300 MB more than before."""
    pytest.importorskip("PIL")
    before = megabytes()
    count = fuzz.run(name, tmp_path, CASES.get(name, 1000))
    assert count["read"] > 10 and count["refused"] > 50, count
    assert megabytes() - before < 300


LONG = {
    "one line": b" " * (1 << 22),
    "empty lines": b"\n" * (1 << 22),
    "lines": b"1,2,3,pv,9\n" * (1 << 18),
}


@pytest.mark.matrix
@pytest.mark.parametrize("content", LONG)
def test_memory_of_compressed_files(tmp_path, monkeypatch, content):
    """Kilobytes that stand for hundreds of megabytes are refused after some of them."""
    monkeypatch.setattr(files, "_FREE_BYTES", 1 << 21)
    monkeypatch.setattr(lines, "_CHECK_BYTES", 1 << 20)
    packed = fuzz.packed(LONG[content])
    for name in ("a.csv", "train-images-idx3-ubyte.gz"):
        (tmp_path / name).write_bytes(packed)
    before = megabytes()
    for read in (
        lambda: text.load(str(tmp_path / "a.csv")),
        lambda: sum(1 for _ in lines.numbered(tmp_path / "a.csv")),
        lambda: image_files.fashion(tmp_path),
    ):
        with pytest.raises(ValueError, match="(a.csv|idx3-ubyte.gz).*(times|bytes)"):
            read()
    assert megabytes() - before < 100


@pytest.mark.matrix
def test_memory_of_a_line_of_gigabytes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(fuzz.packed(b" " * (1 << 26)))  # 5 GB.
    before = megabytes()
    with pytest.raises(ValueError, match="a.csv, line 1: more than 16,777,216 bytes"):
        ctr_files.taobao(path)
    with pytest.raises(ValueError, match="a.csv: .* more than 200 times as many"):
        text.load(str(path))
    assert megabytes() - before < 300


def test_lines_are_bounded(tmp_path):
    path = tmp_path / "a.txt"
    for data in (b"a\n" + b"b" * 11, gzip.compress(b"a\n" + b"b" * 11 + b"\n")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="a.txt, line 2: more than 10 bytes"):
            list(lines.numbered(path, longest=10))
        assert list(lines.numbered(path, longest=12))[1] == (2, "b" * 11)


def test_numbers_are_those_of_the_text():
    assert lines.whole("-7") == -7 and lines.whole("7.0") == 7
    for bad in ("1_0", "٣", "7.5", "", "0x1", "nan"):
        with pytest.raises(ValueError):
            lines.whole(bad)
    for bad in ("1_0", "nan", "inf", "1e309", "2", ""):
        with pytest.raises(ValueError):
            lines.number(bad, 0.0, 1.0)
    assert lines.number("1e-3", 0.0, 1.0) == np.float64(1e-3)
