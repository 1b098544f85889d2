"""Perceptrons that predict noise from a state and its time, for points and small images.

``MLPDenoiser`` is told time as sinusoids, and optionally a word. ``StepMLP`` has learned
vectors for each of a fixed number of steps instead, as the toy denoiser and the value
nets of SFT-PG (Fan and Lee, arXiv 2301.13362) have; it serves as either.
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
# maps into and out of it, the map of time and word, the table of words.
RULES = (
    (r"block_\d+/(first|scale|shift)/kernel$", P(None, "model")),
    (r"block_\d+/(first|scale|shift)/bias$", P("model")),
    (r"block_\d+/second/kernel$", P("model", None)),
)
# Not glorot_normal, which is cut at two standard deviations.
XAVIER = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")


def time_embedding(
    time: Real[Array, " B"], width: int, longest: float = 10_000.0
) -> Float[Array, "B width"]:
    r"""Sinusoids of time: width / 2 sines, then as many cosines, in float32.

    The angles are $t\,L^{-i/(w/2-1)}$, i = 0 .. w/2-1, from t to t / L, as in DDPM.

    Args:
      time: in steps, whole or not; bfloat16 does not tell large ones apart.
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


def word_embedding(
    table: Float[Array, "N W"], word: Int[Array, " B"] | Int[Array, "B L"]
) -> Float[Array, "B W"]:
    """Rows of words, or the mean row of the words of each caption.

    In captions 0 is padding and does not count; one of padding alone reads row 0, which
    therefore is the natural null word.

    Args:
      table: one row per word.
      word: a word each, or captions of L tokens, padded with 0.

    Raises:
      ValueError: a word outside 0 .. N-1. Under ``jax.jit``, where values are not known,
        it reads the nearest row instead.

    Example:
      >>> table = jnp.array([[0.0], [1.0], [5.0]])
      >>> word_embedding(table, jnp.array([2, 0])).tolist()
      [[5.0], [0.0]]
      >>> word_embedding(table, jnp.array([[1, 2, 0], [0, 0, 0]])).tolist()
      [[3.0], [0.0]]
    """
    rows = _rows(table, word, "word")
    if word.ndim == 1:
        return rows
    counts = word != 0
    empty = ~counts.any(-1, keepdims=True)
    first = (jnp.arange(word.shape[1]) == 0)[None, :]
    weight = (counts | (empty & first)).astype(rows.dtype)
    weight = weight / weight.sum(-1, keepdims=True)
    return (rows * weight[..., None]).sum(1)


def check_word(words: int, word: Any) -> None:
    """Raises ValueError where a net with ``words`` rows needs a word or takes none."""
    if words and word is None:
        raise ValueError(
            f"a net with words={words} needs a word for every row; use the null word's "
            "row for none"
        )
    if not words and word is not None:
        raise ValueError("a net with words=0 takes no word; build it with words > 0")


class FilmBlock(nn.Module):
    """y = second(swish(first(norm(x)) * (1 + scale(c)) + shift(c))), before the skip."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B W"], condition: Float[Array, "B C"]
    ) -> Float[Array, "B W"]:
        """What a block adds to x."""
        dense = functools.partial(nn.Dense, self.width, dtype=self.dtype)
        kind = jnp.promote_types(self.dtype, jnp.float32)
        y = nn.LayerNorm(use_bias=False, use_scale=False, dtype=kind, name="norm")(x)
        y = dense(name="first")(y) * (1 + dense(name="scale")(condition))
        y = nn.silu(y + dense(name="shift")(condition))
        return dense(name="second")(y)


class MLPDenoiser(nn.Module):
    """Residual perceptron whose blocks time and word scale and shift (FiLM).

    The last layer starts at zero: the first prediction is 0, the mean of the noise, so
    that the loss starts at 1 per coordinate and guidance starts as the identity. The
    other layers get a gradient from the second step on.

    Attributes:
      width: of the stream and of the blocks.
      blocks: number of blocks, >= 1.
      time_width: of ``time_embedding``.
      words: rows of the word table, the null word's included; 0: no words.
      word_width: of a word's row.
      dtype: of the products, e.g. bfloat16; parameters, norms and the output are float32.
    """

    width: int = 192
    blocks: int = 3
    time_width: int = 64
    words: int = 0
    word_width: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, " B *X"],
        time: Real[Array, " B"],
        word: Int[Array, " B"] | Int[Array, "B L"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, " B *X"]:
        """The noise in x.

        Args:
          x: states; their axes are flattened.
          time: see ``time_embedding``.
          word: see ``word_embedding``; None for a net without words.
          train: changes nothing here (there is no dropout); every net takes it.

        Raises:
          ValueError: no blocks; a word missing, or given to a net without words.
        """
        check_word(self.words, word)
        if min(self.width, self.blocks) < 1 or self.words < 0:
            raise ValueError(
                "MLPDenoiser needs width, blocks >= 1 and words >= 0, got "
                f"{self.width}, {self.blocks} and {self.words}"
            )
        given = [time_embedding(time, self.time_width)]
        if word is not None:
            shape = (self.words, self.word_width)
            table = self.param("word_table", nn.initializers.normal(1.0), shape)
            given.append(word_embedding(table, word))
        dense = functools.partial(nn.Dense, self.width, dtype=self.dtype)
        condition = nn.silu(dense(name="condition")(jnp.concatenate(given, -1)))
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
    r"""log(1 + exp(x)) to the last digits of float32 and float64, also far below 0.

    $\max(x, 0) + 2\,\mathrm{artanh}(e / (2 + e))$ with $e = \exp(-|x|)$, by the power
    series of artanh in at most 1/3: on a CPU a third of the time of
    ``jax.nn.softplus``, whose log1p was half of a rollout of ``StepMLP``, and a fifth for
    its derivative, the sigmoid.

    Example:
      >>> [f"{y:.4g}" for y in softplus(jnp.array([-80.0, 0.0, 3.0])).tolist()]
      ['1.805e-35', '0.6931', '3.049']
    """
    e = jnp.exp(-jnp.abs(x))
    s = e / (2 + e)
    # The first term left out is 2 s^(2n + 1) / (2n + 1): below half a unit of the last.
    terms = 17 if x.dtype == jnp.float64 else 7
    series = jnp.zeros_like(x)
    for i in reversed(range(terms)):
        series = series * (s * s) + 1 / (2 * i + 1)
    return jnp.maximum(x, 0) + 2 * s * series


softplus.defjvps(lambda tangent, _, x: tangent * jax.nn.sigmoid(x))

ACTIVATIONS = {"softplus": softplus, "relu": nn.relu}


class StepDense(nn.Module):
    """E[k] * (x W + b) with a row E[k] for each step; steps=0: x W + b.

    W is drawn Xavier-normal, E uniformly from [0, 1), b from +-1/sqrt(fan in), which is
    what PyTorch's linear layer leaves there in the reference.
    """

    features: int
    steps: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B I"], step: Int[Array, " B"]
    ) -> Float[Array, "B O"]:
        """Rows x, each at its step."""

        def between(key, shape):
            bound = x.shape[-1] ** -0.5
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        kernel_shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", XAVIER, kernel_shape)
        bias = self.param("bias", between, (self.features,))
        y = x @ kernel + bias[None, :]
        if not self.steps:
            return y
        scale_shape = (self.steps, self.features)
        scale = self.param("scale", nn.initializers.uniform(1.0), scale_shape)
        return _rows(scale, step, "step") * y


class StepMLP(nn.Module):
    """Perceptron whose layers are multiplied by learned vectors of the step.

    With softplus and outputs=2 the toy denoiser of SFT-PG, whose last layer alone starts
    otherwise there (PyTorch's default); with ReLU and outputs=1 its value nets, or with a
    caption as context DPOK's. Parameters are ``layer_i`` of kernel (in, out), bias (out,)
    and scale (steps, out).

    Attributes:
      widths: of the hidden layers.
      outputs: width of the output.
      steps: number of steps.
      activation: of ``ACTIVATIONS``.
      scale_output: multiply the last layer too; else it is a plain one.
      residual: add x to the output, which then has x's width.
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
          step: in 0 .. steps-1; out of range it raises, but under ``jax.jit``, where
            values are not known, it reads the nearest.
          context: appended to x.
          train: changes nothing here; every net takes it.

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
    """Rows of a table; an index out of range raises where its value is known."""
    if not isinstance(index, jax.core.Tracer) and index.size:
        known = np.asarray(index)  # JAX's own min would be traced under jit.
        low, high = known.min(), known.max()
        if low < 0 or high >= len(table):
            raise ValueError(
                f"{name} must be in 0 .. {len(table) - 1}, got {low} to {high}"
            )
    return jnp.take(table, index, axis=0, mode="clip")
