"""Images as arrays (batch, height, width, channels)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key


def augment(
    key: Key[Array, ""], x: Float[Array, "B H W C"], *, flip: bool = True, pad: int = 4
) -> Float[Array, "B H W C"]:
    """Random mirror images and shifts, the border filled by reflection.

    Args:
      key: of the draws.
      x: images, larger than ``pad``.
      flip: whether each image is mirrored, left and right, with probability 1/2.
      pad: largest shift in pixels; each image is shifted uniformly.

    Raises:
      ValueError: a negative pad, or one not below the images' height and width.
    """
    _, height, width, _ = x.shape
    if not 0 <= pad < min(height, width):
        raise ValueError(
            f"augment needs 0 <= pad < {min(height, width)}, the size, got {pad}"
        )
    key_flip, key_shift = jax.random.split(key)
    if flip:
        mirror = jax.random.bernoulli(key_flip, shape=(len(x), 1, 1, 1))
        x = jnp.where(mirror, x[:, :, ::-1], x)
    border = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = jnp.pad(x, border, mode="reflect")
    corners = jax.random.randint(key_shift, (len(x), 2), 0, 2 * pad + 1)

    def crop(image, corner):
        start = (corner[0], corner[1], 0)
        return lax.dynamic_slice(image, start, (height, width, image.shape[-1]))

    return jax.vmap(crop)(padded, corners)
