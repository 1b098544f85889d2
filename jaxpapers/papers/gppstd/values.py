"""Sampled value functions: draws of Q given the transitions of a buffer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Key

from jaxpapers.ops import gaussian_process as gp
from jaxpapers.ops import posterior as blr
from jaxpapers.ops.linalg import HIGHEST
from jaxpapers.papers.gppstd.buffer import Transitions, stages, states
from jaxpapers.papers.gppstd.options import Options
from jaxpapers.papers.gppstd.problem import Problem


class Values(NamedTuple):
    """Drawn functions, one for each stage; leading axis of every leaf: stages.

    Attributes:
      post: the posteriors that they were drawn from, without observations' targets.
      function: the draws, see ``ops.gaussian_process.Function``.
      target: (rows,) of each stage: y of regression, scaled rewards of differences.
      change: () of each stage: largest change of a target in the last sweep.
      sweeps: () int32 of each stage.
    """

    post: gp.Posterior
    function: gp.Function
    target: Any
    change: Any
    sweeps: Any


def td_targets(
    reward: Float[Array, " n"],
    done: Bool[Array, " n"],
    after: Float[Array, "n K"],
    options: Options,
) -> Float[Array, " n"]:
    """r + gamma (1 - done) max_k Q(s', a_k), within ``options.clip``.

    Args:
      reward: scaled.
      done: whether no value follows.
      after: values of the next state's candidate actions.
      options: gamma and clip.
    """
    y = reward + options.gamma * jnp.where(done, 0, after.max(1))
    return jnp.clip(y, *options.clip) if options.clip else y


def draw_values(
    key: Key[Array, ""],
    model: gp.Model,
    buffer: Transitions,
    problem: Problem,
    options: Options,
) -> Values:
    """One value function for an episode.

    Staged: from the last step to the first, each stage's process is given the targets of
    the function drawn for the next. Stationary: one draw of the prior and of the noise,
    and one factorisation; targets are swept until they settle.

    Args:
      key: of the draw.
      model: hyper-parameters.
      buffer: (stages, rows, ...).
      problem, options: of the agent.
    """
    if options.form == "staged":
        return _staged(key, model, buffer, problem, options)
    rows = jax.tree.map(lambda v: v[0], buffer)
    draw = _temporal if options.likelihood == "temporal" else _stationary
    values = draw(key, model, rows, problem, options)
    return jax.tree.map(lambda v: v[None], values)


def q_values(
    values: Values, q: Float[Array, "M _"], options: Options
) -> Float[Array, " M"]:
    """A stage's function at inputs (state, action)."""
    if options.explore == "rlsvi":
        return gp.evaluate_prior(values.function, q)
    return gp.evaluate(values.function, values.post, q)


def with_actions(
    states: Float[Array, "n D"], actions: Float[Array, "K A"]
) -> Float[Array, "nK _"]:
    """Every state with every action, state by state."""
    n, k = len(states), len(actions)
    return jnp.concatenate([jnp.repeat(states, k, 0), jnp.tile(actions, (n, 1))], 1)


def candidates(
    key: Key[Array, ""], problem: Problem, options: Options
) -> Float[Array, "K A"]:
    """All discrete actions, or as many uniform ones as ``options.candidates``."""
    if problem.actions:
        return jnp.arange(problem.actions, dtype=float)[:, None]
    return jax.vmap(problem.uniform)(jax.random.split(key, options.candidates))


def _prior_draw(key, model, options) -> tuple[gp.Function, Any]:
    """A draw of the prior, and the key of the noise; zero where the mean is followed."""
    key_prior, key_noise = jax.random.split(key)
    function = gp.draw_prior(key_prior, model, options.features)
    if options.explore in ("mean", "epsilon"):
        function = function._replace(weights=jnp.zeros_like(function.weights))
    return function, key_noise


def _staged(key, model, buffer, problem, options) -> Values:
    key_actions, *keys = jax.random.split(key, stages(problem, options) + 1)
    tried = candidates(key_actions, problem, options)

    def stage(after, xs):
        key, rows, last = xs
        q = with_actions(rows.successor, tried)
        known = q_values(after, q, options).reshape(len(rows.mask), len(tried))
        y = td_targets(rows.reward, rows.done | last, known, options)
        y = jnp.where(rows.mask, y, 0)
        function, key_noise = _prior_draw(key, model, options)
        post = gp.fit(model, rows.x, y, rows.mask)
        if options.explore == "rlsvi":
            fitted = _regression(function, rows, options, key_noise)(y)
            function = function._replace(weights=fitted, alpha=jnp.zeros_like(y))
        else:
            function = gp.pathwise(post, function, _noise(key_noise, post, options))
        zero = jnp.zeros((), y.dtype)
        values = Values(post, function, y, zero, jnp.ones((), jnp.int32))
        return values, values

    # The function after the last stage: read by no target, since the last rows are ends.
    shapes = jax.eval_shape(
        lambda: stage(
            _nothing(model, buffer, options),
            (keys[0], jax.tree.map(lambda v: v[0], buffer), False),
        )[0]
    )
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    count = len(buffer.mask)
    xs = (jnp.stack(keys), buffer, jnp.arange(count) == count - 1)
    return lax.scan(stage, start, xs, reverse=True)[1]


def _nothing(model, buffer, options) -> Values:
    """Values of the shapes that a stage's have."""
    rows = jax.tree.map(lambda v: v[0], buffer)
    post = gp.fit(model, rows.x, rows.reward, rows.mask)
    function = gp.draw_prior(jax.random.key(0), model, options.features)
    function = function._replace(alpha=jnp.zeros_like(rows.reward))
    zero = jnp.zeros((), rows.reward.dtype)
    return Values(post, function, rows.reward, zero, jnp.ones((), jnp.int32))


def _noise(key, post, options) -> Array:
    drawn = gp.draw_noise(key, post)
    greedy = options.explore in ("mean", "epsilon")
    return jnp.zeros_like(drawn) if greedy else drawn


def _stationary(key, model, rows, problem, options) -> Values:
    key_actions, key = jax.random.split(key)
    tried = candidates(key_actions, problem, options)
    function, key_noise = _prior_draw(key, model, options)
    post = gp.fit(model, rows.x, rows.reward, rows.mask)
    n, k = len(rows.mask), len(tried)
    q = with_actions(rows.successor, tried)
    prior = gp.evaluate_prior(function, q).reshape(n, k)
    if options.explore == "rlsvi":
        fitted = _regression(function, rows, options, key_noise)
        phi = gp.feature_map(function.features, model, gp.split(model, q)[0])

        def solve(y) -> tuple[gp.Function, Array]:
            drawn = function._replace(weights=fitted(y), alpha=jnp.zeros_like(y))
            weights = drawn.weights
            if problem.actions:
                each = jnp.matmul(phi[::k], weights.T, precision=HIGHEST)
            else:
                each = jnp.matmul(phi, weights, precision=HIGHEST).reshape(n, k)
            return drawn, model.mean + each
    else:
        noise = _noise(key_noise, post, options)
        at_rows = gp.evaluate_prior(function, rows.x)
        added = _cross(post, model, rows, q, problem)

        def solve(y) -> tuple[gp.Function, Array]:
            missing = jnp.where(rows.mask, y - at_rows - noise, 0)
            alpha = gp.solve(post.root, missing)
            return function._replace(alpha=alpha), prior + added(alpha)

    def targets(after):
        y = td_targets(rows.reward, rows.done, after, options)
        return jnp.where(rows.mask, y, 0)

    def sweep(carry):
        y, _, count = carry
        new = targets(solve(y)[1])
        return new, jnp.abs(new - y).max(), count + 1

    def going(carry):
        return (carry[1] > options.tolerance) & (carry[2] < options.sweeps)

    start = targets(prior)
    carry = (start, jnp.full((), jnp.inf, start.dtype), jnp.ones((), jnp.int32))
    y, change, count = lax.while_loop(going, sweep, carry)
    function, _ = solve(y)
    change = jnp.where(jnp.isinf(change), 0, change)
    return Values(gp.refit(post, y), function, y, change, count)


def _cross(post, model, rows, q, problem) -> Callable[[Array], Array]:
    """alpha -> what the data add at every (successor, candidate), (n, K).

    The kernel is computed once; a sweep is a product with it.
    """
    n = len(rows.mask)
    if not problem.actions:
        k = gp.cross(post, q)
        return lambda alpha: jnp.matmul(k, alpha, precision=HIGHEST).reshape(n, -1)
    k = gp.stationary(model, rows.successor, states(rows))
    k = jnp.where(rows.mask[None], k, 0)
    own = rows.x[:, -1:] == jnp.arange(problem.actions)[None]
    return lambda alpha: jnp.matmul(
        k, jnp.where(own, alpha[:, None], 0), precision=HIGHEST
    )


def _regression(function, rows, options, key) -> Callable[[Array], Array]:
    """y -> weights of randomised least squares on the features, (F,) or (A, F).

    Factorised here, once. A draw of the posterior of weights N(0, I) (Osband, Van Roy and
    Wen, "Generalization and exploration via randomized value functions", ICML 2016).
    """
    model = function.model
    inputs, actions = gp.split(model, rows.x)
    phi = gp.feature_map(function.features, model, inputs)
    count = max(model.actions, 1)
    eps = jax.random.normal(key, (count, phi.shape[1]), phi.dtype)
    index = jnp.zeros(len(phi)) if actions is None else actions

    def root(a):
        kept = (rows.mask & (index == a)).astype(phi.dtype)
        # Targets come with the sweeps; the factor does not depend on them.
        stats = blr.statistics(phi, jnp.zeros_like(kept), kept)
        return blr.posterior(stats, 1.0, model.noise).root

    roots = lax.map(root, jnp.arange(count))

    def weights(y):
        def one(pair):
            a, root, eps = pair
            kept = rows.mask & (index == a)
            moment = jnp.matmul(
                phi.T, jnp.where(kept, y - model.mean, 0), precision=HIGHEST
            )
            half = solve_triangular(root, moment / model.noise, trans="T")
            return solve_triangular(root, half + eps)

        drawn = lax.map(one, (jnp.arange(count), roots, eps))
        return drawn if model.actions else drawn[0]

    return weights


def _temporal(key, model, rows, problem, options) -> Values:
    key_actions, key = jax.random.split(key)
    tried = candidates(key_actions, problem, options)
    function, key_noise = _prior_draw(key, model, options)
    reward = jnp.where(rows.mask, rows.reward, 0)

    def conditioned(follower):
        successor = jnp.concatenate([rows.successor, follower], 1)
        post = gp.fit_td(
            model, rows.x, successor, reward, rows.done, options.gamma,
            noise=options.noise, order=rows.time, mask=rows.mask,
        )  # fmt: skip
        noise = gp.draw_td_noise(key_noise, post, options.noise, rows.time)
        if options.explore in ("mean", "epsilon"):
            noise = jnp.zeros_like(noise)
        return post, gp.pathwise(post, function, noise)

    post, drawn = conditioned(rows.follower)

    def relinearised(_, carry):
        """Next actions are the best of the sample: Q-learning in place of SARSA."""
        post, drawn, _ = carry
        q = with_actions(rows.successor, tried)
        best = gp.evaluate(drawn, post, q).reshape(len(reward), len(tried)).argmax(1)
        new, after = conditioned(tried[best])
        change = jnp.abs(after.alpha - drawn.alpha).max()
        return new, after, change

    zero = jnp.zeros((), reward.dtype)
    post, drawn, change = lax.fori_loop(
        0, options.relinearise, relinearised, (post, drawn, zero)
    )
    sweeps = jnp.full((), 1 + options.relinearise, jnp.int32)
    return Values(post, drawn, reward, change, sweeps)


def log_evidence(
    model: gp.Model, values: Values, buffer: Transitions, options: Options
) -> Float[Array, ""]:
    """log p of the targets of ``values``, or of rewards, over all stages.

    Differentiable with respect to the model; targets are constants.
    """

    def one(pair):
        rows, y, link = pair
        if options.likelihood == "temporal":
            given = gp.differences(
                model, rows.x, link.successor, y, rows.done, options.gamma,
                noise=options.noise, order=rows.time, mask=rows.mask,
            )  # fmt: skip
        else:
            given = gp.observations(model, rows.x, y, rows.mask)
        return gp.evidence(model, given)

    return lax.map(one, (buffer, values.target, values.post.link)).sum()


def uncertainty(values: Values, x: Float[Array, "G m _"]) -> Float[Array, "G m"]:
    """Posterior standard deviation of Q at each stage's inputs, (stages, m).

    What bounds the regret of an episode, summed along it (theorem T3 of the docs page).
    """
    return lax.map(lambda pair: jnp.sqrt(gp.predict(*pair)[1]), (values.post, x))
