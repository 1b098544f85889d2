"""IDX, CSV, CelebA and folders: original files that the test writes, what is refused."""

import gzip
import os
import struct

import numpy as np
import pytest

from jaxpapers.data import image_files, images

Image = pytest.importorskip("PIL.Image")


def save(path, pixels):
    Image.fromarray(pixels).save(path)


def as_idx(array):
    magic = {1: 0x801, 3: 0x803}[array.ndim]
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0,)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx(tmp_path, shape, pack):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    (tmp_path / "file").write_bytes(pack(as_idx(array)))
    np.testing.assert_array_equal(image_files.idx(tmp_path / "file"), array)


VECTOR = as_idx(np.arange(5, dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (VECTOR[:-1], r"says \(5,\), which is 5 bytes, but 4 follow"),
        (VECTOR + b"x", "5 bytes, but 6 follow"),
        (VECTOR[:6], "has 6 bytes, its header 8"),
        (b"\0\0\x0d\1" + VECTOR[4:], "starts with 0x00000d01; expected an IDX file"),
        # The same header with its bytes the other way round.
        (b"\1\x08\0\0" + VECTOR[4:], "starts with 0x01080000"),
        (b"", "starts with 0x; expected"),
        (gzip.compress(VECTOR, mtime=0)[:-9], "unreadable after 0 bytes"),
    ],
    ids=["cut", "too long", "cut header", "type", "byte order", "empty", "cut gzip"],
)
def test_idx_refuses(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        image_files.idx(tmp_path / "file")


def write_fashion(folder, side=28, counts=(6, 4)):
    rng = np.random.default_rng(0)
    arrays = []
    for part, n in zip(("train", "t10k"), counts):
        image = rng.integers(0, 256, (n, side, side)).astype(np.uint8)
        label = np.arange(n, dtype=np.uint8)
        # One kind packed, one not: each file may be either.
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(as_idx(image))
        )
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(as_idx(label))
        arrays.append(image)
    return arrays


def test_fashion(tmp_path):
    train, test = write_fashion(tmp_path)
    dataset = image_files.fashion(tmp_path)
    np.testing.assert_allclose(dataset.train.image[..., 0], train / 255, rtol=1e-6)
    np.testing.assert_allclose(dataset.test.image[..., 0], test / 255, rtol=1e-6)
    assert dataset.train.image.shape == (6, 28, 28, 1)
    assert dataset.train.label.tolist() == list(range(6)) and dataset.classes == 10
    assert (
        dataset.train.image.dtype == np.float32
        and dataset.train.label.dtype == np.int32
    )
    np.testing.assert_allclose(dataset.mean, [(train / 255).mean()])
    np.testing.assert_allclose(dataset.std, [(train / 255).std()], rtol=1e-6)
    pooled = image_files.fashion(tmp_path, pooled=True, name="MNIST")
    assert pooled.train.image.shape == (6, 14, 14, 1) and pooled.name == "MNIST"
    np.testing.assert_allclose(
        pooled.train.image[2, 3, 5, 0], train[2, 6:8, 10:12].mean() / 255, rtol=1e-6
    )


def test_fashion_refuses(tmp_path):
    write_fashion(tmp_path)
    label = tmp_path / "train-labels-idx1-ubyte"
    for array, message in (
        (np.zeros(5, np.uint8), "6 train images, 5 labels"),
        (np.full(6, 10, np.uint8), r"labels must be 0 \.\. 9"),
        (np.zeros((6, 1, 1), np.uint8), "labels-idx1-ubyte: has 3 dimensions"),
    ):
        label.write_bytes(as_idx(array))
        with pytest.raises(ValueError, match=message):
            image_files.fashion(tmp_path)
    label.unlink()
    with pytest.raises(
        FileNotFoundError, match="ubyte.gz, nor .*dataset-fashion-mnist"
    ):
        image_files.fashion(tmp_path)
    write_fashion(tmp_path, side=3)
    with pytest.raises(ValueError, match="even sides, got 3 x 3"):
        image_files.fashion(tmp_path, pooled=True)


def test_a_constant_channel_is_normalised_to_zero(tmp_path):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(as_idx(np.full((6, 3, 3), 7, np.uint8)))
    dataset = image_files.fashion(tmp_path)
    assert dataset.std.tolist() == [1.0]
    np.testing.assert_allclose(
        images.normalize(dataset, dataset.train.image), 0, atol=1e-7
    )


def write_csv(folder, bad=""):
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.integers(0, 256, (10, 784)), np.arange(10)])
    lines = [",".join(map(str, row)) for row in rows]
    lines[6] = bad or lines[6]
    with gzip.open(folder / "mnist_5k.csv.gz", "wt") as f:
        f.write("\n".join(lines) + "\n")
    return rows


def test_mnist_csv(tmp_path):
    rows = write_csv(tmp_path)[np.random.default_rng(0).permutation(10)]
    dataset = image_files.mnist_csv(tmp_path)
    assert dataset.train.label.tolist() == rows[:8, -1].tolist()
    assert dataset.test.label.tolist() == rows[8:, -1].tolist()
    image = np.concatenate([dataset.train.image, dataset.test.image])
    np.testing.assert_allclose(image.reshape(10, 784), rows[:, :-1] / 255, rtol=1e-6)
    assert image.shape == (10, 28, 28, 1) and image.dtype == np.float32
    again = image_files.mnist_csv(tmp_path / "mnist_5k.csv.gz")
    np.testing.assert_array_equal(again.test.image, dataset.test.image)


@pytest.mark.parametrize(
    "bad",
    [
        "1,2,3",
        ",".join(["256"] * 784 + ["1"]),
        ",".join(["0"] * 784 + ["10"]),
        ",".join(["-1"] + ["0"] * 784),
        ",".join(["0.5"] + ["0"] * 784),
        ",".join(["nan"] + ["0"] * 784),
        "x,y",
    ],
)
def test_a_malformed_line_of_mnist_is_named(tmp_path, bad):
    write_csv(tmp_path, bad)
    with pytest.raises(ValueError, match="line 7: expected 784 pixels"):
        image_files.mnist_csv(tmp_path)


def write_celeba(folder, size=(178, 218)):
    """Three faces, left half green and right half blue inside the crop, red around it."""
    (folder / "img_align_celeba").mkdir()
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 0] = 255
    pixels[57:185, 25:89], pixels[57:185, 89:153] = (50, 200, 0), (0, 0, 100)
    for number in (1, 2, 3):
        # PNG under another name: exact pixels, and what a file holds decides.
        Image.fromarray(pixels).save(
            folder / "img_align_celeba" / f"00000{number}.jpg", "PNG"
        )
    (folder / "list_eval_partition.txt").write_text(
        "000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n"
    )


def test_celeba_crop(tmp_path):
    write_celeba(tmp_path)
    dataset = image_files.celeba(tmp_path, 64)
    assert dataset.train.image.shape == dataset.test.image.shape == (1, 64, 64, 3)
    # 32 columns of each colour; only the two at the seam may mix, and red never enters.
    left, right = np.array([50, 200, 0]) / 255, np.array([0, 0, 100]) / 255
    image = dataset.train.image[0]
    np.testing.assert_allclose(image[:, :31], np.broadcast_to(left, (64, 31, 3)))
    np.testing.assert_allclose(image[:, 33:], np.broadcast_to(right, (64, 31, 3)))
    assert dataset.classes == 1 and dataset.train.label.tolist() == [0]


def test_celeba_refuses(tmp_path):
    write_celeba(tmp_path)
    assert len(image_files.celeba(tmp_path, 2, most=1).test.label) == 1
    with pytest.raises(ValueError, match="most must be None or at least 1, got 0"):
        image_files.celeba(tmp_path, most=0)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        image_files.celeba(tmp_path, 0)
    listing = tmp_path / "list_eval_partition.txt"
    for text, message in (
        (
            "000001.jpg 0\n000003.jpg 3\n",
            "txt, line 2: expected a file's name and 0, 1",
        ),
        ("000001.jpg 0\n../000003.jpg 2\n", "line 2: expected a file's name"),
        ("000001.jpg 0\n000002.jpg 1\n", "partitions 0 and 2"),
    ):
        listing.write_text(text)
        with pytest.raises(ValueError, match=message):
            image_files.celeba(tmp_path)
    listing.write_text("000001.jpg 0\n000009.jpg 2\n")
    with pytest.raises(FileNotFoundError, match="000009.jpg"):
        image_files.celeba(tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "img_align_celeba" / "000009.jpg")
    with pytest.raises(ValueError, match=r"000009.jpg: is \(64, 64\), expected \(178"):
        image_files.celeba(tmp_path)


def write_folder(folder, count, color, size=(6, 4)):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGBA", size, (*color, 255 - i)).save(folder / f"{i}.png")


def test_image_folder_of_classes(tmp_path):
    write_folder(tmp_path / "blue", 4, (0, 0, 255))
    write_folder(tmp_path / "amber", 6, (255, 100, 0))
    (tmp_path / "amber" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    dataset = image_files.image_folder(tmp_path, 3, held_out=0.3)
    assert dataset.train.image.shape == (7, 3, 3, 3) and dataset.classes == 2
    assert dataset.test.image.shape == (3, 3, 3, 3) and dataset.name == tmp_path.name
    label = np.concatenate([dataset.train.label, dataset.test.label])
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_array_equal(label, np.array([0] * 6 + [1] * 4)[order])
    # Red where the class is amber; a pixel that is nearly opaque nearly keeps its colour.
    image = np.concatenate([dataset.train.image, dataset.test.image])
    np.testing.assert_allclose(image[..., 0].mean((1, 2)), 1 - label, atol=6 / 255)
    # The transparent share is white: 255 - i of 255 are opaque.
    blue = np.sort(image[label == 0][:, 0, 0, 2])
    np.testing.assert_allclose(blue, np.arange(6) / 255, atol=1e-6)


def test_image_folder_takes_the_middle_square(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255
    for name in ("a.png", "b.PNG", "c.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    dataset = image_files.image_folder(tmp_path, 2, held_out=0.3)
    assert (dataset.train.image == 1).all() and dataset.train.image.shape == (
        2,
        2,
        2,
        3,
    )
    assert dataset.classes == 1


def test_image_folder_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        image_files.image_folder(tmp_path / "absent", 4)
    with pytest.raises(FileNotFoundError, match="no images with a suffix of"):
        image_files.image_folder(tmp_path, 4)
    write_folder(tmp_path, 3, (0, 0, 0))
    for share in (0.0, 0.1, 1.0):
        with pytest.raises(
            ValueError, match=f"of 3 images in both splits, got {share}"
        ):
            image_files.image_folder(tmp_path, 4, share)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="0.png: broken image"):
        image_files.image_folder(tmp_path, 4, 0.4)
    Image.new("I;16", (4, 4)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="0.png: pixel mode I;16"):
        image_files.image_folder(tmp_path, 4, 0.4)
    write_folder(tmp_path / "inside", 1, (0, 0, 0))
    with pytest.raises(ValueError, match="images beside folders"):
        image_files.image_folder(tmp_path, 4)


def test_images_are_turned_as_viewers_show_them(tmp_path):
    """Of each EXIF orientation the loaded image is the upright one."""
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8], upright[:, :8, 1] = (255, 0, 0), 255  # All four quarters differ.
    turned = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1]]
    turned += [upright.transpose(1, 0, 2), np.rot90(upright)]
    turned += [np.rot90(upright, 2).transpose(1, 0, 2), np.rot90(upright, -1)]
    for orientation, pixels in enumerate(turned, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(pixels)).save(
            tmp_path / f"{orientation}.png", exif=exif
        )
    dataset = image_files.image_folder(tmp_path, 16, 0.25)
    for image in np.concatenate([dataset.train.image, dataset.test.image]):
        np.testing.assert_array_equal(image, upright / np.float32(255))


def test_hidden_and_other_files_are_no_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            save(tmp_path / name / f"{i}.png", np.full((4, 4, 3), 9, np.uint8))
        (tmp_path / name / "._0.png").write_bytes(b"\0\5\x16\7 Mac OS X")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "b" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "readme.txt").write_bytes(b"x")
    dataset = image_files.image_folder(tmp_path, 4, 0.5)
    assert dataset.classes == 2 and len(dataset.train.label) == 3
    assert dataset.notes.startswith("skipped 2 of 8 files: readme.txt (no image")


def test_large_images_and_odd_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 99)
    for i in range(2):
        save(tmp_path / f"{i}.png", np.zeros((9, 9, 3), np.uint8))
    save(tmp_path / "x.png", np.zeros((10, 10, 3), np.uint8))
    with pytest.raises(ValueError, match="x.png: has 10 x 10 pixels, more than the 99"):
        image_files.image_folder(tmp_path, 4, 0.5)
    # Pillow's own refusal names no file.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 45)
    with pytest.raises(ValueError, match="x.png: broken image .DecompressionBomb"):
        image_files.image_folder(tmp_path, 4, 0.5)
    (tmp_path / "x.png").unlink()
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="x.png: is a pipe"):
        image_files.image_folder(tmp_path, 4, 0.5)
    (tmp_path / "x.png").unlink()
    (tmp_path / "x.png").mkdir()
    with pytest.raises(ValueError, match="images beside folders"):
        image_files.image_folder(tmp_path, 4, 0.5)


def test_absent_pillow_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, 3, (0, 0, 0))
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxpapers\[emoji\]'"):
        image_files.image_folder(tmp_path, 4, 0.4)
