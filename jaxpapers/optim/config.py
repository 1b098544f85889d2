"""Optimizers and learning-rate schedules by the config group ``optim``."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxpapers import options
from jaxpapers.optim import routing
from jaxpapers.optim.dion import dion
from jaxpapers.optim.dion2 import dion2
from jaxpapers.optim.layout import DimensionNumbers
from jaxpapers.optim.muon import muon, normuon
from jaxpapers.optim.paths import dimension_numbers, named_leaves
from jaxpapers.optim.weight_decay import add_cautious_weight_decay

NAMES = (
    "adagrad", "adam", "adamw", "dion", "dion2", "muon", "normuon", "optax_muon",
    "rmsprop", "sgd",
)  # fmt: skip
# Those whose decay can be cautious.
CAUTIOUS = ("adamw", "dion", "dion2", "muon", "normuon")
SCHEDULES = ("constant", "cosine", "drop", "trapezoid")


@dataclasses.dataclass(frozen=True)
class Options:
    """Fields of a config's group ``optim``; an optimizer reads those that it has.

    Attributes:
      name: one of ``NAMES``.
      lr: learning rate, the peak of its schedule.
      clip: bound of the gradient's global norm; 0: none.
      weight_decay: decoupled for adamw and the matrix optimizers; for the others added
        to the (clipped) gradient, as PyTorch does.
      cautious_weight_decay: adamw, dion, dion2, muon, normuon: decay only where it and
        the update have one sign, see ``add_cautious_weight_decay``.
      schedule: one of ``SCHEDULES``, see ``schedule``.
      warmup: trapezoid, cosine: share of the run in which the rate rises.
      cooldown: trapezoid: share of the run.
      hold: cosine: steps at the full rate before the cosine begins.
      drop_at: drop: steps after which the rate is multiplied by ``drop_by``.
      milestones: drop: the same as shares of the run, instead of ``drop_at``.
      drop_every: drop: the same every so many steps, instead of ``drop_at``.
      drop_by: drop: factor.
      momentum: of sgd; 0: none.
      nesterov: sgd, dion, muon, normuon: the momentum one step ahead; sgd as PyTorch's.
      b1: of Adam, AdamW and Lion.
      b2: of Adam, AdamW and Lion.
      scalar: dion, dion2, muon and normuon: optimizer of all but the hidden matrices,
        adamw or lion.
      scalar_lr: matrix optimizers: learning rate of all but the hidden matrices; 0 uses
        ``lr``.
      mu: matrix optimizers: decay of the momentum.
      momentum_dtype: dion, dion2, muon and normuon; "": that of the parameters.
      rank_fraction: dion: rank / shorter side; dion2: share of the rows.
      rank_multiple_of: dion.
      orthogonalize: dion.
      right_factor: dion.
      residual: dion: weight of what the rank leaves out, see ``scale_by_dion``; 0: none.
      normalize_rows: dion: equal steps for all outputs, see ``scale_by_dion``.
      q_dtype: dion; "": that of the parameters.
      communication_dtype: dion: of P, and of what replicas average; "": float32.
      precision: dion, muon and normuon: of large products on accelerators, see
        ``scale_by_dion``; "": by the state's dtype.

    Raises:
      ValueError: unknown names, or values out of range.
    """

    name: str
    lr: float
    clip: float = 0.0
    weight_decay: float = 0.0
    cautious_weight_decay: bool = False
    schedule: str = "constant"
    warmup: float = 0.0
    cooldown: float = 0.0
    hold: int = 0
    drop_at: tuple[int, ...] = ()
    milestones: tuple[float, ...] = ()
    drop_every: int = 0
    drop_by: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    b1: float = 0.9
    b2: float = 0.999
    scalar: str = "adamw"
    scalar_lr: float = 0.0
    mu: float = 0.95
    momentum_dtype: str = ""
    rank_fraction: float = 1.0
    rank_multiple_of: int = 1
    orthogonalize: str = "scqr"
    right_factor: str = "colnorm"
    residual: float = 0.0
    normalize_rows: bool = False
    q_dtype: str = ""
    communication_dtype: str = ""
    precision: str = ""

    def __post_init__(self):
        options.check_choices(self, "optim", name=NAMES, schedule=SCHEDULES)
        options.check_positive(self, "optim", "lr")
        options.check_least(
            self, "optim", clip=0, weight_decay=0, warmup=0, cooldown=0, hold=0,
            drop_every=0, drop_by=0, momentum=0, scalar_lr=0, residual=0,
        )  # fmt: skip
        if self.warmup + self.cooldown > 1:
            raise ValueError(
                "optim.warmup and optim.cooldown are shares of the run and at most 1 "
                f"together, got {self.warmup} and {self.cooldown}"
            )
        drops = (self.drop_at, self.milestones, self.drop_every)
        if self.schedule == "drop" and sum(map(bool, drops)) != 1:
            raise ValueError(
                "optim.schedule=drop needs optim.drop_at, optim.milestones or "
                f"optim.drop_every, one of them; got {drops[0]}, {drops[1]} and "
                f"{drops[2]}"
            )
        if not all(0 < share < 1 for share in self.milestones):
            raise ValueError(
                "optim.milestones are shares of the run, between 0 and 1, got "
                f"{self.milestones}"
            )
        if self.hold and self.schedule != "cosine":
            raise ValueError(
                f"optim.hold={self.hold} needs optim.schedule=cosine, got "
                f"{self.schedule!r}"
            )
        if self.nesterov and self.name == "sgd" and not self.momentum:
            raise ValueError("optim.nesterov needs optim.momentum > 0, got 0")
        if self.cautious_weight_decay and self.name not in CAUTIOUS:
            raise ValueError(
                f"optim.cautious_weight_decay needs an optim.name of {CAUTIOUS}, got "
                f"{self.name!r}"
            )


def from_config(
    config: Any,
    steps: int,
    *,
    weight_dimension_numbers: Any = None,
    split_sizes: Any = None,
    sharding: Any = None,
    replicate_axis: str | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a config's group ``optim``, gradient clipping included.

    Args:
      config: mapping with the fields of ``Options``; other fields are the caller's.
      steps: optimizer steps of the run, for schedules that are shares of it.
      weight_dimension_numbers: axes of the hidden matrices, see ``scale_by_dion``. With
        it, adamw does not decay embeddings and heads.
      split_sizes: of dion, dion2, muon and normuon, see ``scale_by_dion``.
      sharding: of the same, see ``scale_by_dion``.
      replicate_axis: of dion, see ``scale_by_dion``.

    Raises:
      ValueError: see ``Options`` and the optimizer's own arguments.
    """
    o = read(config)
    tx = unclipped(
        o,
        steps,
        weight_dimension_numbers=weight_dimension_numbers,
        split_sizes=split_sizes,
        sharding=sharding,
        replicate_axis=replicate_axis,
    )
    return optax.chain(optax.clip_by_global_norm(o.clip), tx) if o.clip else tx


def read(config: Any) -> Options:
    """``Options`` of a config's group; fields that it lacks have their defaults."""
    fields = {f.name for f in dataclasses.fields(Options)}
    group = {k: v for k, v in config.items() if k in fields}
    return options.from_config(Options, group, "optim")


def unclipped(
    o: Options, steps: int, *, replicate_axis: str | None = None, **matrices: Any
) -> optax.GradientTransformation:
    """``from_config`` without gradient clipping, for callers that clip themselves."""
    rate = schedule(o, steps)
    if o.name in ("dion", "dion2", "muon", "normuon"):
        return _matrix_optimizer(o, steps, replicate_axis, **matrices)
    numbers = matrices.get("weight_dimension_numbers")
    if o.name == "optax_muon":
        return optax.contrib.muon(
            rate,
            weight_decay=o.weight_decay,
            adam_b1=o.b1,
            adam_b2=o.b2,
            beta=o.mu,
            adam_learning_rate=schedule(o, steps, o.scalar_lr or o.lr),
            muon_weight_dimension_numbers=functools.partial(_optax_numbers, numbers),
        )
    if o.name == "adamw":
        mask = functools.partial(_decays, numbers) if numbers else None
        if o.cautious_weight_decay:
            return optax.chain(
                optax.scale_by_adam(o.b1, o.b2),
                add_cautious_weight_decay(o.weight_decay, mask),
                optax.scale_by_learning_rate(rate),
            )
        return optax.adamw(rate, o.b1, o.b2, weight_decay=o.weight_decay, mask=mask)
    makers: dict[str, Callable] = {
        "adagrad": optax.adagrad,
        "adam": functools.partial(optax.adam, b1=o.b1, b2=o.b2),
        "rmsprop": functools.partial(optax.rmsprop, decay=0.99),  # PyTorch's default.
        "sgd": functools.partial(
            optax.sgd, momentum=o.momentum or None, nesterov=o.nesterov
        ),
    }
    tx = makers[o.name](rate)
    if not o.weight_decay:
        return tx
    return optax.chain(optax.add_decayed_weights(o.weight_decay), tx)


def schedule(o: Options, steps: int, lr: float | None = None) -> optax.ScalarOrSchedule:
    """Learning rate of the options.

    constant; cosine: half a cosine to 0 over the run, or over what ``warmup`` and
    ``hold`` leave of it; drop: multiplied by ``drop_by`` at ``drop_at``, at
    ``milestones`` or every ``drop_every`` steps; trapezoid: see ``trapezoid``.

    Args:
      o: see ``Options``.
      steps: of the run.
      lr: instead of ``o.lr``.

    Raises:
      ValueError: no step is left for the cosine, or two milestones of a short
        run are the same step.
    """
    lr = o.lr if lr is None else lr
    if o.schedule == "cosine":
        return hold_cosine(lr, steps, o.hold, o.warmup)
    if o.schedule == "trapezoid":
        return trapezoid(lr, steps, o.warmup, o.cooldown)
    if o.schedule == "drop" and o.drop_every:
        return optax.exponential_decay(lr, o.drop_every, o.drop_by, staircase=True)
    if o.schedule == "drop":
        drop_at = o.drop_at or tuple(round(share * steps) for share in o.milestones)
        if len(set(drop_at)) < len(drop_at):
            raise ValueError(
                "the rate drops once at a step, got optim.drop_at or optim.milestones "
                f"{o.drop_at or o.milestones} of {steps} steps: steps {drop_at}"
            )
        return optax.piecewise_constant_schedule(lr, dict.fromkeys(drop_at, o.drop_by))
    return lr


def hold_cosine(
    peak: float, steps: int, hold: int = 0, warmup: float = 0.0
) -> optax.Schedule:
    """Linear warm-up, constant rate, then half a cosine to 0.

    Args:
      peak: learning rate between the two.
      steps: of the run.
      hold: steps at that rate before the cosine begins, such as those of a curriculum.
      warmup: share of the steps.

    Raises:
      ValueError: no step is left for the cosine.
    """
    rise = int(warmup * steps)
    if not hold + rise:
        return optax.cosine_decay_schedule(peak, steps)
    if hold + rise >= steps:
        raise ValueError(
            "optim.hold and optim.warmup must leave a step for the cosine, got "
            f"{hold} + {rise} of {steps}"
        )
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / max(rise, 1), peak, max(rise - 1, 1)),
            optax.constant_schedule(peak),
            optax.cosine_decay_schedule(peak, steps - hold - rise),
        ],
        [rise, rise + hold],
    )


def trapezoid(
    peak: float, steps: int, warmup: float = 0.0, cooldown: float = 0.0
) -> optax.Schedule:
    """Linear warm-up, constant rate, linear cool-down to 0.

    Args:
      peak: learning rate between the two.
      steps: of the run.
      warmup: share of the steps.
      cooldown: share of the steps (Dion's paper: 0.2, no warm-up).
    """
    rise, fall = int(warmup * steps), int(cooldown * steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / max(rise, 1), peak, max(rise - 1, 1)),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, peak / max(fall, 1), max(fall - 1, 1)),
        ],
        [rise, steps - fall],
    )


def _matrix_optimizer(o, steps, replicate_axis, **matrices):
    shared: dict[str, Any] = dict(
        matrices,
        mu=o.mu,
        momentum_dtype=o.momentum_dtype or None,
        weight_decay=o.weight_decay,
        cautious_weight_decay=o.cautious_weight_decay,
        scalar=o.scalar,
        scalar_learning_rate=schedule(o, steps, o.scalar_lr or o.lr),
        scalar_b1=o.b1,
        scalar_b2=o.b2,
    )
    rate = schedule(o, steps)
    if o.name == "dion":
        return dion(
            rate,
            rank_fraction=o.rank_fraction,
            rank_multiple_of=o.rank_multiple_of,
            orthogonalize=o.orthogonalize,
            right_factor=o.right_factor,
            nesterov=o.nesterov,
            residual=o.residual or None,
            normalize_rows=o.normalize_rows,
            q_dtype=o.q_dtype or None,
            communication_dtype=o.communication_dtype or None,
            precision=o.precision or None,
            replicate_axis=replicate_axis,
            **shared,
        )
    if o.name == "dion2":
        return dion2(rate, fraction=o.rank_fraction, **shared)
    return (muon if o.name == "muon" else normuon)(
        rate, nesterov=o.nesterov, precision=o.precision or None, **shared
    )


def _decays(numbers, params):
    """True for the leaves with weight decay: all but embeddings and heads."""
    labels = routing.route(params, numbers)
    return jax.tree.map(lambda label: label in ("dion", "scalar"), labels)


def _optax_numbers(numbers, params):
    """optax's dimension numbers of the hidden matrices, None for all other leaves."""
    named, treedef = named_leaves(params)
    axes = dimension_numbers(numbers or DimensionNumbers(), named)
    labels = jax.tree.leaves(routing.route(params, numbers))
    return treedef.unflatten(
        optax.contrib.MuonDimensionNumbers(*a) if a and label == "dion" else None
        for a, label in zip(axes, labels)
    )
