"""Detection data: the recipe of letters, patches, the pool, drawn glyphs."""

import numpy as np
import pytest

from jaxpapers.data import outliers
from jaxpapers.data.images import Split


def test_letters_are_a_function_of_the_seed():
    one, same, other = (
        outliers.glyphs(12, seed, outliers.POOL_FONTS) for seed in (1, 1, 2)
    )
    assert one.shape == (12, 28, 28, 1) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, same)
    assert (one != other).any((1, 2, 3)).all()
    # Ink in the middle, none at the border; every letter has some.
    assert (one.max((1, 2, 3)) > 200).all()
    assert one[:, 0].mean() < 5 < one[:, 10:18, 10:18].mean()
    assert not set(outliers.POOL_FONTS) & set(outliers.TEST_FONTS)
    assert not set("0123456789OIloSsZzBgqb") & set(outliers.ALPHABET)
    with pytest.raises(FileNotFoundError, match="no font .*Nothing.ttf"):
        outliers.glyphs(1, 0, ("Nothing",))


def test_patches_are_means_of_their_source():
    source = np.arange(100 * 120, dtype=np.uint32).reshape(100, 120) % 251
    got = outliers.patches(40, 0, [source.astype(np.uint8)])
    assert got.shape == (40, 28, 28, 1)
    rng = np.random.RandomState(0)
    rng.randint(1)
    times = 1 + rng.randint(3)
    y, x = (rng.randint(n - 28 * times + 1) for n in source.shape)
    cut = source[y : y + 28 * times, x : x + 28 * times]
    mean = cut.reshape(28, times, 28, times).mean((1, 3))
    np.testing.assert_array_equal(got[0, ..., 0], np.rint(mean))


def write_photos(folder):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in (*outliers.TEXTURES, *outliers.PHOTOS):
        Image.fromarray(rng.integers(0, 255, (90, 100, 3), np.uint8)).save(
            folder / name
        )


def test_digits_among_letters(tmp_path):
    write_photos(tmp_path)
    # Images and labels that tell which digit they are.
    number = np.arange(10_000)
    image = np.zeros((10_000, 28, 28), np.uint8)
    image[:, 0, 0], image[:, 0, 1] = number // 256, number % 256
    digits = Split(image, number.astype(np.int32))
    easy = np.full((50, 28, 28), 9, np.uint8)
    make = outliers.digits_among_letters
    data = make(
        digits, easy, tmp_path, tmp_path, train=100, letters=7, contaminants=5, count=3
    )
    parts = [data.train.label, data.calibration.label, data.test.label]
    hidden = data.pool.read(np.arange(57, 62))[..., 0].astype(int)
    parts.append(256 * hidden[:, 0, 0] + hidden[:, 0, 1])
    assert [len(x) for x in parts] == [100, 1000, 2000, 5]
    assert len(set(np.concatenate(parts).tolist())) == 3105
    order = np.random.RandomState(0).permutation(10_000)
    np.testing.assert_array_equal(parts[0], order[:100])
    np.testing.assert_array_equal(parts[2], order[8000:])
    np.testing.assert_array_equal(parts[3], order[6000:6005])
    assert len(data.pool) == 62
    assert np.flatnonzero(data.marks["letters"]).tolist() == list(range(50, 57))
    assert np.flatnonzero(data.marks["contaminants"]).tolist() == list(range(57, 62))
    assert list(data.outliers) == ["letters", "textures", "photos"]
    for kwargs, words in (
        ({"train": 5000}, "trains on 1 to 4,000"),
        ({"letters": 0}, "at least 1 letter"),
        ({"contaminants": 3000}, "at most 2,000"),
    ):
        with pytest.raises(ValueError, match=words):
            make(digits, easy, tmp_path, tmp_path, **kwargs)
    (tmp_path / "grass.png").unlink()
    with pytest.raises(FileNotFoundError, match="no file grass.png"):
        make(digits, easy, tmp_path, tmp_path, count=3)


def test_drawn_data():
    data = outliers.segments(64, pool=100)
    assert data.train.image.shape == (64, 8, 8, 1) and len(data.pool) == 100
    assert data.marks["letters"].sum() == 10
    assert [x.shape[1:] for x in data.outliers.values()] == [(8, 8, 1)] * 2
    patterns = outliers.patterns(50)
    assert patterns.shape == (50, 28, 28) and patterns.std((1, 2)).min() > 5
    np.testing.assert_array_equal(patterns, outliers.patterns(50))


def test_fashion_is_read_plain_or_gzipped(tmp_path):
    image = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    header = b"\x00\x00\x08\x03" + np.array(image.shape, ">u4").tobytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + image.tobytes())
    np.testing.assert_array_equal(outliers.fashion_images(tmp_path), image)
    with pytest.raises(FileNotFoundError, match=r"ubyte\.gz"):
        outliers.fashion_images(tmp_path / "none")
