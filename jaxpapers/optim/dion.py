"""Dion as optax transformations: ``scale_by_dion`` (direction), ``dion`` (optimizer).

Reference: Ahn, Xu, Abreu, Fan, Magakyan, Sharma, Zhan, Langford. "Dion: Distributed
Orthonormalized Updates", arXiv 2504.05295, and its code, microsoft/dion. Dion replaces
Muon's Newton-Schulz by one warm-started power iteration per step (``power_iteration``)
and needs no gathered matrix under sharding (``sharded``); where many devices split the
shorter side, exchanging whole ones sends less, and it does (``exchange``).

Departures from the reference code, each with its reason:

* P lies on the longer side of a matrix whatever its sharding, so that a run does not
  depend on the mesh (the reference lets the mesh decide); ``p_side`` overrides it.
* ``scqr`` instead of ``rcqr`` by default: never NaN on rank-deficient momentum.
* Whether a momentum is all zero is decided over all shards, not by each.
* NaN gradients give NaN updates; the reference turns them into zero updates.
* Columns of R that are rounding error carry nothing; the reference and the paper make
  them unit columns of the update (``noise_guard=0`` does).
* Factors are computed in float32 at least, also with bfloat16 state.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpapers.optim.collectives import mean, replica_dtype
from jaxpapers.optim.composite import with_scalars
from jaxpapers.optim.dion_leaves import (
    DionState,
    check_beyond_paper,
    check_options,
    check_program,
    dion_blocks,
    init_momentum,
    init_q,
    own_momentum,
    q_names,
    read_layouts,
)
from jaxpapers.optim.dion_step import StepOptions
from jaxpapers.optim.fused import by_leaf
from jaxpapers.optim.matrices import check_shapes, step_leaves
from jaxpapers.optim.options import check_dtype, check_paths, leaf_dtype
from jaxpapers.optim.paths import named_leaves, with_leaves
from jaxpapers.optim.placement import Placement
from jaxpapers.optim.replicas import check_axis
from jaxpapers.optim.sharded import leaf_spec, q_spec


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
    noise_guard: Any = None,
    *,
    nesterov: bool = False,
    residual: Any = None,
    normalize_rows: bool = False,
    replicate_axis: str | None = None,
    split_sizes: Any = None,
    p_side: Any = "longer",
    split_p: str = "auto",
    communication_dtype: Any = None,
    precision: str | None = None,
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
      mu: decay of the part of the momentum that the update used; with ``residual`` of all
        of it.
      eps: added to the column norms of R (and to the residual's). It is absolute, as the
        reference's: a matrix whose |R_j| are far below it (gradients of 1e-12) hardly
        moves. With 0 the update does not depend on the gradient's scale, from 1e-30 (the
        residual from 1e-27) to 1e38.
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
      noise_guard: update columns with |R_j| < noise_guard * max |R| are left out. Where
        a momentum's rank is below r, the columns that are left are rounding error, which
        differs from mesh to mesh. None leaves them out (1024 unit round-offs, 1.2e-4 in
        float32), Q keeps the columns that it had, and the update is that of the signal;
        0 (the reference) makes unit columns of them.
      nesterov: factorise mu B + G, the momentum one step ahead, in place of B.
      residual: weight w of what the rank leaves out, see ``residual``; 1 gives the update
        the root mean square of Muon's; None is error feedback. Not with
        ``replicate_axis``.
      normalize_rows: the update's rows of all outputs get equal norms, as NorMuon's
        without a running mean (``neurons``).
      replicate_axis: mesh axis whose devices compute gradients of their own data. Call
        ``update`` inside ``jax.shard_map`` over this axis with the gradients that are
        not averaged: P and R are, where they are fewer numbers than the gradient,
        else the gradient is. The result is that of the averaged gradient. See
        ``replicas`` for the state's form.
      split_sizes: sizes of fused matrices along the first output axis, per leaf: (2048,
        512, 512) of q, k and v in one kernel; None: one matrix. See ``fused``.
      p_side: side of P, per leaf: ``longer``, ``output`` or ``input``.
      split_p: how devices that split P's columns share the work. ``auto``: a share of the
        matrices each, exchanged whole, where that sends less than P does (``exchange``),
        else by shares of P's orthonormalisation; ``thin``: the latter always, so that
        only factors cross (also where a slow network is among what splits the columns);
        ``whole``: each orthonormalises all of P. Traced ``power_iters`` decide as 1.
      communication_dtype: see ``power_iterate``; of gradients that replicas average too.
        Whole matrices that are exchanged stay as they are.
      precision: of the products with matrices of the leaf's size: ``default``, ``high``
        or ``highest``, on a TPU one, three or six bfloat16 passes. None: ``high`` for
        float32 state, ``default`` for 16-bit state. Gram matrices and triangular factors
        always have ``highest``. It changes nothing on a CPU.
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
      >>> state = jax.jit(tx.init)(params)
      >>> state[0].q["kernel"].shape
      (8, 2)
    """
    check_options(mu, eps, power_iters, orthogonalize, right_factor, batch, scale)
    check_beyond_paper(nesterov, residual, normalize_rows, replicate_axis)
    check_program(split_p, precision, unknown_sharding, noise_guard)
    check_dtype("momentum_dtype", momentum_dtype)
    check_dtype("q_dtype", q_dtype)
    check_dtype("communication_dtype", communication_dtype)
    placement = Placement(sharding, unknown_sharding)

    layouts_of = functools.partial(
        read_layouts,
        weight_dimension_numbers=weight_dimension_numbers,
        rank_fraction=rank_fraction,
        rank_multiple_of=rank_multiple_of,
        split_sizes=split_sizes,
        p_side=p_side,
    )

    def init(params):
        named, _ = named_leaves(params)
        layouts = layouts_of(named)
        leaves = [leaf for _, leaf in named]
        placement.see(named)
        momentum, q, m_names = [], [], []
        for layout, leaf, where in zip(
            layouts, leaves, placement.find(layouts, leaves)
        ):
            dtype = jnp.dtype(momentum_dtype or leaf_dtype(leaf))
            m, names = init_momentum(layout, dtype, where, leaf, replicate_axis)
            momentum.append(m)
            m_names.append(names)
            q.append(init_q(layout, seed, q_dtype or dtype, where, leaf))
        return DionState(
            jnp.zeros((), jnp.int32),
            with_leaves(params, momentum, m_names),
            with_leaves(params, q, [q_names(x) for x in layouts]),
        )

    def update(updates, state, params=None):
        del params
        named, treedef = named_leaves(updates)
        check_paths("dion", named, named_leaves(state.momentum)[0])
        grads = [jnp.asarray(g) for _, g in named]
        check_shapes(named, jax.tree.leaves(state.momentum), bool(replicate_axis))
        layouts = layouts_of(named, named_leaves(state.q)[0])
        qs = by_leaf(layouts, jax.tree.leaves(state.q))
        if replicate_axis:
            check_axis(replicate_axis)
            wide = replica_dtype(communication_dtype)
            grads = [
                g if layout.compresses else mean(g, (), (replicate_axis,), wide)
                for layout, g in zip(layouts, grads)
            ]
        axes = (replicate_axis,) if replicate_axis else ()
        replicas = [axes if x.compresses else () for x in layouts]
        momenta = [
            own_momentum(layout, m, bool(over))
            for layout, m, over in zip(
                layouts, jax.tree.leaves(state.momentum), replicas
            )
        ]
        options = StepOptions(
            mu, eps, noise_guard, power_iters, orthogonalize, right_factor, split_p,
            communication_dtype and jnp.dtype(communication_dtype), nesterov, residual,
            normalize_rows, precision,
        )  # fmt: skip
        directions, (momenta, qs) = step_leaves(
            dion_blocks,
            layouts,
            placement.find(layouts, momenta, report=True),
            grads,
            [momenta, qs],
            [leaf_spec, q_spec],
            options,
            scale=scale,
            key=lambda x: 0 if batch == "same_shape" else x.path,
            replicas=replicas,
        )
        momenta = [m[None] if over else m for over, m in zip(replicas, momenta)]
        # In the boxes of the state, which may be others than those of the gradients.
        return treedef.unflatten(directions), DionState(
            jnp.asarray(optax.safe_increment(state.count)),
            jax.tree.structure(state.momentum).unflatten(momenta),
            jax.tree.structure(state.q).unflatten(jax.tree.leaves(qs)),
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
    noise_guard: Any = None,
    *,
    nesterov: bool = False,
    residual: Any = None,
    normalize_rows: bool = False,
    replicate_axis: str | None = None,
    split_sizes: Any = None,
    p_side: Any = "longer",
    split_p: str = "auto",
    communication_dtype: Any = None,
    precision: str | None = None,
    unknown_sharding: str = "warn",
    weight_decay: Any = 0.01,
    weight_decay_mask: Any = None,
    cautious_weight_decay: bool = False,
    scalar: str = "adamw",
    scalar_learning_rate: optax.ScalarOrSchedule | None = None,
    scalar_b1: Any = 0.9,
    scalar_b2: Any = 0.95,
    scalar_eps: Any = 1e-8,
    labels: Any = None,
) -> optax.GradientTransformation:
    r"""Dion for hidden matrices, AdamW or Lion for all other parameters.

    $$ X \leftarrow (1 - \eta\lambda) X - \eta \sqrt{m/n}\, P Q^\top $$

    Routing is by path and shape (``routing.route``): matrices go to Dion; embeddings,
    output heads, norms and biases to the scalar optimizer, whose learning-rate factor
    is 1, except that Lion's for a head is 1/sqrt(fan_in) (the paper's scaling table).
    ``routing_table`` prints what went where.

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
      nesterov: see ``scale_by_dion``.
      residual: see ``scale_by_dion``.
      normalize_rows: see ``scale_by_dion``.
      replicate_axis: see ``scale_by_dion``; gradients of the other leaves are averaged
        over it.
      split_sizes: see ``scale_by_dion``.
      p_side: see ``scale_by_dion``.
      split_p: see ``scale_by_dion``.
      communication_dtype: see ``scale_by_dion``.
      precision: see ``scale_by_dion``.
      unknown_sharding: see ``scale_by_dion``.
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
      >>> state = jax.jit(tx.init)(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
    """
    matrices = scale_by_dion(
        rank_fraction,
        rank_multiple_of=rank_multiple_of,
        mu=mu,
        eps=eps,
        power_iters=power_iters,
        orthogonalize=orthogonalize,
        right_factor=right_factor,
        weight_dimension_numbers=weight_dimension_numbers,
        momentum_dtype=momentum_dtype,
        q_dtype=q_dtype,
        sharding=sharding,
        batch=batch,
        seed=seed,
        scale=scale,
        noise_guard=noise_guard,
        nesterov=nesterov,
        residual=residual,
        normalize_rows=normalize_rows,
        replicate_axis=replicate_axis,
        split_sizes=split_sizes,
        p_side=p_side,
        split_p=split_p,
        communication_dtype=communication_dtype,
        precision=precision,
        unknown_sharding=unknown_sharding,
    )
    return with_scalars(
        matrices,
        learning_rate,
        weight_dimension_numbers=weight_dimension_numbers,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        cautious_weight_decay=cautious_weight_decay,
        scalar=scalar,
        scalar_learning_rate=scalar_learning_rate,
        scalar_b1=scalar_b1,
        scalar_b2=scalar_b2,
        scalar_eps=scalar_eps,
        momentum_dtype=momentum_dtype,
        labels=labels,
        replicate_axis=replicate_axis,
        communication_dtype=communication_dtype,
    )
