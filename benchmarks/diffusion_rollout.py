"""Rollouts and updates of diffusion policies: ours under jit, PyTorch's eager loop.

    python benchmarks/diffusion_rollout.py

The same nets with the same parameters (checked before anything is timed), the same
schedules and steps, one thread each, in turn: trajectories per second, and one update, of
SFT-PG (swiss roll, 5 rollouts of 128 trajectories and 10 policy steps) and of DPOK (40
trajectories of a 14 x 14 U-Net). Then the bytes of trajectories stored as states and as
keys, and the
compile time of the U-Net's update. Writes results/diffusion_rollout.json.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from jaxpapers.config import load_config  # noqa: E402
from jaxpapers.ops import diffusion, trajectories  # noqa: E402
from jaxpapers.ops.schedules import reverse_schedule  # noqa: E402
from jaxpapers.options import from_config  # noqa: E402
from jaxpapers.papers import dpok, sft_pg  # noqa: E402

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
torch.set_num_threads(1)


class StepLinear(nn.Module):
    """A linear layer, multiplied by a vector of the step."""

    def __init__(self, params):
        super().__init__()
        self.linear = linear(params)
        scale = params.get("scale")
        self.scale = None if scale is None else parameter(scale)

    def forward(self, x, k):
        """Rows at their steps."""
        y = self.linear(x)
        return y if self.scale is None else self.scale[k] * y


class StepNet(nn.Module):
    """``StepMLP`` with our parameters."""

    def __init__(self, params, activation):
        super().__init__()
        layers = [StepLinear(params[f"layer_{i}"]) for i in range(len(params))]
        self.layers, self.activation = nn.ModuleList(layers), activation

    def forward(self, x, k):
        """Output at each row's step."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x, k))
        return self.layers[-1](x, k)


class Critic(nn.Module):
    """``MLPCritic`` with our parameters."""

    def __init__(self, params):
        super().__init__()
        self.layers = nn.ModuleList(
            linear(params[f"layer_{i}"]) for i in range(len(params))
        )

    def forward(self, x):
        """Scores of rows."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)[:, 0]


class Block(nn.Module):
    """A residual block of ``UNet``."""

    def __init__(self, params, groups):
        super().__init__()
        self.norm_0, self.norm_1 = (norm(params[f"norm_{i}"], groups) for i in (0, 1))
        self.conv_0, self.conv_1 = (conv(params[f"conv_{i}"]) for i in (0, 1))
        self.condition = linear(params["condition"])
        shortcut = params.get("shortcut")
        self.shortcut = None if shortcut is None else linear(shortcut)

    def forward(self, x, condition):
        """As ours, channels first."""
        y = self.conv_0(F.silu(self.norm_0(x)))
        y = y + self.condition(F.silu(condition))[:, :, None, None]
        y = self.conv_1(F.silu(self.norm_1(y)))
        if self.shortcut is not None:
            x = self.shortcut(x.movedim(1, -1)).movedim(-1, 1)
        return x + y


class Attention(nn.Module):
    """Self-attention of ``UNet``, one head."""

    def __init__(self, params, groups):
        super().__init__()
        self.norm = norm(params["norm"], groups)
        self.query, self.key, self.value, self.out = (
            linear(params[name]) for name in ("query", "key", "value", "out")
        )

    def forward(self, x):
        """As ours, channels first."""
        rows = self.norm(x).flatten(2).mT
        y = F.scaled_dot_product_attention(
            self.query(rows), self.key(rows), self.value(rows)
        )
        return x + self.out(y).mT.reshape(x.shape)


class UNet(nn.Module):
    """``nets.unet.UNet`` with our parameters, one block a level."""

    def __init__(self, params, c):
        super().__init__()
        self.c, self.parts = c, nn.ModuleDict()
        self.table = parameter(params["token_table"])
        for name, p in params.items():
            if name == "token_table":
                continue
            if "block" in name:
                self.parts[name] = Block(p, c.groups)
            elif "attention" in name:
                self.parts[name] = Attention(p, c.groups)
            elif name == "norm":
                self.parts["last_norm"] = norm(p, c.groups)
            elif name.startswith("time"):
                self.parts[name] = linear(p)
            else:
                stride = 2 if name.startswith("down") else 1
                self.parts[name] = conv(p, stride)

    def forward(self, x, time, word):
        """Noise in pictures (B, C, H, W)."""
        parts, levels = self.parts, len(self.c.multipliers)
        half = self.c.channels // 2
        rate = torch.exp(-np.log(1e4) * torch.arange(half) / (half - 1))
        angle = time[:, None] * rate
        condition = torch.cat([angle.sin(), angle.cos()], -1)
        condition = (
            parts["time_1"](F.silu(parts["time_0"](condition))) + self.table[word]
        )

        def block(h, name, i):
            h = parts[f"{name}_block_{i}"](h, condition)
            attention = f"{name}_attention_{i}"
            return parts[attention](h) if attention in parts else h

        h = parts["stem"](x)
        skips = [h]
        for level in range(levels):
            h = block(h, f"down_{level}", 0)
            skips.append(h)
            if level < levels - 1:
                # XLA pads what is halved on the right, PyTorch on both sides.
                h = parts[f"down_{level}_conv"](F.pad(h, (0, 1, 0, 1)))
                skips.append(h)
        h = parts["middle_block_0"](h, condition)
        h = parts["middle_attention"](h)
        h = parts["middle_block_1"](h, condition)
        for level in reversed(range(levels)):
            for i in range(2):
                h = block(torch.cat([h, skips.pop()], 1), f"up_{level}", i)
            if level:
                h = F.interpolate(h, scale_factor=2, mode="nearest")
                h = parts[f"up_{level}_conv"](h)
        return parts["last"](F.silu(parts["last_norm"](h)))


def parameter(x):
    """A copy for PyTorch."""
    return nn.Parameter(torch.tensor(np.asarray(x)))


def linear(p):
    """A dense layer."""
    layer = nn.Linear(*p["kernel"].shape, bias="bias" in p)
    layer.weight = parameter(np.asarray(p["kernel"]).T)
    if "bias" in p:
        layer.bias = parameter(p["bias"])
    return layer


def conv(p, stride=1):
    """A 3 x 3 convolution."""
    _, _, inside, out = p["kernel"].shape
    layer = nn.Conv2d(inside, out, 3, stride, padding=0 if stride > 1 else 1)
    layer.weight = parameter(np.asarray(p["kernel"]).transpose(3, 2, 0, 1))
    layer.bias = parameter(p["bias"])
    return layer


def norm(p, groups):
    """A group norm."""
    layer = nn.GroupNorm(groups, len(p["scale"]), eps=1e-6)
    layer.weight, layer.bias = parameter(p["scale"]), parameter(p["bias"])
    return layer


def torch_schedule(schedule):
    """Coefficients of a schedule as floats."""
    return [
        tuple(float(v) for v in row)
        for row in zip(schedule.x_mult, schedule.eps_mult, schedule.std, schedule.time)
    ]


def torch_rollout(eps_fn, schedule, shape):
    """States and predictions of a rollout, without gradients."""
    x = torch.randn(shape)
    states, found = [x], []
    with torch.no_grad():
        for a, c, std, t in torch_schedule(schedule):
            eps = eps_fn(x, t)
            x = a * x + c * eps + std * torch.randn(shape)
            states.append(x)
            found.append(eps)
    return torch.stack(states), torch.stack(found)


def torch_sample(eps_fn, schedule, shape):
    """The last states of a rollout, without gradients."""
    x = torch.randn(shape)
    with torch.no_grad():
        for a, c, std, t in torch_schedule(schedule):
            x = a * x + c * eps_fn(x, t) + std * torch.randn(shape)
    return x


def times(count, run):
    """A function that runs another one ``count`` times."""

    def repeated():
        for _ in range(count):
            run()

    return repeated


def log_prob(schedule, k, x, x_next, eps):
    """Sum over coordinates of a step's log-density, up to a constant."""
    a, c, std = (
        torch.tensor(np.asarray(v))[k].reshape(-1, *(1,) * (x.ndim - 1))
        for v in (schedule.x_mult, schedule.eps_mult, schedule.std)
    )
    z = (x_next - a * x - c * eps) / std
    return (-0.5 * z**2 - std.log()).flatten(1).sum(1)


def swiss_roll_config():
    """SFT-PG's default."""
    return load_config("sft_pg")


def unet_config():
    """DPOK with a small U-Net on 14 x 14 images."""
    fields = {
        "data.batch": 40, "net.model": "unet", "net.shape": (14, 14, 1),
        "net.channels": 32, "net.multipliers": (1, 2), "net.blocks": 1,
        "net.attention": (1,), "sampler.steps": 10, "method.transitions": 1,
        "method.policy_steps": 2, "method.value_steps": 1,
        "method.value_transitions": 1, "method.lora_rank": 0, "method.reward": "none",
    }  # fmt: skip
    return load_config("dpok", [f"--config.{k}={v}" for k, v in fields.items()])


def torch_update_sft_pg(net, critic, value, config, schedule, x):
    """One update of SFT-PG as its released code runs it; 10 policy steps."""
    c, rows = config.method, config.data.batch // config.method.n_critic
    txs = [
        torch.optim.Adam(m.parameters(), lr)
        for m, lr in ((net, 5e-5), (critic, 1e-3), (value, 1e-3))
    ]

    def eps_fn(z, t):
        return net(z, torch.full((len(z),), int(t)))

    def run():
        kept = []
        for i in range(c.n_critic):
            states, _ = torch_rollout(eps_fn, schedule, (rows, 2))
            real = x[i * rows : (i + 1) * rows]
            cost = critic(states[-1])
            loss = critic(real).mean() - cost.mean()
            for k in range(c.steps):
                v = value(states[k], torch.full((rows,), k))[:, 0]
                loss = loss + (v - cost).square().mean() / c.steps
            for tx in txs[1:]:
                tx.zero_grad()
            loss.backward()
            for tx in txs[1:]:
                tx.step()
            kept.append(states)
        for j in range(c.n_generator):
            states, k = kept[j % c.n_critic], torch.randint(0, c.steps, (rows,))
            row = torch.arange(rows)
            z, z_next = states[k, row], states[k + 1, row]
            with torch.no_grad():
                cost = critic(states[-1]) - value(z, k)[:, 0]
            t = c.steps - 1 - k
            loss = (cost * log_prob(schedule, k, z, z_next, net(z, t))).mean()
            txs[0].zero_grad()
            loss.backward()
            txs[0].step()

    return run


def torch_update_dpok(net, frozen, value, config, schedule, word):
    """One update of DPOK: rollout, a value step, policy steps with PPO's clip and KL."""
    c, rows = config.method, config.data.batch
    tx = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-4)
    value_tx = torch.optim.Adam(value.parameters(), 1e-3)
    condition = F.one_hot(word.long(), config.net.vocab).float()
    times = torch.tensor(np.asarray(schedule.time))

    def guided(model, x, t):
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([word, 0 * word]))
        conditional, free = both.chunk(2)
        return free + c.guidance * (conditional - free)

    def eps_fn(x, t):
        return guided(net, x, torch.full((rows,), t))

    def at(states, eps):
        k, row = torch.randint(0, c.steps, (rows,)), torch.arange(rows)
        return k, states[k, row], states[k + 1, row], eps[k, row]

    def run():
        states, eps = torch_rollout(eps_fn, schedule, (rows, 1, 14, 14))
        reward = states[-1].mean((1, 2, 3))
        k, x, _, _ = at(states, eps)
        v = value(torch.cat([x.flatten(1), condition], 1), k)[:, 0]
        value_tx.zero_grad()
        (v - reward).square().mean().backward()
        value_tx.step()
        for _ in range(c.policy_steps):
            k, x, x_next, old = at(states, eps)
            with torch.no_grad():
                v = value(torch.cat([x.flatten(1), condition], 1), k)[:, 0]
                ref = guided(frozen, x, times[k])
            new = guided(net, x, times[k])
            ratio = (
                log_prob(schedule, k, x, x_next, new)
                - log_prob(schedule, k, x, x_next, old)
            ).exp()
            gain = reward - v
            clipped = ratio.clamp(1 - c.clip_eps, 1 + c.clip_eps)
            mult = torch.tensor(np.asarray(schedule.eps_mult / schedule.std))[k]
            kl = (
                (0.5 * (mult[:, None, None, None] * (new - ref)) ** 2).flatten(1).sum(1)
            )
            loss = (
                -torch.minimum(gain * ratio, gain * clipped).mean() + c.beta * kl.mean()
            )
            tx.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            tx.step()

    return run


def compiled(f, *args):
    """A jitted function, compiled, and the seconds that took."""
    lowered = jax.jit(f).lower(*args)
    began = time.perf_counter()
    return lowered.compile(), time.perf_counter() - began


def mlp(repetitions):
    """SFT-PG on the swiss roll."""
    config = swiss_roll_config()
    method, model = sft_pg.make(config), sft_pg.model()
    schedule, parts = model.schedule, model.parts
    x = jax.random.normal(jax.random.key(1), (config.data.batch, 2))
    state = jax.jit(method.init)(jax.random.key(0), {"x": x})
    params, rows = state.params, 128
    net = StepNet(params["net"], F.softplus)
    critic, value = Critic(params["critic"]), StepNet(params["value"], F.relu)
    draw, _ = compiled(
        lambda p, key: method.sampler(p, key, (rows, 2)), params, jax.random.key(0)
    )
    update, seconds = compiled(method.update, state, {"x": x})
    k = jnp.arange(rows) % config.sampler.steps
    z = np.array(x[:rows])
    agree(parts.eps(params["net"], x[:rows], k.astype(jnp.float32)),
          net(torch.tensor(z), torch.tensor(np.array(k))))  # fmt: skip
    agree(parts.critic(params["critic"], x[:rows]), critic(torch.tensor(z)))

    def eps_fn(z, t):
        return net(z, torch.full((len(z),), int(t)))

    # Many in turn: what a single one takes is mostly how cold it finds the caches. A
    # list of keys: an array would be cut in the time that is measured.
    count = 50
    keys = itertools.cycle(list(jax.random.split(jax.random.key(2), 256)))
    found = timing.measure(
        {
            "rollout": times(
                count, lambda: draw(params, next(keys)).block_until_ready()
            ),
            "rollout torch": times(
                count, lambda: torch_sample(eps_fn, schedule, (rows, 2))
            ),
            "update": lambda: jax.block_until_ready(update(state, {"x": x})),
            "update torch": torch_update_sft_pg(
                net, critic, value, config, schedule, torch.tensor(np.array(x))
            ),
        },
        repetitions,
    )
    for name in ("rollout", "rollout torch"):
        found[name] = {k: ms / count for k, ms in found[name].items()}
    return summary(found, rows, seconds)


def unet(repetitions):
    """DPOK with a U-Net."""
    config = unet_config()
    method = dpok.make(config, reward_fn=lambda x, prompt: x.mean((1, 2, 3)))
    rows = config.data.batch
    net_options = from_config(dpok.Net, config.net, "net")
    sampler = dpok.Sampler(**config.sampler)
    schedule = reverse_schedule(dpok.NOISE, sampler)
    prompt = jnp.arange(rows, dtype=jnp.int32) % 10
    batch = {"tokens": prompt + 1, "prompt": prompt}
    state = jax.jit(method.init)(jax.random.key(0), batch)
    params, word = state.params, torch.tensor(np.array(batch["tokens"]))
    net, frozen = (UNet(params["net"], config.net) for _ in range(2))
    value = StepNet(params["value"], F.relu)
    draw, _ = compiled(
        lambda p, key, word: method.sampler(p, key, word),
        params, jax.random.key(0), batch["tokens"],
    )  # fmt: skip
    update, seconds = compiled(method.update, state, batch)
    last = params["net"]["last"]["kernel"]
    drawn = 0.1 * jax.random.normal(jax.random.key(3), last.shape)
    moved = {**params["net"], "last": {**params["net"]["last"], "kernel": drawn}}
    parts = dpok.nets.parts(net_options, sampler.steps, dpok.NOISE.timesteps)
    x = jax.random.normal(jax.random.key(4), (rows, 14, 14, 1))
    time_ = jnp.linspace(0, 999, rows)
    other = UNet(moved, config.net)(
        torch.tensor(np.array(x)).movedim(-1, 1), torch.tensor(np.array(time_)), word
    )
    agree(parts.eps(moved, x, time_, batch["tokens"]), other.movedim(1, -1))

    def eps_fn(x, t):
        both = net(
            torch.cat([x, x]), torch.full((2 * rows,), t), torch.cat([word, 0 * word])
        )
        conditional, free = both.chunk(2)
        return free + config.method.guidance * (conditional - free)

    # A list: an array of keys would be cut in the time that is measured.
    keys = iter(list(jax.random.split(jax.random.key(2), 512)))
    found = timing.measure(
        {
            "rollout": lambda: draw(
                params, next(keys), batch["tokens"]
            ).block_until_ready(),
            "rollout torch": lambda: torch_sample(eps_fn, schedule, (rows, 1, 14, 14)),
            "update": lambda: jax.block_until_ready(update(state, batch)),
            "update torch": torch_update_dpok(
                net, frozen, value, config, schedule, word
            ),
        },
        repetitions,
    )
    return summary(found, rows, seconds)


def agree(ours, theirs):
    """Both nets compute the same."""
    theirs = theirs.detach().numpy()
    gap = float(np.abs(np.asarray(ours) - theirs).max())
    if not gap < 1e-3 * max(1.0, float(np.abs(theirs).max())):
        raise SystemExit(f"the nets differ by {gap}")


def summary(found, rows, seconds):
    """Medians, trajectories per second and ratios."""
    return {
        "ms": found,
        "trajectories_per_second": {
            name: rows / found[name]["wall_ms"] * 1000
            for name in ("rollout", "rollout torch")
        },
        "times_faster": {
            name: found[f"{name} torch"]["cpu_ms"] / found[name]["cpu_ms"]
            for name in ("rollout", "update")
        },
        "compile_update_s": seconds,
    }


def memory():
    """Bytes of what a rollout of 128 CIFAR pictures keeps, and its temporaries."""
    shape, found = (128, 32, 32, 3), {}
    for steps in (10, 50, 1000):
        schedule = diffusion.ddpm_schedule(diffusion.linear_betas(steps))
        for store in ("all", "keys"):
            program = (
                jax.jit(
                    lambda key, schedule=schedule, store=store: trajectories.rollout(
                        key, lambda x, time: 0.1 * x, schedule, shape, store=store
                    )
                )
                .lower(jax.random.key(0))
                .compile()
            )
            sizes = program.memory_analysis()
            found[f"{store} {steps}"] = {
                "kept_bytes": sizes.output_size_in_bytes,
                "temporary_bytes": sizes.temp_size_in_bytes,
            }
    return found


def main():
    """Runs everything and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument(
        "--out",
        default=str(Path(__file__).parent / "results" / "diffusion_rollout.json"),
    )
    args = parser.parse_args()
    result = {
        **timing.header(
            "python benchmarks/diffusion_rollout.py", "jax", "jaxlib", "flax", "torch"
        ),
        "threads": 1,
        "mlp": mlp(args.repetitions),
        "unet": unet(max(args.repetitions // 3, 3)),
        "memory": memory(),
    }
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    for name in ("mlp", "unet"):
        print(name, json.dumps(result[name], indent=1))


if __name__ == "__main__":
    main()
