r"""Gated recurrent layers over time, plain and with attention in the update gate.

One scan serves all variants. The products with the inputs are computed for all steps at
once, so that a step is one product with the state. Gate columns are in the order reset,
update, candidate; u is the gate that *writes* (DIEN, arXiv 1809.03672, eq 2-5):

$$ r = \sigma(W^r x + U^r h), \quad u = \sigma(W^u x + U^u h), \quad
   c = \tanh(W^h x + r \odot (U^h h)), \quad h \leftarrow h + w \odot (c - h) $$

With a the attention of the step, the variants have the write strength w = u in ``gru``
and ``aigru`` (which scales x by a, eq 9), w = a in ``agru`` (eq 10) and w = a u in
``augru`` (eq 11-12). ``augru_released`` is the cell of the authors' code, where u keeps
the state, w = 1 - (1 - a) u, and the reset gate multiplies h before its product.

The backward pass is a custom one, which computes the gradient of U as one product over
all steps after its scan: summed step by step, it would need a collective in every step
when the batch is split over devices. Only ``augru_released`` has forward-mode
derivatives.

Parameters: ``input`` and ``hidden``, each of kernel (I or H, 3 H) and bias (3 H).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from jaxpapers.nets.mlp import channels, matmul

VARIANTS = ("gru", "aigru", "agru", "augru", "augru_released")


def init(
    key: Key[Array, ""],
    inputs: int,
    hidden: int,
    *,
    reset_bias: float = 1.0,
    update_bias: float = -1.0,
) -> dict:
    """Glorot-uniform kernels as TensorFlow 1 draws them: over inputs and state together.

    Args:
      key: of the kernels.
      inputs: I.
      hidden: H.
      reset_bias: of the reset gate.
      update_bias: of the update gate; -1 corresponds to the released code's 1 of a gate
        that keeps the state.

    Raises:
      ValueError: a size below 1.
    """
    if inputs < 1 or hidden < 1:
        raise ValueError(f"gru.init needs sizes >= 1, got {inputs} and {hidden}")
    key_gates, key_candidate = jax.random.split(key)
    glorot = jax.nn.initializers.glorot_uniform()
    gates = glorot(key_gates, (inputs + hidden, 2 * hidden))
    candidate = glorot(key_candidate, (inputs + hidden, hidden))
    kernel = jnp.concatenate([gates, candidate], 1)
    bias = jnp.repeat(jnp.array([reset_bias, update_bias, 0.0]), hidden)
    return {
        "input": {"kernel": kernel[:inputs], "bias": bias},
        "hidden": {"kernel": kernel[inputs:], "bias": jnp.zeros(3 * hidden)},
    }


def gru_scan(
    params: dict,
    x: Float[Array, "*batch T I"],
    mask: Bool[Array, "*batch T"],
    h0: Float[Array, "*batch H"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "*batch T H"], Float[Array, "*batch H"]]:
    """A plain GRU: ``augru_scan`` without attention.

    Args:
      params: see ``init``.
      x: inputs.
      mask: False at steps that copy the state; their output is zero.
      h0: first state; None: zeros.
      options: ``unroll``, ``chunk``, ``dtype`` of ``augru_scan``.

    Returns:
      The states of all steps, and the last state.
    """
    return augru_scan(params, x, None, mask, "gru", h0, **options)


def augru_scan(
    params: dict,
    x: Float[Array, "*inputs T I"],
    att: Float[Array, "..."] | None,
    mask: Bool[Array, "..."],
    variant: str = "augru",
    h0: Float[Array, "*batch H"] | None = None,
    *,
    unroll: int = 1,
    chunk: int = 0,
    dtype: Any = None,
) -> tuple[Float[Array, "*batch T H"], Float[Array, "*batch H"]]:
    """A recurrent layer whose update gate attention scales.

    Args:
      params: see ``init``.
      x: inputs. Leading axes of size 1 are shared: for N candidates of one history, with
        x (B, 1, T, I) and att (B, N, T), the products with x are computed once.
      att: (.., T), attention, usually a softmax over the steps; None for "gru".
      mask: (.., T), False at steps that copy the state; their output is zero.
      variant: one of ``VARIANTS``.
      h0: first state; None: zeros.
      unroll: steps per iteration of the compiled loop; on CPUs 1 is fastest, larger
        values help where the overhead of an iteration exceeds the work of a step.
      chunk: steps between the states stored for the backward pass, which computes those
        in between again; 0: all states are stored.
      dtype: of the products with the inputs, e.g. bfloat16, accumulated in float32.

    Returns:
      The states of all steps, and the last state.

    Raises:
      ValueError: unknown variant, a variant without its attention, sizes that do not
        fit, or no steps.

    Example:
      >>> params = jax.jit(init, static_argnums=(1, 2))(jax.random.key(0), 2, 3)
      >>> x, mask = jnp.ones((1, 4, 2)), jnp.ones((1, 4), bool)
      >>> states, last = jax.jit(augru_scan)(params, x, jnp.zeros((1, 4)), mask)
      >>> last.tolist()
      [[0.0, 0.0, 0.0]]
    """
    kernel = params["hidden"]["kernel"]
    hidden = kernel.shape[0]
    _check(params, x, att, mask, variant, unroll, chunk)
    shape = jnp.broadcast_shapes(
        x.shape[:-1], mask.shape, x.shape[:-1] if att is None else att.shape
    )
    kind = jnp.result_type(kernel.dtype, jnp.float32)
    # Time first, and a last axis for the channels.
    seen = _time_first(mask, shape).astype(kind)[..., None]
    a = jnp.ones_like(seen) if att is None else _time_first(att, shape)[..., None]
    offset, scale = {
        "gru": (jnp.zeros_like(seen), seen),
        "aigru": (jnp.zeros_like(seen), seen),
        "agru": (seen * a, jnp.zeros_like(seen)),
        "augru": (jnp.zeros_like(seen), seen * a),
        "augru_released": (seen, seen * (a - 1)),
    }[variant]
    x = jnp.moveaxis(x, -2, 0)
    x = x.reshape(x.shape[:1] + (1,) * (len(shape) - x.ndim + 1) + x.shape[1:])
    a = a if variant == "aigru" else None
    if h0 is None:
        h0 = jnp.zeros((*shape[:-1], hidden), kind)
    h0 = jnp.broadcast_to(h0, (*shape[:-1], hidden)).astype(kind)
    recur = _recur_released if variant == "augru_released" else _recur

    def part(h, steps):
        x, a, offset, scale = steps
        gates, bias = _project(params, x, a, dtype)
        return recur(unroll, kernel, bias, gates, offset, scale, h)

    steps = (x, a, offset, scale)
    states = _in_chunks(part, h0, steps, chunk) if chunk else part(h0, steps)
    last = states[-1]
    states = jnp.where(seen > 0, states, 0.0)
    return jnp.moveaxis(states, 0, -2), last


def _project(params, x, a, dtype):
    """Products with the inputs plus all biases but the candidate's hidden one."""
    kernel, bias = params["input"]["kernel"], params["hidden"]["bias"]
    hidden = kernel.shape[1] // 3
    gates = matmul(x, kernel, dtype)
    if a is not None:
        gates = gates * a  # (a x) W = a (x W): the product is that of all candidates.
    reset_update, inside = jnp.split(bias, [2 * hidden])
    outside = jnp.concatenate([reset_update, jnp.zeros_like(inside)])
    return gates + channels(params["input"]["bias"] + outside, gates), inside


def _in_chunks(part, h, steps, chunk):
    """``part`` of pieces of the time axis; the backward pass computes each again."""
    count = steps[2].shape[0]
    pieces = -(-count // chunk)

    def cut(x):
        # With zero strength the added steps copy the state.
        x = jnp.pad(x, [(0, pieces * chunk - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(pieces, chunk, *x.shape[1:])

    @jax.checkpoint
    def piece(h, steps):
        states = part(h, steps)
        return states[-1], states

    _, states = lax.scan(piece, h, jax.tree.map(cut, steps))
    return states.reshape(-1, *states.shape[2:])[:count]


def _gates(kernel, bias, gates, h):
    """Update gate, candidate, reset gate, and the candidate's part that reset scales."""
    reset, update, candidate = jnp.split(gates, 3, -1)
    from_reset, from_update, from_state = jnp.split(matmul(h, kernel), 3, -1)
    reset = jax.nn.sigmoid(reset + from_reset)
    update = jax.nn.sigmoid(update + from_update)
    from_state = from_state + channels(bias, from_state)
    candidate = jnp.tanh(candidate + reset * from_state)
    return update, candidate, reset, from_state


def _scan(cell, unroll, h, steps):
    """States of all steps, and the residuals of the backward pass."""

    def body(h, step):
        gates, offset, scale = step
        update, candidate, *others = cell(gates, h)
        new = h + (offset + scale * update) * (candidate - h)
        return new, (new, (h, update, candidate, *others))

    return lax.scan(body, h, steps, unroll=min(unroll, len(steps[1])))[1]


def _recur_released(unroll, kernel, bias, gates, offset, scale, h0):
    hidden = kernel.shape[0]

    def cell(gates, h):
        outside, candidate = jnp.split(gates, [2 * hidden], -1)
        both = jax.nn.sigmoid(outside + matmul(h, kernel[:, : 2 * hidden]))
        reset, update = jnp.split(both, 2, -1)
        inner = matmul(reset * h, kernel[:, 2 * hidden :]) + channels(bias, h)
        return update, jnp.tanh(candidate + inner)

    return _scan(cell, unroll, h0, (gates, offset, scale))[0]


def _recur_forward(unroll, kernel, bias, gates, offset, scale, h0):
    def cell(gates, h):
        return _gates(kernel, bias, gates, h)

    states, steps = _scan(cell, unroll, h0, (gates, offset, scale))
    # The backward pass needs only the shape of the gates.
    shape = jnp.zeros((0, *gates.shape), gates.dtype)
    return states, (kernel, steps, offset, scale, shape)


def _recur_backward(unroll, saved, cotangents):
    kernel, steps, offset, scale, gates = saved
    before = steps[0]

    def body(carry, step):
        cotangent, (h, update, candidate, reset, from_state), offset, scale = step
        e = carry + cotangent
        strength = offset + scale * update
        to_strength = e * (candidate - h)
        to_candidate = e * strength * (1 - candidate**2)
        to_product = [
            to_candidate * from_state * reset * (1 - reset),
            to_strength * scale * update * (1 - update),
            to_candidate * reset,
        ]
        to_product = jnp.concatenate(to_product, -1)
        through = matmul(to_product, kernel.T)
        to_offset = _sum_to(to_strength, offset.shape)
        to_scale = _sum_to(to_strength * update, scale.shape)
        outputs = (to_product, to_candidate, to_offset, to_scale)
        return e * (1 - strength) + through, outputs

    to_h0, (to_product, to_candidate, to_offset, to_scale) = lax.scan(
        body,
        jnp.zeros_like(before[0]),
        (cotangents, steps, offset, scale),
        reverse=True,
        unroll=min(unroll, len(cotangents)),
    )
    outside, inside = jnp.split(to_product, [2 * kernel.shape[0]], -1)
    to_gates = jnp.concatenate([outside, to_candidate], -1)
    return (
        _rows(before).T @ _rows(to_product),
        _rows(inside).sum(0),
        _sum_to(to_gates, gates.shape[1:]),
        to_offset,
        to_scale,
        to_h0,
    )


def _recur_value(unroll, *args):
    return _recur_forward(unroll, *args)[0]


_recur = jax.custom_vjp(_recur_value, nondiff_argnums=(0,))
_recur.defvjp(_recur_forward, _recur_backward)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _sum_to(x, shape):
    """Sums the axes along which an array of this shape was broadcast."""
    axes = [i for i, (m, n) in enumerate(zip(x.shape, shape)) if m != n]
    return x.sum(axes, keepdims=True) if axes else x


def _time_first(x, shape):
    x = jnp.moveaxis(x, -1, 0)
    return x.reshape(x.shape[:1] + (1,) * (len(shape) - x.ndim) + x.shape[1:])


def _check(params, x, att, mask, variant, unroll, chunk):
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if variant != "gru" and att is None:
        raise ValueError(
            f"variant {variant!r} needs attention (.., T), got att=None; pass att, or "
            "use variant 'gru'"
        )
    inputs, columns = params["input"]["kernel"].shape
    hidden = params["hidden"]["kernel"].shape
    if x.shape[-1] != inputs or hidden != (columns // 3, columns) or columns % 3:
        raise ValueError(
            f"x has {x.shape[-1]} channels, the kernels are {(inputs, columns)} and "
            f"{hidden}; expected (channels, 3 H) and (H, 3 H)"
        )
    steps = {x.shape[-2], mask.shape[-1], mask.shape[-1] if att is None
             else att.shape[-1]}  # fmt: skip
    if len(steps) != 1 or 0 in steps:
        raise ValueError(
            f"x, att and mask must have the same number of steps, at least 1, got {steps}"
        )
    if unroll < 1 or chunk < 0:
        raise ValueError(f"unroll must be >= 1 and chunk >= 0, got {unroll}, {chunk}")
