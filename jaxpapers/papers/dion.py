r"""Dion trains a byte-level language model.

Kwangjun Ahn, Byron Xu, Natalie Abreu, Ying Fan, Gagik Magakyan, Pratyusha Sharma, Zheng
Zhan, John Langford. "Dion: Distributed Orthonormalized Updates", arXiv 2504.05295, 2025.

Muon replaces the momentum of a weight matrix by its polar factor, for which it needs the
whole matrix on one device. Dion takes one step of power iteration per optimizer step,
warm-started by the last one's right factor, orthonormalises a thin factor and keeps what
the low-rank update missed in the momentum. Only thin factors need to cross devices.

For a weight X (m, n) of m outputs and n inputs (the paper's orientation; flax kernels are
their transposes, and the optimizer knows), momentum M (m, n), right factor Q (n, r):

$$ B = M + G, \quad P = \mathrm{orth}(B Q), \quad R = B^\top P, \quad
   M \leftarrow B - (1-\mu) P R^\top, $$
$$ Q \leftarrow R\,\mathrm{diag}(1/(\|R_j\|+\epsilon)), \quad
   X \leftarrow (1-\eta\lambda) X - \eta\sqrt{m/n}\,P Q^\top $$

The optimizer itself is ``jaxpapers.optim.dion`` and documents where it departs from the
reference code. This module is the language model that it trains: next-token loss, sampler
with a key/value cache, and the AdamW and Muon baselines. The paper trains GPT-2-sized
models on FineWeb; here the text is read by ``data.text``, by default from the source of
the running Python's standard library, byte by byte.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from jaxpapers import optim, options
from jaxpapers.method import Method, Replicas, State, gradient, param_spec
from jaxpapers.nets import decoding, transformer
from jaxpapers.ops.means import weighted_mean
from jaxpapers.optim import DimensionNumbers, routing


def dimensions(path: str, leaf: Any) -> DimensionNumbers | None:
    """Every leaf's last two axes are (in, out); the layer axis before them is batch."""
    del path
    n = leaf.ndim
    return DimensionNumbers(n - 2, n - 1) if n > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """Hyper-parameters of the transformer, by default a small one on bytes.

    Attributes:
      vocab_size: of the bytes, a separator, and padding to a multiple of 8.
      width: of the residual stream.
      layers: blocks.
      heads: of the queries.
      kv_heads: of keys and values; 0 uses ``heads``.
      head_dim: size of a head; 0 uses ``width / heads``.
      hidden: of SwiGLU; 0 uses 8/3 of the width.
      rope_theta: base of the rotary frequencies.
      qk_norm: RMSNorm of queries and keys per head.
      tied: the output head is the transposed embedding.
      remat: recompute each block in the backward pass.
      dtype: of activations, float32 or bfloat16; parameters are float32.
      epsilon: of the norms.
      init_residual: projections into the residual stream start at ``zero`` or ``scaled``.
      unroll: layers per iteration of the scan over layers.

    Raises:
      ValueError: sizes that do not fit each other, or an unknown dtype.
    """

    vocab_size: int = 264
    width: int = 96
    layers: int = 4
    heads: int = 2
    kv_heads: int = 0
    head_dim: int = 0
    hidden: int = 0
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    tied: bool = False
    remat: bool = False
    dtype: str = "float32"
    epsilon: float = 1e-6
    init_residual: str = "zero"
    unroll: int = 4

    def __post_init__(self):
        options.check_least(self, "net", vocab_size=1, width=1, layers=1, heads=1)
        options.check_choices(self, "net", dtype=("float32", "bfloat16"))
        network(self).sizes()


def network(net: Net | nn.Module) -> Any:
    """The transformer of the hyper-parameters; a module is returned as it is."""
    if isinstance(net, nn.Module):
        return net
    fields: Any = {**dataclasses.asdict(net), "dtype": jnp.dtype(net.dtype)}
    return transformer.Transformer(**fields)


def loss(
    params: Any,
    batch: dict[str, Array],
    key: Key[Array, ""],
    *,
    net: Net | nn.Module = Net(),  # noqa: B008 (frozen)
) -> tuple[Array, dict[str, Array]]:
    """Mean next-token cross-entropy.

    Args:
      params: of the transformer.
      batch: ``tokens`` int32 (B, T + 1); optional ``weight`` float32 (B, T) per target.
      key: unused, the model has no noise.
      net: hyper-parameters, or a module (tokens) -> logits.

    Returns:
      Nats per token, and ``bits``: the same in bits; with weights, also ``weight``:
      their sum.
    """
    del key
    tokens = batch["tokens"]
    logits = network(net).apply({"params": params}, tokens[:, :-1])
    # One-hot labels, which the compiler fuses away: picking a label's logit would gather
    # logits whose vocabulary is split over devices.
    labels = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1], dtype=logits.dtype)
    nats = optax.softmax_cross_entropy(logits, labels)
    value = weighted_mean(nats, batch.get("weight"))
    metrics = {"bits": value / jnp.log(2.0)}
    if "weight" in batch:
        metrics["weight"] = batch["weight"].sum()
    return value, metrics


def sampler(
    params: Any,
    key: Key[Array, ""],
    prompt: Int[Array, "B T"],
    *,
    net: Net | transformer.Transformer = Net(),  # noqa: B008 (frozen)
    length: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Int[Array, "B L"]:
    """Continues a prompt, token by token with a key/value cache.

    Args:
      params: of the transformer.
      key: of the draws.
      prompt: at least one token.
      net: hyper-parameters, or a ``Transformer``.
      length: L, tokens to draw.
      temperature: of the softmax; 0 takes the most probable token.
      vocab_size: draw only tokens below it (bytes: 256).

    Returns:
      The drawn tokens, int32.

    Raises:
      ValueError: empty prompt, length below 1 or negative temperature.
    """
    if prompt.shape[1] < 1 or length < 1 or not temperature >= 0:
        raise ValueError(
            "sampler needs a prompt of one token or more, length >= 1 and temperature "
            f">= 0, got {prompt.shape[1]}, {length}, {temperature}"
        )
    drawn = decoding.Options(
        length=length, temperature=temperature, vocab_size=vocab_size
    )
    return decoding.generate(network(net), params, prompt, key, options=drawn).tokens


def rank_schedule(config: Any) -> list[tuple[int, float]]:
    """``config.optim.rank_schedule`` as (last step, rank fraction) of each part of a run.

    A rank is a shape, so each part is a program of its own, which goes on from the state
    of the one before it with Q resized (``optim.resize``). Changes after the last step
    are left out.

    Raises:
      ValueError: text of another form, steps that do not rise, fractions outside (0, 1],
        or a schedule for another optimizer than dion.
    """
    text, steps = config.optim.rank_schedule, config.train.steps
    try:
        changes = [change.split(":") for change in text.split(",") if change]
        changes = [(int(step), float(fraction)) for step, fraction in changes]
    except ValueError:
        raise ValueError(
            "optim.rank_schedule must be step:fraction,step:fraction, e.g. "
            f"1000:0.125,2000:0.5, got {text!r}"
        ) from None
    starts = [step for step, _ in changes]
    if starts != sorted(set(starts)) or any(step < 1 for step in starts):
        raise ValueError(
            f"optim.rank_schedule: steps must be >= 1 and rise, got {text!r}"
        )
    wrong = [fraction for _, fraction in changes if not 0 < fraction <= 1]
    if wrong:
        raise ValueError(
            f"optim.rank_schedule: fractions must be in (0, 1], got {wrong[0]} in "
            f"{text!r}"
        )
    if changes and config.optim.name != "dion":
        raise ValueError(
            f"optim.rank_schedule needs optim.name=dion, got {config.optim.name!r}"
        )
    fractions = [config.optim.rank_fraction] + [fraction for _, fraction in changes]
    return [
        (min(last, steps), fraction)
        for first, last, fraction in zip([0, *starts], [*starts, steps], fractions)
        if first < max(steps, 1)
    ]


def replica_axis(config: Any) -> str:
    """The mesh axis that ``train.replica_sync`` is about.

    Raises:
      ValueError: ``train.replica_axis`` is no axis of copies of the parameters.
    """
    axis = config.train.get("replica_axis", "replica")
    if axis not in ("replica", "slice"):
        raise ValueError(f"train.replica_axis must be replica or slice, got {axis!r}")
    return axis


def optimizer(config: Any) -> optax.GradientTransformation:
    """``optim.from_config`` with the transformer's matrices and sharding.

    ``dion``, ``dion2``, ``muon`` and ``normuon`` are this package's, on sharded matrices;
    ``optax_muon`` (optax.contrib) and ``adamw`` are baselines. Embedding and head do not
    decay; norm gains do, except under optax_muon, which does not decay its Adam part.

    Raises:
      ValueError: see ``optim.from_config``; ``train.replica_sync=lowrank`` with another
        optimizer, with gradient clipping or a residual.
    """
    c, sync, axis = config.optim, config.train.replica_sync, replica_axis(config)
    if sync not in ("gradient", "lowrank"):
        raise ValueError(
            f"train.replica_sync must be gradient or lowrank, got {sync!r}"
        )
    residual = c.get("residual", 0.0)
    if sync == "lowrank" and (c.name != "dion" or c.clip or residual):
        raise ValueError(
            "train.replica_sync=lowrank never forms the averaged gradient: it needs "
            "optim.name=dion, optim.clip=0 and optim.residual=0, got "
            f"{c.name!r}, {c.clip} and {residual}"
        )
    return optim.from_config(
        c,
        config.train.steps,
        weight_dimension_numbers=dimensions,
        sharding=lambda path, leaf: param_spec(transformer.RULES, path),
        replicate_axis=axis if sync == "lowrank" else None,
    )


def make(
    config: Any,
    net: transformer.Transformer | None = None,
    tx: optax.GradientTransformation | None = None,
) -> Method:
    """Binds ``config`` (see configs/dion.py).

    Args:
      config: groups ``net`` (``Net``), ``optim``, ``train``.
      net: a network in place of ``config.net``, with the same call.
      tx: an optimizer in place of ``config.optim``.

    Raises:
      ValueError: see ``Net``, ``optimizer``, ``optim.dion`` and ``rank_schedule``.
    """
    if net is None:
        net = network(options.from_config(Net, config.net, "net"))
    labels, replicas, axis = None, None, replica_axis(config)
    if tx is None:
        rank_schedule(config)  # Refused before any part of the run.
        tx = optimizer(config)
        if config.train.replica_sync == "lowrank":
            specs = functools.partial(optim.replica_specs, replicate_axis=axis)
            replicas = Replicas(axis, specs)
        labels = functools.partial(
            _labels, name=config.optim.name, scalar=config.optim.scalar
        )

    def init_params(key, batch):
        return net.init(key, jnp.zeros(batch["tokens"].shape, jnp.int32))["params"]

    rules = [
        *optim.state_rules(dimensions, replicate_axis=axis),
        *(
            (regex, spec)
            for regex, spec in transformer.RULES
            if not (net.tied and regex.startswith("head"))
        ),
    ]
    return gradient(
        init_params,
        functools.partial(loss, net=net),
        tx,
        # Decoding stays within the distances that training has seen.
        sampler=functools.partial(
            sampler, net=net.clone(window=config.data.context, name=None)
        ),
        rules=rules,
        labels=labels,
        resize=resize,
        accumulate=config.train.accumulate,
        replicas=replicas,
    )


def resize(state: State, target: State) -> State:
    """A state whose Dion part gets the target's rank and number of replicas."""
    return state._replace(opt_state=optim.resize(state.opt_state, target.opt_state))


def _labels(params, *, name, scalar):
    labels = routing.route(params, dimensions)
    if name == "optax_muon":
        scalar = "adamw"
    elif name not in ("dion", "dion2", "muon", "normuon"):
        scalar = name
    return jax.tree.map(lambda x: name if x == "dion" else scalar, labels)
