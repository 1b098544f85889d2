"""Independent runs of one method in one program: 64 seeds of an experiment at once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxpapers.method.protocol import Method, State, WarmStart

AXIS = "data"
"""Mesh axis that the members are divided over."""


def mean_and_spread(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Mean over the members as ``name``, standard deviation as ``name_std``."""
    values = {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}
    means = {name: x.mean(0) for name, x in values.items()}
    return {**means, **{f"{name}_std": x.std(0) for name, x in values.items()}}


def population(
    method: Method,
    n: int,
    *,
    shared_batch: bool = True,
    vectorize: bool | None = None,
    aggregate: Callable[[dict], dict] = mean_and_spread,
) -> Method:
    """n independent members of a method as one method.

    Every leaf of the population's ``State`` but ``step`` has a leading axis of n members.
    Member i is, up to rounding, the run that ``method`` gives with the key
    ``jax.random.split(key, n)[i]``. ``jax.shard_map`` divides the members over the mesh
    axis ``data``, which the method itself must not use.

    Args:
      method: of one member; an update advances its ``step`` by one.
      n: members, a multiple of the size of ``data``.
      shared_batch: all members see the same batch. False: leaves of a batch have a
        leading axis of n, and ``init`` sees shapes only.
      vectorize: members of a device by ``jax.vmap`` (True) or one after another by
        ``lax.map`` (False). None: ``lax.map`` on CPUs, where batched LAPACK calls of
        jaxlib 0.10 can hang, ``jax.vmap`` elsewhere.
      aggregate: metrics of shape (n,) to the metrics that ``update``, ``loss`` and
        ``diagnose`` return. The default suits the trainer, which takes scalars;
        ``lambda metrics: metrics`` keeps those of every member. Whatever a method
        accumulates in ``extra``, e.g. returns, is there per member in any case.

    Returns:
      A method. Its ``loss`` is the mean over the members; ``sampler`` and ``predict``
      return arrays with a leading member axis. A sampler's ``extra`` has to be a keyword
      argument, its other arguments are shared by the members.

    Raises:
      ValueError: n below 1; at trace time, n that the mesh axis does not divide or a
        batch without the member axis; rules of ``method`` that use ``data``.

    Example:
      >>> import optax
      >>> from jaxpapers.method import gradient
      >>> single = gradient(
      ...     lambda key, batch: jax.random.normal(key, (3,)),
      ...     lambda params, batch, key: (((params - batch) ** 2).sum(), {}),
      ...     optax.sgd(0.1),
      ... )
      >>> seeds = population(single, 4)
      >>> state, metrics = seeds.update(seeds.init(jax.random.key(0), 1.0), 1.0)
      >>> state.params.shape, sorted(metrics)[2:4]
      ((4, 3), ['loss', 'loss_std'])
    """
    if n < 1:
        raise ValueError(f"a population must have at least 1 member, got {n}")

    def each(f: Callable, *trees: Any) -> Any:
        """F of every member's part of the trees, results stacked."""

        def one_by_one(*trees):
            return lax.map(lambda parts: f(*parts), trees)

        def local(*trees):
            if vectorize is not None:
                return (jax.vmap(f) if vectorize else one_by_one)(*trees)
            return lax.platform_dependent(*trees, cpu=one_by_one, default=jax.vmap(f))

        devices = dict(jax.sharding.get_abstract_mesh().shape).get(AXIS, 1)
        if n % devices:
            raise ValueError(
                f"a population of {n} does not divide over mesh axis {AXIS!r} of size "
                f"{devices}; nearest size that does: "
                f"{devices * max(round(n / devices), 1)}"
            )
        if devices == 1:
            return local(*trees)
        # Members' loops start from constants, which do not vary over the axis as their
        # results do: the check of varying axes would refuse them.
        return jax.shard_map(
            local,
            in_specs=(P(AXIS),) * len(trees),
            out_specs=P(AXIS),
            axis_names={AXIS},
            check_vma=False,
        )(*trees)

    def with_batch(f: Callable, batch: Any, *trees: Any) -> Any:
        """``each`` for an f whose last argument is the member's batch."""
        if shared_batch:
            return each(lambda *parts: f(*parts, batch), *trees)
        _check_member_axis(batch, n)
        return each(f, *trees, batch)

    def init(key, batch):
        if not shared_batch:
            _check_member_axis(batch, n)
            batch = _member_shapes(batch)
        state = each(lambda key: method.init(key, batch), jax.random.split(key, n))
        return state._replace(step=jnp.zeros((), jnp.int32))

    def update(state, batch):
        def member_update(params, opt_state, extra, key, batch):
            member = State(state.step, params, opt_state, extra, key)
            after, metrics = method.update(member, batch)
            return after[1:], metrics

        after, metrics = with_batch(member_update, batch, *state[1:])
        return State(state.step + 1, *after), aggregate(metrics)

    def loss(params, batch, key):
        values, metrics = with_batch(
            lambda params, key, batch: method.loss(params, batch, key),
            batch, params, jax.random.split(key, n),
        )  # fmt: skip
        return values.mean(), aggregate(metrics)

    def sampler(params, key, *args, extra=None, **kwargs):
        def member_sampler(params, key, extra):
            given = {} if extra is None else {"extra": extra}
            assert method.sampler is not None
            return method.sampler(params, key, *args, **given, **kwargs)

        return each(member_sampler, params, jax.random.split(key, n), extra)

    def predict(params, extra, batch):
        assert method.predict is not None
        return with_batch(method.predict, batch, params, extra)

    def diagnose(params, extra, batch, key):
        diagnose = method.diagnose
        assert diagnose is not None
        metrics = with_batch(
            lambda params, extra, key, batch: diagnose(params, extra, batch, key),
            batch, params, extra, jax.random.split(key, n),
        )  # fmt: skip
        return aggregate(metrics)

    def labels(params):
        assert method.labels is not None
        return method.labels(_member_shapes(params))

    return Method(
        init,
        loss,
        update,
        sampler if method.sampler else None,
        _population_rules(method.rules),
        labels if method.labels else None,
        warm_start=_population_start(method.warm_start, each, n),
        diagnose=diagnose if method.diagnose else None,
        predict=predict if method.predict else None,
        served=method.served,
    )


def member(state: State, index: int) -> State:
    """The state of one member of a population, as its method alone would have it."""
    parts = jax.tree.map(lambda x: x[index], state[1:])
    return State(state.step, *parts)


def _population_start(warm: WarmStart | None, each: Callable, n: int):
    """Every member starts from what its own place in the other population holds."""
    if warm is None:
        return None

    def parts(shapes):
        member_parts = warm.parts(State(shapes.step, *_member_shapes(shapes[1:])))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), member_parts
        )

    def apply(state, restored):
        def member_apply(restored, *parts):
            return warm.apply(State(state.step, *parts), restored)[1:]

        return State(state.step, *each(member_apply, restored, *state[1:]))

    return WarmStart(parts, apply)


def _member_shapes(tree: Any) -> Any:
    """Shapes of one member's part of arrays or shapes with a member axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)


def _check_member_axis(batch: Any, n: int) -> None:
    for path, x in jax.tree_util.tree_flatten_with_path(batch)[0]:
        if x.shape[:1] != (n,):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} must have a leading axis of {n} "
                f"members, got shape {x.shape}; shared_batch=True gives one batch to all"
            )


def _population_rules(rules: Sequence[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    """A method's sharding rules with the member axis in front."""
    functions = [(r, _function_rule(f)) for r, f in rules if callable(f)]
    specs = [(r, _with_member_axis(s)) for r, s in rules if not callable(s)]
    # State of a parameter but of another shape, e.g. factored moments, is divided by
    # members alone.
    other_shapes = (
        "^(opt_state|extra)/",
        lambda path, leaf, param, spec: spec if leaf.shape == param.shape else P(AXIS),
    )
    return (("^step$", P()), *functions, other_shapes, *specs, ("", P(AXIS)))


def _function_rule(rule: Callable) -> Callable:
    def of_member(path, leaf, param, spec):
        leaf, param = _member_shapes((leaf, param))
        return _with_member_axis(rule(path, leaf, param, P(*spec[1:])))

    return of_member


def _with_member_axis(spec: P) -> P:
    names = [n for e in spec for n in ((e,) if isinstance(e, str) else e or ())]
    if AXIS in names:
        raise ValueError(
            f"a population divides its members over mesh axis {AXIS!r}, which the "
            f"method's rule {spec} uses too; take another axis there"
        )
    return P(AXIS, *spec)
