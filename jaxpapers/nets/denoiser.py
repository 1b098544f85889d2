"""Perceptrons that predict noise from a state and its time, for points and small images.

``MLPDenoiser`` embeds time as sinusoids and is optionally conditioned on tokens.
``StepMLP`` learns a scale vector for each of a fixed number of steps, as the toy denoiser
and the value nets of SFT-PG (Fan and Lee, arXiv 2301.13362) do.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Real

# Of MLPDenoiser: outputs of a block's first map and its FiLM, inputs of its second, so
# that one sum per block crosses devices. Replicated: the stream between blocks with the
# maps into and out of it, the map of time and tokens, the token table.
RULES = (
    (r"block_\d+/(first|scale|shift)/kernel$", P(None, "model")),
    (r"block_\d+/(first|scale|shift)/bias$", P("model")),
    (r"block_\d+/second/kernel$", P("model", None)),
)
# Not glorot_normal, which is truncated at two standard deviations.
XAVIER = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")


def time_embedding(
    time: Real[Array, " B"], width: int, longest: float = 10_000.0
) -> Float[Array, "B width"]:
    r"""Sinusoids of time: width / 2 sines, then as many cosines, in float32.

    The angles are $t\,L^{-i/(w/2-1)}$, i = 0 .. w/2-1, from t to t / L, as in DDPM.

    Args:
      time: in steps, whole or not; bfloat16 does not resolve large ones.
      width: w, even and at least 4.
      longest: L, steps per radian of the slowest sinusoid.

    Raises:
      ValueError: width odd or below 4, or longest not above 1.

    Example:
      >>> time_embedding(jnp.array([0.0, 2.5]), 4).round(3).tolist()[0]
      [0.0, 0.0, 1.0, 1.0]

    Reference: Ho et al., arXiv 2006.11239, appendix B.
    """
    if width < 4 or width % 2 or not longest > 1:
        raise ValueError(
            "time_embedding needs an even width >= 4 and longest > 1, got "
            f"width={width} and longest={longest}"
        )
    half = width // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - 1)
    frequencies = jnp.exp(-math.log(longest) * exponents)
    angles = time.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def token_embedding(
    table: Float[Array, "N W"], tokens: Int[Array, " B"] | Int[Array, "B L"]
) -> Float[Array, "B W"]:
    """Embeddings of single tokens, or mean embeddings of token sequences.

    In sequences 0 is padding and is not averaged; a sequence of padding alone gives
    row 0, the embedding of the null token.

    Args:
      table: one row per token.
      tokens: one for each row, or L of them, padded with 0.

    Raises:
      ValueError: a token outside 0 .. N-1. Under ``jax.jit``, where values are not
        known, it is clipped to that range.

    Example:
      >>> table = jnp.array([[0.0], [1.0], [5.0]])
      >>> jax.jit(token_embedding)(table, jnp.array([2, 0])).tolist()
      [[5.0], [0.0]]
      >>> jax.jit(token_embedding)(table, jnp.array([[1, 2, 0], [0, 0, 0]])).tolist()
      [[3.0], [0.0]]
    """
    rows = _rows(table, tokens, "tokens")
    if tokens.ndim == 1:
        return rows
    present = tokens != 0
    empty = ~present.any(-1, keepdims=True)
    first = (jnp.arange(tokens.shape[1]) == 0)[None, :]
    weight = (present | (empty & first)).astype(rows.dtype)
    weight = weight / weight.sum(-1, keepdims=True)
    return (rows * weight[..., None]).sum(1)


def check_tokens(vocab: int, tokens: Any) -> None:
    """Checks that tokens are given to conditional nets and to no others.

    Raises:
      ValueError: tokens that are missing, or given to an unconditional net.
    """
    if vocab and tokens is None:
        raise ValueError(
            f"a net with vocab={vocab} needs tokens for every row; use the null token 0 "
            "for none"
        )
    if not vocab and tokens is not None:
        raise ValueError("a net with vocab=0 takes no tokens; build it with vocab > 0")


class FilmBlock(nn.Module):
    """y = second(swish(first(norm(x)) * (1 + scale(c)) + shift(c))), before the skip."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B W"], condition: Float[Array, "B C"]
    ) -> Float[Array, "B W"]:
        """The residual of a block."""
        dense = functools.partial(nn.Dense, self.width, dtype=self.dtype)
        kind = jnp.promote_types(self.dtype, jnp.float32)
        y = nn.LayerNorm(use_bias=False, use_scale=False, dtype=kind, name="norm")(x)
        y = dense(name="first")(y) * (1 + dense(name="scale")(condition))
        y = nn.silu(y + dense(name="shift")(condition))
        return dense(name="second")(y)


class MLPDenoiser(nn.Module):
    """Residual perceptron with FiLM conditioning on time and tokens.

    The last layer is initialised to zero: the first prediction is 0, the mean of the
    noise, and the loss starts at 1 per coordinate. The other layers have gradients from
    the second step on.

    Attributes:
      width: of the stream and of the blocks.
      blocks: number of blocks, >= 1.
      time_width: of ``time_embedding``.
      vocab: conditioning tokens, the null token included; 0: unconditional.
      token_width: of a token's embedding.
      dtype: of the products, e.g. bfloat16; parameters, norms and the output are float32.
    """

    width: int = 192
    blocks: int = 3
    time_width: int = 64
    vocab: int = 0
    token_width: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, " B *X"],
        time: Real[Array, " B"],
        tokens: Int[Array, " B"] | Int[Array, "B L"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, " B *X"]:
        """The noise in x.

        Args:
          x: states; their axes are flattened.
          time: see ``time_embedding``.
          tokens: see ``token_embedding``; None for an unconditional net.
          train: unused, there is no dropout.

        Raises:
          ValueError: no blocks; see ``check_tokens``.
        """
        check_tokens(self.vocab, tokens)
        if min(self.width, self.blocks) < 1 or self.vocab < 0:
            raise ValueError(
                "MLPDenoiser needs width, blocks >= 1 and vocab >= 0, got "
                f"{self.width}, {self.blocks} and {self.vocab}"
            )
        embedded = [time_embedding(time, self.time_width)]
        if tokens is not None:
            shape = (self.vocab, self.token_width)
            table = self.param("token_table", nn.initializers.normal(1.0), shape)
            embedded.append(token_embedding(table, tokens))
        dense = functools.partial(nn.Dense, self.width, dtype=self.dtype)
        condition = nn.silu(dense(name="condition")(jnp.concatenate(embedded, -1)))
        rows = x.reshape(len(x), -1)
        h = dense(name="inputs")(rows)
        for i in range(self.blocks):
            h = h + FilmBlock(self.width, self.dtype, name=f"block_{i}")(h, condition)
        kind = jnp.promote_types(self.dtype, jnp.float32)
        last = nn.Dense(
            rows.shape[-1],
            dtype=kind,
            kernel_init=nn.initializers.zeros,
            name="outputs",
        )
        return last(h).reshape(x.shape)


@jax.custom_jvp
def softplus(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""log(1 + exp(x)), accurate to rounding in float32 and float64, also far below 0.

    $\max(x, 0) + 2\,\mathrm{artanh}(e / (2 + e))$ with $e = \exp(-|x|)$, by the power
    series of artanh. On a CPU it takes a third of the time of ``jax.nn.softplus``, whose
    log1p was half of a rollout of ``StepMLP``, and its derivative a fifth.

    Example:
      >>> y = jax.jit(softplus)(jnp.array([-80.0, 0.0, 3.0]))
      >>> [f"{v:.4g}" for v in y.tolist()]
      ['1.805e-35', '0.6931', '3.049']
    """
    e = jnp.exp(-jnp.abs(x))
    s = e / (2 + e)
    # The first omitted term, 2 s^(2n + 1) / (2n + 1), is below half an ulp.
    terms = 17 if x.dtype == jnp.float64 else 7
    series = jnp.zeros_like(x)
    for i in reversed(range(terms)):
        series = series * (s * s) + 1 / (2 * i + 1)
    return jnp.maximum(x, 0) + 2 * s * series


softplus.defjvps(lambda tangent, _, x: tangent * jax.nn.sigmoid(x))

ACTIVATIONS = {"softplus": softplus, "relu": nn.relu}


class StepDense(nn.Module):
    """E[k] * (x W + b) with a row E[k] for each step; steps=0: x W + b.

    W is Xavier-normal, E uniform on [0, 1), b uniform on +-1/sqrt(fan in), PyTorch's
    default, as in the reference.
    """

    features: int
    steps: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B I"], step: Int[Array, " B"]
    ) -> Float[Array, "B O"]:
        """Outputs of rows x at their steps."""

        def uniform(key, shape):
            bound = x.shape[-1] ** -0.5
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        kernel_shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", XAVIER, kernel_shape)
        bias = self.param("bias", uniform, (self.features,))
        y = x @ kernel + bias[None, :]
        if not self.steps:
            return y
        scale_shape = (self.steps, self.features)
        scale = self.param("scale", nn.initializers.uniform(1.0), scale_shape)
        return _rows(scale, step, "step") * y


class StepMLP(nn.Module):
    """Perceptron whose layers are scaled by learned vectors of the step.

    With softplus and outputs=2 it is the toy denoiser of SFT-PG, but for the last
    layer's initialisation (PyTorch's default there); with ReLU and outputs=1 the value
    net of SFT-PG, and with token counts as context that of DPOK. Parameters are
    ``layer_i`` of kernel (in, out), bias (out,) and scale (steps, out).

    Attributes:
      widths: of the hidden layers.
      outputs: width of the output.
      steps: number of steps.
      activation: of ``ACTIVATIONS``.
      scale_output: whether the last layer is scaled too.
      residual: whether x is added to the output, which then has x's width.
    """

    widths: tuple[int, ...] = (128, 128, 128)
    outputs: int = 2
    steps: int = 10
    activation: str = "softplus"
    scale_output: bool = False
    residual: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, " B *X"],
        step: Int[Array, " B"],
        context: Float[Array, "B C"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B outputs"]:
        """The output at each row's step.

        Args:
          x: states; their axes are flattened.
          step: in 0 .. steps-1. Under ``jax.jit``, where values are not known, it is
            clipped to that range.
          context: appended to x.
          train: unused, there is no dropout.

        Raises:
          ValueError: unknown activation, sizes below 1, a step out of range, or a
            residual net whose output is not as wide as x.
        """
        rows = x.reshape(len(x), -1).astype(jnp.promote_types(x.dtype, jnp.float32))
        self._check(rows.shape[-1])
        h = rows if context is None else jnp.concatenate([rows, context], -1)
        sizes = (*self.widths, self.outputs)
        for i, width in enumerate(sizes):
            last = i == len(sizes) - 1
            steps = 0 if last and not self.scale_output else self.steps
            h = StepDense(width, steps, name=f"layer_{i}")(h, step)
            h = h if last else ACTIVATIONS[self.activation](h)
        return h + rows if self.residual else h

    def _check(self, width: int) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {tuple(ACTIVATIONS)}, got "
                f"{self.activation!r}"
            )
        if min(*self.widths, self.outputs, self.steps) < 1:
            raise ValueError(
                "StepMLP needs widths, outputs and steps >= 1, got "
                f"{self.widths}, {self.outputs} and {self.steps}"
            )
        if self.residual and width != self.outputs:
            raise ValueError(
                "residual adds x to the output, which must be as wide: got "
                f"outputs={self.outputs} and x of width {width}"
            )


def _rows(table: jax.Array, index: jax.Array, name: str) -> jax.Array:
    """Rows of a table; an index out of range raises if its value is known."""
    if not isinstance(index, jax.core.Tracer) and index.size:
        known = np.asarray(index)  # jnp.min would be traced under jit.
        low, high = known.min(), known.max()
        if low < 0 or high >= len(table):
            raise ValueError(
                f"{name} must be in 0 .. {len(table) - 1}, got {low} to {high}"
            )
    return jnp.take(table, index, axis=0, mode="clip")
