"""Pictures mirrored and shifted: what stays, what moves, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops.images import augment


def pictures(count=64, size=6):
    shape = (count, size, size + 1, 2)
    return jnp.arange(count * size * (size + 1) * 2, dtype=jnp.float32).reshape(shape)


def test_without_shift_it_mirrors_left_and_right_half_of_them():
    x = pictures()
    y = np.asarray(augment(jax.random.key(0), x, pad=0))
    same = (y == x).all((1, 2, 3))
    mirrored = (y == x[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_without_mirror_each_is_a_crop_of_the_reflected_picture():
    x, pad = pictures(), 2
    y = np.asarray(augment(jax.random.key(0), x, flip=False, pad=pad))
    border = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    wide, found = np.pad(x, border, mode="reflect"), set()
    _, height, width, _ = x.shape
    for picture, whole in zip(y, wide):
        places = [
            (i, j)
            for i in range(2 * pad + 1)
            for j in range(2 * pad + 1)
            if (whole[i : i + height, j : j + width] == picture).all()
        ]
        assert len(places) == 1
        found |= set(places)
    # Rows and columns move on their own, by every amount.
    assert {i for i, _ in found} == {j for _, j in found} == set(range(2 * pad + 1))
    assert len(found) > 2 * pad + 1


def test_the_key_decides():
    x = pictures(8)
    first = augment(jax.random.key(0), x)
    np.testing.assert_array_equal(first, augment(jax.random.key(0), x))
    assert (first != augment(jax.random.key(1), x)).any()


@pytest.mark.parametrize("pad", [-1, 6])
def test_refuses(pad):
    with pytest.raises(ValueError, match="0 <= pad < 6"):
        augment(jax.random.key(0), pictures(2), pad=pad)
