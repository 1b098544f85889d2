"""Images as arrays (batch, height, width, channels)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

BORDERS = ("reflect", "zeros")
# Weights of red, green and blue in grey (ITU-R BT.601).
GREY = (0.299, 0.587, 0.114)


def augment(
    key: Key[Array, ""],
    x: Float[Array, "B H W C"],
    *,
    flip: bool = True,
    pad: int = 4,
    border: str = "reflect",
    least_area: float = 1.0,
    jitter: float = 0.0,
    grey: float = 0.0,
) -> Float[Array, "B H W C"]:
    """Random mirror images, crops, shifts and colours.

    Args:
      key: of the draws.
      x: images, larger than ``pad``; in [0, 1] for ``jitter``.
      flip: whether each image is mirrored, left and right, with probability 1/2.
      pad: largest shift in pixels; each image is shifted uniformly.
      border: what a shift brings in: reflect the image, or zeros.
      least_area: of a crop, as a share of the image; the crop, of a share that is uniform
        up to 1 and an aspect within 3/4 and 4/3, is resized to the image's size. 1: none.
      jitter: brightness, contrast and saturation are multiplied by factors within 1 - j
        and 1 + j, the hue is turned by up to j of half a circle. 0: none.
      grey: probability of losing the colour.

    Raises:
      ValueError: a negative pad, or one not below the images' height and width; another
        border; shares outside [0, 1]; colours of images without three channels.
    """
    _check(x, pad, border, least_area, jitter, grey)
    _, height, width, _ = x.shape
    key_flip, key_shift = jax.random.split(key)
    if flip:
        mirror = jax.random.bernoulli(key_flip, shape=(len(x), 1, 1, 1))
        x = jnp.where(mirror, x[:, :, ::-1], x)
    if least_area < 1:
        x = _crops(jax.random.fold_in(key, 2), x, least_area)
    if pad:
        mode = "reflect" if border == "reflect" else "constant"
        padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=mode)
        corners = jax.random.randint(key_shift, (len(x), 2), 0, 2 * pad + 1)

        def crop(image, corner):
            start = (corner[0], corner[1], 0)
            return lax.dynamic_slice(image, start, (height, width, image.shape[-1]))

        x = jax.vmap(crop)(padded, corners)
    if jitter:
        x = _jitter(jax.random.fold_in(key, 3), x, jitter)
    if grey:
        lost = jax.random.bernoulli(jax.random.fold_in(key, 4), grey, (len(x), 1, 1, 1))
        x = jnp.where(lost, _grey(x), x)
    return x


def _check(x, pad, border, least_area, jitter, grey):
    _, height, width, count = x.shape
    if not 0 <= pad < min(height, width):
        raise ValueError(
            f"augment needs 0 <= pad < {min(height, width)}, the size, got {pad}"
        )
    if border not in BORDERS:
        raise ValueError(f"border must be one of {BORDERS}, got {border!r}")
    shares = {"least_area": least_area, "jitter": jitter, "grey": grey}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
    if (jitter or grey) and count != 3:
        raise ValueError(f"jitter and grey need 3 channels, got {count}")


def _crops(key, x, least_area):
    """Each image's own crop, resized to the whole, bilinear."""
    _, height, width, count = x.shape
    keys = jax.random.split(key, 3)
    area = jax.random.uniform(keys[0], (len(x),), minval=least_area, maxval=1.0)
    aspect = jnp.exp(
        jax.random.uniform(keys[1], (len(x),), minval=-1.0) * jnp.log(4 / 3)
    )
    sides = jnp.sqrt(area[:, None] * jnp.stack([1 / aspect, aspect], 1))
    sides = jnp.minimum(sides, 1.0)
    corner = jax.random.uniform(keys[2], (len(x), 2)) * (1 - sides)
    size = jnp.array([height, width], x.dtype)

    def resize(image, side, corner):
        scale = 1 / side
        return jax.image.scale_and_translate(
            image, (height, width, count), (0, 1), scale, -corner * size * scale,
            "linear", antialias=False,
        )  # fmt: skip

    return jax.vmap(resize)(x, sides, corner)


def _grey(x):
    return (x * jnp.array(GREY, x.dtype).reshape(1, 1, 1, 3)).sum(-1, keepdims=True)


def _jitter(key, x, strength):
    keys = jax.random.split(key, 4)

    def factor(key):
        low, high = max(0.0, 1 - strength), 1 + strength
        return jax.random.uniform(key, (len(x), 1, 1, 1), minval=low, maxval=high)

    x = (x * factor(keys[0])).clip(0, 1)
    f, mean = factor(keys[1]), _grey(x).mean((1, 2), keepdims=True)
    x = (f * x + (1 - f) * mean).clip(0, 1)
    f = factor(keys[2])
    x = (f * x + (1 - f) * _grey(x)).clip(0, 1)
    turn = jax.random.uniform(keys[3], (len(x),), minval=-strength, maxval=strength)
    return _turn_hue(x, turn * jnp.pi).clip(0, 1)


def _turn_hue(x, angle):
    """Colours turned about the axis of greys, whose sum of channels stays."""
    cos, sin = jnp.cos(angle)[:, None, None], jnp.sin(angle)[:, None, None]
    eye, third = jnp.eye(3)[None], jnp.full((1, 3, 3), 1 / 3)
    cross = jnp.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])[None] / 3**0.5
    matrix = cos * eye + (1 - cos) * third + sin * cross
    return jnp.einsum("bhwc,bdc->bhwd", x, matrix, precision="highest")
