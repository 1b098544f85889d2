r"""Domain generalisation by the nuclear norm of features: ERM-NU and SWAD-NU.

Zhenmei Shi, Yifei Ming, Ying Fan, Frederic Sala, Yingyu Liang. "Domain Generalization via
Nuclear Norm Regularization", arXiv 2303.07527, 2023 (CPAL 2024).

Data come from several labelled domains, and the test domain is another. Inputs mix
features that the class causes everywhere with features of the environment, which tell the
class in the training domains and not in the test's. Of all predictors that fit, take the
one whose features carry least information in the sense of rank: add the nuclear norm of
the features of the batch to the loss. It needs no labels of domains and no further net,
and goes with any other method.

With $\Phi \in R^{B \times D}$ the features of the batch of all training domains, W and b
the head, theta = 0.01:

$$ \mathcal L = \mathrm{CE}(\Phi W^\top + b, y)
   + \theta \frac{\|\Phi\|_*}{B} 1[\mathrm{step} > 100] $$

theta = 0, and the first 101 updates, are ERM exactly. The batch is the global one on
every mesh, see ``penalty``. SWAD-NU averages the parameters too, see ``method.swad``.

Departures. The division by B and the warm-up of 100 updates are those of the released
program (``Options.normalize``, ``warmup``). Where the rank is deficient the gradient is
the element of least norm, the released program's an arbitrary one. Domains are evaluated
after k, 2k, ... updates, in DomainBed one update later. IRM and V-REx do not start a new
Adam where their weights jump.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpapers import optim
from jaxpapers.method import Method, State, gradient, swad
from jaxpapers.options import from_config
from jaxpapers.papers.nuclear_norm.featurizers import (
    NETS,
    CnnNet,
    LinearNet,
    Net,
    ResNet,
    classify,
    featurize,
    init,
    statistics,
)
from jaxpapers.papers.nuclear_norm.objectives import (
    PAPER,
    Options,
    combined,
    cross_entropy,
    mixed,
    nu_loss,
    nuclear_term,
)
from jaxpapers.papers.nuclear_norm.penalty import (
    Norm,
    effective_rank,
    nuclear_norm,
    polar_factor,
    prox_nuclear,
    smoothed_nuclear_norm,
)
from jaxpapers.papers.nuclear_norm.selection import (
    Choice,
    select_iid,
    select_last,
    select_loo,
    select_oracle,
)

__all__ = [
    "Choice", "classify", "CnnNet", "effective_rank", "featurize", "init",
    "LinearNet", "loss", "make", "Net", "net_of", "NETS", "Norm", "nu_loss",
    "nuclear_norm", "Options", "options_of", "own_extra", "PAPER", "polar_factor",
    "predict", "prox_nuclear", "ResNet", "select_iid", "select_last", "select_loo",
    "select_oracle", "smoothed_nuclear_norm", "start", "statistics", "with_own_extra",
]  # fmt: skip


def start(params: dict, net: Net, domains: int, records: tuple[int, ...] = ()) -> dict:
    """Initial ``State.extra``.

    Args:
      params: see ``init``.
      net: hyper-parameters.
      domains: of training.
      records: shape of the table of evaluations that the run keeps, -1 where there is
        none yet: evaluations, all domains, (inside, held out), (accuracy, loss).

    Returns:
      updates so far, group_dro's weights, moving statistics, records.
    """
    return {
        "updates": jnp.zeros((), jnp.int32),
        "weights": jnp.full(domains, 1 / domains),
        "moments": statistics(params, net),
        "records": jnp.full(records or (0,), -1.0),
    }


def loss(
    params: dict,
    extra: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    net: Net,
    options: Options = PAPER,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict]]:
    """The loss of a batch of all training domains.

    Args:
      params: see ``init``.
      extra: see ``start``.
      batch: x, label, domain; the domains one after the other, as many rows of each.
      key: of augmentation, dropout and mixup.
      net: hyper-parameters of the net.
      options: of the loss.

    Returns:
      The loss, and its metrics and the new ``extra``.
    """
    updates, weights = extra["updates"], extra["weights"]
    x, mixup = batch["x"], options.algorithm == "mixup"
    label, second, share = batch["label"], batch["label"], jnp.ones(())
    if mixup:
        x = x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x
        x, second, share = mixed(
            jax.random.fold_in(key, 2), {**batch, "x": x}, len(weights), options.alpha
        )
    features, moments = featurize(params, extra["moments"], x, net, train=True, key=key)
    logits = classify(params, features)
    if mixup:
        pair = [cross_entropy(logits, c) for c in (label, second)]
        value = (share * pair[0] + (1 - share) * pair[1]).mean()
        metrics = {"ce": value}
    else:
        value, weights, metrics = combined(
            logits, features, batch, weights, updates, options
        )
    if options.theta:
        term, more = nuclear_term(features, options.normalize, options.norm)
        value += jnp.where(updates > options.warmup, options.theta, 0.0) * term
        metrics |= more
    metrics["loss"] = value
    extra = {**extra, "updates": updates + 1, "weights": weights, "moments": moments}
    return value, (metrics, extra)


def predict(
    params: dict, extra: dict, batch: Mapping[str, Array], *, net: Net
) -> Float[Array, "B C"]:
    """Logits of a batch's x."""
    features, _ = featurize(params, extra["moments"], batch["x"], net)
    return classify(params, features)


def own_extra(extra: dict) -> dict:
    """The part of ``State.extra`` that is this module's, with or without SWAD."""
    return extra["method"] if "swad" in extra else extra


def with_own_extra(extra: dict, own: dict) -> dict:
    """``extra`` with another own part."""
    return {**extra, "method": own} if "swad" in extra else own


def resize(state: State, target: State) -> State:
    """A state with room for as many evaluations as ``target`` has, for longer runs."""
    own, shape = own_extra(state.extra), own_extra(target.extra)["records"].shape
    kept = own["records"][: shape[0]]
    records = jnp.full(shape, -1.0).at[: len(kept)].set(kept)
    own = {**own, "records": records}
    return state._replace(extra=with_own_extra(state.extra, own))


def net_of(config: Any) -> Net:
    """The hyper-parameters of a config's group ``net``."""
    fields = dict(config.net.items())
    model = fields.pop("model")
    if model not in NETS:
        raise ValueError(f"net.model must be one of {tuple(NETS)}, got {model!r}")
    return from_config(NETS[model], fields, "net")


def options_of(config: Any) -> Options:
    """The hyper-parameters of a config's group ``method``."""
    return from_config(Options, config.method, "method")


def make(config: Any, *, domains: int) -> Method:
    """Binds a config (see configs/nuclear_norm.py): ``net, method, optim, train``.

    Args:
      config: with ``data.test``, domains that are not trained on, and
        ``data.validate_every``.
      domains: number of all domains.

    Raises:
      ValueError: values out of range; test domains that are not there; fewer than one
        training domain left; several micro-batches.
    """
    net, options = net_of(config), options_of(config)
    test = tuple(config.data.test)
    if domains < 2:
        raise ValueError(
            f"domain generalisation needs 2 domains at least, got {domains}"
        )
    if not test or len({*test}) < len(test) or not {*test} < {*range(domains)}:
        raise ValueError(
            f"data.test must be some of the domains 0 .. {domains - 1}, each once and "
            f"not all, got {test}"
        )
    if config.train.accumulate > 1:
        raise ValueError(
            "the nuclear norm is that of the whole batch: train.accumulate must be 1, "
            f"got {config.train.accumulate}"
        )
    every, steps = config.data.validate_every, config.train.steps
    if not 0 < every:
        raise ValueError(f"data.validate_every must be >= 1, got {every}")
    if every > max(steps, 1):
        raise ValueError(
            f"data.validate_every={every} must be <= train.steps={steps}: nothing would "
            "be evaluated"
        )
    count = domains - len(test)
    method = gradient(
        lambda key, batch: init(key, net),
        functools.partial(loss, net=net, options=options),
        optim.from_config(config.optim, steps),
        predict=functools.partial(predict, net=net),
        resize=resize,
        init_extra=lambda params: start(
            params, net, count, (steps // every, domains, 2, 2)
        ),
    )
    return swad.averaged(method, options.valley) if options.swad else method
