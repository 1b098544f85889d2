"""Images mirrored and shifted: what stays, what moves, what is refused."""

import functools

import jax
import numpy as np
import pytest

from jaxpapers.ops import images as images_module
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


def test_zeros_come_in_at_the_border():
    x = np.ones((32, 5, 5, 1), np.float32)
    crop = functools.partial(augment, flip=False, pad=2, border="zeros")
    y = together(crop, jax.random.key(0), x)
    sums = {int(image.sum()) for image in y}
    assert sums <= {a * b for a in (3, 4, 5) for b in (3, 4, 5)} and len(sums) > 3
    assert set(np.unique(y)) == {0, 1}


def test_crops_and_colours():
    """A ramp stays one; greys keep their grey under turns of the hue; colour is lost."""
    ramp = np.broadcast_to(np.linspace(0, 1, 9)[:, None, None], (16, 9, 9, 3))
    ramp = ramp.astype(np.float32)
    colour = np.random.default_rng(0).random((40, 4, 4, 3)).astype(np.float32)

    def run(key, ramp, colour):
        crops = augment(key, ramp, flip=False, pad=0, least_area=0.5)
        turned = images_module._turn_hue(colour, np.pi * 2 / 3 * np.ones(40, "f"))
        jittered = augment(key, colour, flip=False, pad=0, jitter=0.3)
        grey = augment(key, colour, flip=False, pad=0, grey=0.5)
        return crops, turned, jittered, grey

    crops, turned, jittered, grey = together(run, jax.random.key(0), ramp, colour)
    slopes = np.diff(crops[:, 2:-2], axis=1)
    assert np.ptp(slopes, axis=(1, 2, 3)).max() < 1e-5
    heights = 8 * slopes.mean((1, 2, 3))
    assert heights.min() > 0.6 and heights.max() < 1.001 and np.ptp(heights) > 0.1
    # A third of a circle moves each channel to the next.
    np.testing.assert_allclose(turned, np.roll(colour, 1, -1), atol=1e-6)
    assert (jittered != colour).any((1, 2, 3)).all()
    assert jittered.min() >= 0 and jittered.max() <= 1
    lost = np.ptp(grey, axis=-1).max((1, 2)) == 0
    assert 10 < lost.sum() < 30
    weights = np.float32([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey[lost][..., 0], colour[lost] @ weights, atol=1e-6)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"border": "wrap"}, "border must be one of"),
        ({"least_area": 1.5}, r"least_area must be in \[0, 1\], got 1.5"),
        ({"jitter": 0.1}, "need 3 channels, got 2"),
    ],
)
def test_refuses_options(options, says):
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(functools.partial(augment, **options), KEY, images(2))
