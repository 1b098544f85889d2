"""One-sided Lipschitz constants of a score: lower estimates and an upper bound."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

MODES = ("jacobian", "power", "pairs")


@dataclasses.dataclass(frozen=True)
class Lipschitz:
    """Constants L_s(t), and whether they are lower or upper values.

    Attributes:
      value: (K,).
      side: "lower": the supremum over given points; "upper": a certified bound.
    """

    value: Any
    side: str


jax.tree_util.register_dataclass(Lipschitz, ["value"], ["side"])


def one_sided_lipschitz(
    score_fn: Callable,
    points: Float[Array, "N d"],
    t: Float[Array, " K"],
    mode: str = "jacobian",
    *,
    chunk: int = 256,
    iterations: int = 100,
) -> Lipschitz:
    r"""The largest $(s(x)-s(y)) \cdot (x-y) / |x-y|^2$ at given points: a lower value.

    Args:
      score_fn: (x (B, d), t (B,)) -> (B, d).
      points: where the supremum is taken.
      t: times.
      mode: "jacobian": largest eigenvalue of the symmetric part of the Jacobian at each
        point, d forward derivatives of the score; "power": the same by power iteration,
        for large d, at most that; "pairs": the quotient itself over all pairs, as the
        released code has it. Pairs of equal points are left out; those of close points
        have the rounding error of the score divided by their distance.
      chunk: points, or rows of the table of pairs, that are computed at a time.
      iterations: of "power".

    Returns:
      ``Lipschitz`` with side "lower".

    Raises:
      ValueError: unknown mode; too few points.

    Example:
      >>> def score(x, t):
      ...     return -x * jnp.array([[2.0, 3.0]])
      >>> one_sided_lipschitz(score, jnp.eye(2), jnp.ones(1)).value
      Array([-2.], dtype=float32)
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if len(points) < 1 + (mode == "pairs") or chunk < 1 or iterations < 1:
        raise ValueError(
            f"mode {mode!r} needs {1 + (mode == 'pairs')} points, chunk and iterations "
            f">= 1, got {len(points)}, {chunk} and {iterations}"
        )

    def largest(time):
        if mode == "pairs":
            return _over_pairs(score_fn, points, time, chunk)

        def single(x):
            return score_fn(x[None], time[None])[0]

        def at(x):
            if mode == "jacobian":
                return largest_eigenvalue(jax.jacfwd(single)(x))
            return _by_power(single, x, iterations)

        return lax.map(at, points, batch_size=min(chunk, len(points))).max()

    return Lipschitz(lax.map(largest, t), "lower")


def one_sided_lipschitz_upper(
    layers: Any, std: Float[Array, " K"], slope: float = 1.0
) -> Lipschitz:
    r"""$\prod_l \|W_l\|_2 \cdot a^{L-1} / \sigma_k$, a loose upper bound.

    For the score -eps / std of a net of L linear maps with activations between them.

    Args:
      layers: matrices (K, fan_in, fan_out), or (fan_in, fan_out) if constant in time.
      std: of x_t given x_0.
      slope: largest slope a of the activation: 1 for ReLU, softplus, tanh.

    Returns:
      ``Lipschitz`` with side "upper".

    Raises:
      ValueError: no layers, or a slope that is not positive.
    """
    if not layers or not slope > 0:
        raise ValueError(f"needs layers and slope > 0, got {len(layers)} and {slope}")
    norms = [jnp.linalg.svd(w, compute_uv=False)[..., 0] for w in layers]
    product = jnp.ones_like(std)
    for norm in norms:
        product = product * jnp.broadcast_to(norm, std.shape)
    return Lipschitz(product * slope ** (len(layers) - 1) / std, "upper")


def largest_eigenvalue(matrix: Float[Array, "d d"]) -> Float[Array, ""]:
    """Largest eigenvalue of the symmetric part."""
    half = 0.5 * (matrix + matrix.T)
    if len(half) == 1:
        return half[0, 0]
    if len(half) == 2:  # LAPACK is slow on batches of small matrices.
        centre = 0.5 * (half[0, 0] + half[1, 1])
        return centre + jnp.hypot(0.5 * (half[0, 0] - half[1, 1]), half[0, 1])
    return jnp.linalg.eigvalsh(half)[-1]


def _over_pairs(score_fn, points, time, chunk):
    scores = score_fn(points, jnp.broadcast_to(time, points.shape[:1]))

    def row(x_and_s):
        x, s = x_and_s
        apart, differ = x[None] - points, s[None] - scores
        square = jnp.square(apart).sum(1)
        same = square == 0
        quotient = (apart * differ).sum(1) / jnp.where(same, 1.0, square)
        return jnp.where(same, -jnp.inf, quotient).max()

    return lax.map(row, (points, scores), batch_size=min(chunk, len(points))).max()


def _by_power(single, x, iterations):
    """Largest eigenvalue of the Jacobian's symmetric part, from below.

    A first power iteration estimates the spectral radius; the second is shifted by it,
    so that the largest eigenvalue is also largest in modulus.
    """
    _, forward = jax.linearize(single, x)
    backward = jax.linear_transpose(forward, x)

    def apply(v):
        return 0.5 * (forward(v) + backward(v)[0])

    def iterate(shift):
        def body(_, v):
            w = apply(v) + shift * v
            norm = jnp.linalg.norm(w)
            return jnp.where(norm > 0, w / jnp.where(norm > 0, norm, 1.0), v)

        start = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
        return lax.fori_loop(0, iterations, body, start / jnp.linalg.norm(start))

    size = jnp.linalg.norm(apply(iterate(0.0)))
    top = iterate(size)
    return top @ apply(top)
