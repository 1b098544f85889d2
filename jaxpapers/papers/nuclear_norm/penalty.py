r"""The nuclear norm of a batch of features, its gradient, and the back ends for both.

With the thin SVD $\Phi = U \mathrm{diag}(s) V^\top$ of rank r:

$$ \|\Phi\|_* = \sum_i s_i, \qquad
   \partial \|\Phi\|_* = U_r V_r^\top + Z, \quad
   U_r^\top Z = 0,\; Z V_r = 0,\; \|Z\|_2 \le 1 $$

The gradient is unique only at full rank. Here Z = 0, the element of least norm, which is
zero at $\Phi = 0$ and turns with $\Phi$; ``gradient="library"`` gives what
differentiating the singular values does, another Z, and can be differentiated again.

Back ends, k the shorter side:

- svd: exact. Singular values below ``tau`` times the largest count as zero.
- gram: eigenvalues of the k x k matrix of products, the fastest on CPUs. Squaring loses
  singular values below sqrt(eps) of the largest, and ``tau`` drops them.
- newton_schulz: products of matrices alone. While the singular values lie within a factor
  of 100, the coupled iteration on the k x k matrix; otherwise that on the features. What
  is below ``tau`` is not dropped but shrunk, the smaller the more, so the value is at
  most the true one.

In every back end finite features give a finite gradient.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxpapers.options import check_choices, check_least
from jaxpapers.papers.nuclear_norm import polar

METHODS = ("svd", "gram", "newton_schulz")
GRADIENTS = ("least_norm", "library")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """How the nuclear norm of a batch is computed."""

    method: str = "gram"
    """svd, gram or newton_schulz."""
    gradient: str = "least_norm"
    """Where the rank is deficient: least_norm, or library (svd only)."""
    tau: float = 0.0
    """Ratio to the largest singular value below which others count as zero; 0: that of
    the back end, min(B, D) eps for svd, 3 sqrt(eps) for gram, 1e3 eps for
    newton_schulz."""
    steps: int = 100
    """Most iterations of newton_schulz; ``tau`` may ask for fewer."""
    per_device: bool = False
    """Sum of the norms of the devices' rows, an upper bound that needs no features of
    other devices, instead of the norm of the global batch."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        check_choices(self, "norm", method=METHODS, gradient=GRADIENTS)
        check_least(self, "norm", tau=0, steps=1)
        if not self.tau < 1:
            raise ValueError(f"norm.tau must be < 1, got {self.tau}")
        if self.gradient == "library" and self.method != "svd":
            raise ValueError(
                f"norm.gradient=library needs norm.method=svd, got {self.method!r}"
            )


GRAM = Norm()


def nuclear_norm(
    features: Float[Array, "B D"], norm: Norm = GRAM
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Nuclear norm of a batch of features and, without gradient, its largest value.

    Under ``jax.jit`` the batch is the global one on every mesh: no axis name is needed.

    Args:
      features: of the batch; bfloat16 is computed in float32. NaN gives NaN.
      norm: back end and conventions.

    Returns:
      The sum of the singular values, and the largest one.

    Raises:
      ValueError: features that are no matrix, or an empty one.
      TypeError: complex features, or ``norm`` that is no ``Norm``.

    Example:
      >>> value, largest = jax.jit(nuclear_norm)(jnp.diag(jnp.array([3.0, 4.0])))
      >>> float(value.round(5)), float(largest.round(5))
      (7.0, 4.0)

    Reference:
      Shi, Ming, Fan, Sala and Liang, 2023, arXiv 2303.07527.
    """
    _check_matrix(features, norm)
    features = features.astype(_wide(features.dtype))
    if norm.per_device and (mesh := _rows_axis()):
        return _per_device(features, norm, mesh)
    return _nuclear_norm(features, norm)


def polar_factor(
    features: Float[Array, "B D"], norm: Norm = GRAM
) -> Float[Array, "B D"]:
    """U V^T of the singular values that count: the gradient of the nuclear norm.

    Raises:
      ValueError, TypeError: see ``nuclear_norm``.
    """
    _check_matrix(features, norm)
    return _factor(features.astype(_wide(features.dtype)), norm).polar


def smoothed_nuclear_norm(features: Float[Array, "B D"], mu: float) -> Float[Array, ""]:
    r"""$\sum_i \sqrt{s_i^2 + \mu^2} - \mu$, differentiable everywhere.

    Args:
      features: any matrix.
      mu: > 0, in the units of the singular values.
    """
    _check_matrix(features)
    if not mu > 0:
        raise ValueError(f"mu must be > 0, got {mu}")
    return _smoothed(features, mu)


def prox_nuclear(a: Float[Array, "B D"], t: float) -> Float[Array, "B D"]:
    r"""$\arg\min_x \frac12\|x - a\|_F^2 + t\|x\|_*$: singular values, t less each.

    Raises:
      ValueError: what is no matrix, or a t below 0.
    """
    _check_matrix(a)
    if not isinstance(t, jax.core.Tracer) and not t >= 0:
        raise ValueError(f"t must be >= 0, got {t}")
    u, s, vt = polar.thin_svd(a)
    return polar.dot(u * jnp.maximum(s - t, 0)[None], vt)


def effective_rank(s: Float[Array, " K"], kind: str = "ratio") -> Float[Array, ""]:
    """How many singular values a matrix has, in a sense that is not a whole number.

    Args:
      s: singular values.
      kind: ratio, of the nuclear norm to the largest; squares, of the squared nuclear to
        the squared Frobenius norm; entropy, its exponential for s / sum(s).

    Raises:
      ValueError: another kind, or no singular values.
    """
    if s.ndim != 1 or not s.size:
        raise ValueError(f"singular values must be (K,), K >= 1, got {s.shape}")
    total = s.sum()
    tiny = jnp.finfo(s.dtype).tiny
    if kind == "ratio":
        return total / jnp.maximum(s.max(), tiny)
    if kind == "squares":
        return total**2 / jnp.maximum(jnp.square(s).sum(), tiny)
    if kind == "entropy":
        p = s / jnp.maximum(total, tiny)
        return jnp.exp(-jnp.where(p > 0, p * jnp.log(jnp.maximum(p, tiny)), 0).sum())
    raise ValueError(f"kind must be ratio, squares or entropy, got {kind!r}")


def _check_matrix(features, norm=GRAM):
    """Raises ValueError and TypeError, see ``nuclear_norm``."""
    if not isinstance(norm, Norm):
        raise TypeError(
            f"norm must be a Norm, such as Norm(method='svd'), got {norm!r}"
        )
    if features.ndim != 2 or not features.size:
        raise ValueError(
            f"features must be a matrix (B, D) of at least one row, got {features.shape}"
        )
    if jnp.issubdtype(features.dtype, jnp.complexfloating):
        raise TypeError(f"features must be real, got {features.dtype}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _least_norm(features, norm):
    factor = _factor(features, norm)
    return factor.nuclear, factor.largest


def _forward(features, norm):
    factor = _factor(features, norm)
    return (factor.nuclear, factor.largest), factor.polar


def _backward(norm, gradient, cotangents):
    del norm
    return (cotangents[0] * gradient,)


def _factor(features, norm):
    return polar.factor(features, norm.method, norm.tau, norm.steps, _whole_rows)


_least_norm.defvjp(_forward, _backward)


def _nuclear_norm(features, norm):
    if norm.gradient == "library":
        s = jnp.linalg.svd(features, compute_uv=False)
        return s.sum(), lax.stop_gradient(s[0])
    nuclear, largest = _least_norm(features, norm)
    return nuclear, lax.stop_gradient(largest)


def _per_device(features, norm, axis):
    """Sum over the devices of an axis of the nuclear norms of their rows."""

    def local(features):
        nuclear, largest = _nuclear_norm(features, norm)
        return lax.psum(nuclear, axis), lax.pmax(largest, axis)

    return jax.shard_map(local, in_specs=P(axis), out_specs=P(), axis_names={axis})(
        features
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _smoothed(features, mu):
    return _smoothed_forward(features, mu)[0]


def _smoothed_forward(features, mu):
    wide = features.shape[0] <= features.shape[1]
    values, vectors = polar.eigh(polar.products_of(features, wide))
    roots = jnp.sqrt(jnp.maximum(values, 0) + mu**2)
    inverse = polar.dot(vectors / roots[None], vectors.T)
    return (roots - mu).sum(), polar.applied(inverse, features, wide)


def _smoothed_backward(mu, gradient, cotangent):
    del mu
    return (cotangent * gradient,)


_smoothed.defvjp(_smoothed_forward, _smoothed_backward)


def _wide(dtype) -> Any:
    """float32 at least: bfloat16 has 8 bits."""
    return jnp.promote_types(dtype, jnp.float32)


def _rows_axis() -> str | None:
    """The mesh axis ``data``, where it has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = dict(zip(mesh.axis_names, mesh.axis_types)).get("data") == AxisType.Auto
    return "data" if auto and mesh.shape["data"] > 1 else None


def _whole_rows(a):
    """Wide features on every device, before their products: one gather, of B D numbers.

    Left to the compiler, products of rows on several devices are gathered too, and
    everything after them is computed in parts.
    """
    if _rows_axis() is None or a.shape[0] > a.shape[1]:
        return a
    return lax.with_sharding_constraint(a, P(None, P.UNCONSTRAINED))
