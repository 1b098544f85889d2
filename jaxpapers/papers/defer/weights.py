"""Importance weights, calibration and losses of the delayed-feedback methods."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxpapers.ops.means import weighted_mean
from jaxpapers.ops.shapes import same_shape

UNWEIGHTED = ("oracle", "vanilla_win", "vanilla", "vanilla_defer", "fnc", "fnc_rn")
WEIGHTED = ("fnw", "fnw_rn", "es_dfm", "defer", "fsiw")


def importance_weights(
    method: str,
    p: Float[Array, "*B"],
    dp: Float[Array, "*B"] | None = None,
    rn: Float[Array, "*B"] | None = None,
    clip: bool = True,
    *,
    variant: str = "paper",
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """w(v) = p(y=v|x) / q(v|x) of events with label v = 1 and v = 0, without gradient.

    q(v|x) is the share of label v among the events of a click x. With these weights the
    expected loss of an event is that of a click with its final label, so the loss is
    unbiased if the features of the stream are distributed as those of the clicks: true of
    DEFER and FNW-RN only.

    Args:
      method: one of ``UNWEIGHTED`` (weights 1) or ``WEIGHTED``.
      p: p(y=1|x) of the current model.
      dp: for ``defer`` and ``es_dfm`` the joint probability p(y=1, z > w1|x); for
        ``fsiw`` p(already observed | converts).
      rn: for ``es_dfm`` p(y=0 | no conversion within w1, x); for ``fsiw`` the same at the
        elapsed time of the event.
      clip: clip the positive weight of ``defer`` to [1, 2], its range where dp <= p,
        which estimates can violate. Its denominators are at least 1e-6 in any case. The
        paper does not say what it does.
      variant: "released" for the weights of the authors' repository: ``defer`` has those
        of its ES-DFM10, for the stream without the second copy of immediate positives,
        ``fnw_rn`` half the paper's.

    Returns:
      Weights of positive and of negative events.

    Raises:
      ValueError: unknown method or variant, or dp or rn missing.

    Example:
      >>> pos, neg = importance_weights("defer", jnp.array([0.2]), jnp.array([0.1]))
      >>> print(f"{pos[0]:.4f} {neg[0]:.4f}")
      1.3333 0.9412

    Reference: Gu et al. 2021, equations 11-13 (as reconstructed, see the package).
    """
    if variant not in ("paper", "released"):
        raise ValueError(f"variant must be paper or released, got {variant!r}")
    same_shape("importance_weights", p=p, dp=dp, rn=rn)
    p = jax.lax.stop_gradient(p)
    released = variant == "released"
    if method in UNWEIGHTED:
        return jnp.ones_like(p), jnp.ones_like(p)
    if method == "fnw":
        return 1 + p, (1 - p) * (1 + p)
    if method == "fnw_rn":
        scale = 1.0 if released else 2.0
        return jnp.full_like(p, scale), scale * (1 - p) / (2 - p)
    if method == "fsiw":
        observed, real = _required(method, "dp", dp), _required(method, "rn", rn)
        return 1 / (observed + 1e-8), real
    if method == "es_dfm":
        late, real = _required(method, "dp", dp), _required(method, "rn", rn)
        return 1 + late, (1 + late) * real
    if method == "defer":
        late = _required(method, "dp", dp)
        if released:
            z = p + 2 * (1 - p) + late
            # p = 1 and p_dp = 0 can both be rounded.
            return z, z * (1 - p) / jnp.maximum(2 * (1 - p) + late, 1e-6)
        w_pos = p / jnp.maximum(p - late / 2, 1e-6)
        w_neg = (1 - p) / jnp.maximum((1 - p) + late / 2, 1e-6)
        return jnp.clip(w_pos, 1, 2) if clip else w_pos, w_neg
    raise ValueError(f"method must be one of {UNWEIGHTED + WEIGHTED}, got {method!r}")


def delayed_loss(
    method: str,
    logits: Float[Array, " B"],
    labels: Shaped[Array, " B"],
    *,
    dp: Float[Array, " B"] | None = None,
    rn: Float[Array, " B"] | None = None,
    raw_lambda: Float[Array, " B"] | None = None,
    elapsed: Float[Array, " B"] | None = None,
    weight: Float[Array, " B"] | None = None,
    clip: bool = True,
    variant: str = "paper",
) -> Float[Array, ""]:
    """Mean of y w_pos softplus(-s) + (1 - y) w_neg softplus(s); ``dfm_loss`` for dfm.

    Args:
      method: "dfm" or a method of ``importance_weights``, with p the sigmoid of the
        logits.
      logits: s, of p(y=1|x), or of q for ``fnc`` and ``fnc_rn``.
      labels: of the events, 0 or 1.
      dp, rn, clip, variant: see ``importance_weights``.
      raw_lambda, elapsed: for dfm, see ``dfm_losses``.
      weight: of the rows in the mean, 0 for padding.

    Raises:
      ValueError: see ``importance_weights``; labels other than 0 and 1, if they are
        concrete; dfm without its two arguments.
    """
    if method == "dfm":
        if raw_lambda is None or elapsed is None:
            raise ValueError(
                "delayed_loss: dfm needs raw_lambda, the network's second output, and "
                "elapsed, days since the click or to its conversion"
            )
        return dfm_loss(logits, raw_lambda, labels, elapsed, weight)
    check_labels(labels)
    w_pos, w_neg = importance_weights(
        method, jax.nn.sigmoid(logits), dp, rn, clip, variant=variant
    )
    return weighted_mean(event_losses(logits, labels, w_pos, w_neg), weight)


def event_losses(
    logits: Float[Array, "*B"],
    labels: Shaped[Array, "*B"],
    w_pos: Float[Array, "*B"],
    w_neg: Float[Array, "*B"],
) -> Float[Array, "*B"]:
    """Weighted binary cross-entropy of each event."""
    same_shape("event_losses", logits=logits, labels=labels, w_pos=w_pos, w_neg=w_neg)
    positive = labels * w_pos * jax.nn.softplus(-logits)
    return positive + (1 - labels) * w_neg * jax.nn.softplus(logits)


def dfm_losses(
    logits: Float[Array, " B"],
    raw_lambda: Float[Array, " B"],
    labels: Shaped[Array, " B"],
    elapsed: Float[Array, " B"],
) -> Float[Array, " B"]:
    """Negative log-likelihood of each click under exponentially distributed delays.

    With lambda = softplus(raw_lambda): -[log p + log lambda - lambda d] for a conversion
    after a delay d, -log(1 - p + p exp(-lambda e)) for none within e.

    Args:
      logits: of p(y=1|x).
      raw_lambda: of the rate, per unit of ``elapsed``.
      labels: 1 for a conversion, 0 for none yet.
      elapsed: delay of the conversion, else time since the click. In days: in seconds,
        as in the released code, lambda d overflows.

    Reference: Chapelle, "Modeling Delayed Feedback in Display Advertising", KDD 2014.
    """
    same_shape(
        "dfm_losses", logits=logits, raw_lambda=raw_lambda, labels=labels,
        elapsed=elapsed,
    )  # fmt: skip
    rate = jax.nn.softplus(raw_lambda)
    log_p, log_not = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    # softplus(x) is exp(x) in float32 below -20, and underflows long before log would.
    low = raw_lambda < -20
    log_rate = jnp.where(low, raw_lambda, jnp.log(jnp.where(low, 1.0, rate)))
    converted = -(log_p + log_rate - rate * elapsed)
    pending = -jnp.logaddexp(log_not, log_p - rate * elapsed)
    return labels * converted + (1 - labels) * pending


def dfm_loss(
    logits: Float[Array, " B"],
    raw_lambda: Float[Array, " B"],
    labels: Shaped[Array, " B"],
    elapsed: Float[Array, " B"],
    weight: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Mean of ``dfm_losses``.

    Raises:
      ValueError: labels other than 0 and 1, if they are concrete.
    """
    check_labels(labels)
    return weighted_mean(dfm_losses(logits, raw_lambda, labels, elapsed), weight)


def calibrate(
    method: str, prob: Float[Array, "*B"], *, clip: bool = True
) -> tuple[Float[Array, "*B"], Int[Array, ""]]:
    """p(y=1|x) from the output q of a method's network.

    ``fnc``: q / (1 - q); ``fnc_rn``: 2 q; all others: q.

    Args:
      method: any of the family.
      prob: q, sigmoid of the logits.
      clip: at 1, which ``fnc`` and ``fnc_rn`` can exceed.

    Returns:
      Probabilities, and the number of them above 1 before clipping.

    Example:
      >>> p, count = calibrate("fnc", jnp.array([0.2, 0.75]))
      >>> p.tolist(), int(count)
      ([0.25, 1.0], 1)
    """
    if method == "fnc":
        prob = prob / (1 - prob + 1e-8)  # As in the released code: finite at q = 1.
    elif method == "fnc_rn":
        prob = 2 * prob
    count = (prob > 1).sum()
    return jnp.minimum(prob, 1) if clip else prob, count


def aux_loss(
    rn_logit: Float[Array, " B"],
    dp_logit: Float[Array, " B"],
    label: Shaped[Array, " B"],
    delayed: Shaped[Array, " B"],
    weight: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropies of the two classifiers in the weights of ES-DFM and DEFER.

    f_dp predicts a delayed conversion, 1[w1 < z <= w2], of all clicks. f_rn predicts a
    real negative among the clicks without conversion within w1.

    Args:
      rn_logit: of f_rn.
      dp_logit: of f_dp.
      label: final label y.
      delayed: 1[w1 < z <= w2].
      weight: of the rows.

    Returns:
      The sum of both mean cross-entropies, and each of them as a metric.
    """
    weight = jnp.ones_like(dp_logit) if weight is None else weight
    unconverted = weight * (1 - label + delayed)
    ones = jnp.ones_like(dp_logit)
    rn = weighted_mean(event_losses(rn_logit, 1 - label, ones, ones), unconverted)
    dp = weighted_mean(event_losses(dp_logit, delayed, ones, ones), weight)
    return rn + dp, {"aux_rn": rn, "aux_dp": dp}


def offline_loss(
    head_logits: Float[Array, "B H"],
    labels: Shaped[Array, "B H"],
    elapsed: Float[Array, " B"],
    windows: tuple[float, ...],
    weight: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Multi-task DEFER: each head is trained on the clicks older than its window.

    Head n <= N predicts the joint p(z < w_n, y=1|x), on clicks older than w_n; the last
    head predicts p(y=1|x), on all. Cross-entropies are summed over the heads and averaged
    over the batch.

    Args:
      head_logits: of H = N + 1 heads.
      labels: 1[z < w_n] for each window, then the current y.
      elapsed: time since the click, in the unit of the windows.
      windows: w_1 < ... < w_N.
      weight: of the rows.

    Returns:
      The loss, and ``coverage``: the share of (click, head) pairs in it.

    Raises:
      ValueError: the number of heads is not that of windows plus one, or windows do not
        ascend.
    """
    if head_logits.shape[-1] != len(windows) + 1:
        raise ValueError(
            f"offline_loss: {len(windows)} windows need {len(windows) + 1} heads, the "
            f"last for p(y=1|x); got {head_logits.shape[-1]}"
        )
    if any(b <= a for a, b in zip((0.0, *windows), windows)):
        raise ValueError(f"windows must be positive and ascending, got {windows}")
    check_labels(labels)
    known = elapsed[:, None] > jnp.asarray((*windows, -jnp.inf))[None]
    ones = jnp.ones_like(head_logits)
    ce = event_losses(head_logits, labels, ones, ones)
    loss = weighted_mean(jnp.where(known, ce, 0).sum(-1), weight)
    return loss, {"coverage": weighted_mean(known.mean(-1), weight)}


def check_labels(labels: Any) -> None:
    """Raises ValueError for labels other than 0 and 1; traced ones are not checked."""
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(labels)
    bad = values[(values != 0) & (values != 1)]
    if bad.size:
        raise ValueError(
            f"labels must be 0 or 1, got {bad[0]}; drop rows without a label"
        )


def _required(method: str, name: str, value: Any) -> Any:
    if value is None:
        raise ValueError(
            f"importance_weights: {method} needs {name}, got None; it is the output of "
            "an auxiliary classifier, see aux_loss"
        )
    return jax.lax.stop_gradient(value)
