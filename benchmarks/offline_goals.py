"""Updates of CODA's IQL beside the same nets in PyTorch; MuJoCo beside gymnasium.

    pip install 'jaxpapers[bench,rl]' torch
    python benchmarks/offline_goals.py          two minutes
    python benchmarks/offline_goals.py --quick  one repetition
    python benchmarks/offline_goals.py --part environments   or updates: the other is kept

An update is V, two critics, their slow copies and the policy, in the authors' order, with
Adam, from batches that lie ready: 100 in one scan, 100 calls of one program, 100 in
PyTorch. An environment step is one of PointMaze's (velocities clipped, a forward pass, a
physics step), of 1, 8 and 64 environments: in one scan, and in gymnasium's vector
environments, synchronous and asynchronous, as ``gymnasium.make_vec`` makes them. One
thread each, the same process, in turn. Writes results/offline_goals.json beside this.
"""

import argparse
import copy
import functools
import json
import os
import time
import warnings
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
from timing import header, measure  # noqa: E402
from torch import nn  # noqa: E402

from jaxpapers.ops import gymnasium, mujoco  # noqa: E402
from jaxpapers.papers import coda  # noqa: E402

OUT = Path(__file__).parent / "results" / "offline_goals.json"
UPDATES, STEPS = 100, 500
# Name -> hidden widths, batch: this package's, the digest's, the authors'.
SIZES = {
    "2 x 128, batch 256": ((128, 128), 256),
    "2 x 256, batch 256": ((256, 256), 256),
    "2 x 64, batch 64": ((64, 64), 64),
}
GATE = 3.0
"""Updates per second in a scan, of PyTorch's."""


def batches(net: coda.Net, size: int) -> tuple[dict, dict]:
    """UPDATES value and policy batches."""
    rng = np.random.default_rng(0)

    def draw(width):
        return rng.normal(size=(UPDATES, size, width)).astype(np.float32)

    done = (rng.random((UPDATES, size)) < 0.5).astype(np.float32)
    value = {
        "observation": draw(net.observation), "action": draw(net.action + 1),
        "next": draw(net.observation), "reward": done - 1, "done": done,
    }  # fmt: skip
    policy = {"observation": draw(net.observation), "action": draw(net.action + 1)}
    return value, policy


def ours(net: coda.Net, value: dict, policy: dict) -> tuple:
    """(scan, calls): functions that do UPDATES updates."""
    options, tx = coda.Options(), optax.adam(3e-4)
    txs = {"v": tx, "q": tx, "pi": optax.chain(optax.clip_by_global_norm(0.1), tx)}
    params = coda.init(jax.random.key(0), net)
    start = (
        params,
        {name: txs[name].init(params[name]) for name in txs},
        coda.target_of(params),
    )

    def one(carry, batch):
        *carry, metrics = coda.iql_update(
            *carry, *batch, txs=txs, options=options, net=net
        )
        return tuple(carry), metrics["loss"]

    scan = jax.jit(functools.partial(jax.lax.scan, one))
    call = jax.jit(one)
    value, policy = jax.device_put((value, policy))
    apart = [jax.tree.map(lambda x, i=i: x[i], (value, policy)) for i in range(UPDATES)]

    def calls():
        carry = start
        for batch in apart:
            carry, loss = call(carry, batch)
        jax.block_until_ready(carry)

    return lambda: jax.block_until_ready(scan(start, (value, policy))), calls


def perceptron(size: int, hidden: tuple[int, ...], out: int) -> nn.Sequential:
    """A ReLU perceptron."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(size, width), nn.ReLU()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, out))


def theirs(net: coda.Net, value: dict, policy: dict):
    """A function that does UPDATES updates in PyTorch, as the authors' code."""
    pair = net.observation + net.action + 1
    v = perceptron(net.observation, net.hidden, 1)
    q = nn.ModuleList(perceptron(pair, net.hidden, 1) for _ in range(2))
    slow = copy.deepcopy(q).requires_grad_(False)
    pi = perceptron(net.observation, net.hidden, net.outputs)
    log_std = nn.Parameter(torch.zeros(net.outputs))
    o = coda.Options()
    opts = [torch.optim.Adam(p, 3e-4) for p in (v.parameters(), q.parameters())]
    opt_pi = torch.optim.Adam([*pi.parameters(), log_std], 3e-4)
    rows = [
        {k: torch.from_numpy(x[i]) for k, x in b.items()}
        for i in range(UPDATES)
        for b in (value, policy)
    ]

    def smaller(nets, observation, action):
        x = torch.cat([observation, action], -1)
        return torch.minimum(nets[0](x), nets[1](x))[:, 0]

    def update(b, p):
        with torch.no_grad():
            target = smaller(slow, b["observation"], b["action"])
            following = v(b["next"])[:, 0]
        u = target - v(b["observation"])[:, 0]
        loss = (torch.abs(o.expectile - (u < 0).float()) * u**2).mean()
        opts[0].zero_grad(set_to_none=True)
        loss.backward()
        opts[0].step()
        y = b["reward"] + o.discount * (1 - b["done"]) * following
        y = y.clamp(o.low, 0)
        x = torch.cat([b["observation"], b["action"]], -1)
        loss = sum(((n(x)[:, 0] - y) ** 2).mean() for n in q) / 2
        opts[1].zero_grad(set_to_none=True)
        loss.backward()
        opts[1].step()
        with torch.no_grad():
            for a, c in zip(slow.parameters(), q.parameters()):
                a.lerp_(c, o.rate)
            advantage = smaller(slow, p["observation"], p["action"])
            advantage -= v(p["observation"])[:, 0]
            weight = torch.exp(o.temperature * advantage).clamp(max=o.cap)
        std = log_std.clamp(-5, 2).exp()
        normal = torch.distributions.Normal(pi(p["observation"]), std)
        log_p = normal.log_prob(p["action"][:, : net.outputs]).sum(-1)
        loss = -(weight * log_p).mean()
        opt_pi.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*pi.parameters(), log_std], o.clip)
        opt_pi.step()

    def run():
        for i in range(UPDATES):
            update(rows[2 * i], rows[2 * i + 1])

    return run


def environments(count: int) -> dict:
    """Name -> function of STEPS steps of ``count`` environments."""
    env = gymnasium.unwrapped("PointMaze_Medium-v3")
    simulator = mujoco.Simulator(env.model, before=gymnasium.clip_velocity)
    xy = np.tile([-2.5, 2.5], (count, 1))
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (STEPS // 25, count, 2)).repeat(25, 0)
    actions = actions.astype(np.float32)
    start = jnp.asarray(simulator.start_on_host(xy, 0 * xy))
    scan = jax.jit(lambda s, a: jax.lax.scan(simulator.step, s, a))
    made = {"in a scan": lambda: jax.block_until_ready(scan(start, actions))}
    package = gymnasium.module()
    for mode in ("sync", "async"):
        with gymnasium.quiet():
            vector = package.make_vec(
                "PointMaze_Medium-v3", num_envs=count, vectorization_mode=mode
            )
            vector.reset(seed=0)

        def run(vector=vector):
            for action in actions:
                vector.step(action)

        made[f"gymnasium {mode}"] = run
    return made


def _rate(times: dict, count: int, clock: str) -> dict[str, float]:
    """Per second of a clock."""
    return {k: count / (t[clock] / 1000) for k, t in times.items()}


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repetition")
    parser.add_argument("--part", choices=("updates", "environments"))
    arguments = parser.parse_args()
    repetitions = 1 if arguments.quick else 3
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = header(
        "python benchmarks/offline_goals.py",
        *("jax", "jaxlib", "torch", "mujoco", "gymnasium", "gymnasium-robotics"),
    )
    kept = json.loads(OUT.read_text()) if OUT.exists() and arguments.part else {}
    result["updates"] = kept.get("updates", {})
    result["environment steps"] = kept.get("environment steps", {})
    for name, (hidden, size) in SIZES.items():
        if arguments.part == "environments":
            break
        net = coda.Net(
            state=4, action=2, context=1, known=(2.0, 3.0, 4.0), hidden=hidden
        )
        value, policy = batches(net, size)
        scan, calls = ours(net, value, policy)
        compiling = time.perf_counter()
        scan()
        compiling = time.perf_counter() - compiling
        calls()
        steps = {"scan": scan, "calls": calls, "PyTorch": theirs(net, value, policy)}
        times = measure(steps, repetitions)
        rate = {k: UPDATES / (t["cpu_ms"] / 1000) for k, t in times.items()}
        result["updates"][name] = {
            "times": times,
            "per cpu second": rate,
            "first scan, seconds": compiling,
            "scan / PyTorch": rate["scan"] / rate["PyTorch"],
            "scan / PyTorch, wall": times["PyTorch"]["wall_ms"]
            / times["scan"]["wall_ms"],
        }
        print(name, {k: round(x) for k, x in rate.items()},
              f"{rate['scan'] / rate['PyTorch']:.2f} of PyTorch, aim {GATE}")  # fmt: skip
    for count in (1, 8, 64):
        if arguments.part == "updates":
            break
        steps = environments(count)
        for run in steps.values():
            run()
        times = measure(steps, repetitions)
        # Workers of asynchronous environments are other processes: wall time for all.
        result["environment steps"][str(count)] = {
            "times": times,
            "per wall second": _rate(times, STEPS * count, "wall_ms"),
            "per cpu second": _rate(times, STEPS * count, "cpu_ms"),
        }
        rate = result["environment steps"][str(count)]["per wall second"]
        print(f"{count} environments", {k: round(x) for k, x in rate.items()})
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
