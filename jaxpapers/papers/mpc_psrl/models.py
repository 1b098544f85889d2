"""The model of an episode: what is drawn at its start, and a step of it in planning."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

from jaxpapers.ops import planning
from jaxpapers.ops import posterior as blr
from jaxpapers.ops.environments import Box
from jaxpapers.ops.mesh_axes import auto_axes, batch_axes
from jaxpapers.papers.mpc_psrl import network
from jaxpapers.papers.mpc_psrl.options import Options, Problem


class Regression(NamedTuple):
    """A regression on the features of a network, and what it was made with.

    Attributes:
      posterior: of the weights (D, S).
      noise: (), standard deviation of the targets.
    """

    posterior: Any
    noise: Any


class Known(NamedTuple):
    """What an agent knows, besides its networks.

    Attributes:
      scaler: of the inputs.
      dynamics: regression of the differences of observations; of ``ensemble``: ().
      reward: regression of the reward; with an oracle, and for ``ensemble``: ().
    """

    scaler: network.Scaler
    dynamics: Any
    reward: Any


class Model(NamedTuple):
    """One model of the world, for one episode.

    Attributes:
      params: networks: dynamics and, where it is learned, reward.
      scaler: of their inputs.
      weights: (D, S) of the dynamics; of ``ensemble``: ().
      reward: (D, 1) of the reward, or ().
      noise: (), standard deviation of the dynamics' noise.
      spread: (D, D), a root of the posterior's covariance, or () if not optimistic.
    """

    params: Any
    scaler: network.Scaler
    weights: Any
    reward: Any
    noise: Any
    spread: Any


def draw(key: Key[Array, ""], params: Any, known: Known, options: Options) -> Model:
    """The model of an episode.

    Args:
      key: of the draw; read by ``sample`` only.
      params: networks.
      known: see ``Known``.
      options: see ``Options``.
    """
    if options.agent == "ensemble":
        return Model(params, known.scaler, (), (), jnp.zeros(()), ())
    key_dynamics, key_reward = jax.random.split(key)

    def weights(key, regression):
        if not regression:
            return ()
        post = regression.posterior
        return blr.sample(key, post) if options.agent == "sample" else post.mean

    post = known.dynamics.posterior
    spread = ()
    if options.agent == "optimistic":
        eye = jnp.eye(len(post.root), dtype=post.root.dtype)
        spread = solve_triangular(post.root, eye)
    return Model(
        params,
        known.scaler,
        weights(key_dynamics, known.dynamics),
        weights(key_reward, known.reward),
        known.dynamics.noise,
        spread,
    )


def predict(
    model: Model, observations: Float[Array, "B S"], actions: Float[Array, "B A"]
) -> tuple[Float[Array, "B S"], Float[Array, "B D"]]:
    """Mean of the next observations, and the features that it comes from."""
    x = jnp.concatenate([observations, actions], 1)
    params = model.params["dynamics"]
    z = network.features(params, model.scaler, x)
    bias = network.mean_bias(params)[None]
    return observations + z @ model.weights + bias, z


def reward_of(model: Model, x: Float[Array, "B N"]) -> Float[Array, " B"]:
    """The learned reward of inputs."""
    params = model.params["reward"]
    z = network.features(params, model.scaler, x)
    return (z @ model.reward + network.mean_bias(params)[None])[:, 0]


def evaluator(model: Model, problem: Problem, options: Options) -> planning.Evaluate:
    """Returns of plans in a model, for ``planning.plan``."""
    if options.agent == "ensemble":
        return _ensemble(model, problem, options)

    def step(observations, actions, key):
        given = actions[:, : problem.actions]
        after, z = predict(model, observations, given)
        if options.agent == "optimistic":
            deviation = jnp.sqrt(jnp.square(z @ model.spread).sum(1, keepdims=True))
            after += options.optimism * deviation * actions[:, problem.actions :]
        if options.plan_noise:
            eps = jax.random.normal(key, after.shape, after.dtype)
            after += model.noise * eps
        if options.reward == "oracle":
            assert problem.oracle is not None
            return after, problem.oracle(observations, given)
        return after, reward_of(model, jnp.concatenate([observations, given], 1))

    run = planning.rollout(step)
    return lambda state, plans, key: run(state, spread_plans(plans), key)


def _ensemble(model, problem, options):
    """Plans whose returns are means over particles, each of one network at a time."""
    count, members = options.particles, options.members

    def apply(params, scaler, x):
        return network.heads(params, network.features(params, scaler, x))

    each = jax.vmap(apply, in_axes=(0, None, 0))

    def by_member(x):
        """(P K, N) as (M, P K / M, N): particle k of a plan with network k mod M."""
        plans = x.reshape(-1, members, count // members, x.shape[1])
        return plans.swapaxes(0, 1).reshape(members, -1, x.shape[1])

    def back(x):
        """The inverse."""
        plans = x.reshape(members, -1, count // members, x.shape[2])
        return plans.swapaxes(0, 1).reshape(-1, x.shape[2])

    def step(observations, actions, key):
        key_order, key_noise = jax.random.split(key)
        if options.propagation == "ts1":
            # Particles of a plan are exchangeable: another order, other networks.
            particles = observations.reshape(-1, count, observations.shape[1])
            order = jnp.argsort(jax.random.uniform(key_order, particles.shape[:2]))
            particles = jnp.take_along_axis(particles, order[:, :, None], 1)
            observations = particles.reshape(observations.shape)
        x = by_member(jnp.concatenate([observations, actions], 1))
        mean, logvar = each(model.params["dynamics"], model.scaler, x)
        if options.plan_noise:
            eps = jax.random.normal(key_noise, mean.shape, mean.dtype)
            mean += jnp.exp(logvar / 2) * eps
        after = observations + back(mean)
        if options.reward == "oracle":
            assert problem.oracle is not None
            return after, problem.oracle(observations, actions)
        reward, _ = each(model.params["reward"], model.scaler, x)
        return after, back(reward)[:, 0]

    run = planning.rollout(step)

    def evaluate(state, plans, key):
        repeated = jnp.repeat(plans, count, axis=0)
        returns = run(state, spread_plans(repeated), key)
        return returns.reshape(len(plans), count).mean(1)

    return evaluate


def planner_space(problem: Problem, options: Options) -> Box:
    """Actions, and for ``optimistic`` where in its set the next observation lies."""
    space = problem.environment.action_space
    more = problem.outputs if options.agent == "optimistic" else 0
    return Box((*space.low, *(-1.0,) * more), (*space.high, *(1.0,) * more))


def spread_plans(plans: Float[Array, "P H A"]) -> Float[Array, "P H A"]:
    """Plans divided over the data axes of the mesh, where their number allows it."""
    mesh = jax.sharding.get_abstract_mesh()
    # Inside jax.shard_map, as the members of a population are, they are local.
    axes = batch_axes(auto_axes())
    size = math.prod(mesh.shape[n] for n in axes)
    if size == 1 or len(plans) % size:
        return plans
    return lax.with_sharding_constraint(plans, PartitionSpec(axes))
