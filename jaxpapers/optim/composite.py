"""One optimizer for matrices, AdamW or Lion for all other parameters."""

import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxpapers.optim import routing
from jaxpapers.optim.collectives import mean, replica_dtype
from jaxpapers.optim.layout import make_layout
from jaxpapers.optim.names import is_of_norm
from jaxpapers.optim.options import check_choice, check_flag, check_leaf, check_range
from jaxpapers.optim.paths import aligned, dimension_numbers, named_leaves
from jaxpapers.optim.weight_decay import add_cautious_weight_decay


def with_scalars(
    matrices: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_dimension_numbers: Any = None,
    weight_decay: Any = 0.01,
    weight_decay_mask: Any = None,
    cautious_weight_decay: bool = False,
    scalar: str = "adamw",
    scalar_learning_rate: optax.ScalarOrSchedule | None = None,
    scalar_b1: Any = 0.9,
    scalar_b2: Any = 0.95,
    scalar_eps: Any = 1e-8,
    momentum_dtype: Any = None,
    labels: Any = None,
    replicate_axis: str | None = None,
    communication_dtype: Any = None,
) -> optax.GradientTransformation:
    """Routes matrices to a direction transformation and the rest to AdamW or Lion.

    Args:
      matrices: direction for the leaves labelled ``dion``; averages over
        ``replicate_axis`` itself.
      learning_rate: base learning rate or schedule, decay uses it unscaled.
      weight_dimension_numbers: see ``scale_by_dion``; a None leaf goes to the scalar
        optimizer. Without it only 2-D leaves are matrices.
      weight_decay: decoupled decay of matrices and of the ``scalar`` group; embeddings
        and heads have none.
      weight_decay_mask: tree of bool, or function of the parameters, further
        restricting what decays.
      cautious_weight_decay: decay only where it and the update have one sign, see
        ``add_cautious_weight_decay``.
      scalar: ``adamw`` or ``lion``.
      scalar_learning_rate: default ``learning_rate``.
      scalar_b1: first beta of the scalar optimizer.
      scalar_b2: second beta.
      scalar_eps: AdamW's epsilon.
      momentum_dtype: of the scalar optimizer's first moment.
      labels: replaces the default routing: a tree of ``dion`` | ``scalar`` |
        ``embedding`` | ``head``, or a function of the parameters that returns one.
      replicate_axis: manual mesh axis over which gradients of the other leaves are
        averaged.
      communication_dtype: in which they are sent there, but float16.

    Raises:
      ValueError: bad hyper-parameters.
      TypeError: at ``init``, a leaf that is not of real floating-point numbers.
    """
    check_range("weight_decay", weight_decay, 0)
    check_flag("cautious_weight_decay", cautious_weight_decay)
    check_choice("scalar", scalar, ("adamw", "lion"))
    for name, value in (
        ("learning_rate", learning_rate),
        ("scalar_learning_rate", scalar_learning_rate),
    ):
        if value is not None and not callable(value):
            check_range(name, value, 0)
    for name, beta in (("scalar_b1", scalar_b1), ("scalar_b2", scalar_b2)):
        check_range(name, beta, 0, 1, open_right=True)
    if scalar_learning_rate is None:
        scalar_learning_rate = learning_rate

    mask = aligned(weight_decay_mask, _is_bool, "weight_decay_mask")

    def decay(amount):
        # An array (inject_hyperparams) may become non-zero: the state must not change.
        if not isinstance(amount, jax.Array) and amount == 0:
            return optax.identity()
        if cautious_weight_decay:
            return add_cautious_weight_decay(amount, mask)
        return optax.add_decayed_weights(amount, mask)

    def scalar_direction():
        if scalar == "lion":
            rule = optax.scale_by_lion(scalar_b1, scalar_b2, mu_dtype=momentum_dtype)
        else:
            rule = optax.scale_by_adam(
                scalar_b1, scalar_b2, scalar_eps, mu_dtype=momentum_dtype
            )
        if replicate_axis is not None:
            dtype = replica_dtype(communication_dtype)
            rule = _averaged(rule, replicate_axis, dtype)
        return _with_steady_dtypes(rule)

    scalar_rate = optax.scale_by_learning_rate(scalar_learning_rate)
    head = (
        [_scale_by_fan_in(weight_dimension_numbers)] if scalar == "lion" else []
    )  # The factor belongs to Lion only: with AdamW it starves the head.
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "dion": optax.chain(
            matrices, decay(weight_decay), optax.scale_by_learning_rate(learning_rate)
        ),
        "scalar": optax.chain(scalar_direction(), decay(weight_decay), scalar_rate),
        "embedding": optax.chain(scalar_direction(), scalar_rate),
        "head": optax.chain(scalar_direction(), *head, scalar_rate),
    }

    given = aligned(labels, routing.is_label, "labels")
    told: list[str] = []

    def checked_labels(params):
        # Leaves of the other groups too: optax's AdamW takes complex ones.
        for path, leaf in named_leaves(params)[0]:
            check_leaf(path, leaf, "this optimizer")
        if given is not None:
            return given(params)
        routes, treedef = routing.routes(params, weight_dimension_numbers)
        # At every trace: init, update, each new shape.
        if not told:
            told.extend(routing.warn_left_out(routes))
        return treedef.unflatten([x.group for x in routes])

    return optax.partition(transforms, checked_labels)


def _is_bool(x: Any) -> bool:
    return isinstance(x, bool | np.bool_)


def _averaged(
    rule: optax.GradientTransformation, axis: str, dtype: Any
) -> optax.GradientTransformation:
    """``rule``, with its state, on the mean of the gradients over a manual mesh axis.

    A norm's gain is whole on every device of a replica, which would all send it to the
    other replicas: each sends a part, and the mean is put together again.

    Args:
      rule: of the mean.
      axis: of the mesh.
      dtype: in which they are sent; None: their own.
    """

    def update(updates, state, params=None):
        named, treedef = named_leaves(updates)
        means = []
        for path, g in named:
            parts = _parts(g, axis) if is_of_norm(path) else None
            if parts:
                g = jax.lax.with_sharding_constraint(g, parts)
            g = mean(g, (), (axis,), dtype)
            means.append(jax.lax.with_sharding_constraint(g, P()) if parts else g)
        return rule.update(treedef.unflatten(means), state, params)

    return optax.GradientTransformation(rule.init, update)


def _parts(g: jax.Array, axis: str) -> P | None:
    """Splits g over the Auto axes inside a replica; None where they do not divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    axes = tuple(n for n, kind in kinds if kind == AxisType.Auto and mesh.shape[n] > 1)
    size = math.prod(mesh.shape[n] for n in axes)
    if jax.lax.axis_size(axis) == 1 or size == 1 or not g.ndim or g.shape[-1] % size:
        return None
    return P(*[None] * (g.ndim - 1), axes)


def _with_steady_dtypes(
    rule: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """``rule`` whose state keeps its dtypes, and whose updates have the gradients' or
    the parameters', the wider one.

    Optax's Adam and Lion promote: float32 gradients of bfloat16 parameters change their
    state at the first update, and ``lax.scan`` and ``apply_if_finite`` refuse that.
    """

    def update(updates, state, params=None):
        directions, new = rule.update(updates, state, params)
        like = [updates] if params is None else [updates, params]
        return (
            jax.tree.map(
                lambda d, *x: d.astype(jnp.result_type(*x)), directions, *like
            ),
            jax.tree.map(lambda new, old: new.astype(old.dtype), new, state),
        )

    return optax.GradientTransformation(rule.init, update)


def _scale_by_fan_in(weight_dimension_numbers: Any) -> optax.GradientTransformation:
    """Multiplies by 1/sqrt(fan_in): Lion's learning-rate factor of an output head."""

    def update(updates, params=None):
        del params
        named, treedef = named_leaves(updates)
        dimensions = dimension_numbers(weight_dimension_numbers, named)
        scaled = [
            g / math.sqrt(make_layout(path, g.shape, d).fan_in)
            for (path, g), d in zip(named, dimensions)
        ]
        return treedef.unflatten(scaled)

    return optax.stateless(update)
