r"""Losses of several training domains: the nuclear norm, and what it is compared with.

Rows of a batch carry the number of their domain, so every mean is one of weights, the
same on every mesh. With $\ell_e$ the mean cross-entropy of domain e:

- erm: $\sum_e \ell_e / E$.
- coral: adds the squared distances of the domains' feature means and covariances, over
  pairs (Sun and Saenko, arXiv 1607.01719).
- irm: adds $\|\nabla_w \ell_e(w f)\|^2$ at w = 1, each domain's from two halves
  (Arjovsky et al., arXiv 1907.02893).
- vrex: adds the variance of $\ell_e$ (Krueger et al., arXiv 2003.00688).
- group_dro: $\sum_e q_e \ell_e$, $q_e \propto q_e e^{\eta \ell_e}$ (Sagawa et al., arXiv
  1911.08731).
- mixup: cross-entropy of mixtures of two domains (Zhang et al., arXiv 1710.09412).
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.method.swad import Valley
from jaxpapers.options import check_choices, check_least, check_positive
from jaxpapers.papers.nuclear_norm.penalty import Norm, nuclear_norm

ALGORITHMS = ("erm", "coral", "irm", "vrex", "group_dro", "mixup")
NORMALIZE = ("batch", "sqrt", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Hyper-parameters of the loss; the defaults are those of the released programs."""

    theta: float = 0.01
    """Weight of the nuclear norm, which goes with every algorithm; 0: none."""
    warmup: int = 100
    """The norm counts after more than so many updates."""
    normalize: str = "batch"
    """The norm is divided by batch, its rows, by their square root (sqrt), or none."""
    algorithm: str = "erm"
    """erm, coral, irm, vrex, group_dro or mixup."""
    coral: float = 1.0
    """Weight of CORAL's penalty."""
    irm: float = 100.0
    """Weight of IRM's penalty after ``anneal`` updates; 1 before."""
    vrex: float = 10.0
    """Weight of V-REx's penalty after ``anneal`` updates; 1 before."""
    anneal: int = 500
    """Updates before the weights of irm and vrex."""
    eta: float = 0.01
    """Step size of group_dro's weights."""
    alpha: float = 0.2
    """Both parameters of the Beta distribution of mixup."""
    swad: bool = False
    """Whether parameters are averaged by ``method.swad``."""
    norm: Norm = Norm()
    """Back end of the nuclear norm."""
    valley: Valley = Valley()
    """Hyper-parameters of SWAD."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        check_choices(self, "method", algorithm=ALGORITHMS, normalize=NORMALIZE)
        check_least(
            self, "method", theta=0, warmup=0, coral=0, irm=0, vrex=0, anneal=0, eta=0
        )  # fmt: skip
        check_positive(self, "method", "alpha")


PAPER = Options()


def nu_loss(
    features: Float[Array, "B D"],
    logits: Float[Array, "B C"],
    label: Int[Array, " B"],
    theta: Float[Array, ""] | float,
    step: Int[Array, ""] | int,
    *,
    warmup: int = 100,
    normalize: str = "batch",
    norm: Norm = PAPER.norm,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy + theta times the nuclear norm of the features, after a warm-up.

    Args:
      features: of the global batch, of all domains.
      logits: of the head on them.
      label: classes.
      theta: may be traced, so a schedule works.
      step: updates so far; up to ``warmup`` of them the norm does not count.
      warmup: see ``Options``.
      normalize: see ``Options``.
      norm: back end.

    Returns:
      The loss, and ce, nuclear (as it is divided), ratio to the largest singular value,
      and rank, the squared nuclear by the squared Frobenius norm.

    Raises:
      ValueError: labels of another length or, if they are known, of no class; a theta
        that is known and below 0; a ``warmup`` below 0, an unknown ``normalize``; see
        ``nuclear_norm``.
      TypeError: labels that are no integers.

    Reference:
      Shi et al., 2023, arXiv 2303.07527; update of the released program.
    """
    if label.shape != logits.shape[:1] or len(label) != len(features):
        raise ValueError(
            f"features {features.shape}, logits {logits.shape} and labels {label.shape} "
            "must have the same rows"
        )
    _check_values(logits, label, theta, warmup)
    ce = cross_entropy(logits, label).mean()
    value, metrics = nuclear_term(features, normalize, norm)
    weight = jnp.where(jnp.asarray(step) > warmup, theta, 0.0)
    return ce + weight * value, {"ce": ce, **metrics}


def _check_values(logits, label, theta, warmup):
    """Raises what ``nu_loss`` says, of values that are known while it is traced."""
    if not jnp.issubdtype(label.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {label.dtype}")
    if warmup < 0:
        raise ValueError(f"warmup must be >= 0, got {warmup}")
    if not isinstance(theta, jax.core.Tracer) and not theta >= 0:
        raise ValueError(f"theta must be >= 0, got {theta}")
    if not isinstance(label, jax.core.Tracer) and label.size:
        values = np.asarray(label)
        low, high = values.min(), values.max()
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(
                f"labels must be in 0 .. {logits.shape[1] - 1}, the classes of the "
                f"logits, got {low} .. {high}"
            )


def nuclear_term(
    features: Float[Array, "B D"], normalize: str = "batch", norm: Norm = PAPER.norm
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The nuclear norm as it enters the loss, and metrics: see ``nu_loss``."""
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {NORMALIZE}, got {normalize!r}")
    nuclear, largest = nuclear_norm(features, norm)
    count = {"batch": len(features), "sqrt": len(features) ** 0.5, "none": 1}[normalize]
    squares = jnp.square(features.astype(nuclear.dtype)).sum()
    tiny = jnp.finfo(nuclear.dtype).tiny
    metrics = {
        "nuclear": nuclear / count,
        "ratio": nuclear / jnp.maximum(largest, tiny),
        "rank": nuclear**2 / jnp.maximum(squares, tiny),
    }
    return nuclear / count, lax.stop_gradient(metrics)


def cross_entropy(
    logits: Float[Array, "B C"], label: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Negative log-likelihood of each row's class, in float32."""
    log_p = jax.nn.log_softmax(
        logits.astype(jnp.promote_types(logits.dtype, "float32"))
    )
    return -jnp.take_along_axis(log_p, label[:, None], 1)[:, 0]


def shares(
    domain: Int[Array, " B"], count: int, kept: Any = None
) -> Float[Array, "E B"]:
    """Weights whose product with the rows' values is the mean of every domain.

    Args:
      domain: of each row, 0 .. count - 1.
      count: E.
      kept: False at rows to leave out; None: none.
    """
    own = domain[None] == jnp.arange(count)[:, None]
    own = own if kept is None else own & kept[None]
    return own / jnp.maximum(own.sum(1, keepdims=True), 1)


def coral_penalty(
    features: Float[Array, "B D"], domain: Int[Array, " B"], count: int
) -> Float[Array, ""]:
    """Mean squared differences of means and covariances, averaged over pairs."""
    weights = shares(domain, count)
    means = weights @ features
    centred = features[None] - means[:, None]
    rows = jnp.maximum((weights > 0).sum(1), 2)
    unbiased = weights * (rows / (rows - 1))[:, None]
    covariances = jnp.einsum("eb,ebi,ebj->eij", unbiased, centred, centred)
    pairs = list(itertools.combinations(range(count), 2))
    total = sum(
        jnp.square(means[i] - means[j]).mean()
        + jnp.square(covariances[i] - covariances[j]).mean()
        for i, j in pairs
    )
    return jnp.asarray(total) / max(len(pairs), 1)


def irm_penalty(
    logits: Float[Array, "B C"],
    label: Int[Array, " B"],
    domain: Int[Array, " B"],
    count: int,
) -> Float[Array, ""]:
    """Products of the scale's gradients in the even and the odd rows, mean of domains."""
    p = jax.nn.softmax(logits)
    own = jnp.take_along_axis(logits, label[:, None], 1)[:, 0]
    gradient = (p * logits).sum(1) - own
    even = jnp.arange(len(label)) % 2 == 0
    halves = [shares(domain, count, kept) @ gradient for kept in (even, ~even)]
    return (halves[0] * halves[1]).mean()


def mixed(
    key: Key[Array, ""], batch: Mapping[str, Array], count: int, alpha: float
) -> tuple[Array, Array, Array]:
    """Mixtures of each domain with another one, in a random cycle of domains.

    Args:
      key: of the cycle and the weights.
      batch: x, label; the domains one after the other, as many rows of each.
      count: domains.
      alpha: of the Beta distribution.

    Returns:
      The mixed x, the second classes, and the weight of the first ones, (B,).
    """
    key_order, key_share = jax.random.split(key)
    order = jax.random.permutation(key_order, count)
    # The domain after e in the cycle.
    after = jnp.zeros(count, order.dtype).at[order].set(jnp.roll(order, -1))
    share = jax.random.beta(key_share, alpha, alpha, (count,))
    each = len(batch["label"]) // count
    rows = (after[:, None] * each + jnp.arange(each)[None]).reshape(-1)
    first = jnp.repeat(share, each, total_repeat_length=len(rows))
    x = batch["x"]
    wide = first.reshape(-1, *[1] * (x.ndim - 1))
    return wide * x + (1 - wide) * x[rows], batch["label"][rows], first


def combined(
    logits: Float[Array, "B C"],
    features: Float[Array, "B D"],
    batch: Mapping[str, Array],
    weights: Float[Array, " E"],
    updates: Int[Array, ""],
    options: Options,
) -> tuple[Float[Array, ""], Float[Array, " E"], dict[str, Float[Array, ""]]]:
    """The loss of every algorithm but mixup, without the nuclear norm.

    Args:
      logits: of the batch.
      features: of the batch.
      batch: label, domain.
      weights: q of group_dro.
      updates: so far.
      options: hyper-parameters.

    Returns:
      The loss, the new q, and metrics.
    """
    label, domain, count = batch["label"], batch["domain"], len(weights)
    ce = cross_entropy(logits, label)
    metrics = {"ce": ce.mean()}
    if options.algorithm == "erm":
        return ce.mean(), weights, metrics
    losses = shares(domain, count) @ ce
    if options.algorithm == "group_dro":
        grown = weights * jnp.exp(options.eta * lax.stop_gradient(losses))
        weights = grown / grown.sum()
        return weights @ losses, weights, metrics
    annealed = updates >= options.anneal
    if options.algorithm == "coral":
        weight, penalty = options.coral, coral_penalty(features, domain, count)
    elif options.algorithm == "irm":
        weight = jnp.where(annealed, options.irm, 1.0)
        penalty = irm_penalty(logits, label, domain, count)
    else:
        weight = jnp.where(annealed, options.vrex, 1.0)
        penalty = jnp.square(losses - losses.mean()).mean()
    return losses.mean() + weight * penalty, weights, {**metrics, "penalty": penalty}
