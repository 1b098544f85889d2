"""Convolutions whose gradients are fast in loops on a CPU.

XLA's CPU backend has no fast program for the gradients of a convolution inside a
``lax.scan`` or ``while_loop``: that of the kernel took 1,700 ms there and 42 ms outside
(80 pictures of 14 x 14 x 64, one thread, jaxlib 0.10.2). Here they are forward
convolutions and matrix products, of about the speed that they have outside. Other
backends compile the usual gradients.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
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

    Plain convolutions of pictures, channels last, go to ``convolve``, all others to XLA.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "h w C O"],
    stride: int,
    pads: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "B I J O"]:
    """A convolution of pictures.

    Args:
      x: pictures.
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
    """The gradient spread out over the windows: a convolution with the turned kernel."""
    size = kernel.shape[:2]
    if stride > 1:
        inside = ((0, 0, 0), (0, 0, stride - 1), (0, 0, stride - 1), (0, 0, 0))
        dy = lax.pad(dy, jnp.zeros((), dy.dtype), inside)
    # Windows that began before the picture, and pixels that none reached, count too.
    around = []
    for side, length, n, (low, _) in zip(x.shape[1:3], dy.shape[1:3], size, pads):
        before = n - 1 - low
        around.append((before, side + n - 1 - before - length))
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return lax.conv_general_dilated(
        dy, turned, (1, 1), around, dimension_numbers=LAYOUT
    )


def _dkernel(x, kernel, stride, pads, dy):
    """For each place in the window, what lay there times the gradient.

    The gradients of a window's row stand side by side, each moved to the column that its
    pixel had: one product per row of the window, with many columns, instead of one per
    place is up to twice as fast.
    """
    (height, width), (_, rows, columns, out) = kernel.shape[:2], dy.shape
    (above, below), (left, _) = pads
    channels = x.shape[-1]
    kind, zero = jnp.promote_types(dy.dtype, jnp.float32), jnp.zeros((), dy.dtype)

    def moved(j):
        before = j - left
        after = x.shape[2] - (before + stride * (columns - 1) + 1)
        beside = ((0, 0, 0), (0, 0, 0), (before, after, stride - 1), (0, 0, 0))
        return lax.pad(dy, zero, beside)

    beside = jnp.concatenate([moved(j) for j in range(width)], -1)
    beside = beside.reshape(-1, width * out)
    padded = jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))

    def at(i):
        seen = padded[:, i : i + stride * (rows - 1) + 1 : stride]
        found = jnp.matmul(
            seen.reshape(-1, channels).T, beside, preferred_element_type=kind
        )
        return found.reshape(channels, width, out).swapaxes(0, 1)

    return jnp.stack([at(i) for i in range(height)]).astype(kernel.dtype)


def _layout(numbers, lhs, rhs):
    return lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
