"""Images mirrored and shifted: what stays, what moves, what is refused."""

import functools

import jax
import numpy as np
import pytest

from jaxpapers.ops.images import augment
from tests.programs import KEY, together


def images(count=64, size=6):
    shape = (count, size, size + 1, 2)
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_without_shift_it_mirrors_left_and_right_half_of_them():
    x = images()
    y = together(functools.partial(augment, pad=0), jax.random.key(0), x)
    same = (y == x).all((1, 2, 3))
    mirrored = (y == x[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_without_mirror_each_is_a_crop_of_the_reflected_image():
    x, pad = images(), 2
    crop = functools.partial(augment, flip=False, pad=pad)
    y = together(crop, jax.random.key(0), x)
    border = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    wide, found = np.pad(x, border, mode="reflect"), set()
    _, height, width, _ = x.shape
    for image, whole in zip(y, wide):
        places = [
            (i, j)
            for i in range(2 * pad + 1)
            for j in range(2 * pad + 1)
            if (whole[i : i + height, j : j + width] == image).all()
        ]
        assert len(places) == 1
        found |= set(places)
    # Rows and columns move on their own, by every amount.
    assert {i for i, _ in found} == {j for _, j in found} == set(range(2 * pad + 1))
    assert len(found) > 2 * pad + 1


def test_the_key_decides():
    x, run = images(8), jax.jit(augment)
    first, again, other = (np.asarray(run(jax.random.key(i), x)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("pad", [-1, 6])
def test_refuses(pad):
    with pytest.raises(ValueError, match="0 <= pad < 6"):
        jax.eval_shape(functools.partial(augment, pad=pad), KEY, images(2))
