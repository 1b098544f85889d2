r"""Quantisation of vectors: ratings of codes, and gradients past a hard choice.

Shapes: B vectors of D features, a codebook C of K codes. Ratings, softmax and norms are
in float32 at least. Codes of equal rating: the first.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

EPS = 1e-12
LEAST_COUNT = 1e-6
HIGHEST = lax.Precision.HIGHEST


class Choice(NamedTuple):
    """What one level of a quantiser gives.

    Attributes:
      value: (B, D), what it takes off the vectors.
      code: (B,) int32.
      weights: (B, K) of the codes; one-hot where the choice is hard.
    """

    value: Float[Array, "B D"]
    code: Int[Array, " B"]
    weights: Float[Array, "B K"]


class EMA(NamedTuple):
    """Moving statistics of a codebook's clusters.

    Attributes:
      counts: (K,) vectors of a code.
      sums: (K, D) of them.
    """

    counts: Float[Array, "*L K"]
    sums: Float[Array, "*L K D"]


def project(
    r: Float[Array, " D"], x: Float[Array, "B D"]
) -> tuple[Float[Array, " B"], Float[Array, "B D"]]:
    r"""The component along a reference vector, and what is left (R3-VAE).

    $$ \alpha = x^\top r / \|r\|^2, \quad e^0 = x - \alpha r $$

    Both do not depend on the length of r.

    Returns:
      alpha (B), e^0 (B, D), which is orthogonal to r.
    """
    alpha = jnp.matmul(x, r, precision=HIGHEST) / (jnp.square(r).sum() + EPS)
    return alpha, x - alpha[:, None] * r[None]


def rate(
    e: Float[Array, "B D"], codes: Float[Array, "K D"], tau: float = 1.0
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    r"""Ratings of codes by their cosine, and their softmax (R3-VAE).

    $$ s_k = \cos(e, c_k), \quad w = \mathrm{softmax}(s / \tau) $$

    Raises:
      ValueError: ``tau`` not above 0.
    """
    if not tau > 0:
        raise ValueError(f"ratings need tau > 0, got {tau}")
    s = jnp.matmul(unit(e), unit(codes).T, precision=HIGHEST)
    return s, jax.nn.softmax(s / tau, -1)


def rated(
    e: Float[Array, "B D"], codes: Float[Array, "K D"], mode: str, tau: float = 1.0
) -> Choice:
    r"""One level of R3-VAE's quantiser.

    ``soft``: the mean of the codes by their weights, $\hat e = \sum_k w_k c_k$.
    ``top1``: the best unit code times its rating, $s_{k^*} u_{k^*}$.
    ``mp``: matching pursuit, $\langle e, u_{k^*} \rangle u_{k^*}$, after which
    $\|e - \hat e\|^2 = \|e\|^2 (1 - s_{k^*}^2)$.

    Args:
      e: vectors.
      codes: codebook.
      mode: of the three.
      tau: of the softmax; ``top1`` and ``mp`` weigh their one code by 1.

    Raises:
      ValueError: an unknown mode, ``tau`` not above 0.
    """
    s, weights = rate(e, codes, tau)
    code = jnp.argmax(s, -1).astype(jnp.int32)
    if mode == "soft":
        return Choice(jnp.matmul(weights, codes, precision=HIGHEST), code, weights)
    if mode not in ("top1", "mp"):
        raise ValueError(f"mode must be soft, top1 or mp, got {mode!r}")
    direction = unit(codes)[code]
    if mode == "top1":
        size = jnp.take_along_axis(s, code[:, None], 1)[:, 0]
    else:
        size = (e * direction).sum(-1)
    chosen = jax.nn.one_hot(code, len(codes), dtype=e.dtype)
    return Choice(size[:, None] * direction, code, chosen)


def top_weight_bound(codes: int, tau: float = 1.0) -> float:
    r"""The largest weight that ``rate`` can give: $e^{2/\tau} / (e^{2/\tau} + K - 1)$.

    Cosines lie in [-1, 1]: with tau = 1 and 256 codes no weight exceeds 0.028.

    Example:
      >>> round(top_weight_bound(64), 3), round(top_weight_bound(256), 4)
      (0.105, 0.0282)
    """
    return 1 / (1 + (codes - 1) * math.exp(-2 / tau))


def nearest(
    e: Float[Array, "B D"], codes: Float[Array, "K D"]
) -> tuple[Int[Array, " B"], Float[Array, "B K"]]:
    """The nearest code of each vector, and squared distances to all."""
    squares = jnp.square(e).sum(-1)[:, None] + jnp.square(codes).sum(-1)[None]
    distance = squares - 2 * jnp.matmul(e, codes.T, precision=HIGHEST)
    return jnp.argmin(distance, -1).astype(jnp.int32), distance


def straight_through(
    e: Float[Array, "*B D"], q: Float[Array, "*B D"]
) -> Float[Array, "*B D"]:
    """q, with the gradient of e: the straight-through estimator."""
    return e + lax.stop_gradient(q - e)


def rotate(e: Float[Array, "B D"], q: Float[Array, "B D"]) -> Float[Array, "B D"]:
    r"""q, with the gradient of the rotation that takes e to q (Fifty et al. 2024).

    With unit vectors $\hat e, \hat q$ and $v = (\hat e + \hat q) / \|\hat e + \hat q\|$:

    $$ q = \lambda R e, \quad R = I - 2 v v^\top + 2 \hat q \hat e^\top, \quad
       \lambda = \|q\| / \|e\| $$

    R and lambda are constants to the gradient. Where e and q are opposite no rotation is
    singled out; v is 0 then, and R the reflection that takes e to q.
    """
    a, b = lax.stop_gradient(unit(e)), lax.stop_gradient(unit(q))
    v = unit(a + b)
    scale = lax.stop_gradient(_norm(q) / jnp.maximum(_norm(e), EPS))
    along = (e * v).sum(-1, keepdims=True)
    turned = e - 2 * v * along + 2 * b * (e * a).sum(-1, keepdims=True)
    rotated = scale * turned
    # Exactly q: the products above round.
    return rotated + lax.stop_gradient(q - rotated)


def gumbel(
    key: Key[Array, ""] | None,
    logits: Float[Array, "B K"],
    tau: float,
) -> Float[Array, "B K"]:
    """Weights of a relaxed draw of a code (Jang et al. 2017).

    Args:
      key: of the noise; None: no noise.
      logits: of the codes.
      tau: temperature, above 0.
    """
    noise = 0 if key is None else jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.nn.softmax((logits + noise) / tau, -1)


def ema_start(codes: Float[Array, "*L K D"]) -> EMA:
    """Statistics of which ``ema_codes`` gives these codes."""
    return EMA(jnp.ones(codes.shape[:-1], codes.dtype), codes)


def ema_codes(ema: EMA) -> Float[Array, "*L K D"]:
    """The mean of each cluster; codes that are never chosen stay."""
    return ema.sums / ema.counts[..., None]


def ema_update(
    ema: EMA, e: Float[Array, "B D"], code: Int[Array, " B"], decay: float
) -> EMA:
    r"""Statistics after a batch (van den Oord et al. 2017, appendix).

    $$ n \leftarrow \gamma n + (1-\gamma) n_{batch}, \quad
       m \leftarrow \gamma m + (1-\gamma) \sum e $$

    Counts that come down to ``LEAST_COUNT`` decay no further, nor do their sums: their
    ratio, the code, would be lost to rounding.
    """
    member = jax.nn.one_hot(code, len(ema.counts), dtype=e.dtype)
    sums = jnp.matmul(member.T, e, precision=HIGHEST)
    counts = decay * ema.counts + (1 - decay) * member.sum(0)
    stay = counts < LEAST_COUNT
    return EMA(
        jnp.where(stay, ema.counts, counts),
        jnp.where(stay[:, None], ema.sums, decay * ema.sums + (1 - decay) * sums),
    )


def fsq(
    z: Float[Array, "B D"], levels: Sequence[int]
) -> tuple[Float[Array, "B D"], Int[Array, " B"]]:
    """Finite scalar quantisation (Mentzer et al. 2023): each feature to few values.

    Args:
      z: unbounded features, one for each entry of ``levels``.
      levels: number of values of each feature, at least 2.

    Returns:
      Values in [-1, 1] with the gradient of the bounded features, and their index in
      mixed radix, the first feature the fastest.

    Raises:
      ValueError: levels below 2, or not one for each feature.
    """
    if len(levels) != z.shape[-1] or min(levels) < 2:
        raise ValueError(
            f"fsq needs a level >= 2 for each of {z.shape[-1]} features, got {levels}"
        )
    size = jnp.asarray(levels, z.dtype)[None]
    # tanh to (0, size - 1), so that rounding reaches each value.
    bounded = (jnp.tanh(z) + 1) / 2 * (size - 1)
    whole = straight_through(bounded, jnp.round(bounded))
    radix = [math.prod(levels[:i]) for i in range(len(levels))]
    digits = lax.stop_gradient(jnp.round(bounded)).astype(jnp.int32)
    index = (digits * jnp.asarray(radix, jnp.int32)[None]).sum(-1)
    return 2 * whole / (size - 1) - 1, index


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Vectors of length 1; shorter ones than ``EPS`` become 0, with gradient zero."""
    square = jnp.square(x).sum(-1, keepdims=True)
    some = square > EPS**2
    return jnp.where(some, x * lax.rsqrt(jnp.where(some, square, 1)), 0)


def _norm(x):
    return jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
