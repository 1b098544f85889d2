"""Images: original files that the test writes, order of batches, what is refused."""

import gzip
import pickle
import struct
import zlib

import numpy as np
import pytest
from scipy.io import savemat

from jaxpapers.data import images, matlab


def write_digits(folder, count=20, bad=""):
    rng = np.random.default_rng(0)
    rows = np.concatenate(
        [rng.integers(0, 17, (count, 64)), rng.integers(0, 10, (count, 1))], 1
    )
    lines = [",".join(map(str, row)) for row in rows]
    if bad:
        lines[3] = bad
    with gzip.open(folder / "digits.csv.gz", "wt") as f:
        f.write("\n".join(lines) + "\n")
    return rows


def test_digits(tmp_path):
    rows = write_digits(tmp_path)
    dataset = images.digits(tmp_path)
    assert len(dataset.train.label) == 19 and len(dataset.test.label) == 1
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_array_equal(dataset.train.label, rows[order[:19], -1])
    np.testing.assert_allclose(
        dataset.test.image[0, ..., 0], rows[order[19], :-1].reshape(8, 8) / 16
    )
    assert dataset.train.image.dtype == np.float32
    normal = images.normalize(dataset, dataset.train.image)
    assert normal.dtype == np.float32
    assert abs(normal.mean()) < 1e-5 and abs(normal.std() - 1) < 1e-5


@pytest.mark.parametrize("bad", ["1,2,3", ",".join(["17"] * 64 + ["1"]), "x"])
def test_a_malformed_digit_names_its_line(tmp_path, bad):
    write_digits(tmp_path, bad=bad)
    with pytest.raises(ValueError, match="line 4"):
        images.digits(tmp_path)


def cifar_batch(count, key, classes, seed=0):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (count, 3072)).astype(np.uint8)
    return {b"data": data, key: rng.integers(0, classes, count).tolist()}


def test_cifar_planes_and_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = [cifar_batch(2, b"labels", 10, i) for i in range(6)]
    for name, batch in zip(names, batches):
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    dataset = images.cifar(tmp_path)
    assert dataset.train.image.shape == (10, 32, 32, 3)
    assert dataset.train.label.tolist() == sum((b[b"labels"] for b in batches[:5]), [])
    plain = batches[0][b"data"][0]
    # Byte 1024 is the first green one, byte 34 the red of row 1, column 2.
    assert dataset.train.image[0, 0, 0, 1] == np.float32(plain[1024] / 255)
    assert dataset.train.image[0, 1, 2, 0] == np.float32(plain[34] / 255)
    np.testing.assert_allclose(dataset.mean * 255, [125.3, 123.0, 113.9])
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3"):
        images.cifar(tmp_path)


def test_cifar_100_takes_the_fine_labels(tmp_path):
    for name in ("train", "test"):
        batch = cifar_batch(3, b"fine_labels", 100)
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    assert images.cifar(tmp_path, 100).classes == 100
    with pytest.raises(ValueError, match="10 or 100"):
        images.cifar(tmp_path, 20)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Evil(), b"fine_labels": []}), "not allowed"),
        (
            pickle.dumps({b"data": np.zeros((1, 3), np.uint8), b"fine_labels": [1]}),
            "3072",
        ),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}), "fine_labels"),
        (b"", "not a batch"),
        (
            pickle.dumps(
                {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [100]}
            ),
            "0 .. 99",
        ),
    ],
)  # fmt: skip
def test_cifar_refuses(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        images.cifar(tmp_path, 100)
    assert not (tmp_path / "evil").exists()


def test_svhn(tmp_path, monkeypatch):
    rng, y = np.random.default_rng(0), [[10], [1], [9], [10]]
    x = rng.integers(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    for name in ("train", "test"):
        savemat(tmp_path / f"{name}_32x32.mat", {"X": x, "y": y})
    dataset = images.svhn(tmp_path)
    assert dataset.train.label.tolist() == [0, 1, 9, 0]
    assert dataset.train.image[1, 2, 3, 0] == np.float32(x[2, 3, 0, 1] / 255)
    savemat(tmp_path / "extra_32x32.mat", {"X": x, "y": [[1]] * 4})
    assert len(images.svhn(tmp_path).train.label) == 8
    savemat(tmp_path / "train_32x32.mat", {"X": x, "y": y}, do_compression=True)
    assert images.svhn(tmp_path).train.label.tolist()[:4] == [0, 1, 9, 0]
    content = (tmp_path / "train_32x32.mat").read_bytes()
    bomb = zlib.compress(bytes(1 << 20))
    monkeypatch.setattr(matlab, "_FREE_BYTES", 99)
    for bad, message in (
        (content[:-20], "cut off or malformed"),
        (content[:60], "starts with b'MATLAB 5.0 MAT-file"),
        (b"MATLAB 7.3 MAT-file" + content[19:], "save others .7.3 is HDF5. with -v7"),
        (content[:140] + b"\xff" * 20 + content[160:], "a broken compressed element"),
        (
            content[:128] + struct.pack("<II", 15, len(bomb)) + bomb,
            "grow to more than 23,",
        ),
    ):
        (tmp_path / "train_32x32.mat").write_bytes(bad)
        with pytest.raises(ValueError, match=f"train_32x32.mat: .*{message}"):
            images.svhn(tmp_path)
    cells = np.zeros((2, 2), object)
    for bad, message in (
        (
            {"X": cells, "y": y},
            "X is cell of shape .2, 2.; expected numbers of 4",
        ),
        ({"y": y}, "X is missing"),
        ({"X": x, "y": [[1.5]] * 4}, r"y must be 1 .. 10"),
        ({"X": x.astype(float), "y": y}, "X must be uint8"),
    ):
        savemat(tmp_path / "train_32x32.mat", bad)
        with pytest.raises(ValueError, match=message):
            images.svhn(tmp_path)
    savemat(tmp_path / "train_32x32.mat", {"X": x, "y": y})
    savemat(tmp_path / "test_32x32.mat", {"X": x[:16], "y": [[1]] * 4})
    with pytest.raises(ValueError, match="32, 32, 3, 4"):
        images.svhn(tmp_path)


def test_batches_are_normalised(tmp_path):
    write_digits(tmp_path)
    dataset = images.digits(tmp_path)
    batch = images.examples(dataset, seed=3).batch(0, len(dataset.train.label))
    assert sorted(batch["label"]) == sorted(dataset.train.label)
    assert abs(batch["image"].mean()) < 1e-5
    assert batch["image"].std() == pytest.approx(1, abs=1e-4)


def test_signed_there_and_back(tmp_path):
    write_digits(tmp_path)
    dataset = images.digits(tmp_path)
    signed = images.to_signed(dataset.train.image)
    # Sixteenths are exact: x / 8 - 1 of the grey levels.
    np.testing.assert_array_equal(signed, dataset.train.image * 16 / 8 - 1)
    assert signed.dtype == np.float32
    np.testing.assert_array_equal(images.from_signed(signed), dataset.train.image)
    out = images.from_signed(np.array([-3.0, 0.5, 1.5]))
    assert out.tolist() == [0.0, 0.75, 1.0] and out.dtype == np.float32


@pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan])
def test_signed_refuses(bad):
    with pytest.raises(ValueError, match="must lie in"):
        images.to_signed(np.array([0.5, bad]))
    with pytest.raises(ValueError, match="must be finite"):
        images.from_signed(np.array([0.5, np.inf * bad]))


@pytest.mark.parametrize("count, sizes", [(97, (49, 24, 24)), (9, (5, 2, 2))])
def test_parts_of_the_digits(tmp_path, count, sizes):
    rows = write_digits(tmp_path, count)
    order = np.random.default_rng(0).permutation(count)
    parts = images.digit_parts(tmp_path)
    assert tuple(len(x.label) for x in parts) == sizes
    assert parts.reward is parts[1] and parts.held_out is parts[2]
    for splits in (parts, images.digit_halves(tmp_path)):
        label = np.concatenate([x.label for x in splits])
        image = np.concatenate([x.image for x in splits])
        np.testing.assert_array_equal(label, rows[order, -1])
        np.testing.assert_allclose(image.reshape(count, 64), rows[order, :-1] / 16)
    halves = images.digit_halves(tmp_path)
    assert len(halves[0].label) == sizes[0] == count - len(halves[1].label)


def test_too_few_digits(tmp_path):
    write_digits(tmp_path, 3)
    with pytest.raises(ValueError, match="at least 4 scans, got 3"):
        images.digit_parts(tmp_path)
    write_digits(tmp_path, 1)
    with pytest.raises(ValueError, match="at least 2 scans, got 1"):
        images.digit_halves(tmp_path)


def test_segment_digits_are_told_by_their_pixels():
    parts = images.segment_digits()
    assert [len(x.label) for x in parts] == [600, 300, 300]
    train, test = parts.pretraining, parts.held_out
    assert train.image.shape == (600, 8, 8, 1) and 0 <= train.image.min()
    assert train.image.max() <= 1
    # The nearest neighbour: shifted glyphs overlap in part.
    x, y = (p.image.reshape(len(p.image), -1) for p in (train, test))
    nearest = np.square(x[None] - y[:, None]).sum(2).argmin(1)
    assert (train.label[nearest] == test.label).mean() > 0.95
    np.testing.assert_array_equal(
        images.segment_digits().pretraining.image, train.image
    )
