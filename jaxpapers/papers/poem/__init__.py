r"""POEM: out-of-distribution detection with outliers mined by posterior sampling.

Yifei Ming, Ying Fan, Yixuan Li. "POEM: Out-of-Distribution Detection with Posterior
Sampling", arXiv 2206.13687, 2022 (ICML 2022).

A classifier that must also say "none of my classes" is trained with outliers from a large
pool, most of which are trivially far from the data. A Bayesian linear regression on the
network's features tells in-distribution (ID) images from outliers; each epoch one weight
vector is drawn from its posterior (Thompson sampling), and the outliers of the pool
nearest to that boundary are trained on, with an energy margin. The test score is the
negative free energy; the regression is not used at test time.

With features phi(x) in R^D, logits f(x) in R^C, targets y of -K (ID) and K (outliers):

$$ y = w^\top \phi + \epsilon,\ \epsilon \sim N(0, \sigma_n),\ w \sim N(0, \sigma I),
   \qquad A = \Phi^\top \Phi / \sigma_n + I / \sigma $$
$$ w \sim N(A^{-1} \Phi^\top y / \sigma_n,\ A^{-1}), \qquad G(x) = -|w^\top \phi(x)| $$
$$ E(x) = -\log \sum_c e^{f_c(x)}, \qquad L = CE + \beta (E_{in}(E - m_{in})_+^2 +
   E_{out}(m_{out} - E)_+^2) $$

Selected are the outliers of largest G. ``mining`` has the round that precedes an epoch,
``ops.posterior`` the regression, ``ops.selection`` the running choice.

Departures. The paper's text past its introduction was not at hand: equations are those of
the authors' code and abstract. That code draws with covariance sigma A^-1
(``covariance="reference"``); the conjugate A^-1 is the default. It adds one draw of noise
to all targets (``shared_noise``), a constant shift, left out. It keeps pixels in memory;
here the buffer is indices into the pool and seeds of crops, drawn anew with the law of
those that were trained on, and the pool is a stream. The ID rows of the regression are
kept once, their statistics multiplied by the number of rounds in the buffer. He's
initialisation in place of one standard deviation for all kernels (``net.init="poem"``).
Where sampling fails it raises; the code draws from N(0, I).
"""

import functools
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxpapers import optim
from jaxpapers.method import Method, gradient
from jaxpapers.options import from_config
from jaxpapers.papers.poem.mining import (
    SHOWN,
    boundary_score,
    buffer_chunk,
    buffer_slots,
    chosen,
    draw,
    empty_top,
    first_posterior,
    latest,
    remember,
    round_keys,
    scan_chunk,
    scanned,
    solve,
    start,
    targets,
)
from jaxpapers.papers.poem.net import Net, apply, features, init, statistics
from jaxpapers.papers.poem.objective import (
    Options,
    Predictions,
    detection_score,
    exposed,
    forward,
    loss,
    predict,
)

__all__ = [
    "Net", "Options", "Predictions", "RULES", "SHOWN", "apply", "boundary_score",
    "buffer_chunk", "buffer_slots", "chosen", "detection_score", "draw", "empty_top",
    "exposed", "features", "first_posterior", "forward", "init", "latest", "loss", "make",
    "predict", "read",
    "remember", "round_keys", "scan_chunk", "scanned", "solve", "start", "statistics",
    "targets",
]  # fmt: skip

RULES = ((r"linear/kernel$", P("model", None)),)
"""The linear map is split by features; convolutions are replicated."""


def read(config: Any) -> tuple[Net, Options]:
    """Net and options of a config.

    Raises:
      ValueError: a field that is unknown or out of range; a class of outliers without
        the loss that trains it, or the other way round.
    """
    net = from_config(Net, config.net, "net")
    options = from_config(Options, config.method, "method")
    trained = options.loss == "extra_class" and options.select != "none"
    if net.outlier_class != trained:
        raise ValueError(
            "net.outlier_class is for method.loss=extra_class with outliers, and that "
            f"needs it: got net.outlier_class={net.outlier_class}, "
            f"method.loss={options.loss!r}, method.select={options.select!r}"
        )
    return net, options


def make(config: Any, *, images: int) -> Method:
    """The method of a config (configs/poem.py).

    Args:
      config: groups ``net``, ``optim``, ``train``, ``method``.
      images: ID images of an epoch; a round chooses ``method.outliers`` for each.

    Raises:
      ValueError: a field that is unknown or out of range.
    """
    net, options = read(config)
    count = images * options.outliers

    def init_params(key, batch):
        del batch
        return init(key, net)

    return gradient(
        init_params,
        functools.partial(loss, net=net, options=options),
        optim.from_config(config.optim, config.train.steps),
        predict=functools.partial(predict, net=net),
        rules=RULES,
        accumulate=config.train.accumulate,
        init_extra=lambda params: start(statistics(params, net), net, options, count),
    )._replace(served=served)


def served(tree: dict) -> dict:
    """Params, or ``State.extra`` without what only mining needs."""
    return {"net": tree["net"]} if "ring" in tree else tree
