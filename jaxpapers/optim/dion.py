"""Dion as optax transformations: ``scale_by_dion`` (direction), ``dion`` (optimizer).

Reference: Ahn, Xu, Abreu, Fan, Magakyan, Sharma, Zhan, Langford. "Dion: Distributed
Orthonormalized Updates", arXiv 2504.05295, and its code, microsoft/dion. Dion replaces
Muon's Newton-Schulz by one warm-started power iteration per step (``power_iteration``)
and needs no gathered matrix under sharding (``sharded``).

Departures from the reference code, each with its reason:

* P lies on the longer side of a matrix whatever its sharding, so that a run does not
  depend on the mesh (the reference lets the mesh decide); ``p_side`` overrides it.
* ``scqr`` instead of ``rcqr`` by default: never NaN on rank-deficient momentum.
* Whether a momentum is all zero is decided over all shards, not by each.
* NaN gradients give NaN updates; the reference turns them into zero updates.
* Factors are computed in float32 at least, also with bfloat16 state.
"""

import math
import zlib
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim import routing
from jaxpapers.optim.layout import (
    SCALES,
    DimensionNumbers,
    Layout,
    make_layout,
    path_name,
    per_leaf,
)
from jaxpapers.optim.orthonormalize import METHODS
from jaxpapers.optim.power_iteration import RIGHT_FACTORS, StepOptions
from jaxpapers.optim.sharded import (
    find_sharding,
    group_key,
    mesh_step,
    report_unknown,
)


class DionState(NamedTuple):
    """State of ``scale_by_dion``; every leaf is an array, sharded like its parameter.

    Attributes:
      count: number of updates, int32 scalar.
      momentum: M, shaped as the parameters.
      q: right factors Q, (batch axes, axes of the Q side, rank): ``Layout.q_shape``.
    """

    count: jax.Array
    momentum: Any
    q: Any


def scale_by_dion(
    rank_fraction: Any = 1.0,
    rank_multiple_of: Any = 1,
    mu: Any = 0.95,
    eps: Any = 1e-8,
    power_iters: Any = 1,
    orthogonalize: str = "scqr",
    right_factor: str = "colnorm",
    weight_dimension_numbers: Any = None,
    momentum_dtype: Any = None,
    q_dtype: Any = None,
    sharding: Any = None,
    batch: str = "same_shape",
    seed: Any = 0,
    scale: str | None = "spectral",
    noise_guard: Any = 0.0,
    *,
    p_side: Any = "longer",
    unknown_sharding: str = "warn",
) -> optax.GradientTransformation:
    r"""Replaces gradients of matrices by Dion's orthonormalised direction.

    $$ B = M + G,\quad P = \mathrm{orth}(BQ),\quad R = B^\top P,\quad
       M \leftarrow B - (1-\mu) P R^\top,\quad Q \leftarrow R\,\mathrm{diag}
       (1/(\|R_j\| + \epsilon)) $$

    The update is scale * P Q^T. Chain it with ``optax.add_decayed_weights`` and
    ``optax.scale_by_learning_rate``, or use ``dion``.

    "Per leaf" below means: one value, a tree like the parameters, or a function of
    (path, leaf) where path is the leaf's pytree path joined by "/".

    Args:
      rank_fraction: r / min(fan_in, fan_out) in (0, 1], per leaf; r is rounded up.
      rank_multiple_of: r is rounded up to a multiple of it.
      mu: decay of the part of the momentum that the update used.
      eps: added to the column norms of R (absolute).
      power_iters: power iterations per step.
      orthogonalize: ``scqr`` | ``cqr2`` | ``rcqr`` | ``qr``, see ``orthonormalize``.
      right_factor: ``colnorm`` (the paper) or ``orth`` (Orth-Dion, arXiv 2605.16341).
      weight_dimension_numbers: ``DimensionNumbers`` per leaf; default (in, out). Axes
        that are not named are batch axes.
      momentum_dtype: dtype of M; default the parameter's.
      q_dtype: dtype of Q; default that of M.
      sharding: NamedSharding or PartitionSpec per leaf. Needed only inside jit on a
        mesh with Auto axes when ``init`` did not see the sharded arrays.
      batch: ``same_shape`` factorises equal-shaped thin factors of several leaves as
        one batch; ``none`` does each leaf alone. The numbers are the same.
      seed: of Q's normal start, drawn per leaf from (seed, path, shape) alone.
      scale: ``spectral`` (sqrt(fan_out / fan_in), the paper), ``rms`` (root mean square
        0.2 as AdamW's) or None.
      noise_guard: update columns with |R_j| < noise_guard * max |R| are left out; 0
        (the reference) lets rounding noise of rank-deficient momenta become unit
        columns.
      p_side: side of P, per leaf: ``longer``, ``output`` or ``input``.
      unknown_sharding: ``warn`` or ``raise`` where a leaf's sharding cannot be known.

    Returns:
      A ``GradientTransformation`` with ``DionState``; ``update`` ignores ``params``.

    Raises:
      ValueError, TypeError: bad hyper-parameters, leaves that are no real matrices,
        gradients that do not fit the state, shardings that do not fit the mesh.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(scale_by_dion(0.25), optax.scale_by_learning_rate(0.02))
      >>> params = {"kernel": jnp.ones((8, 16))}
      >>> state = tx.init(params)
      >>> state[0].q["kernel"].shape
      (8, 2)
    """
    _check_options(mu, eps, power_iters, orthogonalize, right_factor, batch, scale)
    _check_choice("unknown_sharding", unknown_sharding, ("warn", "raise"))
    _check_range("noise_guard", noise_guard, 0, 1, open_right=True)
    # Shardings of the concrete arrays that init was given, by path: under Auto axes the
    # traced update cannot see them.
    seen: dict[str, NamedSharding] = {}
    told: list[str] = []

    def layouts_of(named, qs=None):
        dimensions = per_leaf(
            weight_dimension_numbers, named, _is_dimensions, "weight_dimension_numbers"
        )
        sides = per_leaf(p_side, named, lambda x: isinstance(x, str), "p_side")
        fractions = per_leaf(rank_fraction, named, _is_number, "rank_fraction")
        layouts = []
        for i, (path, leaf) in enumerate(named):
            _check_leaf(path, leaf)
            rank = None if qs is None else qs[i].shape[-1]
            layout = make_layout(
                path,
                leaf.shape,
                dimensions[i],
                rank_fraction=_static_fraction(path, fractions[i], rank),
                rank_multiple_of=_static_multiple(rank_multiple_of, rank),
                p_side=sides[i],
                rank=rank if _is_traced(fractions[i], rank_multiple_of) else None,
            )
            if qs is not None and qs[i].shape != layout.q_shape:
                raise ValueError(
                    f"{path}: Dion state has Q of shape {qs[i].shape}, expected "
                    f"{layout.q_shape} for rank_fraction={fractions[i]}; the state was "
                    "made with another rank or other dimension numbers: start from "
                    "init, or use the options that made it"
                )
            layouts.append(layout)
        return layouts

    def shardings_of(layouts, leaves):
        named = [(x.path, leaf) for x, leaf in zip(layouts, leaves)]
        declared = per_leaf(sharding, named, _is_sharding, "sharding")
        found = [
            find_sharding(x, leaf, given, seen.get(x.path))
            for x, leaf, given in zip(layouts, leaves, declared)
        ]
        return [s for s, _ in found], [
            x.path for x, (_, known) in zip(layouts, found) if not known
        ]

    def init(params):
        named, treedef = _named_leaves(params)
        layouts = layouts_of(named)
        leaves = [leaf for _, leaf in named]
        for path, leaf in named:
            if isinstance(leaf, jax.core.Tracer):
                continue
            seen.pop(path, None)
            actual = getattr(leaf, "sharding", None)
            if isinstance(actual, NamedSharding):
                seen[path] = actual
        found = shardings_of(layouts, leaves)[0]
        momentum, q = [], []
        for layout, leaf, where in zip(layouts, leaves, found):
            m_dtype = jnp.dtype(momentum_dtype or leaf.dtype)
            m = jnp.zeros_like(leaf, dtype=m_dtype)
            momentum.append(m if where is None else _constrain(m, where))
            q.append(_init_q(layout, seed, q_dtype or m_dtype, where, leaf))
        return DionState(
            jnp.zeros((), jnp.int32), treedef.unflatten(momentum), treedef.unflatten(q)
        )

    def update(updates, state, params=None):
        del params
        named, treedef = _named_leaves(updates)
        if treedef != jax.tree.structure(state.momentum):
            raise ValueError(
                "dion: gradients and state have different structures: got "
                f"{treedef}, expected {jax.tree.structure(state.momentum)}; call init "
                "with the parameters that these gradients belong to"
            )
        momenta = jax.tree.leaves(state.momentum)
        qs = jax.tree.leaves(state.q)
        for (path, g), m in zip(named, momenta):
            if g.shape != m.shape:
                raise ValueError(
                    f"{path}: gradient has shape {g.shape}, the state's momentum "
                    f"{m.shape}; call init with the parameters of these gradients"
                )
        layouts = layouts_of(named, qs)
        found, unknown = shardings_of(layouts, momenta)
        if unknown and (unknown_sharding == "raise" or not told):
            told.append(unknown[0])
            report_unknown(unknown, unknown_sharding)
        groups: dict[Any, list[int]] = {}
        for i, (layout, where) in enumerate(zip(layouts, found)):
            key = group_key(layout, where, momenta[i].dtype)
            groups.setdefault(key if batch == "same_shape" else i, []).append(i)
        options = StepOptions(
            mu, eps, noise_guard, power_iters, orthogonalize, right_factor
        )
        outputs: list[Any] = [None] * len(layouts)
        for members in groups.values():
            done = mesh_step(
                [layouts[i] for i in members],
                [found[i] for i in members],
                [named[i][1] for i in members],
                [momenta[i] for i in members],
                [qs[i] for i in members],
                options,
            )
            for i, direction, m, q in zip(members, *done):
                outputs[i] = (
                    (layouts[i].update_scale(scale) * direction).astype(
                        named[i][1].dtype
                    ),
                    m.astype(momenta[i].dtype),
                    q.astype(qs[i].dtype),
                )
        directions, new_momenta, new_qs = zip(*outputs) if outputs else ((), (), ())
        return treedef.unflatten(directions), DionState(
            jnp.asarray(optax.safe_increment(state.count)),
            treedef.unflatten(new_momenta),
            treedef.unflatten(new_qs),
        )

    return optax.GradientTransformation(init, update)


def dion(
    learning_rate: optax.ScalarOrSchedule,
    rank_fraction: Any = 1.0,
    rank_multiple_of: Any = 1,
    mu: Any = 0.95,
    eps: Any = 1e-8,
    power_iters: Any = 1,
    orthogonalize: str = "scqr",
    right_factor: str = "colnorm",
    weight_dimension_numbers: Any = None,
    momentum_dtype: Any = None,
    q_dtype: Any = None,
    sharding: Any = None,
    batch: str = "same_shape",
    seed: Any = 0,
    scale: str | None = "spectral",
    noise_guard: Any = 0.0,
    *,
    p_side: Any = "longer",
    unknown_sharding: str = "warn",
    weight_decay: Any = 0.01,
    weight_decay_mask: Any = None,
    scalar: str = "adamw",
    scalar_learning_rate: optax.ScalarOrSchedule | None = None,
    scalar_b1: Any = 0.9,
    scalar_b2: Any = 0.95,
    scalar_eps: Any = 1e-8,
    labels: Any = None,
) -> optax.GradientTransformation:
    r"""Dion for hidden matrices, AdamW or Lion for everything else.

    $$ X \leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\, P Q^\top $$

    Routing is by path and shape (``routing.route``): matrices go to Dion; embeddings,
    output heads, norms and biases to the scalar optimizer, whose learning-rate factor
    is 1, except that Lion's for a head is 1/sqrt(fan_in) (the paper's scaling table).
    ``routing.table`` prints what went where.

    Args:
      learning_rate: base learning rate or schedule, decay uses it unscaled.
      rank_fraction: see ``scale_by_dion``, as are all arguments up to
        ``unknown_sharding``.
      rank_multiple_of: see ``scale_by_dion``.
      mu: see ``scale_by_dion``.
      eps: see ``scale_by_dion``.
      power_iters: see ``scale_by_dion``.
      orthogonalize: see ``scale_by_dion``.
      right_factor: see ``scale_by_dion``.
      weight_dimension_numbers: see ``scale_by_dion``; a None leaf goes to the scalar
        optimizer. Without it only 2-D leaves go to Dion, and a warning names others
        that look like matrices.
      momentum_dtype: see ``scale_by_dion``; also the scalar optimizer's first moment.
      q_dtype: see ``scale_by_dion``.
      sharding: see ``scale_by_dion``.
      batch: see ``scale_by_dion``.
      seed: see ``scale_by_dion``.
      scale: see ``scale_by_dion``.
      noise_guard: see ``scale_by_dion``.
      p_side: see ``scale_by_dion``.
      unknown_sharding: see ``scale_by_dion``.
      weight_decay: decoupled decay of matrices and of the ``scalar`` group; embeddings
        and heads have none.
      weight_decay_mask: tree of bool, or function of the parameters, further
        restricting what decays.
      scalar: ``adamw`` or ``lion``.
      scalar_learning_rate: default ``learning_rate``.
      scalar_b1: first beta of the scalar optimizer.
      scalar_b2: second beta.
      scalar_eps: AdamW's epsilon.
      labels: replaces the default routing: a tree of ``dion`` | ``scalar`` |
        ``embedding`` | ``head``, or a function of the parameters that returns one.

    Returns:
      A ``GradientTransformation``; ``update`` needs ``params`` if ``weight_decay`` > 0.

    Raises:
      ValueError, TypeError: see ``scale_by_dion``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), dion(0.02, 0.25))
      >>> params = {"dense": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones((16,))}}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
    """
    _check_range("weight_decay", weight_decay, 0)
    _check_choice("scalar", scalar, ("adamw", "lion"))
    for name, value in (
        ("learning_rate", learning_rate),
        ("scalar_learning_rate", scalar_learning_rate),
    ):
        if value is not None and not callable(value):
            _check_range(name, value, 0)
    for name, beta in (("scalar_b1", scalar_b1), ("scalar_b2", scalar_b2)):
        _check_range(name, beta, 0, 1, open_right=True)
    if scalar_learning_rate is None:
        scalar_learning_rate = learning_rate

    def decay(amount):
        # An array (inject_hyperparams) may become non-zero: the state must not change.
        if isinstance(amount, jax.Array) or amount != 0:
            return optax.add_decayed_weights(amount, weight_decay_mask)
        return optax.identity()

    def scalar_direction():
        if scalar == "lion":
            return optax.scale_by_lion(scalar_b1, scalar_b2, mu_dtype=momentum_dtype)
        return optax.scale_by_adam(
            scalar_b1, scalar_b2, scalar_eps, mu_dtype=momentum_dtype
        )

    scalar_rate = optax.scale_by_learning_rate(scalar_learning_rate)
    matrices = scale_by_dion(
        rank_fraction,
        rank_multiple_of,
        mu,
        eps,
        power_iters,
        orthogonalize,
        right_factor,
        weight_dimension_numbers,
        momentum_dtype,
        q_dtype,
        sharding,
        batch,
        seed,
        scale,
        noise_guard,
        p_side=p_side,
        unknown_sharding=unknown_sharding,
    )
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
    if labels is None:

        def labels(params):
            return routing.route(params, weight_dimension_numbers)

    return optax.partition(transforms, labels)


def dion_state_sharding(
    state: Any,
    params: Any,
    params_sharding: Any,
    *,
    weight_dimension_numbers: Any = None,
    p_side: Any = "longer",
) -> Any:
    """Shardings for an optimizer state that contains Dion's, on the parameters' mesh.

    Q has a shape of its own, so rules that go by the parameter's shape or path miss it:
    it takes the specs of the batch and Q-side axes, its rank axis is whole. Every other
    leaf whose path ends in a parameter's path takes that parameter's sharding; the rest
    (counts) is replicated.

    Args:
      state: arrays or ``jax.eval_shape(tx.init, params)``; any nesting of optax states.
      params: the parameters, or their shapes.
      params_sharding: tree of NamedSharding like ``params``.
      weight_dimension_numbers: as given to ``dion``.
      p_side: as given to ``dion``.

    Returns:
      Tree of NamedSharding like ``state``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = {"kernel": jnp.ones((8, 16))}
      >>> state = jax.eval_shape(scale_by_dion(0.5).init, params)
      >>> where = {"kernel": NamedSharding(mesh, P(None, "data"))}
      >>> dion_state_sharding(state, params, where).q["kernel"].spec == P(None, None)
      True
    """
    named, _ = _named_leaves(params)
    shardings = dict(_named_leaves(params_sharding)[0])
    table = {path: (leaf, shardings[path]) for path, leaf in named}
    mesh = next(iter(shardings.values())).mesh
    whole: Any = NamedSharding(mesh, P())
    rule = q_rule(weight_dimension_numbers, p_side=p_side)[1]

    def like_parameter(path, leaf):
        name = path_name(path)
        # The longest, as "block/kernel" ends in "kernel" too.
        owners = [p for p in table if name == p or name.endswith("/" + p)]
        if owners:
            param, where = table[max(owners, key=len)]
            if leaf.shape == param.shape:
                return where
        return whole

    def like_q(path, leaf):
        name = path_name(path)
        param, where = table[name]
        return NamedSharding(mesh, rule(name, leaf, param, where.spec))

    def node(path, x):
        # Found by its type: a parameter may be called "q" as well.
        if not isinstance(x, DionState):
            return like_parameter(path, x)
        return x._replace(
            count=whole,
            momentum=jax.tree_util.tree_map_with_path(like_parameter, x.momentum),
            q=jax.tree_util.tree_map_with_path(like_q, x.q),
        )

    return jax.tree_util.tree_map_with_path(
        node, state, is_leaf=lambda x: isinstance(x, DionState)
    )


def q_rule(
    weight_dimension_numbers: Any = None, *, p_side: Any = "longer"
) -> tuple[str, Callable[..., P]]:
    """Sharding rule for Dion's Q: (regex of its path, function giving its spec).

    The function takes (path of the parameter, Q, parameter, the parameter's spec). Put
    the rule before those of the parameters.
    """

    def spec(path, q, param, param_spec):
        named = [(path, param)]
        layout = make_layout(
            path,
            param.shape,
            per_leaf(weight_dimension_numbers, named, _is_dimensions, "dimensions")[0],
            p_side=per_leaf(p_side, named, lambda x: isinstance(x, str), "p_side")[0],
            rank=q.shape[-1],
        )
        return layout.q_spec(param_spec)

    return r"(^|/)q/", spec


def _init_q(layout: Layout, seed: Any, dtype: Any, where: NamedSharding | None, like):
    """i.i.d. normal Q from (seed, path, shape): equal on every mesh, in any order."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(layout.path.encode()))

    def draw(key):
        return jax.random.normal(key, layout.q_shape, jnp.float32).astype(dtype)

    if where is None:
        return draw(key)
    where = NamedSharding(where.mesh, layout.q_spec(where.spec))
    if isinstance(like, jax.core.Tracer):
        return _constrain(draw(key), where)
    return jax.jit(draw, out_shardings=where)(key)


def _scale_by_fan_in(weight_dimension_numbers: Any) -> optax.GradientTransformation:
    """Multiplies by 1/sqrt(fan_in): Lion's learning-rate factor of an output head."""

    def update(updates, params=None):
        del params
        named, treedef = _named_leaves(updates)
        dimensions = per_leaf(
            weight_dimension_numbers, named, _is_dimensions, "weight_dimension_numbers"
        )
        scaled = [
            g / math.sqrt(make_layout(path, g.shape, d).fan_in)
            for (path, g), d in zip(named, dimensions)
        ]
        return treedef.unflatten(scaled)

    return optax.stateless(update)


def _named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [(path_name(path), leaf) for path, leaf in flat], treedef


def _is_dimensions(x: Any) -> bool:
    return x is None or isinstance(x, DimensionNumbers)


def _is_sharding(x: Any) -> bool:
    return x is None or isinstance(x, P | jax.sharding.Sharding)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | jax.Array) or hasattr(x, "dtype")


def _is_traced(*values: Any) -> bool:
    return any(isinstance(v, jax.core.Tracer) for v in values)


def _check_options(mu, eps, power_iters, orthogonalize, right_factor, batch, scale):
    _check_range("mu", mu, 0, 1)
    _check_range("eps", eps, 0)
    _check_range("power_iters", power_iters, 1)
    if not jnp.issubdtype(jnp.result_type(power_iters), jnp.integer):
        raise ValueError(f"power_iters must be an integer, got {power_iters}")
    _check_choice("orthogonalize", orthogonalize, METHODS)
    _check_choice("right_factor", right_factor, RIGHT_FACTORS)
    _check_choice("batch", batch, ("same_shape", "none"))
    _check_choice("scale", scale, SCALES)


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_range(
    name: str,
    value: Any,
    low: int | float,
    high: int | float = math.inf,
    *,
    open_right: bool = False,
) -> None:
    if _is_traced(value) or callable(value):
        return
    value = float(value)
    if not low <= value <= high or (open_right and value == high):
        bound = ")" if open_right or high == math.inf else "]"
        raise ValueError(f"{name} must be in [{low}, {high}{bound}, got {value}")


def _check_leaf(path: str, leaf: Any) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"{path}: Dion needs real floating-point leaves, got {leaf.dtype}; keep it "
            "out with optax.masked, or give it to another optimizer"
        )


def _static_fraction(path: str, fraction: Any, rank: int | None) -> float:
    """rank_fraction as a float; may be traced once the state fixes the rank."""
    if _is_traced(fraction):
        if rank is None:
            raise ValueError(_STATIC.format(name="rank_fraction"))
        return 1.0
    if not 0 < float(fraction) <= 1:
        raise ValueError(
            f"{path}: rank_fraction must be in (0, 1], got {float(fraction)}"
        )
    return float(fraction)


def _static_multiple(multiple: Any, rank: int | None) -> int:
    if _is_traced(multiple):
        if rank is None:
            raise ValueError(_STATIC.format(name="rank_multiple_of"))
        return 1
    if int(multiple) != multiple or multiple < 1:
        raise ValueError(f"rank_multiple_of must be an integer >= 1, got {multiple}")
    return int(multiple)


_STATIC = (
    "{name} shapes the state and cannot be traced; with optax.inject_hyperparams pass "
    "static_args=('rank_fraction', 'rank_multiple_of'), or call init outside jit"
)


def _constrain(x: jax.Array, where: NamedSharding) -> jax.Array:
    """Gives a traced or concrete value the sharding."""
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, where)
    if AxisType.Explicit in where.mesh.axis_types:
        return jax.sharding.reshard(x, where)
    return jax.lax.with_sharding_constraint(x, where)
