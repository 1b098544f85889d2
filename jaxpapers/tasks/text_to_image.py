"""Images for prompts, tuned to a reward, evaluated by a held-out classifier."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpapers import figures
from jaxpapers.data import arrays
from jaxpapers.ops.schedules import NoiseSchedule, Sampler, reverse_schedule
from jaxpapers.papers import dpok
from jaxpapers.study import Data, Finding, Row, Stage, Study, with_fields, with_seed
from jaxpapers.tasks import captioned, classifiers
from jaxpapers.tasks.scores import all_finite


def abstract(config: Any) -> Data:
    """Shapes of a global training batch, and a reward of the same cost.

    Pretraining reads captioned images, tuning the prompts to draw images for.
    """
    size, length = config.data.batch, config.data.length
    tokens = (size, length) if length else (size,)
    shapes = {"tokens": jax.ShapeDtypeStruct(tokens, jnp.int32)}
    if config.method.stage == "pretrain":
        image = (size, *config.net.shape)
        return Data(
            None,
            {**shapes, "x": jax.ShapeDtypeStruct(image, jnp.float32)},
            unit="images",
        )
    shapes["prompt"] = jax.ShapeDtypeStruct((size,), jnp.int32)
    classifier = classifiers.zeros(tuple(config.net.shape), 10)
    facts = _reward(config, captioned.probability(classifier))
    return Data(None, shapes, facts, unit="images")


def read(config: Any) -> Data:
    """Captioned images to pretrain on, or the prompts and the reward to tune for."""
    source, tunes = captioned.load(config), config.method.stage == "tune"
    data = abstract(config)._replace(
        summary=f"{source.name}: {len(source.image):,} to train on, "
        f"{len(source.prompts)} prompts"
    )
    if not tunes:
        fields = {"x": source.image, "tokens": source.tokens}
        return data._replace(examples=arrays.Examples(fields, config.data.seed))
    if len(source.prompts) != config.method.prompts:
        raise ValueError(
            f"config.method.prompts must be {len(source.prompts)}, the prompts of "
            f"{config.data.source}, got {config.method.prompts}"
        )
    number = np.arange(len(source.prompts), dtype=np.int32)
    fields = {"tokens": source.prompt_tokens, "prompt": number}
    return data._replace(
        examples=arrays.Examples(fields, config.data.seed),
        facts=_reward(config, source.reward),
    )


def _reward(config: Any, reward_fn: Callable) -> dict[str, Callable]:
    """The fact of tuning, which ``method.reward=none`` leaves out: sampling only."""
    return {} if config.method.reward == "none" else {"reward_fn": reward_fn}


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The tuned model, its variants with as many rewards, and the model before tuning."""
    del data  # Each stage reads the data of its config.
    source = captioned.load(config)
    prompt = np.repeat(
        np.arange(len(source.prompts), dtype=np.int32), config.data.eval_each
    )
    draw = _drawing(config, mesh, source)

    def scores(method, state, quick=False):
        values = _scores(source, draw(method, state, prompt), prompt)
        if not method.diagnose:
            return values
        batch = {"tokens": jnp.asarray(source.prompt_tokens[prompt])}
        with jax.set_mesh(mesh):
            diagnosis = _jitted(method.diagnose)(
                state.params, state.extra, batch, jax.random.key(1)
            )
        return values | {k: float(v) for k, v in diagnosis.items()}

    def measure(method, state):
        images = {
            "samples.npz": _gallery(source, functools.partial(draw, method, state))
        }
        return Finding(scores(method, state), files=images)

    def measure_untuned(method, state):
        finding = measure(method, state)
        sample = functools.partial(draw, method, state)
        more = _best_of_four(source, sample, prompt) | _sweep(source, sample, prompt)
        return finding._replace(numbers={**finding.numbers, **more})

    def rows(seed):
        seeded = with_seed(config, seed)
        tunes, first = config.method.stage == "tune", dpok.pretraining(seeded)
        before = Stage(name, first) if first else None
        tuned = {"this model": {}, **(variants(config) if tunes else {})}
        rows = [
            Row(
                label,
                Stage(name, with_fields(seeded, fields), before),
                measure if tunes else measure_untuned,
                watch=scores,
            )
            for label, fields in tuned.items()
        ]
        if before:
            rows.append(Row("before tuning", before, measure_untuned, watch=scores))
        return [*rows, chance]

    chance = Row("chance", None, lambda: Finding({"accuracy": source.chance}))
    panels = ("reward", "accuracy", "frechet")
    return Study(
        title=f"accuracy of the held-out classifier on the prompts of {len(prompt):,} "
        f"images, {source.name}",
        metric="accuracy",
        rising=True,
        rows=rows,
        columns=("path_kl", "reward_accuracy", "frechet"),
        curve="reward" if config.method.stage == "tune" else "loss",
        pictures={
            "samples.png": figures.samples,
            "against.png": functools.partial(
                figures.against,
                x="validation_path_kl",
                panels={f"validation_{y}": "x" for y in panels},
            ),
        },
        states=("samples.png",),
    )


def variants(config: Any) -> dict[str, dict[str, Any]]:
    """Label -> fields of the variants, which get as many rewards.

    No KL, the released code's clip, and the paper's supervised baselines; none beside a
    supervised baseline.
    """
    if config.method.name != "dpok":
        return {}
    # On the mean over coordinates, whose gradient is that much smaller.
    alpha = config.method.alpha * float(np.prod(config.net.shape))
    hard = {"clip": "hard", "clip_eps": 1e-4, "reduce": "mean", "alpha": alpha}
    others = {
        "no KL": {"beta": 0.0},
        "hard clip": hard,
        "supervised": {"name": "sft"},
        "supervised KL-D": {"name": "kl_d"},
        "supervised KL-O": {"name": "kl_o"},
    }
    return {
        label: {f"method.{field}": v for field, v in fields.items()}
        for label, fields in others.items()
    }


def _drawing(config: Any, mesh: Any, source: captioned.Source) -> Callable:
    """(method, state, prompt ids, guidance, seed) -> images, numpy."""
    replicated = NamedSharding(mesh, PartitionSpec())
    noise, steps = NoiseSchedule(**config.noise), Sampler(**config.sampler)
    schedule = reverse_schedule(noise, steps)

    @functools.cache
    def compiled(sampler):
        @jax.jit
        def sample(params, extra, key, tokens, guidance):
            images = sampler(
                params, key, tokens, extra=extra, guidance=guidance, schedule=schedule
            )
            return jax.lax.with_sharding_constraint(images, replicated)

        return sample

    def draw(method, state, prompt, guidance=None, seed=0):
        weight = config.method.guidance if guidance is None else guidance
        tokens, key = source.prompt_tokens[prompt], jax.random.key(seed)
        with jax.set_mesh(mesh):
            images = compiled(method.sampler)(
                state.params, state.extra, key, tokens, weight
            )
            return np.asarray(images)

    return draw


@functools.lru_cache(maxsize=8)
def _jitted(f: Callable) -> Callable:
    return jax.jit(f)


def _scores(source, x, prompt):
    """Accuracies, reward and Frechet distance of images drawn for prompts.

    All NaN, with a warning, if an image is not finite.
    """
    correct = source.correct(x, prompt)
    scores = {
        "accuracy": float(correct.mean()),
        "reward_accuracy": float(source.agrees(x, prompt).mean()),
        "reward": float(np.mean(_jitted(source.reward)(x, prompt))),
        "frechet": _frechet(source, x),
    }
    if source.unseen.any():
        scores["unseen_accuracy"] = float(correct[source.unseen[prompt]].mean())
    return scores if all_finite(x, "images") else dict.fromkeys(scores, math.nan)


def _frechet(source, x):
    return classifiers.frechet_of_features(
        source.features(x), source.features(source.image)
    )


def _best_of_four(source, sample, prompt):
    """Best-of-4 sampling by reward, without training."""
    tries = [sample(prompt, seed=seed) for seed in range(4)]
    rewards = np.stack([_jitted(source.reward)(x, prompt) for x in tries])
    best = np.stack(tries)[rewards.argmax(0), np.arange(len(prompt))]
    scores = _scores(source, best, prompt)
    return {
        "best_of_4_accuracy": scores["accuracy"],
        "best_of_4_frechet": scores["frechet"],
        "real_frechet": _frechet(source, source.held_out),
    }


def _sweep(source, sample, prompt):
    """Accuracy under other guidance weights."""

    def accuracy(weight):
        x = sample(prompt, guidance=weight)
        finite = all_finite(x, f"images of guidance {weight:g}")
        return float(source.correct(x, prompt).mean()) if finite else math.nan

    return {f"guidance_{w:g}_accuracy": accuracy(w) for w in (1.0, 2.0, 4.0)}


def _gallery(source, sample):
    """Eight images of up to ten prompts, beside real ones of these prompts."""
    chosen = np.unique(np.linspace(0, len(source.prompts) - 1, 10).astype(np.int32))
    prompt = np.repeat(chosen, 8)
    return {
        "samples": sample(prompt, seed=7),
        "data": _real(source, chosen, 8),
        "rows": np.array([source.prompts[i] for i in chosen]),
    }


def _real(source, chosen, each):
    """``each`` real images of every prompt by the reward's classifiers; white where
    there are fewer."""
    x = source.image[:1000]
    rows = np.full((len(chosen), each, *x.shape[1:]), -1, x.dtype)
    for row, prompt in zip(rows, chosen):
        found = x[np.asarray(source.agrees(x, np.full(len(x), prompt, np.int32)))]
        row[: min(each, len(found))] = found[:each]
    return rows.reshape(-1, *x.shape[1:])
