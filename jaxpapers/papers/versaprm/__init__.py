r"""VersaPRM: a process reward model of many domains.

Thomas Zeng, Shuibai Zhang, Shutong Wu, Christian Classen, Daewon Chae, Ethan Ewer, Minjae
Lee, Heeju Kim, Wonjun Kang, Jackson Kunde, Ying Fan, Jungtaek Kim, Hyung Il Koo, Kannan
Ramchandran, Dimitris Papailiopoulos, Kangwook Lee. "VersaPRM: Multi-Domain Process Reward
Model via Synthetic Reasoning Data", arXiv 2502.06737, 2025 (ICML 2025).

A language model is tuned to say after each step of a solution whether the step is right.
With the logits $\ell_+, \ell_-$ of the tokens + and - at the separator that ends step s:

$$ r_s = \sigma(\ell_+ - \ell_-), \quad
   \mathcal L = -E\, [y_s \log r_s + (1 - y_s) \log (1 - r_s)] $$

over the steps up to the first wrong one. A solution's reward is the least, the mean or
the last of its $r_s$; with it the best of N solutions is chosen, or the votes of their
answers are weighted, or a search goes on from the best beginnings. Models that learned
from mathematics alone do not help in other domains; those that learned from solutions in
many domains do.

Departures. Steps are stripped in training too: the authors' code strips them in the
evaluation only, where a step that ends in a space then has no score. Beam search ranks
by the aggregate, theirs by the list of step scores (``legacy_sort``). AUC is that of
probabilities; theirs takes a softmax over all logits of the file. Added: soft labels, a
head of two classes, labels of the last step only, DVTS, the first wrong step as a metric.
For small models without pretraining: the next token's loss beside the process loss, and
labels of all words of a generated step, whether it is right up to there (the paper labels
the separator alone).
"""

import functools
from typing import Any

import jax
import optax

from jaxpapers import optim, options
from jaxpapers.method import Method, WarmStart, gradient, param_spec
from jaxpapers.papers.versaprm.encoding import (
    IGNORE,
    Encoded,
    encode_all,
    encode_example,
    pack,
)
from jaxpapers.papers.versaprm.network import (
    RULES,
    Net,
    decoder_params,
    init,
    states,
    two_logits,
)
from jaxpapers.papers.versaprm.objective import (
    Scores,
    language_loss,
    loss,
    step_scores,
    token_scores,
    two_way_loss,
)

__all__ = [
    "IGNORE", "RULES", "Encoded", "Net", "Scores", "decoder_params", "encode_all",
    "encode_example", "init", "language_loss", "loss", "make", "net_of", "pack", "rules",
    "states",
    "step_scores", "token_scores", "two_logits", "two_way_loss",
]  # fmt: skip

OBJECTIVES = ("process", "language")


def net_of(config: Any, vocab_size: int) -> Net:
    """``Net`` of a config's group ``net`` and of a vocabulary."""
    return options.from_config(Net, {**config.net, "vocab_size": vocab_size}, "net")


def make(config: Any, *, vocab_size: int) -> Method:
    """Binds a config (see configs/versaprm.py): groups ``net``, ``optim``, ``train``.

    Args:
      config: the groups, and ``method``: ``objective`` is process, or language for the
        base model, whose run has the same data; ``language`` see ``loss``.
      vocab_size: of the data, in place of ``net.vocab_size``.

    Raises:
      ValueError: see ``Net`` and ``optim.from_config``; an unknown objective.
    """
    net = net_of(config, vocab_size)
    objective = config.method.objective
    if objective not in OBJECTIVES:
        raise ValueError(
            f"method.objective must be one of {OBJECTIVES}, got {objective!r}"
        )
    specs = rules(net)
    tx = optim.from_config(
        config.optim,
        config.train.steps,
        weight_dimension_numbers=dimensions,
        sharding=lambda path, leaf: param_spec(specs, path),
    )
    if net.lora_rank:
        tx = optax.multi_transform({"tuned": tx, "frozen": optax.set_to_zero()}, labels)
    if not config.method.language >= 0:
        raise ValueError(f"method.language must be >= 0, got {config.method.language}")
    process = functools.partial(loss, language=config.method.language)
    return gradient(
        lambda key, batch: init(key, net),
        functools.partial(
            process if objective == "process" else language_loss, net=net
        ),
        tx,
        predict=functools.partial(token_scores, net=net),
        rules=specs,
        labels=labels if net.lora_rank else None,
        accumulate=config.train.accumulate,
    )._replace(warm_start=_from_base(net))


def dimensions(path: str, leaf: Any) -> optim.DimensionNumbers | None:
    """Kernels are (in, out) in their last two axes; the axis of layers before them."""
    matrix = leaf.ndim > 1 and path.endswith(("kernel", "down", "up", "embedding"))
    return optim.DimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if matrix else None


def labels(params: Any) -> Any:
    """Which parameters the optimizer tunes: with adapters these and the classes alone."""

    def label(path, _):
        return "frozen" if path[0].key == "decoder" else "tuned"

    return jax.tree_util.tree_map_with_path(label, params)


def rules(net: Net) -> list[tuple[str, Any]]:
    """Sharding rules of the leaves that the net has."""
    no_head = net.tied or net.head == "classes"
    # Adapters are small, and their paths have those of their kernels in them.
    return [(r"lora/", jax.P())] * bool(net.lora_rank) + [
        (regex, spec)
        for regex, spec in RULES
        if not (regex.startswith("head") and no_head)
        and not (regex.startswith("classes") and net.head != "classes")
    ]


def _from_base(net: Net) -> WarmStart:
    """Starts from the decoder of a base model, whatever head and adapters are new."""

    def parts(state):
        return {"params": {"decoder": state.params["decoder"]}}

    def apply(state, restored):
        decoder = restored["params"]["decoder"]
        return state._replace(params={**state.params, "decoder": decoder})

    return WarmStart(parts, apply)
