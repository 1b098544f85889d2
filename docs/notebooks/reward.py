# %% [markdown]
# # Fine-tuning a diffusion model with your reward
#
# A small text-to-image model of scanned digits, tuned by DPOK to a reward that is a function of
# yours: here ink in the left half of the image and none in the right. The reward is not
# differentiated; a KL penalty keeps the model near what it was. Two minutes on a CPU.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

from jaxpapers import plots, run, train
from jaxpapers.config import load_config
from jaxpapers.data import arrays
from jaxpapers.papers import dpok
from jaxpapers.report import Report
from jaxpapers.tasks import captioned

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A model to start from
#
# `method.stage=pretrain` trains the denoiser alone.
# The number is the accuracy of a classifier that sees what it draws for each digit.

# %%
pretrained = run.run(
    "dpok",
    [
        "--config.method.stage=pretrain",
        "--config.train.steps=2000",
        "--config.train.eval_every=0",
        "--config.data.batch=128",
    ],
    workdir=str(folder / "denoiser"),
    quiet=True,
)
pretrained.metrics[-1]["validation_accuracy"]

# %% [markdown]
# ## The reward
#
# Images (B, H, W, C) as the sampler ends, about [-1, 1], and the number of each one's prompt; one
# number back for each image. Operations of JAX are compiled into the step; any other Python
# function, a judge of another library say, goes through `ops.host.on_host`
# ([guide](../diffusion.md#a-reward-of-your-own)).


# %%
def reward(images, prompt):
    """Ink left minus ink right, in [-1, 1]."""
    ink = (jnp.clip(images, -1, 1).mean(-1) + 1) / 2
    left, right = jnp.split(ink.mean(1), 2, axis=-1)
    return left.mean(-1) - right.mean(-1)


config = load_config("dpok")
method = dpok.make(config, reward_fn=reward)

# %% [markdown]
# ## Tuning
#
# Prompts are anything with `batch(start, size, rows)`. Training starts from the denoiser's
# checkpoint, whose weights stay in the state, frozen, beside a LoRA adapter that is trained.

# %%
source = captioned.load(config)
count = len(source.prompts)
prompts = arrays.Examples(
    {"tokens": source.prompt_tokens, "prompt": np.arange(count, dtype=np.int32)}, seed=0
)
metrics = []


class Kept:
    """A tracker that keeps the metrics in a list."""

    def start(self, step): ...

    def write(self, step, values):
        metrics.append({"step": step, **values})

    def picture(self, step, path): ...

    def close(self): ...


def tuned(steps, report=None):
    """The state after some updates; after 0 the denoiser's."""
    return train.fit(
        method,
        prompts,
        steps=steps,
        batch=config.data.batch,
        init_from=str(folder / "denoiser"),
        report=report,
    )


progress = Report(
    tokens_per_step=config.data.batch,
    unit="images",
    trackers=[Kept()],
    every=1,
    console=Console(quiet=True),  # No table of parameters: a line of progress.
)
before, after = tuned(0), tuned(config.train.steps, progress)

# %% [markdown]
# ## Before and after
#
# The same noise drawn by both models, a row for each prompt. The reward must not be all: the
# divergence from the first model says what it cost.

# %%
tokens = jnp.asarray(np.repeat(source.prompt_tokens, 6, 0))
sample = jax.jit(method.sampler)
images = {
    name: np.asarray(sample(state.params, jax.random.key(1), tokens))
    for name, state in {"before": before, "after": after}.items()
}
scores = {name: float(reward(x, None).mean()) for name, x in images.items()}
figure, axes = plt.subplots(1, 4, figsize=(11, 4), layout="constrained")
for ax, (name, x) in zip(axes, images.items()):
    ax.imshow(plots.contact_sheet(x, count), cmap="gray_r", vmin=0, vmax=1)
    ax.set(title=f"{name}: {scores[name]:.3f}", xticks=[], yticks=[])
steps = [m["step"] for m in metrics]
for ax, name in zip(axes[2:], ("reward", "path_kl")):
    ax.plot(steps, [m[name] for m in metrics])
    ax.set(title=name, xlabel="update of 100 images")
assert scores["after"] > scores["before"] + 0.05
