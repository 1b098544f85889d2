"""Original formats of pools and test sets, on tiny files; what is refused."""

import pickle

import numpy as np
import pytest
from scipy.io import savemat

from jaxpapers.data import pools


class Evil:
    def __reduce__(self):
        return print, ("run",)


def planes(n, side, seed=0):
    """Images (n, side, side, 3) and their planes (n, 3 side side)."""
    image = np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)
    return image, image.transpose(0, 3, 1, 2).reshape(n, -1)


def write_imagenet(folder, counts=(3, 2), side=8):
    every = []
    for i, n in enumerate(counts, 1):
        image, data = planes(n, side, i)
        every.append(image)
        content = {"data": data, "labels": [1] * n, "mean": data.mean(0)}
        path = folder / f"train_data_batch_{i}"
        if i % 2:
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            np.savez(path.with_suffix(".npz"), data=data, labels=np.ones(n, int))
    return np.concatenate(every)


def test_imagenet_in_pickles_and_npz(tmp_path):
    image = write_imagenet(tmp_path)
    whole = pools.imagenet(tmp_path, size=8)
    assert len(whole) == 5
    order = np.array([4, 0, 3, 3, 1])
    np.testing.assert_array_equal(whole.read(order), image[order])
    small = pools.pool(tmp_path, size=5)
    crops = small.read(np.arange(5))
    assert crops.shape == (5, 5, 5, 3)
    np.testing.assert_array_equal(small.read(order), crops[order])
    windows = np.lib.stride_tricks.sliding_window_view(image, (5, 5), (1, 2))
    for crop, places in zip(crops, windows.transpose(0, 1, 2, 4, 5, 3)):
        assert (places == crop).all((2, 3, 4)).any()
    with pytest.raises(ValueError, match="no square of 9 pixels"):
        pools.imagenet(tmp_path, size=9).read(np.arange(1))


def test_one_file_is_in_memory_at_a_time(tmp_path):
    write_imagenet(tmp_path, (2, 2, 2))
    loads = []

    def load(path):
        loads.append(path.name)
        return pools._imagenet_file(path)

    whole = pools.Files(pools.imagenet(tmp_path, 8).paths, load, 8)
    loads.clear()
    whole.read(np.array([5, 0, 4, 1]))
    whole.read(np.array([5]))
    assert loads == ["train_data_batch_1", "train_data_batch_3"]


def test_imagenet_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file train_data_batch_1"):
        pools.imagenet(tmp_path)
    path = tmp_path / "train_data_batch_1"
    good = {"data": planes(2, 4)[1], "labels": [1, 2]}
    whole = pickle.dumps(good, protocol=2)
    for content, words in (
        (whole[:-20], "not a pickle of plain data"),
        (pickle.dumps({"image": good["data"]}), "expected a dict with data"),
        (pickle.dumps({"data": good["data"][:, :-1]}), r"got uint8 \(2, 47\)"),
        (pickle.dumps({"data": Evil()}), "print, which is not allowed"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            pools.imagenet(tmp_path, 4)


def test_tiny_images(tmp_path):
    image, _ = planes(4, 32)
    # Fortran order: three planes, each column by column.
    data = b"".join(x.tobytes(order="F") for x in image)
    (tmp_path / "tiny_images.bin").write_bytes(data)
    whole = pools.pool(tmp_path)
    np.testing.assert_array_equal(whole.read(np.arange(4)), image)
    # Indices from 1; 0 is none of the file's.
    (tmp_path / "80mn_cifar_idxs.txt").write_text("0\n2\n")
    kept = pools.TinyImages(tmp_path)
    assert len(kept) == 3
    np.testing.assert_array_equal(kept.read(np.array([2, 1])), image[[3, 2]])
    (tmp_path / "80mn_cifar_idxs.txt").write_text("5\n")
    with pytest.raises(ValueError, match=r"must be 0 \.\. 4, got 5"):
        pools.TinyImages(tmp_path)
    (tmp_path / "tiny_images.bin").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="multiple of 3072"):
        pools.TinyImages(tmp_path)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_binary(tmp_path, classes):
    image, data = planes(3, 32)
    label = np.array([0, classes - 1, 3], np.uint8)
    before = [label] if classes == 10 else [label * 0 + 7, label]
    records = np.concatenate([np.stack(before, 1), data], 1).tobytes()
    small = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    names = small if classes == 10 else ["train.bin", "test.bin"]
    for name in names:
        (tmp_path / name).write_bytes(records)
    train, test = pools.cifar_binary(tmp_path, classes)
    assert len(train.label) == 3 * (len(names) - 1)
    np.testing.assert_array_equal(test.image, image)
    np.testing.assert_array_equal(test.label, label)
    (tmp_path / names[-1]).write_bytes(records[:-1])
    with pytest.raises(ValueError, match="expected a multiple"):
        pools.cifar_binary(tmp_path, classes)


def write_svhn(path, label):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3, len(label)), np.uint8)
    savemat(path, {"X": image, "y": np.array(label, np.uint8)[:, None]})
    return image.transpose(3, 0, 1, 2)


def test_test_sets_and_the_papers_data(tmp_path):
    from PIL import Image

    sets, ids, mined = (tmp_path / n for n in ("sets", "ids", "pool"))
    for folder in ("svhn", "textures/dtd/images/knit", "lsun"):
        (sets / folder).mkdir(parents=True)
    for folder in (ids, mined):
        folder.mkdir()
    # Ten is the digit 0; the first of each digit, in the file's order.
    image = write_svhn(sets / "svhn" / "test_32x32.mat", [10, 1, 1, 2, 1, 10])
    np.testing.assert_array_equal(
        pools.svhn_subset(sets / "svhn" / "test_32x32.mat", each=1), image[[0, 1, 3]]
    )
    flat = Image.new("RGB", (60, 40), (10, 200, 30))
    flat.save(sets / "textures" / "dtd" / "images" / "knit" / "a.png")
    flat.save(sets / "lsun" / "b.png")
    _, data = planes(3, 32)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {b"data": data, b"labels": [0, 1, 2]}
        (ids / name).write_bytes(pickle.dumps(content, protocol=2))
    write_imagenet(mined, side=40)
    got = pools.original("cifar-10", *map(str, (ids, mined, sets)), held_out=4)
    assert list(got.outliers) == ["lsun", "svhn", "textures"]
    assert [len(x) for x in got.outliers.values()] == [1, 6, 1]
    assert (got.outliers["textures"] == [10, 200, 30]).all()
    assert (len(got.train.label), len(got.calibration.label)) == (11, 4)
    np.testing.assert_array_equal(got.test.image, planes(3, 32)[0])
    assert len(got.pool) == 5 and got.pool.read(np.arange(2)).shape == (2, 32, 32, 3)
    with pytest.raises(FileNotFoundError, match="config.data.pool_path: not given"):
        pools.original("cifar-10", str(ids), "", str(sets))
    with pytest.raises(ValueError, match="leave none to train on"):
        pools.original("cifar-10", *map(str, (ids, mined, sets)))
    with pytest.raises(FileNotFoundError, match="a folder for each test set"):
        pools.test_sets(sets / "lsun")
