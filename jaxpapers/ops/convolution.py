"""Convolutions whose gradients are fast in loops on a CPU.

XLA's CPU backend has no fast program for the gradients of a convolution inside a
``lax.scan`` or ``while_loop``: that of the kernel took 1,700 ms there and 42 ms outside
(80 images of 14 x 14 x 64, one thread, jaxlib 0.10.2). Here they are forward
convolutions and matrix products, about as fast as outside. Other backends compile XLA's
own gradients.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Float

LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **kwargs: Any,
) -> Any:
    """``lax.conv_general_dilated`` for ``flax.linen.Conv(conv_general_dilated=...)``.

    Plain convolutions of images, channels last, use ``convolve``, all others XLA's.
    """
    plain = (
        lhs.ndim == 4
        and feature_group_count == 1
        and set(lhs_dilation or (1,)) == set(rhs_dilation or (1,)) == {1}
        and len(set(window_strides)) == 1
        and _layout(dimension_numbers, lhs, rhs) == _layout(LAYOUT, lhs, rhs)
    )
    if plain:
        stride = window_strides[0]
        sides = zip(lhs.shape[1:3], rhs.shape[:2])
        if isinstance(padding, str):
            sizes, window = zip(*sides)
            padding = lax.padtype_to_pads(sizes, window, (stride, stride), padding)
        return convolve(lhs, rhs, stride, tuple((int(a), int(b)) for a, b in padding))
    return lax.conv_general_dilated(
        lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation,
        dimension_numbers, feature_group_count, **kwargs,
    )  # fmt: skip


def conv_of_doubled(
    lhs: Any,
    rhs: Any,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **kwargs: Any,
) -> Any:
    """A 3 x 3 convolution of images upsampled by 2 (nearest neighbour).

    For ``flax.linen.Conv(conv_general_dilated=...)``; only the small images are given
    and kept. Outputs at even and odd places depend on 2 x 2 pixels each, which takes 4/9
    of the products.

    Args:
      lhs: (B, H, W, C).
      rhs: (3, 3, C, O).
      window_strides, padding, lhs_dilation, rhs_dilation, feature_group_count: those of a
        plain convolution, 1 and "SAME".
      dimension_numbers: channels last.
      kwargs: ignored, e.g. precision.

    Returns:
      (B, 2 H, 2 W, O).

    Raises:
      ValueError: another convolution.
    """
    del kwargs
    ones = {1, *window_strides, *(lhs_dilation or ()), *(rhs_dilation or ())}
    plain = ones == {1} and feature_group_count == 1 and padding == "SAME"
    if (
        lhs.ndim != 4
        or rhs.shape[:2] != (3, 3)
        or not plain
        or (_layout(dimension_numbers, lhs, rhs) != _layout(LAYOUT, lhs, rhs))
    ):
        raise ValueError(
            "conv_of_doubled is a 3 x 3 convolution, channels last, with padding 'SAME', "
            f"without strides, dilation and groups; got a kernel {rhs.shape}, strides "
            f"{window_strides}, padding {padding!r}, dilations {lhs_dilation} and "
            f"{rhs_dilation}, groups {feature_group_count}"
        )
    # Taps that fall on each of the two pixels, at even and odd places.
    taps = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], rhs.dtype)
    pads = ((1, 0), (0, 1))

    def at(row, column):
        kernel = jnp.einsum(
            "pi,qj,ijco->pqco", taps[row], taps[column], rhs, precision="highest"
        )
        return convolve(lhs, kernel, 1, (pads[row], pads[column]))

    rows = [jnp.stack([at(row, column) for column in (0, 1)], 3) for row in (0, 1)]
    batch, height, width = lhs.shape[:3]
    return jnp.stack(rows, 2).reshape(batch, 2 * height, 2 * width, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "h w C O"],
    stride: int,
    pads: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "B I J O"]:
    """A convolution of images.

    On several CPU devices call it under ``jax.set_mesh``: the algorithm of the kernel's
    gradient depends on whether images are on one device.

    Args:
      x: images.
      kernel: windows.
      stride: of both axes.
      pads: zeros before and after, of each axis.
    """
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=LAYOUT
    )


def _forward(x, kernel, stride, pads):
    return convolve(x, kernel, stride, pads), (x, kernel)


def _backward(stride, pads, kept, dy):
    x, kernel = kept

    def usual(x, kernel, dy):
        def forward(x, kernel):
            return lax.conv_general_dilated(
                x, kernel, (stride, stride), pads, dimension_numbers=LAYOUT
            )

        return jax.vjp(forward, x, kernel)[1](dy)

    def products(x, kernel, dy):
        dx = _dx(x, kernel, stride, pads, dy)
        return dx, _dkernel(x, kernel, stride, pads, dy)

    return lax.platform_dependent(x, kernel, dy, cpu=products, default=usual)


convolve.defvjp(_forward, _backward)


def _dx(x, kernel, stride, pads, dy):
    """Gradient of the images: a convolution with the flipped kernel."""
    size = kernel.shape[:2]
    if stride > 1:
        inside = ((0, 0, 0), (0, 0, stride - 1), (0, 0, stride - 1), (0, 0, 0))
        dy = lax.pad(dy, jnp.zeros((), dy.dtype), inside)
    # Pad for windows that begin outside the image and pixels that no window covers.
    around = []
    for side, length, n, (low, _) in zip(x.shape[1:3], dy.shape[1:3], size, pads):
        before = n - 1 - low
        around.append((before, side + n - 1 - before - length))
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return lax.conv_general_dilated(
        dy, flipped, (1, 1), around, dimension_numbers=LAYOUT
    )


def _dkernel(x, kernel, stride, pads, dy):
    """Gradient of the kernel as one matrix product.

    Images are concatenated once for each row of the window, shifted by as many rows, and
    gradients once for each column. Products are summed over pairs of images, whose copies
    stay in the cache: 1.2 to 1.6 times as fast as all at once. With rows on several
    devices there is one product, since a slice would move them.
    """
    (height, width), (count, rows, columns, out) = kernel.shape[:2], dy.shape
    (above, below), (left, _) = pads
    channels = x.shape[-1]
    kind, zero = jnp.promote_types(dy.dtype, jnp.float32), jnp.zeros((), dy.dtype)

    def shifted(dy, j):
        before = j - left
        after = x.shape[2] - (before + stride * (columns - 1) + 1)
        beside = ((0, 0, 0), (0, 0, 0), (before, after, stride - 1), (0, 0, 0))
        return lax.pad(dy, zero, beside)

    def product(x, dy):
        x = jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))
        span = stride * (rows - 1) + 1
        windows = [x[:, i : i + span : stride] for i in range(height)]
        windows = jnp.concatenate(windows, -1).reshape(-1, height * channels)
        beside = jnp.concatenate([shifted(dy, j) for j in range(width)], -1)
        beside = beside.reshape(-1, width * out)
        return jnp.matmul(windows.T, beside, preferred_element_type=kind)

    def add(i, total):
        part = (lax.dynamic_slice_in_dim(a, i * pair, pair) for a in (x, dy))
        return total + product(*part)

    pair = 2 - count % 2
    if _on_one_device() and count > pair:
        first = jnp.zeros((height * channels, width * out), kind)
        grad = lax.fori_loop(0, count // pair, add, first)
    else:
        grad = product(x, dy)
    grad = grad.reshape(height, channels, width, out).swapaxes(1, 2)
    return grad.astype(kernel.dtype)


def _on_one_device() -> bool:
    """Whether every axis of the mesh that the compiler manages has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return all(mesh.shape[n] == 1 for n, kind in kinds if kind != AxisType.Manual)


def _layout(numbers, lhs, rhs):
    return lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
