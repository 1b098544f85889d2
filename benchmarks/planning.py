"""One plan by the cross-entropy method beside NumPy and mbrl-lib; environment steps.

    pip install 'jaxpapers[rl]'
    pip install --target FOLDER torch mbrl==0.2.0     # in an environment of its own
    PYTHONPATH=FOLDER python benchmarks/planning.py     a minute; without mbrl-lib too

A plan of the paper's size for the cart-pole: 500 sequences of 30 actions, 5 iterations,
75,000 evaluations of a network of 5-200-200-10 and the regression's mean. mbrl-lib plans
with its own optimizer on its own network of those layers, which has another head. One
thread each, the same process, in turn. Environments: 1,024 pendulums at once, beside
gymnasium's vector environments. Writes results/planning.json beside this.
"""

import json
import os
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
for name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{name}_NUM_THREADS", "1")

import gymnasium  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402
from timing import header, measure  # noqa: E402

from jaxpapers.ops import environments as envs  # noqa: E402
from jaxpapers.ops import planning  # noqa: E402
from jaxpapers.papers import mpc_psrl as psrl  # noqa: E402
from jaxpapers.papers.mpc_psrl import network  # noqa: E402

OUT = Path(__file__).parent / "results" / "planning.json"
OPTIONS = planning.Options(stop=0.0)
REPETITIONS, ENVIRONMENTS, STEPS = 5, 1024, 200


def model() -> psrl.Model:
    """A network with the paper's sizes and weights of a regression on it."""
    net, problem = psrl.Net(), psrl.Problem(envs.STOCHASTIC_CART_POLE)
    sizes = net.sizes(problem.inputs, net.hidden)
    params = network.init(jax.random.key(0), sizes, problem.outputs)
    weights = 0.01 * jax.random.normal(jax.random.key(1), (sizes[-1], problem.outputs))
    scaler = network.Scaler(jnp.zeros(problem.inputs), jnp.ones(problem.inputs))
    noise = jnp.asarray(1e-3)
    return psrl.Model({"dynamics": params}, scaler, weights, (), noise, ())


def ours():
    """Our plan as a function without arguments, and seconds of its compilation."""
    problem = psrl.Problem(envs.STOCHASTIC_CART_POLE, psrl.rewards.cart_pole)
    space = problem.environment.action_space
    drawn, options = model(), psrl.Options()

    def plan(state, warm, key, drawn):
        evaluate = psrl.evaluator(drawn, problem, options)
        return planning.plan(evaluate, state, key, warm, OPTIONS, space).action

    args = (jnp.zeros(4), planning.start(OPTIONS, space), jax.random.key(0), drawn)
    began = time.perf_counter()
    compiled = jax.jit(plan).lower(*args).compile()
    seconds = time.perf_counter() - began
    return lambda: jax.block_until_ready(compiled(*args)), seconds


def in_numpy(dtype: type):
    """The same plan, with all sequences of a step in one product."""
    drawn = jax.tree.map(lambda x: np.asarray(x, dtype), jax.device_get(model()))
    params = drawn.params["dynamics"]
    layers = [params[f"layer_{i}"] for i in range(4)]
    rng, o = np.random.default_rng(0), OPTIONS
    truncated = stats.truncnorm(-2, 2)

    def returns(plans):
        s, total = (
            np.zeros((len(plans), 4), np.float32),
            np.zeros(len(plans), np.float32),
        )
        for t in range(o.horizon):
            total += np.cos(s[:, 2]) - 0.01 * s[:, 0] ** 2
            h = np.concatenate([s, plans[:, t]], 1)
            for layer in layers[:-1]:
                h = h @ layer["kernel"] + layer["bias"]
                h = h / (1 + np.exp(-h))
            eps = rng.standard_normal(s.shape, dtype)
            s = s + h @ drawn.weights + layers[-1]["bias"][:4] + drawn.noise * eps
        return total

    def plan():
        mean = np.zeros((o.horizon, 1), dtype)
        variance = np.full_like(mean, o.variance)
        for _ in range(o.iterations):
            room = np.minimum(mean + 1, 1 - mean)
            width = np.sqrt(np.minimum(variance, (room / 2) ** 2))
            z = truncated.rvs((o.population, o.horizon, 1), random_state=rng)
            plans = (mean + width * z).astype(dtype)
            elites = plans[np.argsort(-returns(plans))[: o.elites]]
            mean = o.alpha * mean + (1 - o.alpha) * elites.mean(0)
            variance = o.alpha * variance + (1 - o.alpha) * elites.var(0)
        return mean[0]

    return plan


def in_mbrl():
    """mbrl-lib's optimizer on its model environment, or None where it is missing."""
    try:
        import torch
        from mbrl.models import GaussianMLP, ModelEnv, OneDTransitionRewardModel
        from mbrl.planning import CEMOptimizer
    except ImportError as error:
        print(f"without mbrl-lib: {error}")
        return None
    torch.set_num_threads(1)
    # Layers 5-200-200-10 and a head of mean and variance, as ours has.
    net = GaussianMLP(5, 4, "cpu", num_layers=3, ensemble_size=1, hid_size=200,
                      activation_fn_cfg={"_target_": "torch.nn.SiLU"})  # fmt: skip
    dynamics = OneDTransitionRewardModel(net, learned_rewards=False)
    box = gymnasium.spaces.Box
    shapes = {"observation_space": (4,), "action_space": (1,)}
    env = type("Spaces", (), {k: box(-1, 1, v) for k, v in shapes.items()})()

    def reward(action, after):
        return (torch.cos(after[:, 2]) - 0.01 * after[:, 0] ** 2)[:, None]

    def never(action, after):
        return torch.zeros(len(after), 1, dtype=torch.bool)

    world = ModelEnv(env, dynamics, never, reward, generator=torch.Generator())
    o = OPTIONS
    bound = np.ones((o.horizon, 1)).tolist()
    low = (-np.ones((o.horizon, 1))).tolist()
    optimizer = CEMOptimizer(o.iterations, o.elites / o.population, o.population, low,
                             bound, o.alpha, "cpu", return_mean_elites=True)  # fmt: skip
    first, start = np.zeros(4), torch.zeros(o.horizon, 1)

    def score(plans):
        return world.evaluate_action_sequences(plans, first, num_particles=1)

    return lambda: optimizer.optimize(score, x0=start)


def environment_steps() -> dict[str, float]:
    """Environment steps per second of wall time with random actions."""
    env = envs.PENDULUM_V1

    def run(key):
        def step(state, key):
            action = jax.random.uniform(key, (ENVIRONMENTS, 1), minval=-2, maxval=2)
            after = jax.vmap(env.step)(state, action)
            return after.state, after.reward.sum()

        state = jax.vmap(env.reset)(jax.random.split(key, ENVIRONMENTS))
        return jax.lax.scan(step, state, jax.random.split(key, STEPS))[1]

    compiled, key = jax.jit(run).lower(jax.random.key(0)).compile(), jax.random.key(0)
    rates = {"jaxpapers, 1,024": (lambda: jax.block_until_ready(compiled(key)),
                                  ENVIRONMENTS * STEPS)}  # fmt: skip
    several = gymnasium.make_vec("Pendulum-v1", 8, vectorization_mode="sync")
    poles = gymnasium.make_vec(
        "CartPole-v1", 8, vectorization_mode="vector_entry_point"
    )
    for name, vector in {"Pendulum-v1, sync, 8": several,
                         "CartPole-v1, its vector form, 8": poles}.items():  # fmt: skip
        vector.reset(seed=0)

        def many(vector=vector):
            for _ in range(STEPS):
                vector.step(vector.action_space.sample())

        rates[f"gymnasium {name}"] = (many, 8 * STEPS)
    times = measure({k: f for k, (f, _) in rates.items()}, REPETITIONS)
    return {k: 1000 * n / times[k]["cpu_ms"] for k, (_, n) in rates.items()}


def main() -> None:
    """Measures, prints and writes."""
    result = header("python benchmarks/planning.py", "jax", "jaxlib", "numpy",
                    "gymnasium", "mbrl", "torch")  # fmt: skip
    plan, seconds = ours()
    steps = {
        "jaxpapers": plan,
        "NumPy, float32": in_numpy(np.float32),
        "NumPy, float64": in_numpy(np.float64),
    }
    if mbrl := in_mbrl():
        steps["mbrl-lib"] = mbrl
    for run in steps.values():
        run()
    times = measure(steps, REPETITIONS)
    result["plan"] = {
        "times": times,
        "compile_seconds": seconds,
        "times_slower": {
            k: t["cpu_ms"] / times["jaxpapers"]["cpu_ms"] for k, t in times.items()
        },
    }
    result["environment_steps_per_cpu_second"] = environment_steps()
    result["load"] = os.getloadavg()[0]
    print(json.dumps(result, indent=1))
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
