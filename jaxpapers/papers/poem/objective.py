"""POEM's hyper-parameters and its loss: cross-entropy with energy margins, or another."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxpapers.ops import ood
from jaxpapers.ops.images import augment
from jaxpapers.options import check_choices, check_least, check_positive
from jaxpapers.papers.poem.net import Net, apply

SELECTIONS = ("poem", "greedy", "random", "none")
COVARIANCES = ("conjugate", "reference")
BATCHES = ("joint", "separate")
LOSSES = ("energy", "uniform", "extra_class")
SCANS = ("random", "consecutive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is mined, and what is asked of the energies; the released code's values."""

    select: str = "poem"
    """poem: nearest to the drawn boundary; greedy: highest ``detection_score`` (as NTOM,
    the most ID-like); random; none: cross-entropy alone, without outliers."""
    loss: str = "energy"
    """Of outliers. energy: margins; uniform: cross-entropy to equal probabilities
    (outlier exposure); extra_class: a class of their own, see ``Net.outlier_class``."""
    exposure: float = 0.5
    """uniform and extra_class: weight of the outliers' cross-entropy."""
    outliers: int = 1
    """Outliers for each ID image: of a batch, and chosen in a round."""
    pool: int = 400_000
    """Items scanned in a round."""
    pool_batch: int = 2000
    """Items of one forward pass of the scan."""
    scan: str = "consecutive"
    """consecutive: from a drawn item on, for files; random: drawn without replacement."""
    quantile: float = 0.0
    """greedy: share of the scanned items, from the most ID-like, that is skipped."""
    prior: float = 20.0
    """sigma: variance of the weights' prior."""
    noise: float = 0.5
    """sigma_n: variance of the targets."""
    target: float = 3.0
    """K = -log(1 / p - 1), p the confidence: targets are -K for ID, K for outliers."""
    covariance: str = "conjugate"
    """conjugate: A^-1; reference: sigma A^-1, which the released code draws with."""
    shared_noise: bool = False
    """Whether all targets get one draw of N(0, sigma_n), as in the released code."""
    buffer: int = 4
    """Rounds whose outliers the regression sees."""
    m_in: float = -25.0
    """Energy above which an ID image costs."""
    m_out: float = -7.0
    """Energy below which an outlier costs."""
    beta: float = 0.1
    """energy: weight of both costs."""
    batch_norm: str = "joint"
    """joint: statistics over ID images and outliers together; separate: of each half,
    the moving ones of the ID half."""
    augment: bool = True
    """Whether training images are mirrored and shifted by up to 4 pixels (zeros)."""
    jitter: float = 0.2
    """With ``augment``: strength of the change of ID images' colours; 0: none."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        check_choices(
            self, "method", select=SELECTIONS, covariance=COVARIANCES,
            batch_norm=BATCHES, scan=SCANS, loss=LOSSES,
        )  # fmt: skip
        check_positive(self, "method", "prior", "noise", "target")
        check_least(
            self, "method", outliers=1, pool=1, pool_batch=1, buffer=1, beta=0,
            quantile=0, jitter=0, exposure=0,
        )  # fmt: skip
        if not self.quantile < 1:
            raise ValueError(f"method.quantile must be < 1, got {self.quantile}")
        if self.select == "poem" and self.pool < self.pool_batch:
            raise ValueError(
                "method.pool must be at least method.pool_batch, got "
                f"{self.pool} and {self.pool_batch}"
            )
        if self.m_in > self.m_out:
            warnings.warn(
                "method.m_in and method.m_out are reversed: energies of ID images must "
                f"be lower, got {self.m_in} > {self.m_out}",
                stacklevel=3,
            )


class Predictions(NamedTuple):
    """Logits, which detect and classify, and the features below them."""

    logits: Any
    features: Any


def loss(
    params: dict,
    extra: Mapping[str, Any],
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    net: Net,
    options: Options,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict[str, Any]]]:
    """Cross-entropy of ID images, and what ``options.loss`` asks of outliers.

    Args:
      params: see ``net.init``.
      extra: its ``net`` has the statistics of the normalisations; all else is kept.
      batch: image (B, H, W, C) in [0, 1], label (B,), and, unless nothing is selected,
        outlier (B, k, H, W, C).
      key: of the augmentation.
      net: sizes.
      options: hyper-parameters.

    Returns:
      The loss; its terms and the ID accuracy; the new extra.
    """
    key_in, key_out = jax.random.split(key)
    image, label = batch["image"], batch["label"]
    image = augmented(key_in, image, options, jitter=options.jitter)
    if options.select == "none":
        logits, _, state = apply(params, extra["net"], image, net=net, train=True)
        value = ood.cross_entropy(logits, label)
        terms = {"ce": value}
    else:
        outlier = batch["outlier"]
        flat = outlier.reshape(-1, *outlier.shape[2:])
        outlier = augmented(key_out, flat, options).reshape(outlier.shape)
        logits, logits_out, state = forward(
            params, extra["net"], image, outlier, net=net, batch_norm=options.batch_norm
        )
        logits_out = logits_out.reshape(-1, logits_out.shape[-1])
        value, terms = exposed(logits, label, logits_out, options)
    accuracy = (logits[:, : net.classes].argmax(-1) == label).mean()
    return value, ({**terms, "accuracy": accuracy}, {**extra, "net": state})


def exposed(
    logits: Float[Array, "I K"],
    label: Int[Array, " I"],
    logits_out: Float[Array, "O K"],
    options: Options,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of ``options.loss`` and its terms; each half has its own mean."""
    if options.loss == "energy":
        return ood.energy_loss(
            logits, label, logits_out,
            m_in=options.m_in, m_out=options.m_out, beta=options.beta,
        )  # fmt: skip
    cost = {"uniform": ood.uniform_loss, "extra_class": ood.extra_class_loss}
    ce, outside = ood.cross_entropy(logits, label), cost[options.loss](logits_out)
    return ce + options.exposure * outside, {"ce": ce, "out_ce": outside}


def detection_score(
    logits: Float[Array, "B K"], options: Options
) -> Float[Array, " B"]:
    """Higher for ID inputs, by what ``options.loss`` trains.

    The negative energy; the log of the largest probability (``uniform``); the log odds of
    the outliers' class (``extra_class``).
    """
    if options.loss == "uniform":
        return ood.max_log_softmax(logits)
    if options.loss == "extra_class":
        return ood.id_log_odds(logits)
    return -ood.energy(logits)


def augmented(
    key: Key[Array, ""],
    x: Float[Array, "B H W C"],
    options: Options,
    *,
    jitter: float = 0.0,
) -> Float[Array, "B H W C"]:
    """Training images as ``options.augment`` asks for."""
    if not options.augment:
        return x
    return augment(key, x, border="zeros", jitter=jitter)


def forward(
    params: dict,
    state: Any,
    image: Float[Array, "B H W C"],
    outlier: Float[Array, "B k H W C"],
    *,
    net: Net,
    batch_norm: str = "joint",
) -> tuple[Float[Array, "B K"], Float[Array, "B k K"], Any]:
    """Logits of a training batch, and the new statistics of the normalisations.

    With joint statistics both halves pass as one batch: a network cannot tell outliers by
    statistics that no test image has. With separate ones each half is normalised by its
    own, which hides from the network what sets outliers apart and shifts them at test
    time, where ID statistics normalise both.
    """
    count = outlier.shape[1]
    if batch_norm == "separate":
        inside, _, new = apply(params, state, image, net=net, train=True)
        flat = outlier.reshape(-1, *image.shape[1:])
        outside, _, _ = apply(params, state, flat, net=net, train=True)
        return inside, outside.reshape(-1, count, outside.shape[-1]), new
    # Interleaved: each device keeps its own rows of both halves.
    both = jnp.concatenate([image[:, None], outlier], 1)
    logits, _, new = apply(
        params, state, both.reshape(-1, *image.shape[1:]), net=net, train=True
    )
    logits = logits.reshape(-1, 1 + count, logits.shape[-1])
    return logits[:, 0], logits[:, 1:], new


def predict(
    params: dict, extra: Mapping[str, Any], batch: Mapping[str, Array], *, net: Net
) -> Predictions:
    """Logits and features of images (B, H, W, C) in [0, 1], by the moving statistics."""
    logits, features, _ = apply(
        params, extra["net"], batch["image"], net=net, train=False
    )
    return Predictions(logits, features)
