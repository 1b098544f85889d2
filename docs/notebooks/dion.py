# %% [markdown]
# # Dion in your own training loop
#
# A small regression, trained by the same optimizer in flax linen, flax nnx and equinox, beside
# AdamW. Everything here runs on a CPU in a minute; on a mesh only the shardings of the parameters
# change ([guide](../dion.md#in-your-training-loop)).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from jaxpapers import dion, optim

key = jax.random.key(0)
x = jax.random.normal(key, (512, 16))
y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (16, 16)) / 4)
STEPS = 200

# %% [markdown]
# ## What goes where
#
# Matrices of hidden layers go to Dion; embeddings, heads, norms and biases to AdamW, by path and
# shape. Print it before a long run. A last layer that is called `head` or has a vocabulary is left
# to AdamW.

# %%
from flax import linen as nn


class Net(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x):
        """(B, 16) -> (B, 16)."""
        x = nn.gelu(nn.Dense(64, name="up")(x))
        x = nn.gelu(nn.Dense(64, name="mid")(x))
        return nn.Dense(16, name="down")(x)


net = Net()
start = net.init(key, x)["params"]
print(optim.routing_table(start))

# %% [markdown]
# ## linen
#
# Rank 1/4, with the options that `jaxpapers run dion` uses: the momentum one step ahead, what the
# rank leaves out as a normalised gradient, equal steps for all outputs. One batch of a problem
# this small is AdamW's: what the optimizers do with language is in [results](../results.md).


# %%
def trained(tx, params, loss):
    """Losses of STEPS steps."""

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[1]


def loss(params):
    """Mean squared error."""
    return jnp.square(net.apply({"params": params}, x) - y).mean()


rate = optax.linear_schedule(0.02, 0.0, STEPS)
ahead = dion(rate, rank_fraction=0.25, nesterov=True, residual=1.0, normalize_rows=True)
curves = {
    "AdamW": trained(optax.adamw(rate), start, loss),
    "Dion 1/4, the paper's": trained(dion(rate, rank_fraction=0.25), start, loss),
    "Dion 1/4, ahead": trained(ahead, start, loss),
    "Dion, full rank": trained(dion(rate), start, loss),
}
for name, curve in curves.items():
    print(f"{name:22s} {curve[0]:.4f} -> {curve[-1]:.5f}")

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, curve in curves.items():
    axes.semilogy(curve, label=name)
axes.set(xlabel="step", ylabel="mean squared error")
axes.legend(frameon=False)
# %% [markdown]
# ## nnx

# %%
from flax import nnx


class Model(nnx.Module):
    """The same network."""

    def __init__(self, rngs):
        """Draws the parameters."""
        self.up = nnx.Linear(16, 64, rngs=rngs)
        self.mid = nnx.Linear(64, 64, rngs=rngs)
        self.down = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x):
        """(B, 16) -> (B, 16)."""
        return self.down(nnx.gelu(self.mid(nnx.gelu(self.up(x)))))


@nnx.jit
def step(model, optimizer):
    """One step; the loss before it."""
    value, grads = nnx.value_and_grad(lambda m: jnp.square(m(x) - y).mean())(model)
    optimizer.update(model, grads)
    return value


model = Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, ahead, wrt=nnx.Param)
values = [step(model, optimizer) for _ in range(STEPS)]
print(f"{values[0]:.4f} -> {values[-1]:.5f}")

# %% [markdown]
# ## equinox
#
# Its weights are (out, in): say so by dimension numbers, or scale and transposition are wrong.

# %%
import equinox as eqx

mlp = eqx.nn.MLP(16, 16, width_size=64, depth=2, activation=jax.nn.gelu, key=key)
params, static = eqx.partition(mlp, eqx.is_inexact_array)
tx = dion(
    rate,
    rank_fraction=0.25,
    nesterov=True,
    residual=1.0,
    normalize_rows=True,
    weight_dimension_numbers=optim.DimensionNumbers(reduction_axis=1, output_axis=0),
)
curve = trained(
    tx, params, lambda p: jnp.square(jax.vmap(eqx.combine(p, static))(x) - y).mean()
)
print(f"{curve[0]:.4f} -> {curve[-1]:.5f}")

# %% [markdown]
# ## What a mesh sends
#
# `plan_dion` gives the bytes of a step in closed form, before anything is compiled.

# %%
from jax.sharding import PartitionSpec as P

plan = optim.plan_dion(
    (4096, 16384), P("data", "model"), {"data": 16, "model": 8}, 1 / 4
)
print(f"rank {plan.rank}: {plan.total_bytes / 2**20:.1f} MiB per chip and step")
for (kind, axes_of), size in plan.bytes_per_step.items():
    print(f"  {kind:15s} over {','.join(axes_of):12s} {size / 2**20:6.2f} MiB")
